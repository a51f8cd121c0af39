"""`tollhouse policy replay` and `why` on logs as files."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "conf" / "examples" / "shop" / "policy"


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tollhouse", "policy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, input=stdin)


def event(caller: str, method: str, area: str, verdict: str, number: int, **more: Any) -> dict[str, Any]:
    document = {
        "attributes": {
            "source": {"principal": f"spiffe://shop.example/ns/shop/sa/{caller}"},
            "request": {"http": {"method": method, "path": f"/{area}/{number}"}},
            "contextExtensions": {"gateway": "edge/ingress"},
        },
        "parsed_path": [area, str(number)],
    }
    custom = {"request_id": f"r{number}", "verdict": verdict, "caller": document["attributes"]["source"]["principal"]}  # type: ignore[index]
    return {"decision_id": f"d{number}", "path": "shop/authz/decision", "input": document, "custom": custom, **more}


EVENTS = [
    event("web", "GET", "catalog", "allow", 1),
    event("web", "GET", "catalog", "allow", 2),
    event("batch", "POST", "payments", "deny", 3),
    event("batch", "GET", "catalog", "allow", 4),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "decisions.log"
    path.write_text("".join(json.dumps(each) + "\n" for each in EVENTS))
    return path


@pytest.fixture
def stricter(tmp_path: Path) -> Path:
    """Takes the catalog from `web`, and lets `batch` pay."""
    folder = tmp_path / "stricter"
    shutil.copytree(EXAMPLE, folder)
    rego = folder / "authz.rego"
    text = rego.read_text().replace('caller == web\n\tmethod == "GET"\n\tarea == "catalog"', 'caller == "nobody"')
    rego.write_text(text + '\nallowing contains "batch pays" if {\n\tcaller == batch\n\tarea == "payments"\n}\n')
    return folder


def test_nothing_changes_under_the_policy_that_decided(log: Path) -> None:
    done = run("replay", log, "--against", EXAMPLE, "--fail-on-change")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 lose access, 0 gain it, 4 stay the same" in done.stdout


def test_who_gains_and_who_loses_is_told_by_caller_and_rule(log: Path, stricter: Path) -> None:
    done = run("replay", log, "--against", stricter, "-o", "json", "--fail-on-change")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["counts"] == {"loses": 2, "gains": 1, "differs": 0, "unsure": 0, "same": 1}
    shown = [(each["change"], each["caller"].rpartition("/")[2], each["after"], each["count"]) for each in found["changes"]]
    assert shown == [("loses", "web", "deny: no rule lets this caller do that here", 2), ("gains", "batch", "allow: batch pays", 1)]
    assert found["changes"][0]["example"] == {"request": "r1", "asked": "GET /catalog/1"}
    assert run("replay", log, "--against", stricter).returncode == 0
    assert run("replay", log, "--against", stricter).stdout.splitlines()[1].startswith("loses")


def test_uploads_and_gzipped_files_and_standard_input_are_logs_too(tmp_path: Path) -> None:
    upload = tmp_path / "upload.json.gz"
    upload.write_bytes(gzip.compress(json.dumps(EVENTS).encode()))
    assert "4 decisions" in run("replay", upload, "--against", EXAMPLE).stdout
    assert "4 decisions" in run("replay", "-", "--against", EXAMPLE, stdin=json.dumps(EVENTS)).stdout


def test_what_was_masked_and_is_read_can_not_be_told(tmp_path: Path, stricter: Path) -> None:
    path = tmp_path / "masked.log"
    masked = {**EVENTS[0], "masked": ["/input/attributes/source/principal"]}
    path.write_text(json.dumps(masked) + "\n")
    done = run("replay", path, "--against", stricter, "--fail-on-change")
    assert done.returncode == 1
    assert "of 1 it can't be told" in done.stdout
    assert "/input/attributes/source/principal" in done.stdout


def test_what_is_no_enforced_decision_of_ours_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "mixed.log"
    shadow = {**EVENTS[0], "custom": {**EVENTS[0]["custom"], "shadow": True}}
    provider = {**EVENTS[0], "custom": {**EVENTS[0]["custom"], "provider": "authz:9191"}}
    path.write_text("\n".join([json.dumps(shadow), json.dumps(provider), "{}", '{"torn', json.dumps(EVENTS[1])]))
    done = run("replay", path, "--against", EXAMPLE)
    assert "1 decisions: 0 lose" in done.stdout
    for why in (
        "1 decided by another provider",
        "1 not enforced (shadow)",
        "1 without path or input",
        f"1 lines are not events (the first is {path}:4)",
    ):
        assert why in done.stdout


def test_a_decision_that_the_new_revision_does_not_have_is_lost(tmp_path: Path, log: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "a.rego").write_text("package other\n\nallow := true\n")
    found = json.loads(run("replay", log, "--against", folder, "-o", "json").stdout)
    assert found["counts"]["loses"] == 3
    assert "undefined" in found["changes"][0]["after"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["replay", "nowhere.log", "--against", str(EXAMPLE)], 2, "nowhere.log is not a file"),
        (["replay", "-", "--against", str(EXAMPLE)], 1, "there is no event"),
        (["replay", "-", "--against", "sha256-1"], 2, "is not a folder; for a published revision"),
        (["replay", "-", "--against", "sha256-1", "--config", "/tmp"], 2, "revisions are kept in an etcd"),
        (["diff", str(EXAMPLE), "nowhere"], 2, "is not a folder"),
        (["diff", str(EXAMPLE), str(EXAMPLE), "--fail-on-change"], 2, "there is none"),
        (["why", "r", "--log", "nowhere.log"], 2, "nowhere.log is not a file"),
        (["why", "r"], 2, "where is it to be looked for"),
        (["why", "r", "--admin", "127.0.0.1:9"], 1, "nobody answers"),
        (["why", "r", "--log", "-"], 1, "nothing of the request r"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], code: int, said: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_does_not_compile_is_said(tmp_path: Path, log: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.rego").write_text("package a\n\nallow if {\n")
    done = run("replay", log, "--against", tmp_path / "bad")
    assert done.returncode == 1
    assert "a.rego:" in done.stderr


def test_two_policies_are_compared(log: Path, stricter: Path) -> None:
    done = run("diff", EXAMPLE, stricter, "--text")
    assert (done.returncode, done.stderr) == (0, "")
    assert "policy/authz.rego  changed  +6 -3" in done.stdout
    assert "shop.authz.decision  changed  the same" in done.stdout
    assert '+allowing contains "batch pays" if {' in done.stdout
    found = json.loads(run("diff", EXAMPLE, stricter, "--log", log, "-o", "json").stdout)
    assert found["replayed"]["counts"] == {"loses": 2, "gains": 1, "differs": 0, "unsure": 0, "same": 1}
    assert run("diff", EXAMPLE, stricter, "--log", log, "--fail-on-change").returncode == 1
    assert "they are the same" in run("diff", EXAMPLE, EXAMPLE, "--log", log, "--fail-on-change").stdout


def test_why(log: Path) -> None:
    done = run("why", "r3", "--log", log)
    assert done.returncode == 0, done.stderr
    assert "POST /payments/3 of spiffe://shop.example/ns/shop/sa/batch" in done.stdout
    assert "It was denied by the policy" in done.stdout
    found = json.loads(run("why", "r3", "--log", log, "-o", "json").stdout)
    assert found["decisions"][0]["refused"] is True


def test_why_by_the_conditions_of_a_policy(log: Path, stricter: Path) -> None:
    done = run("why", "r3", "--log", log, "--policy", EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert 'did not hold (line 56): method == "GET" is false (it is "POST")' in done.stdout
    steps = json.loads(run("why", "r3", "--log", log, "--policy", stricter, "-o", "json").stdout)["explanation"]["steps"]
    assert any(step["held"] and "batch pays" in step["rule"] for step in steps)


def test_what_was_masked_is_said_with_the_steps(tmp_path: Path) -> None:
    path = tmp_path / "masked.log"
    path.write_text(json.dumps({**EVENTS[2], "masked": ["/input/parsed_path/0"]}) + "\n")
    done = run("why", "r3", "--log", path, "--policy", EXAMPLE)
    assert "note: it reads /input/parsed_path/0, which the log does not have" in done.stdout


def test_what_a_log_holds_can_not_command_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.log"
    evil = event("web", "GET", "catalog", "deny", 1)
    evil["custom"]["reason"] = "\x1b]0;owned\x07"
    path.write_text(json.dumps(evil) + "\n")
    for done in (run("why", "r1", "--log", path), run("replay", path, "--against", EXAMPLE)):
        assert "\x1b" not in done.stdout
        assert "owned" in done.stdout

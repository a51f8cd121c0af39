"""`tollhouse policy` as an author uses it: from an empty folder on, on the example, and on folders that are wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from policy_world import SHOP, WEB, folder, run

# check


def test_check_of_the_example_says_what_it_reads_and_costs() -> None:
    done = run("check", SHOP)
    assert done.returncode == 0, done.stderr
    for said in ("shop.authz.decision", "input.parsed_path[0]", "% of modelled traffic", "expressions an answer"):
        assert said in done.stdout


def test_check_tells_everything_that_is_wrong(tmp_path: Path) -> None:
    bad = "\n".join(f"a{n} if input.attributes.request.http.methd == {n}" for n in range(10))
    made = folder(tmp_path / "p", f'package x\n\n{bad}\n\nb if http.send({{"url": "http://x", "method": "GET"}})\n')
    done = run("check", made)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 11
    assert all(f"{made}/a.rego:{row}:" in line for row, line in zip([*range(3, 13), 14], lines, strict=True)), lines
    value = json.loads(run("check", made, "-o", "json").stdout)
    assert [problem["row"] for problem in value["problems"]] == [*range(3, 13), 14]
    assert run("check", made, "--allow-builtin", "http.send").stderr.count("\n") == 10


def test_what_an_operator_forbids_is_refused_with_name_and_place(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", 'package x\n\nallow if crypto.md5("a") == "b"\n\nother if upper("a") == "A"\n')
    assert run("check", made).returncode == 0
    done = run("check", made, "--forbid-builtin", "crypto.md5", "--forbid-builtin", "upper")
    assert done.returncode == 1
    said = "is not allowed in a policy here: the operator forbids it"
    assert done.stderr.splitlines() == [f"tollhouse: {made}/a.rego:3:10: crypto.md5 {said}", f"tollhouse: {made}/a.rego:5:10: upper {said}"]
    assert run("eval", made, "--decision", "x.other", "--forbid-builtin", "upper", "GET", "https://a/").returncode == 1
    assert run("eval", made, "--decision", "x.other", "GET", "https://a/").returncode == 0


def test_check_says_where_the_read_set_is_wide(tmp_path: Path) -> None:
    text = "package x\n\n# METADATA\n# entrypoint: true\ndefault allow := false\n\nallow if {\n\tsome name\n"
    made = folder(tmp_path / "p", text + '\tinput.attributes.request.http.headers[name] == "1"\n}\n')
    done = run("check", made)
    assert done.returncode == 0, done.stderr
    assert f"{made}/a.rego:9: all of input.attributes.request.http.headers is read: all of it is gone through" in done.stdout
    assert "(hits without it: 100.0 %)" in done.stdout
    log = [{"decision_id": str(n), "input": {"attributes": {"request": {"http": {"headers": {"x": str(n % 2)}}}}}} for n in range(8)]
    sample = tmp_path / "decisions.jsonl"
    sample.write_text("\n".join(json.dumps(each) for each in log))
    value = json.loads(run("check", made, "--input", sample, "-o", "json").stdout)
    assert value["decisions"][0]["hits"] == 100.0


def test_a_decision_that_is_none_is_told(tmp_path: Path) -> None:
    done = run("check", SHOP, "--decision", "shop.authz.decison")
    assert done.returncode == 1
    assert "shop.authz.decison leads to nothing: no module has such a rule (shop.authz.decision" in done.stderr
    made = folder(tmp_path / "p", "package x\n\nallow := true\n")
    assert "name a --decision" in run("check", made).stdout


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ('{"roots": ["y"]}', "package x is outside of the roots in .manifest ('y'); add 'x'"),
        ('{"roots": ["x"]}', "data.other.a is outside of the roots"),
        ('{"roots": ["x", "x/y"]}', "one in the other"),
        ('{"rots": []}', "unknown field `rots`"),
        ('{"rego_version": 0}', "Rego of version 0"),
        ('{"wasm": [{"entrypoint": "x"}]}', "wasm is not supported"),
        ("[", "not a manifest"),
    ],
)
def test_a_manifest_holds(manifest: str, said: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\n\nallow := true\n", __manifest=manifest, data__json='{"other": {"a": 1}}')
    done = run("check", made)
    assert done.returncode == 1
    assert said in done.stderr


# Folders that are wrong


def test_folders_without_policy(tmp_path: Path) -> None:
    for command in ("check", "test", "fmt"):
        done = run(command, tmp_path)
        assert done.returncode == 2
        assert "no .rego file" in done.stderr
    assert "does not exist" in run("check", tmp_path / "nowhere").stderr


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\n\nallow if {\n", data__json="{", b__rego="package b\n\nallow := [1,\n")
    (made / "c.rego").write_bytes(b"\xff\xfe\x00")
    done = run("check", made)
    assert done.returncode == 1
    assert f"{made}/c.rego: it is not UTF-8" in done.stderr
    assert f"{made}/data.json: not valid JSON" in done.stderr
    (made / "c.rego").unlink()
    (made / "data.json").unlink()
    for command in ("check", "test", "fmt"):
        done = run(command, made)
        assert done.returncode == 1
        assert f"{made}/a.rego:4" in done.stderr
        assert f"{made}/b.rego:4" in done.stderr
    assert (made / "a.rego").read_text() == "package x\n\nallow if {\n"


def test_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\n\nallow := true\n")
    (made / ".regal/rules").mkdir(parents=True)
    (made / ".regal/rules/custom.rego").write_text("not rego at all")
    assert run("check", made).returncode == 0
    assert run("fmt", made, "--check").returncode == 0


# test


def test_failing_tests_are_told_readably(tmp_path: Path) -> None:
    made = folder(
        tmp_path / "p",
        'package x\n\nallow if input.attributes.request.http.method == "GET"\n',
        a_test__rego='package x_test\n\nimport data.x\n\ntest_get if {\n\tprint("trying")\n\tx.allow with input as '
        '{"attributes": {"request": {"http": {"method": "POST"}}}}\n}\n\ntest_other if not x.allow\n',
    )
    done = run("test", made)
    assert done.returncode == 1
    assert f'{made}/a.rego:3: input.attributes.request.http.method == "GET" is false (it is "POST")' in done.stdout
    assert "FAILED x_test.test_get" in done.stdout
    assert "printed: trying" in done.stdout
    assert "1 passed, 1 failed" in done.stdout
    assert run("test", made, "--run", "other").returncode == 0
    value = json.loads(run("test", made, "-o", "json").stdout)
    assert (value["passed"], value["failed"]) == (1, 1)
    assert "no test has a name" in run("test", made, "--run", "zzz").stdout
    assert run("test", made, "--run", "(").returncode == 2


def test_a_threshold_for_coverage(tmp_path: Path) -> None:
    made = folder(
        tmp_path / "p",
        "package x\n\na if input.a\n\nb if input.b\n",
        a_test__rego="package x_test\n\ntest_a if data.x.a with input.a as 1\n",
    )
    done = run("test", made, "--threshold", "90")
    assert done.returncode == 1
    assert f"{made}/a.rego" in done.stdout
    assert "--threshold wants 90" in done.stderr
    assert run("test", made, "--threshold", "50").returncode == 0


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_watching_runs_them_again(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\n\na := 1\n", a_test__rego="package x_test\n\ntest_a if data.x.a == 1\n")
    out = tmp_path / "out"
    with out.open("wb") as sink:
        # Whoever runs the tests in the background may have SIGINT ignored, and that is inherited.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "tollhouse", "policy", "test", str(made), "--watch"]
        watching = subprocess.Popen(command, stdout=sink, stderr=sink)
        try:
            until(lambda: out.read_text().count("waiting for changes") == 1)
            (made / "a.rego").write_text("package x\n\na := 22\n")
            until(lambda: out.read_text().count("waiting for changes") == 2)
            (made / "a.rego").write_text("package x\n\na := {\n")
            until(lambda: out.read_text().count("waiting for changes") == 3)
            watching.send_signal(signal.SIGINT)
            assert watching.wait(30) == 0
        finally:
            watching.kill()
            watching.wait()
    text = out.read_text()
    assert "1 passed, 0 failed" in text
    assert "data.x.a == 1 is false (it is 22)" in text
    assert "a.rego:4" in text


# fmt


def test_fmt_checks_shows_and_writes(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\nallow   if    {input.a==1}\n", b__rego="package b\n")
    checked = run("fmt", made, "--check")
    assert checked.returncode == 1
    assert f"{made}/a.rego" in checked.stdout
    assert "b.rego" not in checked.stdout
    shown = run("fmt", made, "--diff")
    assert shown.returncode == 1
    assert "+allow if input.a == 1" in shown.stdout
    (made / "a.rego").chmod(0o640)
    done = run("fmt", made)
    assert done.returncode == 0
    assert (made / "a.rego").read_text() == "package x\n\nallow if input.a == 1\n"
    assert (made / "a.rego").stat().st_mode & 0o777 == 0o640
    assert "formatted already" in run("fmt", made / "a.rego").stdout
    assert sorted(path.name for path in made.iterdir()) == ["a.rego", "b.rego"]


def test_fmt_writes_nothing_while_one_cannot_be_read(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\nallow   if input.a\n", b__rego="package b\n\nallow if {\n")
    assert run("fmt", made).returncode == 1
    assert (made / "a.rego").read_text() == "package x\nallow   if input.a\n"


# eval, explain, bench


def test_eval_says_what_a_request_gets() -> None:
    done = run("eval", SHOP, "--as", WEB, "GET", "https://shop.example/catalog/1", "-o", "json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["verdict"], value["rule"]) == ("allow", "web reads the catalog")
    done = run("eval", SHOP, "--as", WEB, "DELETE", "https://shop.example/x/../catalog/1", "--show-input", "-o", "json")
    assert done.returncode == 1
    value = json.loads(done.stdout)
    assert (value["verdict"], value["status"]) == ("deny", 403)
    assert value["input"]["parsed_path"] == ["catalog", "1"], "the normalised path"


def test_eval_takes_documents_and_records_of_a_decision_log(tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "attributes": {
            "source": {"principal": WEB},
            "request": {"http": {"method": "GET"}},
            "contextExtensions": {"gateway": "edge/ingress"},
        },
        "parsed_path": ["catalog"],
    }
    (tmp_path / "in.json").write_text(json.dumps(document))
    assert run("eval", SHOP, "--input", tmp_path / "in.json").returncode == 0
    assert run("eval", SHOP, "--input", "-", stdin=json.dumps({"decision_id": "1", "input": document})).returncode == 0
    document["attributes"]["source"] = {}
    assert run("eval", SHOP, "--input", "-", stdin=json.dumps(document)).returncode == 1


def test_claims_of_a_token_are_seen_as_a_gateway_shows_them(tmp_path: Path) -> None:
    claims = 'input.attributes.metadataContext.filterMetadata["envoy.filters.http.jwt_authn"].payload'
    made = folder(tmp_path / "p", f'package x\n\ndefault allow := false\n\nallow if "b" in {claims}.scope\n')
    request = (made, "--decision", "x.allow", "GET", "https://a/")
    assert run("eval", *request, "--claims", '{"scope": "a b"}').returncode == 0
    assert run("eval", *request, "--claims", '{"scope": "a"}').returncode == 1
    assert run("eval", *request).returncode == 1
    for wrong in ("{", "[]", '{"sub": 1}'):
        done = run("eval", *request, "--claims", wrong)
        assert done.returncode == 2
        assert "--claims: Jwt payload" in done.stderr


def test_policies_that_fail_are_told_as_such(tmp_path: Path) -> None:
    text = "package x\n\nconflict := 1 if input.version\n\nconflict := 2 if input.version\n\nmemory := bits.lsh(1, 100000000000)\n"
    made = folder(tmp_path / "p", text)
    request = ("GET", "https://a/", "-o", "json")
    value = json.loads(run("eval", made, "--decision", "x.conflict", *request).stdout)
    assert value["verdict"] == "error"
    assert f"{made}/a.rego:5" in value["reason"]
    done = run("explain", made, "--decision", "x.memory", *request)
    assert done.returncode == 1
    assert "the OPA worker ended" in done.stderr
    assert "goroutine" not in done.stderr
    value = json.loads(run("check", made, "--decision", "x.memory", "--decision", "x.conflict", "-o", "json").stdout)
    assert [each["cost"]["error"] != "" for each in value["decisions"]] == [True, True]
    assert "errors are never kept" in run("check", made, "--decision", "x.conflict").stdout
    undefined = folder(tmp_path / "u", "package x\n\nallow if input.parsed_path[9]\n")
    assert "it is undefined for 100 % of them" in run("check", undefined, "--decision", "x.allow").stdout
    assert "conflicting" in run("bench", made, "--decision", "x.conflict", "--seconds", "0.1").stderr


def test_explain_names_the_condition() -> None:
    done = run("explain", SHOP, "--as", WEB, "POST", "https://shop.example/catalog/1")
    assert done.returncode == 1
    place = f"{SHOP}/authz.rego"
    assert f'at {place}:32 did not hold (line 35): method == "GET" is false (it is "POST")' in done.stdout
    assert f"rule decision at {place}:25 held (its else)" in done.stdout
    value = json.loads(run("explain", SHOP, "--as", WEB, "POST", "https://shop.example/catalog/1", "-o", "json").stdout)
    failed = [step["failed"]["said"] for step in value["steps"] if step["failed"]]
    assert "count(allowing) > 0 is false (it is 0)" in failed
    assert run("explain", SHOP, "--as", WEB, "GET", "https://shop.example/catalog/1").returncode == 0


def test_what_a_gateway_would_do_is_explained_down_to_the_rules() -> None:
    command = [sys.executable, "-m", "tollhouse", "explain", "--gateway", "edge/ingress", "--rules", "--as", WEB]
    command += ["POST", "https://shop.example/catalog/1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert 'at policy/authz.rego:32 did not hold (line 35): method == "GET" is false (it is "POST")' in done.stdout
    value = json.loads(subprocess.run([*command, "-o", "json"], capture_output=True, text=True, timeout=120, check=False).stdout)
    (rules,) = [step["details"]["rules"] for step in value["steps"] if step["name"] == "decision"]
    assert [rule["rule"] for rule in rules if rule["held"] and rule["kind"] == "else"] == ["decision"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "which request?"),
        (("GET", "/orders"), 2, "not a URL"),
        (("GET", "https://a/", "--input", "x.json"), 2, "not both"),
        (("--input", "/nowhere.json"), 2, "No such file"),
        (("GET", "https://a/%2e%2e%2f"), 2, "refused before any policy is asked"),
        (("GET", "https://a/", "--as", "web"), 2, "spiffe://"),
        (("GET", "https://a/", "-H", "x"), 2, "NAME: VALUE"),
        (("GET", "https://a/", "--decision", "shop.authz"), 1, "is a package"),
        (("GET", "https://a/", "--decision", "shop.authz.caller"), 1, "error"),
        (("POST", "https://a/", "-H", "content-type: application/json", "--body", "{"), 2, "--body"),
    ],
)
def test_wrong_questions(arguments: tuple[str, ...], code: int, said: str) -> None:
    for command in ("eval", "explain"):
        done = run(command, SHOP, *arguments)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_which_decision_is_meant_must_be_clear(tmp_path: Path) -> None:
    made = folder(tmp_path / "p", "package x\n\n# METADATA\n# entrypoint: true\na := true\n\n# METADATA\n# entrypoint: true\nb := true\n")
    done = run("eval", made, "GET", "https://a/")
    assert done.returncode == 2
    assert "one of x.a, x.b" in done.stderr
    assert run("eval", made, "GET", "https://a/", "--decision", "x.b").returncode == 0


def test_bench_measures() -> None:
    done = run("bench", SHOP, "--seconds", "0.1", "-o", "json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["inputs"] == 500
    assert value["engine_us"]["median"] > 0
    assert value["asked_per_second"] > 0
    assert run("bench", SHOP, "--seconds", "0.1", "--as", WEB, "GET", "https://shop.example/catalog/1").returncode == 0

"""A revision that is tried, over real processes: beside the active one, for some, promoted, dropped; and never in anybody's way."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from e2e_traffic import Trickle, ask
from e2e_world import EXAMPLE, Mesh, shop, spiffe, tollhouse

from tests.servers import wait_for

pytestmark = pytest.mark.e2e
LOOPS = """package shop.loops

forever if {
	some i in numbers.range(1, 1000000)
	some j in numbers.range(1, 1000000)
	i + j == -1
}
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2"), gateways=("ingress",)) as running:
        running.folder.joinpath("decisions.log").touch()
        yield running


@pytest.fixture(scope="module")
def first(mesh: Mesh) -> str:
    """As in the example: `web` reads the catalog, `batch` too."""
    return publish(mesh, "first", "", "")


@pytest.fixture(scope="module")
def second(mesh: Mesh, first: str) -> str:
    """`web` may write the catalog, and `batch` may read it no more."""
    more = '\nallowing contains "web writes" if {\n\tcaller == web\n\tmethod == "POST"\n}\n'
    return publish(mesh, "second", more, "caller == batch")


@pytest.fixture(autouse=True)
def nothing_tried(mesh: Mesh, first: str) -> None:
    tollhouse("policy", "activate", first, "--config", mesh.config)


def publish(mesh: Mesh, name: str, more: str, without: str) -> str:
    folder = mesh.folder / name
    shutil.copytree(EXAMPLE / "policy", folder)
    rego = folder / "authz.rego"
    text = rego.read_text() + more
    rego.write_text(text.replace(without, 'caller == "nobody"') if without else text)
    return tollhouse("policy", "publish", str(folder), "--config", mesh.config).stdout.split()[1].rstrip(":")


def run(mesh: Mesh, *arguments: str) -> str:
    return tollhouse("policy", *arguments, "--config", mesh.config).stdout


def differences(mesh: Mesh) -> list[dict[str, Any]]:
    shown = tollhouse("policy", "differences", "--admin", f"127.0.0.1:{mesh.ports['admin-ingress']}", "-o", "json").stdout
    return list(json.loads(shown)["differences"])


def rows(mesh: Mesh, revision: str, kind: str) -> set[tuple[str, str]]:
    return {
        (each["change"], each["caller"])
        for each in differences(mesh)
        if each["kind"] == kind and each["revision"] == revision.replace("-", ":", 1)
    }


def statuses(mesh: Mesh) -> tuple[int, int, int]:
    return ask(mesh, "web", "/catalog/1").status, ask(mesh, "web", "/catalog/1", "POST").status, ask(mesh, "batch", "/catalog/1").status


def test_a_shadow_changes_no_answer_and_tells_who_would_gain_and_who_would_lose(mesh: Mesh, second: str) -> None:
    assert "for all requests" in run(mesh, "shadow", second, "--reason", "trying")
    for _ in range(3):
        assert statuses(mesh) == (200, 403, 200)
    wanted = {("gains", spiffe("web")), ("loses", spiffe("batch"))}
    wait_for("the differences", lambda: rows(mesh, second, "shadow") == wanted)
    (row,) = [each for each in differences(mesh) if each["caller"] == spiffe("batch")]
    assert (row["before"], row["after"]) == ("allow: batch reads the catalog", "deny: no rule lets this caller do that here")
    assert row["asked"] == "GET /catalog/1"
    assert mesh.metric("ingress", "tollhouse_trial_decisions_total", kind="shadow", change="same") > 0
    listed = json.loads(run(mesh, "list", "-o", "json"))
    assert {each["name"]: each["state"] for each in listed}[second] == "shadow"
    assert "has ended" in run(mesh, "drop")
    status = json.loads(tollhouse("policy", "list", "--config", mesh.config, "-o", "json").stdout)
    assert {each["state"] for each in status} == {"active", ""}


def test_a_shadow_for_some_callers_is_asked_about_them_alone(mesh: Mesh, second: str) -> None:
    run(mesh, "shadow", second, "--identity", spiffe("batch"))
    before = mesh.metric("ingress", "tollhouse_decisions_total", shadow="true")
    for _ in range(5):
        assert ask(mesh, "web", "/catalog/1").status == 200
    assert mesh.metric("ingress", "tollhouse_decisions_total", shadow="true") == before
    assert ask(mesh, "batch", "/catalog/1").status == 200
    wait_for("the shadow", lambda: mesh.metric("ingress", "tollhouse_decisions_total", shadow="true") == before + 1)


def test_a_canary_decides_for_its_callers_and_is_promoted(mesh: Mesh, first: str, second: str) -> None:
    run(mesh, "canary", second, "--identity", spiffe("web"))
    assert statuses(mesh) == (200, 200, 200), "of the canary for web, of the active one for batch"
    wait_for("the difference", lambda: ("gains", spiffe("web")) in rows(mesh, second, "canary"))
    assert run(mesh, "promote", "--reason", "fine").startswith(f"active: {second}")
    assert statuses(mesh) == (200, 200, 403)
    run(mesh, "rollback")
    assert statuses(mesh) == (200, 403, 200)
    found = json.loads(run(mesh, "history", "-o", "json", "--limit", "3"))
    assert [each["action"] for each in found] == ["rollback", "promote", "canary"]
    assert found[1]["reason"] == "fine"
    assert "canary none ->" in run(mesh, "history", "--limit", "3")


def test_a_canary_decides_about_its_share(mesh: Mesh, second: str) -> None:
    run(mesh, "canary", second, "--percent", "50")
    found = {ask(mesh, "web", "/catalog/1", "POST").status for _ in range(40)}
    assert found == {200, 403}
    run(mesh, "drop")
    assert {ask(mesh, "web", "/catalog/1", "POST").status for _ in range(20)} == {403}


def test_a_shadow_that_loops_is_in_nobodys_way(mesh: Mesh, first: str) -> None:
    folder = mesh.folder / "loops"
    shutil.copytree(EXAMPLE / "policy", folder)
    (folder / "loops.rego").write_text(LOOPS)
    rego = folder / "authz.rego"
    rego.write_text(rego.read_text().replace("area := input.parsed_path[0]", "area := input.parsed_path[0] if not data.shop.loops.forever"))
    loops = tollhouse("policy", "publish", str(folder), "--config", mesh.config).stdout.split()[1].rstrip(":")
    run(mesh, "shadow", loops)
    errors = mesh.metric("ingress", "tollhouse_decision_errors_total", to="central")
    with Trickle(mesh, "web", "/catalog/1", period=0.005) as trickle:
        trickle.more(100)
        for number in range(30):  # questions that were never asked before
            begun = time.monotonic()
            assert ask(mesh, "web", f"/catalog-{number}").status in {403, 404}
            assert time.monotonic() - begun < 5
        wait_for("its errors", lambda: mesh.metric("ingress", "tollhouse_decision_errors_total", to="shadow") > 0)
        trickle.more(50)
    assert set(trickle.statuses()) == {200}
    assert mesh.metric("ingress", "tollhouse_decision_errors_total", to="central") == errors
    assert mesh.metric("ingress", "tollhouse_trial_decisions_total", kind="shadow", change="error") > 0
    run(mesh, "drop")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["promote"], 1, "nothing is tried"),
        (["drop", "--which", "canary"], 1, "there is no canary"),
        (["canary", "{second}"], 2, "name the requests"),
        (["shadow", "{first}"], 1, "is the active revision"),
        (["shadow", "sha256-0000"], 1, "names no revision"),
        (["shadow", "{second}", "--identity", "web"], 2, "is not a SPIFFE ID"),
    ],
)
def test_what_is_wrong_is_said_and_changes_nothing(mesh: Mesh, first: str, second: str, arguments: list[str], code: int, said: str) -> None:
    words = [each.format(first=first, second=second) for each in arguments]
    done = tollhouse("policy", *words, "--config", mesh.config, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert said in done.stderr
    assert statuses(mesh) == (200, 403, 200)

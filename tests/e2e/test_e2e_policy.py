"""Policy as revisions over real processes: put in force everywhere at once, kept where nothing changed, and bad where it is bad only."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from e2e_traffic import Connection, Trickle, apply, ask, attached, exchange, page, route, service
from e2e_world import EXAMPLE, Mesh, shop, spiffe, tollhouse

from tests.servers import wait_for

pytestmark = pytest.mark.e2e
EXTRA = """package shop.extra

steady := {"allowed": input.attributes.request.http.method == "GET"}

text := "yes"

undefined := true if input.attributes.request.http.method == "BREW"

forever := true if {
	some i in numbers.range(1, 1000000)
	some j in numbers.range(1, 1000000)
	i + j == -1
}

memory := bits.lsh(1, 100000000000)

arrays := count(numbers.range(1, 100000000)) > 1
"""
BAD = ("text", "undefined", "forever", "memory", "arrays")
WRITES = """
allowing contains "web writes the catalog" if {
	caller == web
	method == "POST"
	area == "catalog"
}

allowing contains "web reads payments" if {
	caller == web
	method == "GET"
	area == "payments"
}
"""
fresh = count()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2", "payments"), gateways=("ingress", "eastwest")) as running:
        apply(running, *service("one", [running.ports["catalog-v1"]], "catalog"))
        for name in ("steady", *BAD):
            policy = attached("AccessPolicy", name, name, decision=f"shop.extra.{name}", timeout="500ms")
            apply(running, route(name, f"/catalog/{name}", "one"), policy)
        apply(running, route("plain", "/", "one"))
        yield running


@pytest.fixture(scope="module")
def revisions(mesh: Mesh) -> tuple[str, str]:
    """Two: as in the example, and one in which `web` may do more. The first is in force."""
    first = publish(mesh, "first", "")
    second = publish(mesh, "second", WRITES)
    tollhouse("policy", "activate", first, "--config", mesh.config)
    return first, second


def publish(mesh: Mesh, name: str, more: str) -> str:
    folder = mesh.folder / name
    shutil.copytree(EXAMPLE / "policy", folder)
    rego = folder / "authz.rego"
    rego.write_text(rego.read_text() + more)
    Path(folder / "extra.rego").write_text(EXTRA)
    done = tollhouse("policy", "publish", str(folder), "--config", mesh.config)
    return done.stdout.split()[1].rstrip(":")


def in_force(mesh: Mesh, gateway: str) -> str:
    return str(json.loads(page(mesh, gateway, "/status"))["policy"])


def reads_payments(mesh: Mesh) -> int:
    connection = Connection(mesh, "web", "eastwest", "payments.shop.example")
    try:
        return exchange(connection, "GET", "/payments/1").status
    finally:
        connection.close()


def decisions(mesh: Mesh, policy: str, kept: str) -> float:
    return mesh.metric("ingress", "tollhouse_decisions_total", policy=policy, kept=kept)


def test_a_revision_is_in_force_at_every_gateway_when_the_command_returns(mesh: Mesh, revisions: tuple[str, str]) -> None:
    first, second = revisions
    for revision, status in [(second, 200), (first, 403), (second, 200), (first, 403)]:
        done = tollhouse("policy", "activate", revision, "--config", mesh.config)
        answers = (ask(mesh, "web", "/catalog/1", "POST").status, reads_payments(mesh))
        assert answers == (status, status), done.stdout
        assert in_force(mesh, "ingress") == in_force(mesh, "eastwest")
    listed = json.loads(tollhouse("policy", "list", "--config", mesh.config, "-o", "json").stdout)
    assert [each["name"] for each in listed if each["active"]] == [first]


def test_what_is_kept_stays_where_nothing_changed_and_goes_where_something_did(mesh: Mesh, revisions: tuple[str, str]) -> None:
    first, second = revisions
    for _ in range(2):
        assert ask(mesh, "web", "/catalog/steady").status == 200
    asked = {name: decisions(mesh, name, "false") for name in ("mesh", "shop/steady")}
    kept = decisions(mesh, "shop/steady", "true")
    tollhouse("policy", "activate", second, "--config", mesh.config)
    assert ask(mesh, "web", "/catalog/steady").status == 200
    assert decisions(mesh, "mesh", "false") == asked["mesh"] + 1
    assert decisions(mesh, "shop/steady", "false") == asked["shop/steady"], "its own entry point is the same"
    assert decisions(mesh, "shop/steady", "true") == kept + 1
    tollhouse("policy", "activate", first, "--config", mesh.config)


def test_changing_revisions_disturbs_nobody(mesh: Mesh, revisions: tuple[str, str]) -> None:
    first, second = revisions
    with Trickle(mesh, "web", "/catalog/steady", period=0.01) as trickle, Trickle(mesh, "batch", "/orders/1", period=0.01) as refused:
        for revision in (second, first):
            tollhouse("policy", "activate", revision, "--config", mesh.config)
            trickle.more(5)
            refused.more(5)
    assert set(trickle.statuses()) == {200}
    assert set(refused.statuses()) == {403}


def test_a_gateway_that_does_not_follow_is_named(mesh: Mesh, revisions: tuple[str, str]) -> None:
    first, second = revisions
    eastwest = mesh.processes["gateway-eastwest"]
    eastwest.signal(signal.SIGSTOP)
    try:
        done = tollhouse("policy", "activate", second, "--config", mesh.config, "--timeout", "2s", check=False)
        assert done.returncode == 1
        assert "edge/eastwest" in done.stderr
        assert "edge/ingress" not in done.stderr
        assert ask(mesh, "web", "/catalog/1", "POST").status == 200
    finally:
        eastwest.signal(signal.SIGCONT)
    wait_for("the one that was frozen", lambda: reads_payments(mesh) == 200)
    tollhouse("policy", "activate", first, "--config", mesh.config)
    assert reads_payments(mesh) == 403


def test_a_rollback_goes_to_the_one_before_and_is_written_down(mesh: Mesh, revisions: tuple[str, str]) -> None:
    first, second = revisions
    tollhouse("policy", "activate", second, "--config", mesh.config, "--reason", "web may pay")
    for wanted, status in [(first, 403), (second, 200), (first, 403)]:
        done = tollhouse("policy", "rollback", "--config", mesh.config, "--reason", "to and fro")
        assert done.stdout.startswith(f"active: {wanted}")
        assert reads_payments(mesh) == status
    found = json.loads(tollhouse("policy", "history", "--config", mesh.config, "-o", "json", "--limit", "4").stdout)
    assert [(each["action"], each["reason"]) for each in found] == [("rollback", "to and fro")] * 3 + [("activate", "web may pay")]
    assert [each["changes"][0]["after"]["revision"] for each in found] == [first, second, first, second]
    assert all("@" in each["who"] for each in found)
    shown = tollhouse("policy", "history", "--config", mesh.config).stdout
    assert f"{second[:19]} -> {first[:19]}" in shown
    assert "publish" in shown


def test_a_command_that_does_not_wait_does_not(mesh: Mesh, revisions: tuple[str, str]) -> None:
    first, second = revisions
    eastwest = mesh.processes["gateway-eastwest"]
    eastwest.signal(signal.SIGSTOP)
    try:
        done = tollhouse("policy", "activate", second, "--config", mesh.config, "--wait=false")
        assert (done.returncode, done.stderr) == (0, "")
        waited = tollhouse("policy", "activate", first, "--config", mesh.config, "--timeout", "1s", check=False)
        assert "1 of 2 gateways apply it" in waited.stderr or waited.returncode == 0
    finally:
        eastwest.signal(signal.SIGCONT)
    tollhouse("policy", "activate", first, "--config", mesh.config)
    assert reads_payments(mesh) == 403


def test_an_unknown_revision_changes_nothing(mesh: Mesh, revisions: tuple[str, str]) -> None:
    before = in_force(mesh, "ingress")
    assert tollhouse("policy", "activate", "sha256-0000", "--config", mesh.config, check=False).returncode == 1
    assert in_force(mesh, "ingress") == before
    assert revisions


@pytest.mark.parametrize("name", BAD)
def test_a_bad_policy_is_an_error_for_its_own_route_only(mesh: Mesh, revisions: tuple[str, str], name: str) -> None:
    assert revisions
    errors = mesh.metric("ingress", "tollhouse_decisions_total", policy=f"shop/{name}", verdict="error")
    with Trickle(mesh, "web", f"/catalog/{name}", period=0.01) as bad:
        for _ in range(15):
            answer = ask(mesh, "web", f"/area{next(fresh)}")
            assert answer.status == 403, "a question that was never asked before, of another decision"
        bad.more(2)
    assert set(bad.statuses()) == {503}
    assert mesh.logged("ingress", f"/catalog/{name}")["response_flags"] == "UAEE"
    assert mesh.metric("ingress", "tollhouse_decisions_total", policy=f"shop/{name}", verdict="error") > errors
    assert mesh.metric("ingress", "tollhouse_decision_errors_total", to="central") > 0


def test_allow_deny_and_error_are_three_things(mesh: Mesh, revisions: tuple[str, str]) -> None:
    assert revisions
    for path, method, status, flag, verdict in [
        ("/catalog/steady/three", "GET", 200, "-", "allow"),
        ("/catalog/steady/three", "POST", 403, "UAEX", "deny"),
        ("/catalog/text/three", "GET", 503, "UAEE", "error"),
    ]:
        labels = {"response_code": str(status), "response_flags": flag, "source_principal": spiffe("web")}
        before = (
            mesh.metric("ingress", "istio_requests_total", **labels),
            mesh.metric("ingress", "tollhouse_decisions_total", verdict=verdict),
        )
        assert ask(mesh, "web", path, method).status == status
        assert mesh.metric("ingress", "istio_requests_total", **labels) == before[0] + 1
        assert mesh.metric("ingress", "tollhouse_decisions_total", verdict=verdict) > before[1]

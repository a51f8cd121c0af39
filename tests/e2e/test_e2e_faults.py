"""What is away, frozen or killed beneath a mesh in use, and what its clients notice of it."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from itertools import count

import pytest
from e2e_traffic import Connection, Trickle, apply, ask, attached, exchange, page, route, service
from e2e_world import Mesh, shop

from tests import servers
from tests.servers import wait_for

pytestmark = pytest.mark.e2e
BUDGET = 3.0
"""Seconds in which any request is answered, whatever is away: far more than each question's own budget, far less than a hang."""
fresh = count()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2", "orders"), gateways=("ingress",)) as running:
        both = [running.ports["catalog-v1"], running.ports["catalog-v2"]]
        limit = {"name": "all", "tokens": 200, "burst": 200}
        apply(
            running,
            *service("pair", both, "catalog"),
            *service("single", [running.ports["catalog-v1"]], "catalog"),
            *service("lone", [running.ports["catalog-v2"]], "catalog"),
            *service("nobody", [], "catalog"),
            route("pair", "/catalog/pair", "pair"),
            route("single", "/catalog/single", "single"),
            route("lone", "/catalog/lone", "lone"),
            route("nobody", "/catalog/nobody", "nobody"),
            route("counted", "/catalog/counted", "single"),
            route("rest", "/", "single"),
            attached("QuotaPolicy", "counted", "counted", failureMode="Deny", limits=[limit]),
        )
        wait_for("the routes", lambda: ask(running, "web", "/catalog/counted").status == 200)
        yield running


def new_question(mesh: Mesh) -> int:
    """The status of a request about which nobody has been asked before: its area is one that no rule names."""
    answer = ask(mesh, "web", f"/area{next(fresh)}")
    assert answer.seconds < BUDGET
    return answer.status


def flag(mesh: Mesh, prefix: str) -> tuple[int, str]:
    """Status and response flag of one more request; its path is new, so that the log has one entry for it."""
    path = f"{prefix}/{next(fresh)}"
    answer = ask(mesh, "web", path)
    assert answer.seconds < BUDGET
    return answer.status, str(mesh.logged("ingress", path)["response_flags"])


@contextlib.contextmanager
def away(server: servers.Process, how: signal.Signals) -> Iterator[None]:
    """Killed, or frozen; in the end it is there again."""
    if how is signal.SIGKILL:
        server.kill()
    else:
        server.signal(how)
    try:
        yield
    finally:
        if how is signal.SIGKILL:
            server.start()
        else:
            server.signal(signal.SIGCONT)


def fine(mesh: Mesh) -> None:
    """Everything is as in the beginning."""
    wait_for("decisions", lambda: new_question(mesh) == 403)
    wait_for("tokens", lambda: ask(mesh, "web", "/catalog/counted").status == 200)
    wait_for("both endpoints", lambda: ask(mesh, "web", "/catalog/pair").status == 200)


@pytest.fixture(autouse=True)
def whole(mesh: Mesh) -> Iterator[None]:
    fine(mesh)
    yield
    fine(mesh)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_etcd_is_away(mesh: Mesh, how: signal.Signals) -> None:
    with Trickle(mesh, "web", "/catalog/pair") as trickle:
        with away(mesh.etcd, how):
            trickle.more(30)
            assert new_question(mesh) == 403
            wait_for("the status to say so", lambda: stale(mesh), seconds=60)
            trickle.more(30)
        wait_for("etcd", lambda: not stale(mesh))
        apply(mesh, route("later", f"/catalog/later-{how.name}", "nobody"))
        wait_for("the change", lambda: ask(mesh, "web", f"/catalog/later-{how.name}").status == 503)
    assert set(trickle.statuses()) == {200}


def stale(mesh: Mesh) -> bool:
    return bool(json.loads(page(mesh, "ingress", "/status"))["source"]["stale"])


def test_without_etcd_what_is_started_again_serves_from_disk(mesh: Mesh) -> None:
    with away(mesh.etcd, signal.SIGKILL):
        for name in ("gateway-ingress", "pdp"):
            mesh.processes[name].kill()
        mesh.processes["pdp"].start()
        mesh.processes["gateway-ingress"].start()
        assert ask(mesh, "web", "/catalog/pair").status == 200
        assert ask(mesh, "batch", "/catalog/pair", "POST").status == 403
        assert new_question(mesh) == 403
        assert stale(mesh)
    apply(mesh, route("restarted", "/catalog/restarted", "nobody"))
    wait_for("the change", lambda: ask(mesh, "web", "/catalog/restarted").status == 503)
    wait_for("etcd", lambda: not stale(mesh))


def test_without_etcd_and_without_a_state_a_gateway_waits_and_says_for_what(mesh: Mesh) -> None:
    admin = servers.free_port()
    bare = servers.tollhouse(
        "gateway", "edge/ingress", "--config", mesh.config, "--identity", str(mesh.identity("edge-ingress")),
        "--pdp", f"127.0.0.1:{mesh.ports['pdp']}", "--admin", f"127.0.0.1:{admin}",
        ready=lambda: servers.answers(admin), name="gateway-bare",
    )  # fmt: skip
    mesh.processes["gateway-ingress"].stop()
    try:
        with away(mesh.etcd, signal.SIGKILL):
            bare.start()
            with pytest.raises(urllib.error.HTTPError) as told:
                servers.fetched(f"http://127.0.0.1:{admin}/readyz")
            assert told.value.code == 503
            assert mesh.etcd.url.removeprefix("http://") in bare.output()
        wait_for("etcd", lambda: ready(admin))
        assert ask(mesh, "web", "/catalog/pair").status == 200
    finally:
        bare.close()
        mesh.processes["gateway-ingress"].start()


def ready(admin: int) -> bool:
    with contextlib.suppress(urllib.error.HTTPError):
        return servers.fetched(f"http://127.0.0.1:{admin}/readyz")
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_pdp_is_away(mesh: Mesh, how: signal.Signals) -> None:
    with Trickle(mesh, "web", "/catalog/pair") as trickle:
        with away(mesh.processes["pdp"], how):
            for _ in range(5):
                assert flag(mesh, f"/area{next(fresh)}") == (503, "UAEE")
            trickle.more(20)
        wait_for("decisions", lambda: new_question(mesh) == 403)
    assert set(trickle.statuses()) == {200}, "what is kept is answered all the while"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_redis_is_away(mesh: Mesh, how: signal.Signals) -> None:
    with Trickle(mesh, "web", "/catalog/pair") as trickle:
        with away(mesh.redis, how):
            wait_for("the leases to end", lambda: ask(mesh, "web", "/catalog/counted").status == 503)
            assert flag(mesh, "/catalog/counted") == (503, "RLSE")
            wait_for("the local bucket", lambda: ask(mesh, "web", "/orders/1").status == 200)
            connection = Connection(mesh, "web")
            begun = time.monotonic()
            answers = Counter(exchange(connection, "GET", "/orders/2").status for _ in range(80))
            took = time.monotonic() - begun
            connection.close()
            assert set(answers) == {200, 429}, "still limited, never an error"
            assert answers[200] <= 20 + 10 * took + 1
            assert mesh.metric("ingress", "tollhouse_quota_failures_total", mode="Local") > 0
            assert mesh.metric("ingress", "tollhouse_quota_failures_total", mode="Deny") > 0
        wait_for("tokens", lambda: ask(mesh, "web", "/catalog/counted").status == 200, seconds=30)
    assert set(trickle.statuses()) == {200}, "what has no limit notices nothing"


def test_a_service_is_away(mesh: Mesh) -> None:
    wait_for("tokens", lambda: ask(mesh, "web", "/orders/1").status == 200)
    with Trickle(mesh, "web", "/orders/away", period=0.25) as trickle:
        with away(mesh.processes["echo-orders"], signal.SIGKILL):
            trickle.more(3, 503)
            assert flag(mesh, "/orders") == (503, "UF")
        trickle.more(3, 200)
    assert set(trickle.statuses()) == {200, 503}
    assert flag(mesh, "/catalog/nobody") == (503, "UH")


def test_of_two_endpoints_one_dies_and_no_client_notices(mesh: Mesh) -> None:
    pair = {"cluster": "shop/pair:443"}

    def served() -> set[str]:
        return {json.loads(ask(mesh, "web", "/catalog/pair").body)["service"] for _ in range(4)}

    ejections = mesh.metric("ingress", "tollhouse_upstream_ejections_total", **pair)
    with Trickle(mesh, "web", "/catalog/pair") as trickle, Trickle(mesh, "batch", "/catalog/pair") as other:
        with away(mesh.processes["echo-catalog-v2"], signal.SIGKILL):
            wait_for("an ejection", lambda: mesh.metric("ingress", "tollhouse_upstream_ejections_total", **pair) > ejections)
            assert mesh.metric("ingress", "tollhouse_upstream_ejected", **pair) == 1
            assert mesh.metric("ingress", "tollhouse_upstream_retries_total", **pair) > 0
            trickle.more(20)
        assert ask(mesh, "web", "/catalog/lone").status == 200, "the cluster that has only this endpoint uses it at once"
        wait_for("the ejection to end", lambda: served() == {"catalog-v1", "catalog-v2"}, seconds=60)
        assert mesh.metric("ingress", "tollhouse_upstream_ejected", **pair) == 0
        other.more(20)
    assert set(trickle.statuses()) == {200}
    assert set(other.statuses()) == {200}

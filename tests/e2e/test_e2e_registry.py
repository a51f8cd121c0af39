"""Instances that register themselves get traffic while they are well; an outage of the registry takes nobody away."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from e2e_traffic import Trickle, apply, ask, page, route, service
from e2e_world import Mesh, shop

from tests import servers
from tests.servers import wait_for

pytestmark = pytest.mark.e2e
NAMES = ("catalog-v1", "catalog-v2")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=NAMES, gateways=("ingress",)) as running:
        apply(running, *service("live", [], "catalog"), route("live", "/catalog/live", "live"))
        wait_for("the route", lambda: ask(running, "web", "/catalog/live").status == 503)
        yield running


def register(mesh: Mesh, name: str) -> servers.Process:
    """Registers an echo as an instance of shop/live."""
    return mesh.run(
        f"register-{name}",
        "register", "shop/live", "--config", mesh.config, "--address", "127.0.0.1", "--port", f"https={mesh.ports[name]}",
        "--instance", name, "--ttl", "2s", "--interval", "200ms",
        ready=lambda: answering(mesh, name),
    )  # fmt: skip


def answering(mesh: Mesh, *names: str) -> bool:
    """Whether exactly these instances answer now: as many requests in a row as make another one's silence unlikely."""
    found = set()
    for _ in range(6):
        answer = ask(mesh, "web", "/catalog/live")
        if answer.status != 200:
            return not names
        found.add(json.loads(answer.body)["service"])
    return found == set(names) if len(names) != 1 else names[0] in found


def only(mesh: Mesh, *names: str) -> None:
    def so() -> bool:
        found = {
            json.loads(got.body)["service"] if got.status == 200 else "" for got in (ask(mesh, "web", "/catalog/live") for _ in range(12))
        }
        return found == (set(names) or {""})

    wait_for(f"{names or 'nobody'} alone", so)


def test_an_instance_is_used_from_when_it_registers_until_it_stops(mesh: Mesh) -> None:
    assert ask(mesh, "web", "/catalog/live").status == 503
    assert mesh.logged("ingress", "/catalog/live")["response_flags"] == "UH"
    first = register(mesh, "catalog-v1")
    only(mesh, "catalog-v1")
    second = register(mesh, "catalog-v2")
    only(mesh, "catalog-v1", "catalog-v2")
    with Trickle(mesh, "web", "/catalog/live") as trickle:
        assert second.stop() == 0
        only(mesh, "catalog-v1")
    assert set(trickle.statuses()) == {200}
    assert first.stop() == 0
    only(mesh)


def test_one_that_is_not_well_is_left_out_until_it_is(mesh: Mesh) -> None:
    register(mesh, "catalog-v1")
    register(mesh, "catalog-v2")
    only(mesh, "catalog-v1", "catalog-v2")
    with Trickle(mesh, "web", "/catalog/live") as trickle:
        mesh.processes["echo-catalog-v2"].kill()
        only(mesh, "catalog-v1")
        wait_for("the registration to say so", lambda: "not well" in mesh.processes["register-catalog-v2"].output())
        mesh.processes["echo-catalog-v2"].start()
        only(mesh, "catalog-v1", "catalog-v2")
    assert set(trickle.statuses()) == {200}
    for name in NAMES:
        assert mesh.processes[f"register-{name}"].stop() == 0
    only(mesh)


def test_a_lease_that_nobody_renews_ends_and_those_that_vanish_together_are_kept_while_they_answer(mesh: Mesh) -> None:
    for name in NAMES:
        register(mesh, name)
    only(mesh, *NAMES)
    mesh.processes["register-catalog-v2"].kill()
    only(mesh, "catalog-v1")
    register(mesh, "catalog-v2")
    only(mesh, *NAMES)
    with Trickle(mesh, "web", "/catalog/live") as trickle:
        for name in NAMES:
            mesh.processes[f"register-{name}"].kill()
        wait_for("the outage to be seen", lambda: "kept while they answer" in page(mesh, "ingress", "/status"))
        only(mesh, *NAMES)
    assert set(trickle.statuses()) == {200}
    mesh.processes["echo-catalog-v2"].kill()
    only(mesh, "catalog-v1")
    mesh.processes["echo-catalog-v2"].start()

"""Names, addresses and handshakes: bounded in time and in how many run at once."""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from upstream_world import GATEWAY, MESH, ORDERS, authority, cluster_of, identity, ok, permit, run, serves, unused_port, upstream

from gateway.connect import H1, Contexts, Steps, is_loopback
from gateway.limits import Limits
from gateway.resolve import Address, Resolver, address_of
from identity.files import StaticIdentity
from identity.problems import IdentityError
from mesh.model import Endpoint
from mesh.refusals import ConnectFailed

Answer = Callable[[str], Awaitable[list[str]]]


class Names:
    """Stands in for the system's resolver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop, answer: Answer) -> None:
        self.asked: list[str] = []

        async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            self.asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in await answer(host)]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


async def find(resolver: Resolver, host: str) -> tuple[list[Address], str]:
    found: asyncio.Future[tuple[list[Address], str]] = asyncio.get_running_loop().create_future()
    resolver.find(host, 80, lambda addresses, problem: found.set_result((addresses, problem)))
    return await asyncio.wait_for(found, 5)


def one(address: str) -> list[Address]:
    return [(socket.AF_INET, (address, 80))]


def test_a_name_is_asked_once_and_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async def answer(host: str) -> list[str]:
            await asyncio.sleep(0.01)
            return ["10.0.0.1"]

        loop = asyncio.get_running_loop()
        names = Names(monkeypatch, loop, answer)
        resolver = Resolver(loop, Limits(resolve_ttl=0.1))
        found = await asyncio.gather(*(find(resolver, "orders.example") for _ in range(20)))
        assert found == [(one("10.0.0.1"), "")] * 20
        await find(resolver, "orders.example")
        assert len(names.asked) == 1
        end = loop.time() + 5
        while len(names.asked) == 1 and loop.time() < end:
            await find(resolver, "orders.example")
            await asyncio.sleep(0.01)
        assert len(names.asked) == 2
        resolver.close()

    asyncio.run(main())


def test_a_resolver_that_is_slow_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        moods = ["well"]

        async def answer(host: str) -> list[str]:
            mood = moods[-1]
            if mood == "slow":
                await asyncio.sleep(10)
            if mood == "failing":
                raise socket.gaierror(-2, "Name or service not known")
            return ["10.0.0.1"] if mood == "well" else []

        loop = asyncio.get_running_loop()
        Names(monkeypatch, loop, answer)
        resolver = Resolver(loop, Limits(resolve_ttl=0.0, resolve_timeout=0.05))
        assert await find(resolver, "a.example") == (one("10.0.0.1"), "")
        for mood in ("failing", "empty", "slow"):
            moods.append(mood)
            # What was found before is better than nothing; what was never found is nothing.
            assert await find(resolver, "a.example") == (one("10.0.0.1"), "")
            addresses, problem = await find(resolver, "b.example")
            assert not addresses
            assert problem
        resolver.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", (socket.AF_INET, ("127.0.0.1", 80))),
        ("::1", (socket.AF_INET6, ("::1", 80, 0, 0))),
        ("orders.example", None),
        ("127.1", None),
        ("", None),
        ("a\0b", None),
    ],
)
def test_addresses_are_not_names(host: str, expected: Address | None) -> None:
    assert address_of(host, 80) == expected


def test_the_next_address_is_tried() -> None:
    with upstream(serves(ok())) as orders:

        async def conversation(world: Any) -> None:
            async def answer(host: str) -> list[str]:
                return ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first

            with pytest.MonkeyPatch.context() as patch:
                Names(patch, world.loop, answer)
                named = Endpoint(address="orders.example", port=orders.port, identities=(ORDERS,))
                client = await world.ask(permit(cluster_of(named)))
                assert (client.status, client.outcome.attempts) == (200, 1)

        run(conversation)


def test_nobody_at_any_address() -> None:
    async def conversation(world: Any) -> None:
        async def answer(host: str) -> list[str]:
            return ["127.0.0.2", "127.0.0.3"]

        with pytest.MonkeyPatch.context() as patch:
            Names(patch, world.loop, answer)
            named = Endpoint(address="orders.example", port=unused_port(), identities=(ORDERS,))
            client = await world.ask(permit(cluster_of(named)))
            assert isinstance(client.refusal, ConnectFailed)
            assert "refused" in client.refusal.reason

    run(conversation)


def test_steps_are_few_in_a_turn() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        steps = Steps(loop, 3)
        ran: list[int] = []
        turn = 0
        for at in range(10):
            steps.run(lambda at=at: ran.append(at))  # type: ignore[misc]
        counts = []
        while len(ran) < 10 and turn < 20:
            counts.append(len(ran))
            turn += 1
            await asyncio.sleep(0)
        counts.append(len(ran))
        assert ran == list(range(10))
        assert all(after - before <= 3 for before, after in itertools.pairwise(counts))

    asyncio.run(main())


def test_contexts_are_made_once_and_never_from_what_has_expired() -> None:
    contexts = Contexts(identity(GATEWAY))
    first = contexts.get(MESH, H1)
    assert contexts.get(MESH, H1) is first
    contexts.clear()
    assert contexts.get(MESH, H1) is not first
    now = time.time()
    expiring = StaticIdentity(authority().issue(GATEWAY, lifetime=60, now=now - 58))
    contexts = Contexts(expiring)
    contexts.get(MESH, H1)
    while time.time() < expiring.current.not_after + 0.01:
        time.sleep(0.01)
    with pytest.raises(IdentityError):
        contexts.get(MESH, H1)


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False), ("::2", False)]
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected

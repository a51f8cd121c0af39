"""When keys are fetched, and what becomes of those who wait for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from identity.authenticator import Tokens
from identity.jwks import FIRST_RETRY, MOST_RETRY, MOST_WAITING, REFRESH, UNKNOWN_EVERY, FetchError, KeyStore, Schedule
from mesh.model import GatewayConfig, Snapshot
from mesh.tokens import Authentication, KeySource, TokenRule
from tests.tokens import jwks

SOURCE = KeySource(uri="https://issuer.example/jwks", timeout=5.0)


def test_a_source_is_fetched_at_once_and_then_every_20_minutes() -> None:
    schedule = Schedule(100.0, random.Random(1))
    assert schedule.begin(100.0)
    assert not schedule.begin(100.0)
    assert schedule.wanted(100.0)
    schedule.succeeded(101.0)
    assert REFRESH * 0.9 <= schedule.due - 101.0 <= REFRESH
    assert not schedule.begin(schedule.due - 1)
    assert schedule.begin(schedule.due)


def test_failures_are_tried_again_later_and_later() -> None:
    schedule = Schedule(0.0, random.Random(1))
    now, waits = 0.0, []
    for _ in range(12):
        assert schedule.begin(now)
        schedule.failed(now)
        waits.append(schedule.due - now)
        assert not schedule.wanted(now)
        assert not schedule.want(now)
        now = schedule.due
    assert FIRST_RETRY / 2 <= waits[0] <= FIRST_RETRY
    assert MOST_RETRY / 2 <= waits[-1] <= MOST_RETRY
    assert schedule.begin(now)
    schedule.succeeded(now)
    assert not schedule.failing


def test_unknown_keys_cause_a_fetch_now_and_then() -> None:
    schedule = Schedule(0.0, random.Random(1))
    schedule.begin(0.0)
    schedule.succeeded(0.0)
    assert not schedule.want(UNKNOWN_EVERY - 0.1)
    assert schedule.want(UNKNOWN_EVERY)
    assert not schedule.want(UNKNOWN_EVERY)
    assert schedule.wanted(UNKNOWN_EVERY)
    schedule.succeeded(UNKNOWN_EVERY + 1)
    assert not schedule.wanted(2 * UNKNOWN_EVERY)
    assert schedule.wanted(2 * UNKNOWN_EVERY + 1)


def test_no_token_causes_a_fetch_while_the_issuer_is_away() -> None:
    schedule = Schedule(0.0, random.Random(1))
    schedule.begin(0.0)
    schedule.succeeded(0.0)
    assert schedule.begin(schedule.due)
    now = schedule.due
    schedule.failed(now)
    assert not schedule.wanted(now + UNKNOWN_EVERY * 0.01)
    assert schedule.want(schedule.due)


class World:
    """A store whose fetches are answered by the test, and whose clock stands still."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[KeySource] = []
        self.answer: Callable[[], Awaitable[bytes]] = self.never
        self.told: list[tuple[str, str]] = []
        self.store = KeyStore(self.fetch, clock=lambda: self.now, counts=self)

    async def never(self) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def fetch(self, source: KeySource) -> bytes:
        self.asked.append(source)
        return await self.answer()

    def fetched(self, source: str, result: str) -> None:
        self.told.append((source, result))

    def gives(self, text: str | bytes) -> None:
        async def answer() -> bytes:
            return text.encode() if isinstance(text, str) else text

        self.answer = answer

    def fails(self, problem: Exception) -> None:
        async def answer() -> bytes:
            raise problem

        self.answer = answer


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def body() -> None:
        world = World()
        try:
            async with asyncio.timeout(20):
                await test(world)
        finally:
            await world.store.close()

    asyncio.run(body())


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_keys_are_there_before_anybody_asks() -> None:
    async def test(world: World) -> None:
        world.gives(jwks("r1", "e1"))
        world.store.follow([SOURCE])
        await settled()
        keys = world.store.of(SOURCE)
        assert keys.set is not None
        assert [key.kid for key in keys.set.keys] == ["r1", "e1"]
        world.store.follow([SOURCE])
        await settled()
        assert len(world.asked) == 1
        assert world.told == [(SOURCE.uri, "ok")]
        (state,) = world.store.state()
        assert state == {
            "source": SOURCE.uri,
            "keys": 2,
            "ids": ["r1", "e1"],
            "unused": [],
            "age": 0.0,
            "error": "",
            "waiting": 0,
        }

    run(test)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (FetchError("it answers with 500"), "it answers with 500"),
        (TimeoutError(), "no answer within 5 s"),
        (RuntimeError("unforeseen"), "unforeseen"),
        (None, "the key set can't be read"),
    ],
)
def test_the_last_good_keys_outlive_an_outage(problem: Exception | None, said: str) -> None:
    async def test(world: World) -> None:
        world.gives(jwks("r1"))
        world.store.follow([SOURCE])
        await settled()
        keys = world.store.of(SOURCE)
        before = keys.set
        if problem is None:
            world.gives("<html>sorry</html>")
        else:
            world.fails(problem)
        world.now = REFRESH
        world.store.follow([SOURCE])
        await settled()
        assert keys.set is before
        assert keys.error.startswith(said)
        assert world.told[-1] == (SOURCE.uri, "failed")
        world.gives(jwks("r1", "r2"))
        world.now += MOST_RETRY
        world.store.follow([SOURCE])
        await settled()
        assert keys.error == ""
        assert keys.set is not None
        assert len(keys.set.keys) == 2

    run(test)


def test_the_same_keys_are_the_same_set() -> None:
    async def test(world: World) -> None:
        world.gives(jwks("r1"))
        world.store.follow([SOURCE])
        await settled()
        before = world.store.of(SOURCE).set
        world.now = REFRESH
        world.store.follow([SOURCE])
        await settled()
        assert len(world.asked) == 2
        assert world.store.of(SOURCE).set is before

    run(test)


def test_all_who_wait_share_one_fetch() -> None:
    async def test(world: World) -> None:
        gate = asyncio.Event()

        async def answer() -> bytes:
            await gate.wait()
            return jwks("r1").encode()

        world.answer = answer
        keys = world.store.of(SOURCE)
        done: list[int] = []
        cancels = [keys.wait(lambda number=number: done.append(number)) for number in range(5)]  # type: ignore[misc]
        await settled()
        assert len(world.asked) == 1
        cancels[3]()
        gate.set()
        await settled()
        assert done == [0, 1, 2, 4]
        assert keys.waiting == 0

    run(test)


def test_who_waits_is_told_of_failures_and_others_are_not_let_wait() -> None:
    async def test(world: World) -> None:
        world.fails(FetchError("away"))
        keys = world.store.of(SOURCE)
        done: list[str] = []
        assert keys.wanted
        keys.wait(lambda: done.append("a"))
        await settled()
        assert done == ["a"]
        assert keys.set is None
        assert not keys.wanted
        world.now += MOST_RETRY
        assert keys.wanted

    run(test)


def test_no_more_than_so_many_wait() -> None:
    async def test(world: World) -> None:
        keys = world.store.of(SOURCE)
        assert keys.wanted
        held = [keys.wait(_nothing()) for _ in range(MOST_WAITING)]
        assert not keys.wanted
        held[0]()
        assert keys.wanted

    run(test)


def _nothing() -> Callable[[], None]:
    found: list[None] = []
    return lambda: found.append(None)


def test_one_who_fails_does_not_leave_the_others_behind() -> None:
    async def test(world: World) -> None:
        world.gives(jwks("r1"))
        keys = world.store.of(SOURCE)
        done: list[int] = []

        def fails() -> None:
            raise RuntimeError

        keys.wait(fails)
        keys.wait(lambda: done.append(1))
        await settled()
        assert done == [1]

    run(test)


def test_a_fetch_has_its_time() -> None:
    async def test(world: World) -> None:
        slow = KeySource(uri=SOURCE.uri, timeout=0.05)
        keys = world.store.of(slow)
        waited = asyncio.Event()
        keys.wait(waited.set)
        await waited.wait()
        assert keys.error == "no answer within 0.05 s"

    run(test)


def test_sources_that_nobody_names_any_more_are_forgotten() -> None:
    async def test(world: World) -> None:
        keys = world.store.of(SOURCE)
        waited = asyncio.Event()
        keys.wait(waited.set)
        await settled()
        world.store.follow([])
        assert waited.is_set()
        assert world.store.state() == []
        assert world.store.of(SOURCE) is not keys

    run(test)


def test_inline_keys_need_nobody() -> None:
    async def test(world: World) -> None:
        keys = world.store.of(KeySource(inline=jwks("r1")))
        assert keys.set is not None
        assert not keys.wanted
        world.store.follow([keys.source])
        await settled()
        assert world.asked == []
        assert world.store.state()[0]["age"] is None

    run(test)


def test_the_keys_of_a_configuration_are_followed() -> None:
    async def test(world: World) -> None:
        def config(*sources: KeySource) -> Authentication:
            return Authentication(tuple(TokenRule(name="a", issuer="i", keys=source) for source in sources))

        ours, theirs, service = (KeySource(uri=f"https://{name}.example") for name in ("ours", "theirs", "service"))
        gateways = {
            f"edge/{name}": GatewayConfig(namespace="edge", name=name, authentication=config(source))
            for name, source in (("ours", ours), ("theirs", theirs))
        }
        tokens = Tokens(world.store)
        snapshot: Any = Snapshot(version="1", gateways=gateways, service_authentications=(config(service),))
        first = tokens.of(config(ours).rules)
        tokens.follow(snapshot, ("edge/ours", "edge/gone"))
        await settled()
        assert set(world.asked) == {ours, service}
        assert tokens.of(config(ours).rules) is first
        tokens.follow(Snapshot(version="2"), ())
        assert tokens.of(config(ours).rules) is not first

    run(test)

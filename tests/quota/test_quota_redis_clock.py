"""A real Redis whose wall clock is set while gateways lease from it (by libfaketime, for its process alone)."""

from __future__ import annotations

import asyncio
import datetime
import importlib.util
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import redis
from quota_world import limit

from mesh.questions import Grant, TokenQuestion
from quota.lessee import QuotaLessee
from quota.redis_store import RedisStore
from tests import servers

HOUR = 3600
RATE, BURST = 10, 20


def library() -> Path:
    spec = importlib.util.find_spec("libfaketime")  # importing it would change this process
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.rglob("libfaketime.so.1"))


class Clock:
    """What the Redis takes for the time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0)

    def set(self, seconds: int) -> None:
        """Sets it forward, or back."""
        self._write(f"{seconds:+d}")

    def stop(self, at: int) -> None:
        """Sets it to a time (Unix seconds) and stops it there."""
        self._write(datetime.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S"))

    def _write(self, text: str) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(text + "\n")
        beside.replace(self.path)

    @property
    def wrapper(self) -> list[str]:
        settings = ("FAKETIME_NO_CACHE=1", "DONT_FAKE_MONOTONIC=1", f"FAKETIME_TIMESTAMP_FILE={self.path}")
        return ["env", f"LD_PRELOAD={library()}", *settings]


class Fleet:
    """Two gateways, and how much they have admitted since when."""

    def __init__(self, url: str) -> None:
        self.stores = [RedisStore(url + "?start=full", budget=1.0) for _ in range(2)]
        self.lessees = [QuotaLessee(store, holder=f"g{at}", sharers=2) for at, store in enumerate(self.stores)]
        self.question = TokenQuestion(limit(tokens=RATE, interval=1.0, burst=BURST, timeout=2.0), ("x",))
        self.began = time.monotonic()
        self.admitted = 0

    async def ask(self, lessee: QuotaLessee) -> bool:
        grant = lessee.take(self.question, 0.0)
        if grant is None:
            future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
            lessee.ask(self.question, future.set_result)
            grant = await future
        assert not grant.error
        self.admitted += grant.admitted
        return grant.admitted

    async def flood(self) -> None:
        for _ in range(3 * BURST):
            for lessee in self.lessees:
                await self.ask(lessee)

    async def more(self) -> None:
        """Until something is admitted again."""
        end = time.monotonic() + 20
        while not any([await self.ask(lessee) for lessee in self.lessees]):
            assert time.monotonic() < end, "nothing is refilled"
            await asyncio.sleep(0.05)

    def within(self) -> None:
        assert self.admitted <= BURST + RATE * (time.monotonic() - self.began) + 1


async def story(url: str, clock: Clock, steps: Callable[[Fleet], Awaitable[None]]) -> None:
    fleet = Fleet(url)
    try:
        await fleet.flood()
        fleet.within()
        await steps(fleet)
    finally:
        for lessee in fleet.lessees:
            await lessee.close()
        for store in fleet.stores:
            await store.close()


@pytest.mark.parametrize("seconds", [5, HOUR])
def test_a_clock_that_is_set_forward_gives_nothing_away(tmp_path: Path, seconds: int) -> None:
    clock = Clock(tmp_path / "clock")
    with servers.redis(wrapper=clock.wrapper, program="redis-server") as server:

        async def steps(fleet: Fleet) -> None:
            for _ in range(2):
                before = redis.Redis.from_url(server.url).time()[0]
                clock.set(seconds)
                assert redis.Redis.from_url(server.url).time()[0] >= before + seconds - 2, "the clock is set"
                await fleet.flood()
                fleet.within()
                await fleet.more()
                clock.set(0)
                await fleet.more()
                fleet.within()

        asyncio.run(story(server.url, clock, steps))


def test_a_clock_that_is_set_back_stops_nothing(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    with servers.redis(wrapper=clock.wrapper, program="redis-server") as server:

        async def steps(fleet: Fleet) -> None:
            for _ in range(2):
                clock.set(-HOUR)
                await fleet.more()
                await fleet.more()
                fleet.within()
                clock.set(0)

        asyncio.run(story(server.url, clock, steps))

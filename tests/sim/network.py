"""A store as a lessee sees it, over a network that delays, loses, doubles and reorders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from quota.breaker import Breaker
from quota.bucket import Ask
from quota.slots import SlotAsk
from quota.store import Done, Failure, SlotsDone
from tests.sim.redis import Redis
from tests.sim.world import Process, World


class Weather(msgspec.Struct):
    """How the network is just now; the chances are between 0 and 1."""

    delay: float = 0.0005
    """Seconds, on average, one way."""
    slow: float = 0.0
    """The chance that a message takes up to a second."""
    lost: float = 0.0
    doubled: float = 0.0


class Link:
    """A `quota.store.Store` for one process."""

    def __init__(self, world: World, process: Process, redis: Redis, weather: Weather, budget: float = 0.25) -> None:
        self._world = world
        self._process = process
        self._redis = redis
        self._weather = weather
        self._budget = budget
        self._breaker = Breaker(rng=world.rng)
        self.cut = False
        """Nothing gets through."""
        self.asked: Callable[[Ask], None] | None = None
        """Is told of the next ask."""
        self.asks = 0
        self.lost = 0
        """Answers that did not come, of asks that were sent."""

    def ask(self, key: str, ask: Ask, done: Done, *, strict: bool = False) -> None:
        """As `quota.store.Store.ask`."""
        if self._ask(lambda: self._redis.execute(key, ask), done) and self.asked is not None:
            self.asked(ask)

    def ask_slots(self, key: str, ask: SlotAsk, done: SlotsDone, *, strict: bool = False) -> None:
        """As `quota.store.Store.ask_slots`."""
        self._ask(lambda: self._redis.execute_slots(key, ask), done)

    def _ask(self, execute: Callable[[], Any], done: Any) -> bool:
        """False when the breaker does not let it through."""
        if not self._breaker.allows(self._world.now):
            done(Failure("the breaker is open", sent=False))
            return False
        self.asks += 1
        over = False

        def finish(answer: Any) -> None:
            nonlocal over
            if not over:
                over = True
                timer.cancel()
                if isinstance(answer, Failure):
                    self.lost += 1
                    self._breaker.failed(self._world.now)
                else:
                    self._breaker.succeeded()
                done(answer)

        timer = self._process.call_later(self._budget, finish, Failure("no answer in time"))

        def arrived() -> None:
            if self._world.now < self._redis.ready_at:
                self._world.at(self._redis.ready_at, arrived)
                return
            reply = execute()
            self._send(lambda: self._process.deliver(lambda: finish(reply)))

        self._send(arrived)
        if self._world.rng.random() < self._weather.doubled:
            self._send(arrived)
        return True

    def _send(self, call: Any) -> None:
        rng, weather = self._world.rng, self._weather
        if self.cut or rng.random() < weather.lost:
            return
        delay = rng.random() if rng.random() < weather.slow else rng.expovariate(1 / weather.delay)
        self._world.after(delay, call)

    def state(self) -> dict[str, Any]:
        """As `quota.store.Store.state`."""
        return {}

    async def close(self) -> None:
        """As `quota.store.Store.close`."""

"""Virtual time, and processes in it. Everything happens in one thread, in the order of the heap."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any


class Timer:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """As `quota.lessee.Handle`."""
        self.call = None


class World:
    """Seconds since the beginning, and what is to come."""

    def __init__(self, rng: random.Random) -> None:
        self.now = 0.0
        self.rng = rng
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def at(self, moment: float, call: Callable[[], object]) -> Timer:
        """Has `call` called at `moment`."""
        timer = Timer(call)
        heapq.heappush(self._heap, (moment, next(self._numbers), timer))
        return timer

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Has `call` called in `seconds`."""
        return self.at(self.now + seconds, call)

    def run(self, until: float) -> None:
        """Lets time pass."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            moment, _, timer = heapq.heappop(heap)
            self.now = max(self.now, moment)
            if timer.call is not None:
                timer.call()
        self.now = until


class Process:
    """One process of the fleet: what is delivered to it waits while it is stopped, and is lost once it is dead. Its clock is
    CLOCK_BOOTTIME: it begins anywhere and drifts, but goes on while the process is stopped."""

    def __init__(self, world: World, drift: float) -> None:
        self.world = world
        self.dead = False
        self._began = world.rng.uniform(0, 1e6)
        self._drift = drift
        self._stopped_until = 0.0

    def clock(self) -> float:
        """Seconds on its own clock."""
        return self._began + self.world.now * (1 + self._drift)

    @property
    def stopped(self) -> bool:
        """Whether it does nothing just now."""
        return self.dead or self.world.now < self._stopped_until

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`."""
        self._stopped_until = max(self._stopped_until, self.world.now + seconds)

    def deliver(self, call: Callable[[], object]) -> None:
        """Calls `call` in the process, as soon as it runs."""
        if self.dead:
            return
        if self.world.now < self._stopped_until:
            self.world.at(self._stopped_until, lambda: self.deliver(call))
        else:
            call()

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """As `quota.lessee.Timers`."""
        timer = Timer(lambda: callback(*args))

        def due() -> None:
            if timer.call is not None:
                timer.call()

        self.world.after(delay / (1 + self._drift), lambda: self.deliver(due))
        return timer

"""Deadlines of many things, by one timer.

A gateway has tens of thousands of deadlines and nearly none of them passes. So nothing is scheduled for a request: what has a deadline
keeps it in an attribute, and four times a second one sweep looks at all of them. Deadlines are kept to within a quarter of a
second; one that is nearer than a second gets a timer of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("tollhouse.gateway")

INTERVAL = 0.25
"""Seconds between two sweeps."""
NEAR = 1.0
"""Seconds below which a timeout is worth a timer of its own."""


class Timed(Protocol):
    """Something with a deadline."""

    deadline: float
    """Monotonic seconds; `inf` for none."""

    def expired(self, now: float) -> None:
        """Called when `now` is past `deadline`: ends, or sets a later deadline."""
        ...


class Sweeper:
    """Owns the set of what has deadlines, and the one timer."""

    __slots__ = ("_every", "_handle", "_loop", "now", "watched")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self._every: list[Callable[[float], None]] = []
        self.watched: set[Timed] = set()
        self.now = loop.time()
        """Monotonic seconds as of the last sweep: exact enough to tell what has been still for minutes, and costs nothing to read."""

    def start(self) -> None:
        """Begins to sweep."""
        if self._handle is None:
            self._handle = self._loop.call_later(INTERVAL, self._tick)

    def stop(self) -> None:
        """Sweeps no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def each(self, call: Callable[[float], None]) -> Callable[[], None]:
        """Has `call(now)` called at each sweep, until what is returned is called."""
        self._every.append(call)

        def stop() -> None:
            if call in self._every:
                self._every.remove(call)

        return stop

    def soon(self, thing: Timed, seconds: float) -> asyncio.TimerHandle | None:
        """A timer of its own for a `thing` whose deadline is near; None when the sweep will do. The caller cancels it."""
        return self._loop.call_later(seconds, self._look, thing) if seconds < NEAR else None

    def _look(self, thing: Timed) -> None:
        now = self._loop.time()
        if thing in self.watched and thing.deadline <= now:
            thing.expired(now)

    def _tick(self) -> None:
        self._handle = self._loop.call_later(INTERVAL, self._tick)
        self.sweep(self._loop.time())

    def sweep(self, now: float) -> None:
        """Tells everything whose deadline has passed."""
        self.now = now
        for thing in [thing for thing in self.watched if thing.deadline <= now]:
            if thing in self.watched:
                try:
                    thing.expired(now)
                except Exception:  # the others' deadlines have passed as well
                    log.exception("a deadline could not be kept")
        for call in tuple(self._every):
            try:
                call(now)
            except Exception:
                log.exception("a regular task failed")

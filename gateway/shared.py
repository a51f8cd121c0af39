"""What all connections of one gateway in one worker share: the parts that a request meets on its way, and the counts that are bounded."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Protocol

from gateway.codec.h1 import Fields
from gateway.driver import Waiting
from gateway.exchange import Forwarder
from gateway.limits import Limits
from gateway.place import Place
from gateway.plan import Pending, Routed, Settled
from gateway.poller import Poller
from gateway.timers import Sweeper
from mesh.http import RequestHead
from mesh.outcome import Outcome
from mesh.peer import Peer
from telemetry.record import Telemetry


class Route(Protocol):
    """`gateway.route.route`, as a stream sees it."""

    def __call__(self, head: RequestHead, peer: Peer, place: Place, received: float, rng: random.Random, *, waited: bool = False) -> Routed:
        """What is to be done with a request."""
        ...


class Settler(Protocol):
    """`gateway.driver.Driver`, as a stream sees it."""

    def drive(self, pending: Pending, outcome: Outcome, done: Callable[[Settled], None]) -> Settled | Waiting:
        """Answers the questions of `pending`: at once, or later through `done`."""
        ...


class Shared:
    """Owns the worker's poller, sweeper, table of header lines and count of requests in progress."""

    __slots__ = (
        "_own_sweeper",
        "_second",
        "_stops",
        "date",
        "driver",
        "emptied",
        "fields",
        "first_look",
        "forwarder",
        "key",
        "limits",
        "loop",
        "poller",
        "requests",
        "rng",
        "route",
        "sweeper",
        "telemetry",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        key: str,
        *,
        route: Route,
        driver: Settler,
        forwarder: Forwarder,
        telemetry: Telemetry,
        limits: Limits,
        poller: Poller | None = None,
        sweeper: Sweeper | None = None,
    ) -> None:
        self.loop = loop
        self.key = key
        """`namespace/name` of the gateway."""
        self.route = route
        self.driver = driver
        self.forwarder = forwarder
        self.telemetry = telemetry
        self.limits = limits
        self.poller = poller or Poller(loop)
        self.sweeper = sweeper or Sweeper(loop)
        self._own_sweeper = sweeper is None
        self._stops = [self.sweeper.each(self._tick)]
        self.fields = Fields()
        self.rng = random.Random()  # noqa: S311 -- spreads load and makes request ids; keeps no secret
        self.first_look = min(limits.idle_stream, limits.stream_recheck)
        """Seconds after which a request in progress is looked at, unless it says otherwise."""
        self.requests = 0
        """Requests in progress."""
        self.emptied = asyncio.Event()
        """Set whenever a port that takes no more connections has one less."""
        self._second = 0
        self.date = b""
        """The present as a `Date` field's value, to the second (RFC 9110 section 6.6.1)."""
        self._tick(0.0)

    def start(self, each: Callable[[float], None]) -> None:
        """Begins to sweep, with `each` called every time."""
        self._stops.append(self.sweeper.each(each))
        if self._own_sweeper:
            self.sweeper.start()

    def stop(self) -> None:
        """Sweeps no more."""
        for stop in self._stops:
            stop()
        self._stops.clear()
        if self._own_sweeper:
            self.sweeper.stop()

    def _tick(self, _now: float) -> None:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self.date = formatdate(second, usegmt=True).encode("ascii")

"""The parts of a pool: a place for each endpoint of the cluster, in it a lane for each protocol, in that the connections."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Protocol

from gateway.codec.h1 import Fields
from gateway.connect import Dial, Dialer
from gateway.limits import Limits
from gateway.outlier import Health
from gateway.poller import Poller
from gateway.timers import Sweeper
from gateway.upstream import Upstream
from mesh.model import Endpoint
from mesh.refusals import Refusal

Key = tuple[str, int]
"""Address and port."""


class Waiter(Protocol):
    """A request that waits for a connection."""

    def connected(self, connection: Upstream) -> None:
        """Here is one, which must be used or `released`."""
        ...

    def not_connected(self, refusal: Refusal) -> None:
        """There will be none from this place."""
        ...

    def moved(self) -> None:
        """This place is not there any more: choose another."""
        ...


Way = tuple[bool, str]
"""How an endpoint is spoken to: by HTTP/2 or not, and the name that is asked for in TLS (empty: the cluster's own)."""


class Lane:
    """The connections to one endpoint in one way. Owned by its place."""

    __slots__ = ("alpn", "dials", "free", "http2", "name", "opened", "place", "waiting")

    def __init__(self, place: Place, way: Way, alpn: tuple[str, ...]) -> None:
        self.place = place
        self.http2, self.name = way
        self.alpn = alpn
        self.free: list[Upstream] = []
        """With room for a request; the one used last is last, so that those that are not needed grow old."""
        self.opened: set[Upstream] = set()
        self.dials: set[Dial] = set()
        self.waiting: dict[Waiter, None] = {}
        """In order."""

    @property
    def way(self) -> Way:
        """The lane's key at its place."""
        return self.http2, self.name

    def forget(self) -> None:
        """A lane for a name that nobody uses any more goes: names come from requests."""
        if self.name and not (self.opened or self.dials or self.waiting):
            self.place.lanes.pop(self.way, None)

    def take(self) -> Upstream | None:
        """A connection with room, or None."""
        free = self.free
        while free:
            connection = free[-1]
            available = 0 if connection.spent else connection.codec.available
            if available <= 1:
                free.pop()
                connection.listed = False
            if available:
                return connection
        return None


class Place:
    """One endpoint of a cluster. Owned by its pool."""

    __slots__ = ("active", "endpoint", "health", "lanes", "name", "weight")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = f"[{endpoint.address}]:{endpoint.port}" if ":" in endpoint.address else f"{endpoint.address}:{endpoint.port}"
        self.weight = endpoint.weight
        self.active = 0
        """Requests in progress."""
        self.health = Health()
        self.lanes: dict[Way, Lane] = {}
        """By whether it is for HTTP/2."""

    @property
    def busy(self) -> bool:
        """Whether requests are in progress, or connections open."""
        return self.active > 0 or any(lane.opened for lane in self.lanes.values())


class Shared:
    """What the pools of a worker have in common: the parts list of `gateway.forward`."""

    __slots__ = (
        "connects",
        "dialer",
        "ejections",
        "fields",
        "limits",
        "loop",
        "mirroring",
        "mirrors",
        "plaintext",
        "poller",
        "retries",
        "rng",
        "sweeper",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, dialer: Dialer, poller: Poller, limits: Limits, sweeper: Sweeper, rng: random.Random
    ) -> None:
        self.loop = loop
        self.dialer = dialer
        self.poller = poller
        self.limits = limits
        self.sweeper = sweeper
        self.rng = rng
        self.fields = Fields()
        self.plaintext = True
        """Whether plaintext off loopback is allowed."""
        self.connects: Counter[tuple[str, str]] = Counter()
        """Connections made or not, by cluster and `ok` or why not."""
        self.retries: Counter[tuple[str, str]] = Counter()
        """By cluster and why."""
        self.ejections: Counter[tuple[str, str]] = Counter()
        """By cluster and why."""
        self.mirrors: Counter[tuple[str, str]] = Counter()
        """Copies of requests, by cluster and what became of them."""
        self.mirroring = 0
        """Copies in progress."""

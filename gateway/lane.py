"""The parts of a pool: a place for each endpoint of the cluster, in it a lane for each protocol, in that the connections."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Final, Protocol

from gateway.codec.events import ClientCodec
from gateway.codec.h1 import Fields
from gateway.codec.h1_client import H1Client
from gateway.codec.h2_client import H2Client
from gateway.codec.raw_client import RawClient
from gateway.connect import EITHER, H1, H2, Dial, Dialer, Target
from gateway.limits import Limits
from gateway.outlier import Health
from gateway.poller import Poller
from gateway.timers import Sweeper
from gateway.upstream import Upstream
from mesh.model import Cluster, Endpoint
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


HTTP1_ONLY: Final = 0
HTTP2_WANTED: Final = 1
RAW: Final = 2
"""What a tunnel of CONNECT carries, and nothing of our own."""

Way = tuple[int, str]
"""How an endpoint is spoken to (one of the three above), and the name that is asked for in TLS (empty: the cluster's own)."""


def alpn_of(speech: int, cluster: Cluster) -> tuple[str, ...]:
    """What is offered in TLS."""
    if speech == HTTP2_WANTED:
        return H2 if cluster.http2 == "always" else EITHER
    return H1 if speech == HTTP1_ONLY else ()


def target_of(lane: Lane, cluster: Cluster, plaintext: bool) -> Target:
    """Where to connect to for a lane. `plaintext`: whether it is allowed off loopback.

    Through a tunnel to a service with a BackendTLSPolicy goes the client's own TLS, so that we speak none (what is not TLS does not go
    through: `gateway.tunnel_attempt`); to a workload of the mesh it goes within the mesh's.
    """
    endpoint, tls = lane.place.endpoint, cluster.tls
    if lane.speech == RAW and tls is not None and tls.mode == "validate":
        tls, plaintext = None, True
    return Target(
        host=endpoint.address,
        port=endpoint.port,
        tls=tls,
        alpn=lane.alpn,
        identities=endpoint.identities,
        timeout=cluster.connect_timeout,
        plaintext=plaintext,
        name=lane.name,
        proxy=cluster.proxy_protocol,
    )


def codec_of(lane: Lane, http2: bool, shared: Shared) -> ClientCodec:
    """The codec of a connection that was made."""
    limits = shared.limits
    if http2:
        return H2Client(max_head=limits.head, max_fields=limits.fields)
    return RawClient() if lane.speech == RAW else H1Client(shared.fields, limits.head, limits.fields)


class Lane:
    """The connections to one endpoint in one way. Owned by its place."""

    __slots__ = ("alpn", "dials", "free", "http2", "name", "opened", "place", "speech", "waiting")

    def __init__(self, place: Place, way: Way, alpn: tuple[str, ...]) -> None:
        self.place = place
        self.speech, self.name = way
        self.http2 = self.speech == HTTP2_WANTED
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
        return self.speech, self.name

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

"""One gateway in a process: its two sides, the decider and the lessee that it asks, and what it shows of itself.

`tollhouse gateway` has one of these, `tollhouse up` one for each Gateway of the mesh; the parts that they share are given to them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.external_auth import ServiceAsker
from gateway.forward import UpstreamForwarder
from gateway.gateway import Gateway
from gateway.limits import Limits
from gateway.meter import Charging
from gateway.poller import Poller
from gateway.rate_limits import Services
from gateway.reports import Reports
from gateway.timers import Sweeper
from gateway.upstream_reports import UpstreamReports
from identity.authenticator import Tokens
from identity.files import IdentitySource
from mesh.model import Snapshot
from mesh.questions import Decider, Lessee
from pdp.asker import Asker
from telemetry.metrics import Counter
from telemetry.record import Telemetry
from tollhouse.sockets import Where


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateways of one process have in common."""

    loop: asyncio.AbstractEventLoop
    decider: Decider
    services: dict[str, Asker]
    """Who asks the authorization services that routes of a gateway name, by its `namespace/name`: the decider's."""
    lessee: Lessee
    tokens: Tokens
    telemetry: Telemetry
    reports: Reports
    upstreams: UpstreamReports
    costs: Counter
    """Of how costs were told after answers: `gateway.meter.costs_of`."""
    answers: Counter
    """Of rate-limit services (`gateway.rate_limits.answers_of`)."""
    limits: Limits = Limits()
    stale: Callable[[], bool]


class Node:
    """One running gateway. Its owner calls `apply` with each snapshot and `drain` in the end."""

    def __init__(
        self,
        shared: Shared,
        key: str,
        identity: IdentitySource,
        address: str = "",
        sockets: Mapping[Where, socket.socket] | None = None,
        datagrams: Mapping[Where, socket.socket] | None = None,
        *,
        binds: bool = True,
    ) -> None:
        """`key`: `namespace/name`; `address`: where to bind when the Gateway names no address; `sockets`, `datagrams`: those handed over;
        `binds`: whether it may bind others itself."""
        self.key = key
        self.identity = identity
        poller = Poller(shared.loop)
        self._sweeper = sweeper = Sweeper(shared.loop)
        sweeper.start()
        charging = Charging(shared.lessee.charge, shared.costs.inc)
        self.forwarder = UpstreamForwarder(
            shared.loop, identity=identity, limits=shared.limits, sweeper=sweeper, poller=poller, charging=charging
        )
        self._services = shared.services
        self._services[key] = ServiceAsker(self.forwarder)
        self._upstreams = shared.upstreams
        self._upstreams.sides[key] = self.forwarder
        self.gateway = Gateway(
            shared.loop,
            key,
            identity=identity,
            decider=shared.decider,
            lessee=Services(shared.lessee, self.forwarder, key, shared.answers),
            forwarder=self.forwarder,
            telemetry=shared.telemetry,
            limits=shared.limits,
            address=address,
            sockets=sockets,
            datagrams=datagrams,
            binds=binds,
            stale=shared.stale,
            reports=shared.reports,
            poller=poller,
            sweeper=sweeper,
            tokens=shared.tokens,
        )

    def apply(self, snapshot: Snapshot) -> None:
        """Follows `snapshot`. Raises OSError when a port cannot be bound the first time."""
        own = snapshot.gateways.get(self.key)
        if own is None:
            self.forwarder.show(None)
        else:
            self.forwarder.show(own.client_certificate, own.no_client_certificate)
        self.forwarder.apply(snapshot)
        self.gateway.apply(snapshot)

    async def drain(self, seconds: float) -> None:
        """Finishes what is in progress, for `seconds` at most, and ends."""
        await self.gateway.drain(seconds)
        await self.forwarder.close(0.5)
        self._sweeper.stop()
        self._upstreams.sides.pop(self.key, None)
        self._services.pop(self.key, None)

    def state(self) -> dict[str, Any]:
        """What it is doing, as JSON types: for `status` and the admin page."""
        return {
            "gateway": self.key,
            "identity": self.identity.current.spiffe_id,
            "identityUntil": self.identity.current.not_after,
            "identityProblem": self.identity.problem,
            "listening": [
                {"address": address or "*", "port": port, "listeners": list(names)} for address, port, names in self.gateway.listening
            ],
            "problems": self.gateway.problems(),
            "connections": self.gateway.connections,
            "requests": self.gateway.requests,
            "upstreams": self.forwarder.state(),
        }

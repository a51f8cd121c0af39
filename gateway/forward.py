"""Carries permits out: the upstream's side of every exchange, and the only way to an upstream (`gateway.exchange.Forwarder`).

A request's way: `gateway.attempt` (tries) -> `gateway.pool` (an endpoint, a connection) -> `gateway.connect` when a new connection is
needed -> `gateway.upstream` (its streams) -> and the answer back. This module owns the pools and keeps them in step with the configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from gateway.attempt import Attempt
from gateway.connect import Contexts, Dialer
from gateway.exchange import Client, Forwarding
from gateway.grpc_web import WebBridge
from gateway.l4_upstream import Connecting, Done, FlowUpstream, OpeningFlow
from gateway.lane import Shared
from gateway.limits import Limits
from gateway.meter import Charging, Meter
from gateway.mirror import MirrorRequest, Tee, count
from gateway.plan import L4Permit, Permit, Plan
from gateway.poller import Poller
from gateway.pool import Pool
from gateway.resolve import Resolver
from gateway.timers import Sweeper
from gateway.tunnel_attempt import TunnelAttempt
from gateway.upstream_reports import Count, Gauge
from identity.files import IdentitySource
from identity.svid import Identity
from mesh.http import HTTP2, Header
from mesh.model import EMPTY, Cluster, Snapshot
from mesh.outcome import Outcome
from mesh.refusals import Overloaded, Refusal

DEFAULTS = Limits()
CLOSING_POLL = 0.05
"""Seconds between two looks at whether everything has ended."""


class UpstreamForwarder:
    """Owns the pools of a worker, by the name of their cluster. All calls are made on `loop`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        identity: IdentitySource,
        limits: Limits = DEFAULTS,
        sweeper: Sweeper | None = None,
        poller: Poller | None = None,
        rng: random.Random | None = None,
        charging: Charging | None = None,
    ) -> None:
        """`charging`: where costs go that are known after the answer; without it nothing is charged then.

        `poller` and `sweeper` are to be those of the clients' side: then what both sides write in one callback goes out at its end, and
        one timer serves all. A sweeper that is given must be started by its owner."""
        self._own_sweeper = None if sweeper is not None else Sweeper(loop)
        if sweeper is None:
            assert self._own_sweeper is not None
            sweeper = self._own_sweeper
            sweeper.start()
        self._loop = loop
        self._resolver = Resolver(loop, limits)
        self._contexts = Contexts(identity)
        dialer = Dialer(loop, self._resolver, self._contexts, limits.handshake_steps)
        self._shared = Shared(loop, dialer, poller or Poller(loop), limits, sweeper, rng or random.Random())  # noqa: S311  # spreads load; guards nothing
        self._snapshot = EMPTY
        self._charging = charging
        self._pools: dict[str, Pool] = {}
        self._leaving: list[Pool] = []
        self._closing = False
        self._stop_identity = identity.on_change(self._identity_changed)

    # Requests

    def forward(self, permit: Permit, client: Client, *, ended: bool) -> Forwarding:
        """As `gateway.exchange.Forwarder.forward`."""
        plan = permit.plan
        if plan.bridge and not isinstance(client, WebBridge):
            bridge = WebBridge(client, plan.bridge)
            bridge.forwarding = self.forward(permit, bridge, ended=ended)
            return bridge
        if permit.metered and self._charging is not None and not isinstance(client, Meter):
            meter = Meter(client, permit, self._charging)
            meter.forwarding = self.forward(meter.permit, meter, ended=ended)
            return meter
        cluster = plan.cluster
        pool = self._pools.get(cluster.name)
        if pool is None:
            pool = self._new_pool(cluster)
        client.outcome.cluster = cluster.name
        http2 = pool.cluster.http2 != "never" and wants_http2(pool.cluster, plan, permit.headers)
        tunnel = bool(plan.asking.head.tunnel)
        if permit.mirrors and not self._closing and not tunnel:
            return self._mirrored(pool, permit, client, ended, http2)
        attempt = TunnelAttempt(pool, permit, client, http2) if tunnel else Attempt(pool, permit, client, ended, http2)
        if self._closing:
            attempt.cancel()
            client.refuse(Overloaded(reason="the gateway ends"))
        else:
            attempt.begin()
        return attempt

    def _mirrored(self, pool: Pool, permit: Permit, client: Client, ended: bool, http2: bool) -> Forwarding:
        """Begins a request, and the copies of one that has an upstream."""
        shared = self._shared
        tee = Tee(client)
        attempt = Attempt(pool, permit, tee, ended, http2)
        tee.join(attempt, ())
        attempt.begin()
        copies = []
        for copied in () if tee.over else permit.mirrors:
            cluster = copied.plan.cluster
            to = self._pools.get(cluster.name) or self._new_pool(cluster)
            if shared.mirroring >= shared.limits.mirrors:
                count(shared.mirrors, cluster.name, "busy")
                continue
            copy = MirrorRequest(shared, copied)
            copies.append(copy)
            http2 = wants_http2(to.cluster, copied.plan, copied.headers)
            copy.begin(Attempt(to, copied, copy, ended, http2), ended)
        tee.join(attempt, tuple(copies))
        return tee

    def connect(self, permit: L4Permit, outcome: Outcome, done: Done) -> Connecting | Refusal:
        """As `gateway.exchange.Forwarder.connect`."""
        cluster = permit.plan.cluster
        outcome.cluster = cluster.name
        if self._closing:
            return Overloaded(reason="the gateway ends")
        connecting = Connecting(self._pools.get(cluster.name) or self._new_pool(cluster), permit, outcome, done)
        connecting.begin()
        return connecting

    def open_flow(self, permit: L4Permit, outcome: Outcome, done: Callable[[FlowUpstream | Refusal], None]) -> OpeningFlow | Refusal:
        """As `gateway.exchange.Forwarder.open_flow`."""
        cluster = permit.plan.cluster
        outcome.cluster = cluster.name
        if self._closing:
            return Overloaded(reason="the gateway ends")
        return OpeningFlow(self._pools.get(cluster.name) or self._new_pool(cluster), permit, outcome, done)

    def _new_pool(self, cluster: Cluster) -> Pool:
        # What is in force now, not what was when the request was routed; a cluster that is not there any more as it was then.
        pool = self._pools[cluster.name] = Pool(self._shared, self._snapshot.clusters.get(cluster.name, cluster))
        return pool

    # Changes

    def apply(self, snapshot: Snapshot) -> None:
        """Goes by `snapshot` from now on. Clusters that did not change keep connections, ejections and whose turn it is."""
        before, self._snapshot = self._snapshot, snapshot
        self._leaving = [pool for pool in self._leaving if pool.connections or pool.active]
        for name, pool in tuple(self._pools.items()):
            cluster = snapshot.clusters.get(name)
            if cluster is None:
                del self._pools[name]
                self._leaving.append(pool)
                pool.close()
                self._forget(name)
            elif cluster is not pool.cluster and cluster != pool.cluster:
                pool.apply(cluster)
        self._shared.plaintext = snapshot.mesh.upstream != "Strict"
        if before.mesh.upstream != snapshot.mesh.upstream:
            for pool in self._pools.values():
                if pool.cluster.tls is None:
                    pool.renew()

    def show(self, certificate: tuple[bytes, bytes] | None, missing: str = "") -> None:
        """Shows `certificate` (chain and key, PEM) to upstreams outside of the mesh from now on; connections made with another are left.

        missing: why there is none though there should be one; then there are no connections to these upstreams.
        """
        if (certificate, missing) == (self._contexts.certificate, self._contexts.missing):
            return
        self._contexts.certificate, self._contexts.missing = certificate, missing
        self._contexts.clear()
        for pool in self._pools.values():
            tls = pool.cluster.tls
            if tls is not None and tls.mode == "validate" and not tls.present_svid:
                pool.renew()

    def _identity_changed(self, identity: Identity) -> None:
        self._contexts.clear()
        for pool in self._pools.values():
            tls = pool.cluster.tls
            if tls is not None and (tls.mode == "mesh" or tls.present_svid):
                pool.renew()

    async def close(self, seconds: float) -> None:
        """Takes no more requests; gives those in progress `seconds`, then ends what is left."""
        self._closing = True
        self._stop_identity()
        end = self._loop.time() + seconds
        while any(pool.active for pool in self._all()) and self._loop.time() < end:  # noqa: ASYNC110  # requests do not pay for an event that is wanted once
            await asyncio.sleep(min(CLOSING_POLL, max(0.0, end - self._loop.time())))
        for pool in self._all():
            pool.close()
            pool.abort()
        self._resolver.close()
        if self._own_sweeper is not None:
            self._own_sweeper.stop()

    def _all(self) -> list[Pool]:
        return [*self._pools.values(), *self._leaving]

    # What is shown

    @property
    def poller(self) -> Poller:
        """What coalesces writes; to be shared with the clients' side."""
        return self._shared.poller

    def state(self) -> dict[str, Any]:
        """Clusters, their endpoints, who is ejected, connections: for the admin page and `status`."""
        clusters = {}
        for name in sorted({*self._snapshot.clusters, *self._pools}):
            pool = self._pools.get(name)
            if pool is None:  # not used yet: shown as it would begin
                pool = Pool(self._shared, self._snapshot.clusters[name])
            clusters[name] = pool.state()
        return {
            "clusters": clusters,
            "connections": sum(pool.connections for pool in self._all()),
            "leaving": sum(pool.connections for pool in self._leaving),
        }

    def gauge(self, name: Gauge) -> dict[str, float]:
        """As `gateway.upstream_reports.Reporting`."""
        return {cluster: float(len(pool.ejected) if name == "ejected" else getattr(pool, name)) for cluster, pool in self._pools.items()}

    def count(self, name: Count) -> Counter[tuple[str, str]]:
        """As `gateway.upstream_reports.Reporting`."""
        counted: Counter[tuple[str, str]] = getattr(self._shared, name)
        return counted

    def _forget(self, name: str) -> None:
        """The counts of a cluster that is gone: a mesh whose services come and go must not grow a page without end."""
        for counted in (self._shared.connects, self._shared.retries, self._shared.ejections, self._shared.mirrors):
            for key in [key for key in counted if key[0] == name]:
                with contextlib.suppress(KeyError):
                    del counted[key]


def wants_http2(cluster: Cluster, plan: Plan, headers: list[Header]) -> bool:
    """Which protocol a request goes by. With `auto` it is HTTP/1.1, which costs less, except where something would be lost on the way:
    gRPC, and trailers that the client says it reads, arrive by HTTP/2 and must go on by it. A GRPCRoute's backends speak gRPC."""
    mode = cluster.http2
    if mode == "always":
        return True
    head = plan.asking.head
    if mode == "never" or head.tunnel:
        return False
    if plan.rule.grpc:
        return True
    if cluster.tls is None or head.version != HTTP2:
        return False
    return any(
        (name == b"content-type" and value.startswith(b"application/grpc")) or (name == b"te" and value == b"trailers")
        for name, value in headers
    )

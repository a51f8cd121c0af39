"""A gateway with both sides on real sockets, before an upstream of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from door_world import KEY, MUTUAL, Answers, Door, Echo, a_listener, a_snapshot, gateway_identity, listening_socket

from gateway.forward import UpstreamForwarder
from gateway.gateway import Gateway
from gateway.limits import Limits
from gateway.poller import Poller
from gateway.timers import Sweeper
from mesh.model import Endpoint, ListenerTls, QuotaLimit, VirtualHost
from mesh.outcome import Outcome
from telemetry.record import Telemetry

QUICK = Limits(linger=0.1)
T = TypeVar("T", bound="Through")


class Through(Door):
    """A running gateway; `forwarder` is a stand-in that is not used."""

    upstreams: UpstreamForwarder

    async def plain(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def pooled(self) -> int:
        """Upstream connections that are open."""
        found: int = self.upstreams.state()["connections"]
        return found


@asynccontextmanager
async def through(
    upstream: int,
    kind: type[T] = Through,  # type: ignore[assignment]
    *,
    tls: ListenerTls | None = None,
    limits: Limits = QUICK,
    cluster: dict[str, Any] | None = None,
    method: bytes = b"",
    drain: float = 0.5,
    quota: tuple[QuotaLimit, ...] = (),
    **rule: Any,
) -> AsyncIterator[T]:
    """A gateway before the port `upstream`; in plaintext unless `tls` says otherwise. `rule`: as `a_listener`'s; `method`: its match's;
    `quota`: its limits; `drain`: seconds that requests have in the end."""
    loop = asyncio.get_running_loop()
    sock = listening_socket()
    port = sock.getsockname()[1]
    listener = a_listener(port, "http" if tls is None else "https", tls, limits=quota, **rule)
    if method:
        match = msgspec.structs.replace(listener.hosts["*"].prefix[b""][0], method=method)
        listener = msgspec.structs.replace(listener, hosts={"*": VirtualHost(hostname="*", prefix={b"": (match,)})})
    snapshot = a_snapshot(listener)
    before = snapshot.clusters["shop/web:80"]
    made_of = {"endpoints": (Endpoint(address="127.0.0.1", port=upstream),), **(cluster or {})}
    snapshot = msgspec.structs.replace(snapshot, clusters={before.name: msgspec.structs.replace(before, **made_of)})
    identity, telemetry, answers = gateway_identity(), Telemetry(), Answers()
    poller, sweeper = Poller(loop), Sweeper(loop)
    sweeper.start()
    forwarder = UpstreamForwarder(loop, identity=identity, limits=limits, poller=poller, sweeper=sweeper)
    gateway = Gateway(
        loop,
        KEY,
        identity=identity,
        decider=answers,
        lessee=answers,
        forwarder=forwarder,
        telemetry=telemetry,
        limits=limits,
        address="127.0.0.1",
        sockets={("127.0.0.1", port): sock},
        poller=poller,
        sweeper=sweeper,
    )
    made = kind(gateway, port, Echo(), telemetry, answers, identity)
    made.upstreams = forwarder
    record = telemetry.record

    def kept(outcome: Outcome) -> None:
        made.outcomes.append(outcome)
        record(outcome)

    telemetry.record = kept
    forwarder.apply(snapshot)
    gateway.apply(snapshot)
    try:
        yield made
    finally:
        await gateway.drain(drain)
        await forwarder.close(drain)
        sweeper.stop()
        assert gateway.requests == 0


__all__ = ["MUTUAL", "QUICK", "Through", "through"]

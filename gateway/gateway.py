"""The listeners of one Gateway resource: they follow the newest snapshot and the newest identity, and close nothing without need."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Final

from gateway.connection import GRACE, Connection
from gateway.driver import Driver, never
from gateway.exchange import Forwarder
from gateway.handshake import Steps
from gateway.l4_connection import L4Connection
from gateway.l4_udp_ports import UdpPorts
from gateway.limits import Limits
from gateway.listening import Port, bind
from gateway.place import Place
from gateway.poller import Poller
from gateway.reports import Reports
from gateway.route import route
from gateway.serving import Serving
from gateway.shared import Shared
from gateway.timers import Sweeper
from identity.authenticator import Tokens
from identity.files import IdentitySource
from identity.svid import Identity
from mesh.model import EMPTY, GatewayConfig, Listener, Snapshot
from mesh.questions import Decider, Lessee
from telemetry.record import Telemetry

log = logging.getLogger("tollhouse.gateway")

Where = tuple[str, int]
"""An address (empty for all) and a port."""

BIND_AGAIN: Final = 5.0
"""Seconds until a port that could not be bound is tried again."""
RETIRED_MOST: Final = 300.0
"""Seconds that requests in progress on a listener that is no more, or with other trust, may still take."""
DEFAULTS: Final = Limits()


class Gateway:
    """Owns the ports of one Gateway resource and everything that its connections share. Belongs to one event loop.

    A listener whose certificate cannot be served (it has expired, it does not fit its key) ends every connection at once, and says why in
    the log and in `tollhouse_listener_problems`; the others are not touched.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        key: str,
        *,
        identity: IdentitySource,
        decider: Decider,
        lessee: Lessee,
        forwarder: Forwarder,
        telemetry: Telemetry,
        limits: Limits = DEFAULTS,
        address: str = "",
        sockets: Mapping[Where, socket.socket] | None = None,
        datagrams: Mapping[Where, socket.socket] | None = None,
        binds: bool = True,
        stale: Callable[[], bool] = never,
        reports: Reports | None = None,
        poller: Poller | None = None,
        sweeper: Sweeper | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """`key`: `namespace/name`. `address`: where to bind when the resource names none (empty: everywhere). `sockets`: listening sockets
        handed over by a parent, by the address and port that they stand for, `datagrams`: the same for UDP; with `binds` False there are
        no others (a worker's parent binds). `stale`: as `gateway.driver.Driver`'s. `reports`: to be shared by the gateways of one process.
        `poller`, `sweeper`: those that the forwarder was given too, so that what both sides write in one turn goes out together; a sweeper
        that is given must be started by its owner. `tokens`: verifies the tokens of requests; their owner says what they follow."""
        self.key = key
        self._identity = identity
        self._tokens = tokens
        self._address = address
        self._given = dict(sockets or {})
        self._binds = binds
        self._shared = Shared(
            loop,
            key,
            route=route,
            driver=Driver(decider, lessee, loop.time, stale, telemetry.late),
            forwarder=forwarder,
            telemetry=telemetry,
            limits=limits,
            poller=poller,
            sweeper=sweeper,
        )
        self._udp = UdpPorts(self._shared, identity, datagrams or {}, binds)
        self._steps = Steps(loop, limits.handshake_steps)
        self._snapshot: Snapshot = EMPTY
        self._applied = False
        self._draining = False
        self._ports: dict[Where, Port] = {}
        self._unbound: dict[Where, str] = {}
        self._leaving: list[Port] = []
        self._retired: list[tuple[float, Serving]] = []
        self._told: dict[str, str] = {}
        self._bind_at = 0.0
        self._second = 0
        self._forget = identity.on_change(self._identity_changed)
        self._reports = reports or Reports(telemetry)
        self._reports.gateways.append(self)

    # Configuration

    def apply(self, snapshot: Snapshot) -> None:
        """Follows `snapshot` from now on. Raises OSError when a port cannot be bound at the first call; later that is logged, shown in
        `tollhouse_listener_problems` and tried again."""
        if self._draining:
            return
        self._bind(snapshot)
        self._snapshot = snapshot
        if not self._applied:
            self._applied = True
            self._shared.start(self._tick)
        self._refresh()

    def _wanted(self, snapshot: Snapshot) -> dict[Where, list[Listener]]:
        config = snapshot.gateways.get(self.key)
        wanted: dict[Where, list[Listener]] = {}
        if config is not None:
            for host in config.hosts(self._address):
                for listener in config.listeners:
                    if listener.protocol != "UDP":
                        wanted.setdefault((host, listener.port), []).append(listener)
        return wanted

    def _wanted_udp(self, snapshot: Snapshot) -> dict[Where, Listener]:
        config = snapshot.gateways.get(self.key)
        if config is None:
            return {}
        udp = [listener for listener in config.listeners if listener.protocol == "UDP"]
        return {(host, listener.port): listener for host in config.hosts(self._address) for listener in udp}

    def _bind(self, snapshot: Snapshot) -> None:
        """Binds what is new, before anything else is changed."""
        fresh: dict[Where, Port] = {}
        self._unbound = {}
        for where in self._wanted(snapshot):
            if where in self._ports:
                continue
            given = self._given.pop(where, None)
            if given is None and not self._binds:
                self._unbound[where] = f"port {where[1]} is yet to be handed over"
                continue
            try:
                fresh[where] = Port(self._shared, self._steps, where[0], given or bind(*where), given is None)
            except OSError as problem:
                if not self._applied:
                    for port in fresh.values():
                        port.stop()
                    raise
                self._unbound[where] = f"port {where[1]} cannot be bound: {problem.strerror}"
        try:
            self._udp.bind(self._wanted_udp(snapshot), not self._applied)
        except OSError:
            for port in fresh.values():
                port.stop()
            raise
        self._bind_at = self._shared.loop.time() + BIND_AGAIN
        self._ports.update(fresh)

    def _refresh(self) -> None:
        """Brings every port in line with the snapshot and the identity in force."""
        snapshot = self._snapshot
        wanted = self._wanted(snapshot)
        config = snapshot.gateways.get(self.key)
        for where, port in list(self._ports.items()):
            if where not in wanted or config is None:
                port.stop()
                port.abandon()
                self._retire(port.servings)
                port.serve(())
                del self._ports[where]
                self._leaving.append(port)
            else:
                try:
                    self._fit(port, config, wanted[where])
                except Exception:  # what one port cannot follow is no reason to leave the others behind
                    log.exception("gateway %s: port %d stays as it was", self.key, port.number)
        self._udp.fit(snapshot, config, self._wanted_udp(snapshot))
        self._tell()

    def _fit(self, port: Port, config: GatewayConfig, listeners: list[Listener]) -> None:
        snapshot, identity = self._snapshot, self._identity
        # A host of the other kind must not be reached through this port: in plaintext nobody has proved anything.
        kind = [listener for listener in listeners if listener.encrypted == listeners[0].encrypted]
        siblings = tuple(sorted(kind, key=specificity))
        before = {serving.name: serving for serving in port.servings}
        servings: list[Serving] = []
        for listener in listeners:
            place = Place(
                snapshot=snapshot,
                gateway=config,
                listener=listener,
                siblings=siblings,
                identity=identity.current.spiffe_id,
                tokens=self._tokens,
            )
            serving = before.get(listener.name)
            if serving is None or serving.concerns(listener, identity, snapshot.mesh):
                serving = Serving(place, identity)
            else:
                del before[listener.name]
                serving.update(place, identity)
            servings.append(serving)
        port.serve(servings, snapshot.mesh.trusted_proxies if port.number in config.proxy_ports else ())
        self._retire(tuple(before.values()))

    def _retire(self, servings: tuple[Serving, ...]) -> None:
        """Drains the connections of listeners that are no more, or that ask other things of their clients now."""
        for serving in servings:
            for connection in list(serving.connections):
                connection.drain(0.0)
            if serving.connections:
                self._retired.append((self._shared.loop.time() + RETIRED_MOST, serving))

    def _identity_changed(self, identity: Identity) -> None:
        if self._applied and not self._draining:
            self._refresh()

    def _tick(self, now: float) -> None:
        for port in (*self._ports.values(), *self._leaving):
            port.sweep(now)
        second = int(now)
        if second == self._second:
            return
        self._second = second
        self._leaving = [port for port in self._leaving if port.count]
        self._udp.sweep(now)
        for until, serving in self._retired:
            if until <= now:
                for connection in list(serving.connections):
                    connection.abort()
        self._retired = [(until, serving) for until, serving in self._retired if serving.connections]
        if self._draining:
            return
        wall = time.time()
        changed = [serving.check(self._identity, wall) for port in self._ports.values() for serving in port.servings]
        if (self._unbound or self._udp.unbound) and now >= self._bind_at:
            self._bind(self._snapshot)
            self._refresh()
        elif any(changed):
            self._tell()

    def _tell(self) -> None:
        """Logs what has become a problem, and what no longer is one."""
        problems = self.problems()
        for name, problem in problems.items():
            if self._told.get(name) != problem:
                log.error("gateway %s: listener %s is not served: %s", self.key, name, problem)
        for name in self._told:
            if name not in problems:
                log.info("gateway %s: listener %s: the problem is gone", self.key, name)
        self._told = problems

    # State

    @property
    def listening(self) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
        """Address, port and listeners of each socket that takes connections, or flows of datagrams."""
        return tuple(
            (where[0], port.number, tuple([serving.name for serving in port.servings])) for where, port in self._ports.items() if port.open
        ) + (() if self._draining else self._udp.listening)

    @property
    def ready(self) -> bool:
        """Whether traffic may be sent here: configured, not draining, and something is served (or nothing is asked for)."""
        if not self._applied or self._draining:
            return False
        servings = [serving for port in self._ports.values() for serving in port.servings]
        if self._udp.listening or any(not serving.problem for serving in servings):
            return True
        return not (servings or self._unbound or self._udp.unbound)

    @property
    def connections(self) -> int:
        """Client connections open now, those that shake hands or are being written out included."""
        return sum(port.count for port in (*self._ports.values(), *self._leaving))

    @property
    def requests(self) -> int:
        """Requests in progress."""
        return self._shared.requests

    def problems(self) -> dict[str, str]:
        """What is not served, by listener, and why."""
        found = {serving.name: serving.problem for port in self._ports.values() for serving in port.servings if serving.problem}
        found.update(self._udp.unbound)
        for where, listeners in self._wanted(self._snapshot).items():
            if where in self._unbound:
                found.update({listener.name: self._unbound[where] for listener in listeners})
            port = self._ports.get(where)
            if port is not None:
                mixed = [listener.name for listener in listeners if listener.encrypted != port.tls]
                found.update(dict.fromkeys(mixed, f"port {where[1]} is shared with a listener of the other kind (TLS and plaintext)"))
        return found

    def certificates(self) -> dict[tuple[str, str], float]:
        """When each certificate that is served ends (seconds since the epoch), by its SPIFFE ID or name and its serial number."""
        return {labels: ends for port in self._ports.values() for serving in port.servings for labels, ends in serving.served.items()}

    # The end

    async def drain(self, seconds: float) -> None:
        """Takes no new connections (they are refused), has requests in progress finished, and closes everything after `seconds` at the
        latest. Idle HTTP/1.1 connections take a last request for a moment, since one may be under way."""
        loop = self._shared.loop
        deadline = loop.time() + seconds
        self._draining = True
        for port in self._ports.values():
            port.stop()
        self._udp.finish()
        grace = min(GRACE, seconds / 4)
        for connection in self._connections():
            connection.drain(grace)
        emptied = self._shared.emptied
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while self.connections:
                    emptied.clear()
                    await emptied.wait()
        if self._udp.flows:  # nobody knows whether more will come: answers that are under way get a moment
            await asyncio.sleep(max(0.0, min(grace, deadline - loop.time())))
        self.close()

    def _connections(self) -> list[Connection | L4Connection]:
        servings = [serving for port in (*self._ports.values(), *self._leaving) for serving in port.servings]
        return [connection for serving in (*servings, *[old for _, old in self._retired]) for connection in serving.connections]

    def close(self) -> None:
        """Ends everything at once; requests in progress are recorded as given up."""
        self._draining = True
        self._forget()
        for port in (*self._ports.values(), *self._leaving):
            port.stop()
            port.abandon()
        for connection in self._connections():
            connection.abort()
        self._udp.stop()
        for sock in self._given.values():
            sock.close()
        self._given.clear()
        self._shared.stop()
        if self in self._reports.gateways:
            self._reports.gateways.remove(self)


def specificity(listener: Listener) -> tuple[int, int]:
    """Sorts listeners by how specific their hostname is: exact, then the longest wildcard, then all."""
    hostname = listener.hostname
    if hostname in {"", "*"}:
        return 2, 0
    return (1 if hostname.startswith("*.") else 0), -len(hostname)

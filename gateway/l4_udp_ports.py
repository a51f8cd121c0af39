"""The UDP ports of one Gateway resource: they follow the newest snapshot, as `gateway.gateway` has its TCP ports follow it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Final

from gateway.l4_udp import UdpPort, bind_udp
from gateway.place import Place
from gateway.serving import Serving
from gateway.shared import Shared
from identity.files import IdentitySource
from mesh.model import GatewayConfig, Listener, Snapshot

Where = tuple[str, int]
"""An address (empty for all) and a port."""
RETIRED_MOST: Final = 300.0
"""Seconds for which the flows of a listener that is no more may still go on."""


class UdpPorts:
    """Owns the ports, those included whose listener is gone and that have flows left."""

    __slots__ = ("_binds", "_given", "_identity", "_ports", "_retired", "_shared", "unbound")

    def __init__(self, shared: Shared, identity: IdentitySource, given: Mapping[Where, socket.socket], binds: bool) -> None:
        """`given`: bound sockets from a parent; with `binds` False there are no others."""
        self._shared = shared
        self._identity = identity
        self._given = dict(given)
        self._binds = binds
        self._ports: dict[Where, UdpPort] = {}
        self._retired: dict[Where, float] = {}
        """Until when the flows of a port without a listener may go on, monotonic seconds."""
        self.unbound: dict[str, str] = {}
        """Why a listener's port is not bound, by its name."""

    def bind(self, wanted: Mapping[Where, Listener], first: bool) -> None:
        """Binds what is new, before anything else is changed. Raises OSError when something can't be and it is the `first` time."""
        fresh: dict[Where, UdpPort] = {}
        self.unbound = {}
        for where, listener in wanted.items():
            known = self._ports.get(where)
            if known is not None and known.open:
                continue
            given = self._given.pop(where, None)
            if given is None and not self._binds:
                self.unbound[listener.name] = f"UDP port {where[1]} is yet to be handed over"
                continue
            try:
                fresh[where] = UdpPort(self._shared, where[0], given or bind_udp(*where))
            except OSError as problem:
                if first:
                    for port in fresh.values():
                        port.stop()
                    raise
                self.unbound[listener.name] = f"UDP port {where[1]} cannot be bound: {problem.strerror}"
        self._ports.update(fresh)

    def fit(self, snapshot: Snapshot, config: GatewayConfig | None, wanted: Mapping[Where, Listener]) -> None:
        """Brings every port in line with `snapshot`."""
        for where, port in self._ports.items():
            listener = wanted.get(where)
            if listener is None or config is None:
                if where not in self._retired:
                    self._retired[where] = self._shared.loop.time() + RETIRED_MOST
                    port.retire()
                continue
            self._retired.pop(where, None)
            place = Place(snapshot=snapshot, gateway=config, listener=listener, siblings=(), identity=self._identity.current.spiffe_id)
            serving = port.serving
            if serving is None or serving.name != listener.name:
                serving = Serving(place, self._identity)
            else:
                serving.update(place, self._identity)
            port.serve(serving)

    def sweep(self, now: float) -> None:
        """Forgets ports that are closed, and closes those whose time is over."""
        for where, until in list(self._retired.items()):
            port = self._ports[where]
            if until <= now:
                port.stop()
            if not port.open:
                del self._retired[where], self._ports[where]

    @property
    def listening(self) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
        """Address, port and listener of each socket that takes flows."""
        return tuple(
            (where[0], port.number, (port.serving.name,)) for where, port in self._ports.items() if port.open and port.serving is not None
        )

    @property
    def flows(self) -> int:
        """Flows that there are."""
        return sum(len(port.flows) for port in self._ports.values())

    def finish(self) -> None:
        """Takes no more datagrams from clients; answers still go to them."""
        for port in self._ports.values():
            port.finish()

    def stop(self) -> None:
        """Ends everything."""
        for port in self._ports.values():
            port.stop()
        for sock in self._given.values():
            sock.close()
        self._given.clear()

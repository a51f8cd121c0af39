"""Where a request came in: the listener and its snapshot, with what makes routing quick.

One `Place` is made for a snapshot and a listener, and shared by its connections; a request finds its virtual host here by one look-up.
"""

from __future__ import annotations

from typing import Final, final

import msgspec

from gateway.authentication import Authenticated
from gateway.choice import Chooser
from gateway.match import ByHost, ChooserMaker, HostTable
from identity.authenticator import Tokens
from mesh.http import host_of
from mesh.model import GatewayConfig, Listener, Rule, Snapshot, VirtualHost
from mesh.refusals import Misdirected, NoHost
from mesh.tokens import NOT_AUTHENTICATED

AUTHORITIES: Final = 1024
"""Authorities whose virtual host is remembered; all are forgotten when there are more."""


@final
class Served:
    """A virtual host, and the listener that serves it."""

    __slots__ = ("listener", "table")

    def __init__(self, listener: Listener, table: HostTable) -> None:
        self.listener = listener
        self.table = table


class Table:
    """What a place has prepared. It is filled as hosts are asked for; its owner is the place."""

    __slots__ = (
        "_choosers",
        "_hosts",
        "_known",
        "_listeners",
        "_mine",
        "_tables",
        "_tokens",
        "authentication",
        "identity",
        "key",
        "mesh",
        "misdirects",
        "port",
        "trusted",
    )

    def __init__(self, place: Place) -> None:
        snapshot = place.snapshot
        self.mesh = snapshot.mesh
        self.trusted = snapshot.mesh.trusted_gateways
        self.key = place.gateway.key
        self.identity = place.identity
        self.port = place.listener.port
        config = place.gateway.authentication
        self.authentication = Authenticated(config, place.tokens or Tokens()) if config != NOT_AUTHENTICATED else None
        """None where no tokens are looked at before a request is routed."""
        self.misdirects = place.listener.protocol == "HTTPS"
        """Under TLS the connection's SNI chose the listener, and with it what a client had to prove."""
        self._mine = place.listener
        siblings: dict[str, Listener] = {}
        for sibling in (*place.siblings, place.listener):
            siblings.setdefault(sibling.hostname or "*", sibling)
        self._listeners = ByHost(siblings)
        self._hosts: dict[str, ByHost[VirtualHost]] = {}
        self._known: dict[bytes, Served | NoHost | Misdirected] = {}
        self._tables: dict[tuple[str, str], HostTable] = {}
        self._tokens = place.tokens

        def chooser(rule: Rule) -> Chooser:
            return Chooser(rule, snapshot, self._tokens)

        self._choosers = ChooserMaker(chooser)

    def served(self, authority: bytes) -> Served | NoHost | Misdirected:
        """The virtual host of `authority`, or why there is none on this connection."""
        found = self._known.get(authority)
        if found is None:
            if len(self._known) >= AUTHORITIES:
                self._known.clear()
            found = self._known[authority] = self._find(host_of(authority))
        return found

    def _find(self, host: bytes) -> Served | NoHost | Misdirected:
        listener = self._listeners.find(host)
        if listener is None:
            return NoHost(reason="no listener of this port has that hostname")
        if self.misdirects and listener is not self._mine and listener.name != self._mine.name:
            return Misdirected(reason=f"the host belongs to the listener {listener.name}, the connection to {self._mine.name}")
        hosts = self._hosts.get(listener.name)
        if hosts is None:
            hosts = self._hosts[listener.name] = ByHost(listener.hosts)
        host_found = hosts.find(host)
        if host_found is None:
            return NoHost(reason=f"no route of the listener {listener.name} has that hostname")
        name = (listener.name, host_found.hostname)
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = HostTable(host_found, self._choosers)
        return Served(listener, table)


class Place(msgspec.Struct, frozen=True, eq=False):
    """The listener that accepted a connection, in one snapshot."""

    snapshot: Snapshot
    gateway: GatewayConfig
    listener: Listener
    """By port and SNI."""
    siblings: tuple[Listener, ...]
    """All listeners of that port, most specific hostname first."""
    identity: str
    """SPIFFE ID of the gateway itself."""
    tokens: Tokens | None = None
    """Verifies tokens; without it keys are not fetched, and only those in the configuration are there."""
    table: Table = None  # type: ignore[assignment]
    """Prepared here; not to be given."""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "table", Table(self))

"""One listener in force: what its new connections are accepted with, and which connections it has.

A `Serving` outlives snapshots. A new one takes its place, and the old one's connections are drained, when a change concerns connections
that are open: the listener is another one, or what a client has to prove there is something else.
"""

from __future__ import annotations

import re
import ssl
import time
from typing import TYPE_CHECKING, Final

from gateway.l4_route import L4Table
from gateway.limits import Limits
from gateway.place import Place
from identity.files import IdentitySource
from identity.problems import IdentityError
from identity.svid import Facts, Identity, facts_of, leaf_end
from identity.tls import server_context
from mesh.model import Listener, ListenerTls, MeshSettings

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.l4_connection import L4Connection

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
INF: Final = float("inf")


class Serving:
    """Owns one listener's TLS context and the set of its connections. Its owner is the port."""

    __slots__ = (
        "_made_for",
        "connections",
        "context",
        "domains",
        "ends",
        "listener",
        "name",
        "place",
        "problem",
        "served",
        "table",
        "trusted",
    )

    def __init__(self, place: Place, identity: IdentitySource) -> None:
        self.connections: set[Connection | L4Connection] = set()
        self.context: ssl.SSLContext | None = None
        """None when there is nothing to serve: see `problem`. Always None in plaintext."""
        self.problem = ""
        """Why nothing can be accepted, in one sentence."""
        self.ends = INF
        """Wall clock: when the context may not be used any more, because a certificate in it ends."""
        self.served: dict[tuple[str, str], float] = {}
        """When each certificate that is served ends (wall clock), by its SPIFFE ID or name and its serial number."""
        self._made_for: tuple[ListenerTls, Identity] | None = None
        self.table: L4Table | None = None
        """Where connections below HTTP go; None on listeners that speak HTTP."""
        self.trusted = trusted_roots(place.listener, identity)
        self.domains = trust_domains(place.snapshot.mesh)
        self.name = place.listener.name
        self.update(place, identity)

    def make_room(self, now: float, limits: Limits) -> None:
        """Ends the connections that have had no request for `idle_when_full` seconds. `now`: monotonic seconds."""
        for connection in list(self.connections):
            if connection.streams or connection.over:
                continue
            # A deadline that is so near is that of a head which has begun to come.
            allowed = limits.head_timeout if connection.deadline <= now + limits.head_timeout else limits.idle_connection
            if connection.deadline - allowed + limits.idle_when_full <= now:
                connection.drain(0.0)

    def update(self, place: Place, identity: IdentitySource, now: float | None = None) -> bool:
        """Serves `place` from now on; makes a new context where the listener's TLS or the identity has changed. True if it did."""
        if place.listener.protocol in {"TCP", "TLS", "UDP"}:
            if self.table is None or self.table.place is not place:
                self.table = L4Table(place)
        else:
            self.table = None
        self.place = place
        self.listener = listener = place.listener
        self.domains = trust_domains(place.snapshot.mesh)
        self.trusted = trusted_roots(listener, identity)
        tls = listener.tls
        if tls is None:
            self.context, self.problem, self._made_for, self.served = None, "", None, {}
            return False
        now = time.time() if now is None else now
        wanted = (tls, identity.current)
        if self.context is not None and self._made_for == wanted and now < self.ends:
            return False
        try:
            self.context = server_context(tls, identity, now)
            self.problem = ""
            self.served = certificates_of(tls, identity.current)
        except IdentityError as problem:
            # Nothing is better than a certificate that has expired, or one that is no longer the listener's.
            self.context = None
            self.problem = str(problem)
            self.served = {}
        self._made_for = wanted
        ends = [end for chain, _ in tls.certificates if (end := leaf_end(chain)) >= now]
        self.ends = min([identity.current.not_after if tls.svid else INF, *ends])
        return True

    def check(self, identity: IdentitySource, now: float) -> bool:
        """Looks whether what is served has expired at `now` (wall clock); True if something has changed."""
        if self.context is None or now < self.ends:
            return False
        return self.update(self.place, identity, now)

    def concerns(self, listener: Listener, identity: IdentitySource, mesh: MeshSettings) -> bool:
        """Whether the change to `listener` (of the same name) and to the identity concerns connections that are open."""
        old, new = self.listener, listener
        if (old.protocol, old.hostname, old.port) != (new.protocol, new.hostname, new.port):
            return True
        if old.tls is None or new.tls is None:
            return old.tls is not new.tls
        if old.tls.client != new.tls.client:
            return True
        if new.tls.client is None:
            return False
        # A root more means nothing for those that an old one vouched for; a root less may.
        if not self.trusted <= trusted_roots(new, identity):
            return True
        return new.tls.client.source == "trust_bundle" and not self.domains <= trust_domains(mesh)


def trusted_roots(listener: Listener, identity: IdentitySource) -> frozenset[bytes]:
    """The CA certificates (PEM without its frame and white space) that vouch for the listener's clients."""
    client = listener.tls.client if listener.tls is not None else None
    if client is None or client.mode == "insecure_fallback":
        return frozenset()
    pem = client.roots if client.source == "roots" else identity.current.bundle
    return frozenset(b"".join(found.split()) for found in _CERTIFICATE.findall(pem))


def trust_domains(mesh: MeshSettings) -> frozenset[str]:
    """The mesh's own trust domain and its aliases."""
    return frozenset((mesh.trust_domain, *mesh.aliases))


def certificates_of(tls: ListenerTls, own: Identity) -> dict[tuple[str, str], float]:
    """When each certificate of a listener ends (wall clock), by its SPIFFE ID or first name and its serial number."""
    found = {(own.spiffe_id, own.serial): own.not_after} if tls.svid else {}
    for chain, _ in tls.certificates:
        first = chain.find(b"-----BEGIN CERTIFICATE-----")
        end = chain.find(b"-----END CERTIFICATE-----", first)
        if first < 0 or end < 0:
            continue
        facts = facts_of(ssl.PEM_cert_to_DER_cert(chain[first : end + 25].decode("ascii", "ignore")))
        if isinstance(facts, Facts):
            name = (*facts.uris, *facts.dns_names, facts.subject)[0]
            found[name, facts.serial] = facts.not_after
    return found

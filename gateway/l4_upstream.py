"""A connection to an endpoint for a connection of a client's: endpoints are tried one after the other until one takes it. And a socket
towards an endpoint for a flow of datagrams, where nobody takes or refuses anything before the first answer.

The pool's rules hold for all: who may be chosen and who is left out, how many connections there may be. A connection below HTTP is
never shared and never kept.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from gateway.connect import Connected, Dial, Result, Target, is_loopback
from gateway.lane import Place
from gateway.outlier import Result as Health
from gateway.plan import L4Permit
from gateway.pool import Pool
from gateway.resolve import Address
from mesh.outcome import Outcome
from mesh.refusals import ConnectFailed, NoEndpoint, Overflow, Refusal

TRIES = 3
"""Endpoints that are tried for one connection."""


class L4Upstream:
    """A connected endpoint. Whoever has it must `release` it, once."""

    __slots__ = ("_place", "_pool", "made")

    def __init__(self, pool: Pool, place: Place, made: Connected) -> None:
        self._pool = pool
        self._place = place
        self.made = made

    def release(self) -> None:
        """The connection has been closed."""
        give_back(self._pool, self._place)


Done = Callable[[L4Upstream | Refusal], None]


class Connecting:
    """Tries endpoints for one permitted connection. Ends with one call of `done`, never before `begin` returns, or with `cancel`."""

    __slots__ = ("_dial", "_done", "_outcome", "_permit", "_place", "_pool", "_tried")

    def __init__(self, pool: Pool, permit: L4Permit, outcome: Outcome, done: Done) -> None:
        """`outcome`: `endpoint`, `attempts` and `upstream_principal` are filled in."""
        self._pool = pool
        self._permit = permit
        self._outcome = outcome
        self._done: Done | None = done
        self._tried: tuple[Place, ...] = ()
        self._place: Place | None = None
        self._dial: Dial | None = None

    def begin(self) -> None:
        """Makes the first try."""
        refusal = self._try()
        if refusal is not None:
            self._pool.loop.call_soon(self._refuse, refusal)

    def _try(self) -> Refusal | None:
        """Begins to connect to the next endpoint; or why not."""
        pool, plan = self._pool, self._permit.plan
        cluster = pool.cluster
        place = pool.choose(self._tried)
        if place is None:
            return NoEndpoint(reason=f"{cluster.name} has no endpoint that is ready")
        if pool.connections >= cluster.max_connections:
            return Overflow(reason=f"{cluster.name} has {pool.connections} connections, which is all that it may have")
        self._outcome.endpoint = place.name
        self._outcome.attempts += 1
        self._tried = (*self._tried, place)
        self._place = place
        pool.connections += 1
        place.active += 1
        endpoint, peer = place.endpoint, plan.asking.peer
        # What is passed through is the client's own TLS: it checks by itself who is at the other end.
        target = Target(
            host=endpoint.address,
            port=endpoint.port,
            tls=None if plan.passthrough else cluster.tls,
            alpn=(),
            identities=endpoint.identities,
            timeout=cluster.connect_timeout,
            plaintext=plan.passthrough or pool.shared.plaintext,
            name=peer.sni if cluster.gateway else "",
            proxy=cluster.proxy_protocol,
            proxied=((peer.address, peer.port), (peer.local_address, peer.local_port)),
        )
        self._dial = pool.shared.dialer.dial(target, self._dialed)
        return None

    def _dialed(self, result: Result) -> None:
        pool, place = self._pool, self._place
        assert place is not None
        self._dial = None
        self._place = None
        if isinstance(result, Connected):
            pool.shared.connects[pool.cluster.name, "ok"] += 1
            pool.observe(place, Health.SUCCESS)
            self._outcome.upstream_principal = result.principal
            done, self._done = self._done, None
            if done is not None:
                done(L4Upstream(pool, place, result))
            return
        give_back(pool, place)
        pool.shared.connects[pool.cluster.name, result.reason] += 1
        if result.blame:
            pool.observe(place, Health.GATEWAY_ERROR)
        again = len(self._tried) < TRIES and result.blame and pool.has_other(self._tried)
        refusal = self._try() if again else result.refusal
        if refusal is not None:
            self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(refusal)

    def cancel(self) -> None:
        """The client has gone, or its time is over: nobody is called."""
        self._done = None
        dial, self._dial = self._dial, None
        place, self._place = self._place, None
        if dial is not None:
            dial.cancel()
        if place is not None:
            give_back(self._pool, place)


def give_back(pool: Pool, place: Place) -> None:
    """One connection less."""
    pool.connections -= 1
    place.active -= 1
    pool.freed()


class FlowUpstream:
    """A socket towards one endpoint, for one flow. Whoever has it must `close` it."""

    __slots__ = ("_place", "_pool", "fd", "sock")

    def __init__(self, pool: Pool, place: Place, sock: socket.socket) -> None:
        self._pool = pool
        self._place = place
        self.sock = sock
        self.fd = sock.fileno()

    def gone(self) -> bool:
        """Whether the endpoint is no longer in the configuration, or is left out because it fails."""
        place, pool = self._place, self._pool
        endpoint = place.endpoint
        return pool.places.get((endpoint.address, endpoint.port)) is not place or place in pool.ejected

    def succeeded(self) -> None:
        """The endpoint has answered."""
        self._pool.observe(self._place, Health.SUCCESS)

    def failed(self) -> None:
        """The endpoint can't be reached."""
        self._pool.observe(self._place, Health.GATEWAY_ERROR)

    def close(self) -> None:
        """Ends it."""
        self.sock.close()
        give_back(self._pool, self._place)


class OpeningFlow:
    """Finds an endpoint for one permitted flow. Ends with one call of `done`, perhaps before `begin` returns, or with `cancel`."""

    __slots__ = ("_done", "_permit", "_place", "_pool")

    def __init__(self, pool: Pool, permit: L4Permit, outcome: Outcome, done: Callable[[FlowUpstream | Refusal], None]) -> None:
        self._pool = pool
        self._permit = permit
        self._done: Callable[[FlowUpstream | Refusal], None] | None = done
        self._place: Place | None = None
        cluster = pool.cluster
        place = pool.choose(())
        if place is None:
            done(NoEndpoint(reason=f"{cluster.name} has no endpoint that is ready"))
            return
        outcome.endpoint = place.name
        outcome.attempts = 1
        self._place = place
        pool.connections += 1
        place.active += 1
        pool.shared.dialer.resolver.find(place.endpoint.address, place.endpoint.port, self._resolved)

    def _resolved(self, addresses: list[Address], problem: str) -> None:
        pool, place, done = self._pool, self._place, self._done
        if done is None or place is None:
            return
        self._done = self._place = None
        refusal: Refusal
        if not addresses:
            refusal = ConnectFailed(reason=f"{place.endpoint.address}: {problem}")
        elif not pool.shared.plaintext and not is_loopback(addresses[0][1][0]):
            refusal = ConnectFailed(reason="plaintext off loopback, and Mesh.upstream is Strict")
        else:
            family, address = addresses[0]
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM)
                try:
                    sock.setblocking(False)
                    sock.connect(address)
                except OSError:
                    sock.close()
                    raise
            except OSError as error:
                refusal = ConnectFailed(reason=(error.strerror or "error").lower())
            else:
                done(FlowUpstream(pool, place, sock))
                return
        give_back(pool, place)
        done(refusal)

    def cancel(self) -> None:
        """Nobody is called."""
        self._done = None
        place, self._place = self._place, None
        if place is not None:
            give_back(self._pool, place)

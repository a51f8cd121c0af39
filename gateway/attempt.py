"""One permitted request on its way: tries, one after the other, until an answer is complete or there is nothing left to try.

Its states, and what moves it on:

    WAITING   a connection has been asked for          connected -> SENDING      not_connected -> PAUSED or DONE
    SENDING   the head is on its way, no answer yet    answer -> ANSWERING       broken, expired -> PAUSED or DONE
    ANSWERING the answer's head went to the client     answer_end, broken, expired -> DONE
    PAUSED    between two tries                        time -> WAITING
    DONE      nothing more is called in either direction

`cancel` leads from each to DONE.
"""

from __future__ import annotations

import asyncio
import enum
from time import monotonic
from typing import TYPE_CHECKING

from gateway.answering import answer_headers
from gateway.codec.events import ResponseReceived
from gateway.exchange import Client
from gateway.headers import trailers_passed_on
from gateway.outlier import Result, result_of
from gateway.plan import Permit
from gateway.retry import Failure, Try, blames, may_retry, pause
from gateway.session import Stay
from gateway.upstream import Upstream
from mesh.http import HTTP2, HTTP10, HTTP11, UNKNOWN_LENGTH, Header, RequestHead, host_of
from mesh.model import Cluster
from mesh.refusals import BadHeader, NoEndpoint, Refusal, UpstreamTimeout

if TYPE_CHECKING:
    from gateway.lane import Place, Way
    from gateway.pool import Pool

VERSIONS = {HTTP10: "HTTP/1.0", HTTP11: "HTTP/1.1", HTTP2: "HTTP/2"}


class State(enum.Enum):
    """See the module."""

    WAITING = 1
    SENDING = 2
    ANSWERING = 3
    PAUSED = 4
    DONE = 5


WAITING, SENDING, ANSWERING, PAUSED, DONE = State


class Attempt:
    """`gateway.exchange.Forwarding`, `gateway.upstream.Stream`, `gateway.lane.Waiter` and `gateway.timers.Timed` of one request."""

    __slots__ = (
        "_client",
        "_complete",
        "_connection",
        "_credit",
        "_fresh",
        "_heard",
        "_held",
        "_kept",
        "_number",
        "_permit",
        "_place",
        "_pool",
        "_started",
        "_state",
        "_taken",
        "_timer",
        "_trailers",
        "_tried",
        "_tries",
        "_wanted",
        "deadline",
        "way",
    )

    def __init__(self, pool: Pool, permit: Permit, client: Client, ended: bool, http2: bool) -> None:
        self._pool = pool
        self._permit = permit
        self._client = client
        self._complete = ended
        self._state = WAITING
        self._started = monotonic()
        self._place: Place | None = None
        self._connection: Upstream | None = None
        self._number = 0
        self._tries = 0
        self._tried: tuple[Place, ...] = ()
        self._fresh = False
        self._taken = False
        self._kept: bytearray | None = bytearray() if permit.plan.rule.retry.replay and not ended else None
        """What has been taken of the request's body, while it is kept for another try."""
        self._trailers: list[Header] | None = None
        self._wanted = False
        self._heard = False
        self._held = False
        self._credit = 0
        self._timer: asyncio.TimerHandle | None = None
        self.deadline = 0.0
        self.way: Way = (http2, asked_name(pool.cluster, permit.plan.authority) if pool.cluster.gateway else "")
        """How the endpoint is spoken to: by HTTP/2, if it speaks that, and which name is asked for."""

    tunnelling = False
    """As `gateway.upstream.Stream.tunnelling`."""

    # Trying

    def begin(self) -> None:
        """Begins the next try."""
        self._timer = None
        pool = self._pool
        client = self._client
        self._state = WAITING
        stay = self._permit.plan.stay
        place = pool.choose(self._tried) if stay is None else self._kept_place(stay) or pool.choose(self._tried)
        if place is None:
            self._state = DONE
            client.refuse(NoEndpoint(reason=f"{pool.cluster.name} has no endpoint"))
            return
        self._place = place
        place.active += 1
        self._tries += 1
        outcome = client.outcome
        outcome.attempts = self._tries
        outcome.endpoint = place.name
        outcome.upstream_principal = ""
        limit = self._permit.plan.backend_timeout
        if limit is not None:
            self.deadline = pool.loop.time() + limit
            pool.sweeper.watched.add(self)
            self._timer = pool.sweeper.soon(self, limit)
        found = pool.acquire(self, place, self.way, self._fresh)
        if isinstance(found, Upstream):
            self.connected(found)
        elif found is not None:
            self._leave_place()
            self._state = DONE
            client.refuse(found)

    def _kept_place(self, stay: Stay) -> Place | None:
        """The endpoint of the request's session, while it is fit to be used and has not been tried."""
        pool = self._pool
        place = pool.places.get(stay.place) if stay.place is not None else None
        return place if place is not None and place not in self._tried and place not in pool.ejected else None

    def connected(self, connection: Upstream) -> None:
        """A connection has been found for this try."""
        if self._state is not WAITING:
            self._pool.released(connection)
            return
        permit = self._permit
        plan = permit.plan
        head = plan.asking.head
        if plan.method != head.method or plan.bridge:
            length = UNKNOWN_LENGTH if plan.bridge else head.body_length
            head = RequestHead(
                plan.method, head.scheme, head.authority, head.target, head.headers, head.version, length, tunnel=head.tunnel
            )
        complete = self._complete
        trailers = self._trailers
        kept = self._kept
        try:
            self._number = connection.begin(self, head, permit.headers, plan.target, plan.authority, complete and not trailers and not kept)
        except ValueError as error:
            self._pool.released(connection)
            self._leave_place()
            self._state = DONE
            self._client.refuse(BadHeader(reason=str(error)))
            return
        self._connection = connection
        self._state = SENDING
        self._client.outcome.upstream_principal = connection.principal
        if kept:
            connection.send_body(self._number, bytes(kept))
        if self._connection is not connection:
            return
        if not complete:
            self.writable()
        elif trailers or kept:
            connection.send_end(self._number, trailers)

    def not_connected(self, refusal: Refusal) -> None:
        """No connection could be made for this try. The pool has counted it against the endpoint already."""
        if self._state is WAITING:
            self._failed(Failure.CONNECT, refusal)

    def moved(self) -> None:
        """The endpoint was taken out of the configuration before there was a connection: that was no try."""
        if self._state is WAITING:
            self._leave_place()
            self._tries -= 1
            self.begin()

    def broken(self, failure: Failure, refusal: Refusal) -> None:
        """As `gateway.upstream.Stream.broken`."""
        self._connection = None
        if failure is Failure.STALE and (self._heard or self._state is ANSWERING):
            failure = Failure.RESET
        if blames(failure) and self._place is not None:
            self._pool.observe(self._place, Result.GATEWAY_ERROR)
        self._failed(failure, refusal)

    def expired(self, now: float) -> None:
        """As `gateway.timers.Timed.expired`: the try took too long."""
        if self._connection is not None and self._place is not None:
            self._pool.observe(self._place, Result.GATEWAY_ERROR)
        self._leave_connection()
        limit = self._permit.plan.backend_timeout
        self._failed(Failure.TIMEOUT, UpstreamTimeout(reason=f"not answered within the backend's {limit:g} s"))

    def _failed(self, failure: Failure, refusal: Refusal, status: int = 0) -> None:
        """The try is over: another one, or the end."""
        place = self._place
        self._leave_place()
        if self._may_retry(failure, status or refusal.answer_status):
            self._again(failure, place)
        else:
            self._state = DONE
            self._client.refuse(refusal)

    def _may_retry(self, failure: Failure, status: int) -> bool:
        plan = self._permit.plan
        answered = self._state is ANSWERING
        return may_retry(plan.rule.retry, Try(failure, status, plan.method, self._taken, self._tries, answered))

    def _again(self, failure: Failure, place: Place | None) -> None:
        self._state = PAUSED
        self._pool.count_retry(failure)
        self._fresh = failure is Failure.STALE
        if failure is not Failure.STALE and place is not None:
            self._tried = (*self._tried, place)
        if self._wanted:
            self._wanted = False
            self._client.request_wanted(False)
            if self._state is not PAUSED:
                return
        pool = self._pool
        delay = pause(self._permit.plan.rule.retry, failure, self._tries, pool.has_other(self._tried), pool.rng)
        if delay:
            self._timer = pool.loop.call_later(delay, self.begin)
        else:
            self.begin()

    def _leave_place(self) -> None:
        """This try uses its endpoint no longer."""
        place = self._place
        if place is not None:
            self._place = None
            place.active -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.deadline:
            self.deadline = 0.0
            self._pool.sweeper.watched.discard(self)

    def _leave_connection(self) -> None:
        """This try needs its connection, or its place in the queue for one, no longer."""
        connection = self._connection
        if connection is not None:
            self._connection = None
            self._give_back(connection)
            connection.abandon(self._number)
        elif self._state is WAITING and self._place is not None:
            self._pool.leave(self, self._place, self.way)

    # The request's body (gateway.exchange.Forwarding)

    def body(self, data: bytes) -> None:
        """As `Forwarding.body`."""
        connection = self._connection
        if connection is None or self._complete:
            return
        if self._kept is None:
            self._taken = True
        elif len(self._kept) + len(data) <= self._pool.shared.limits.retry_buffer:
            self._kept += data
        else:
            self._kept = None
            self._taken = True
        connection.send_body(self._number, data)
        if connection.multiplexed and self._wanted and self._connection is connection and not connection.room(self._number):
            self.writable()

    def end(self, trailers: list[Header] | None) -> None:
        """As `Forwarding.end`."""
        if self._complete or self._state is DONE:
            return
        self._complete = True
        self._trailers = trailers = trailers_passed_on(trailers)
        if trailers:
            # A server that takes trailers for headers must not be told another value of one that a policy or a filter may have set.
            told = {name for name, _ in self._permit.headers} | self._permit.plan.asking.head.reserved
            self._trailers = trailers = [field for field in trailers if field[0] not in told] or None
        if self._connection is not None:
            self._connection.send_end(self._number, trailers)

    def writable(self) -> None:
        """As `gateway.upstream.Stream.writable`."""
        connection = self._connection
        if connection is None or self._complete:
            return
        wanted = connection.room(self._number)
        if wanted is not self._wanted:
            self._wanted = wanted
            self._client.request_wanted(wanted)

    def cancel(self) -> None:
        """As `Forwarding.cancel`."""
        if self._state is DONE:
            return
        self._leave_connection()
        self._state = DONE
        self._leave_place()

    # The answer (gateway.upstream.Stream)

    def informational(self, status: int, headers: list[Header]) -> None:
        """As `gateway.upstream.Stream.informational`."""
        self._heard = True
        if status != 100 and self._state is SENDING:
            self._client.informational(status, headers)

    def answer(self, event: ResponseReceived) -> None:
        """As `gateway.upstream.Stream.answer`."""
        pool = self._pool
        plan = self._permit.plan
        status = event.status
        place = self._place
        if place is not None and (status >= 500 or place.health.errors):
            pool.observe(place, result_of(status))
        if status in plan.rule.retry.statuses and self._may_retry(Failure.STATUS, status):
            if event.ended:
                self._forget_connection()
            else:
                self._leave_connection()
            self._leave_place()
            self._again(Failure.STATUS, place)
            return
        self._state = ANSWERING
        self._kept = None
        outcome = self._client.outcome
        outcome.upstream_duration = monotonic() - self._started
        outcome.response_version = VERSIONS.get(event.version, "")
        outcome.details = "via_upstream"
        headers = event.headers
        if plan.edits or self._permit.response_headers:
            headers = answer_headers(headers, self._permit)
        if plan.stay is not None and place is not None:
            headers = plan.stay.told(headers, pool.cluster.name, (place.endpoint.address, place.endpoint.port))
        if event.ended:
            self._note_grpc(event.headers)
            self._finish()
        self._client.answer(status, headers, event.ended)

    def answer_body(self, data: bytes, credit: int) -> None:
        """As `gateway.upstream.Stream.answer_body`."""
        connection = self._connection
        if self._client.answer_body(data):
            if credit and connection is not None:
                connection.consumed(self._number, credit)
        elif connection is not None and self._connection is connection:
            self._held = True
            self._credit += credit
            connection.hold()
        elif credit and connection is not None:
            connection.consumed(self._number, credit)

    def answer_wanted(self) -> None:
        """As `Forwarding.answer_wanted`."""
        connection = self._connection
        if self._held and connection is not None:
            self._held = False
            credit, self._credit = self._credit, 0
            connection.consumed(self._number, credit)
            connection.unhold()

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `gateway.upstream.Stream.answer_end`."""
        if trailers:
            self._note_grpc(trailers)
        self._finish()
        self._client.answer_end(trailers)

    def answer_shut(self) -> None:
        """As `gateway.upstream.Stream.answer_shut`."""
        raise NotImplementedError("there is no tunnel")

    def _note_grpc(self, headers: list[Header]) -> None:
        for name, value in headers:
            if name == b"grpc-status":
                self._client.outcome.grpc_status = value[:16].decode("latin-1")

    def _finish(self) -> None:
        """The answer is complete: what is left of the request is of no use any more (RFC 9113 section 8.1)."""
        self._state = DONE
        self._forget_connection()
        self._leave_place()

    def _forget_connection(self) -> None:
        """The connection has forgotten the stream; over HTTP/2 the request's half of it may still be open."""
        connection = self._connection
        self._connection = None
        if connection is not None and connection.multiplexed:
            self._give_back(connection)
            if not self._complete:
                connection.abandon(self._number)

    def _give_back(self, connection: Upstream) -> None:
        """Credit that was withheld is the whole connection's as well."""
        if self._credit:
            credit, self._credit = self._credit, 0
            connection.consumed(self._number, credit)


def asked_name(cluster: Cluster, authority: bytes) -> str:
    """The name to ask another gateway for in TLS: that of the host that is wanted, since its listeners are chosen by it. Services have one
    name at most, which is the cluster's."""
    if not cluster.gateway or cluster.tls is None or cluster.tls.sni:
        return ""
    host = host_of(authority)
    return "" if host[:1] == b"[" or host.replace(b".", b"").isdigit() else host.decode("ascii", "replace")

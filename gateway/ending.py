"""The ways for a request to end: answered, refused, given up; and what is recorded of it then."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from gateway.body import Body
from gateway.exchange import Forwarding
from gateway.grpc_calls import is_grpc, speaks_grpc, status_of, timeout_of, trailers_of
from gateway.held_slots import release_slots
from gateway.phases import ANSWERING, DRAINING, FORWARDING, OVER
from gateway.plan import Pending
from gateway.recheck import ask_again
from gateway.replies import Said, identified, named, note, refusal_answer
from gateway.sending import Sending
from mesh.http import Header, RequestHead
from mesh.outcome import Outcome
from mesh.refusals import ClientGone, IdleTimeout, InternalError, Refusal, UpstreamTimeout

if TYPE_CHECKING:
    from gateway.connection import Connection

INF: Final = float("inf")


class Cancellable(Protocol):
    """What a request waits for: `gateway.driver.Waiting`, or keys."""

    @property
    def cancel(self) -> Callable[[], None]:
        """The client has gone."""
        ...


class Ending(Sending):
    """The part of a stream that owns its outcome and its deadlines. `gateway.stream.Stream` adds the request's way."""

    __slots__ = (
        "_asked",
        "_began",
        "_forwarding",
        "_orphan",
        "_pending",
        "_said",
        "_sized",
        "_timer",
        "_waiting",
        "answered",
        "content",
        "due",
        "head",
        "wanted",
    )

    def __init__(self, connection: Connection, number: int, head: RequestHead | None, outcome: Outcome, began: float) -> None:
        super().__init__(connection, number, outcome, began)
        self.head = head
        self.answered = False
        """The answer's head has been sent."""
        self._said: list[Header] | None = None
        """The upstream's answer's header fields, once they have been sent."""
        self.due = INF
        """Monotonic seconds at which the whole request must be over, or its rest drained."""
        self.content: Body | None = None
        """The request's body; None when it has none."""
        self.wanted = False
        """The upstream's side takes the body."""
        self._began = began
        self._pending: Pending | None = None
        self._waiting: Cancellable | None = None
        self._forwarding: Forwarding | None = None
        self._orphan = False
        """Given up while `forward` had not returned yet."""
        self._sized = True
        self._timer: asyncio.TimerHandle | None = None
        self._asked = began
        """When the policies were asked last (monotonic seconds)."""

    @property
    def _incomplete(self) -> bool:
        """Whether some of the request is still to come."""
        return self.content is not None and not self.content.ended

    def _complete(self, trailers: list[Header] | None) -> None:
        """All of the answer is here."""
        self.phase = ANSWERING
        self.due = INF
        if self._out:
            self._ending = (trailers,)
            self.connection.stalled = True
            return
        if self.content is not None and self._incomplete and self.connection.h1 is not None and self._worth_draining():
            self.phase = DRAINING
            self._drop()
            shared = self.connection.shared
            self.due = shared.loop.time() + shared.limits.linger
            self._record()
            self.connection.until(self.due)
            return
        self._finish(trailers)
        self._over()

    def _worth_draining(self) -> bool:
        """Whether the answer is framed so that its client can read it while the rest of the request comes, and that is little enough."""
        head, content = self.head, self.content
        return self._sized and head is not None and content is not None and content.worth_draining(head, self.outcome.bytes_received)

    def _drain_over(self) -> None:
        self.phase = OVER
        self._finish(None)
        self._leave()

    # The ways to end

    def refuse(self, refusal: Refusal) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase == FORWARDING:
            self._forwarding = None
            self._refuse(refusal)

    def refuse_request(self, refusal: Refusal) -> None:
        """The request itself is not what it should be, or its time is over: the upstream's side is told, and the client."""
        if self.phase == DRAINING:
            self._drain_over()
        elif self.phase != OVER:
            self._cancel()
            self._refuse(refusal)

    def gone(self, reason: str) -> None:
        """The client has given the request up, or has gone altogether."""
        if self.phase == DRAINING:
            self.phase = OVER
            self._leave()
        elif self.phase != OVER:
            self._cancel()
            note(self.outcome, ClientGone(reason=reason), self.answered)
            self._over()

    def malformed(self, refusal: Refusal) -> None:
        """The request breaks the protocol in its body: nothing more of it can be read."""
        self._sized = False
        self.refuse_request(refusal)

    @property
    def deadline(self) -> float:
        """When to look at it next (monotonic seconds)."""
        return min(self.due, self.moved + self._idle, self._asked + self.connection.shared.limits.stream_recheck)

    @property
    def _idle(self) -> float:
        """Seconds for which nothing may move."""
        return self.connection.shared.limits.idle_stream

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether so much of the request's body is held that no more may be read (HTTP/1.1)."""

    def expired(self, now: float) -> None:
        """Ends what takes too long, and has the policies asked again about what has been going on for long."""
        if now >= self.due:
            if self._said is not None and self._streams_on(self._said):
                self.due = INF if (given := self._given) is None else self._began + given
                if now < self.due:
                    return
            self.refuse_request(UpstreamTimeout(reason="the time that the rule or its caller gives it has passed"))
        elif now < self.moved + self._idle:
            self._asked = now
            if self._pending is not None and self.phase in {FORWARDING, ANSWERING}:
                ask_again(self, self._pending)
        else:
            on_client = self._incomplete and not self.full
            self.refuse_request(IdleTimeout(reason="nothing moved in either direction", code=0 if on_client else 504))

    def _streams_on(self, said: list[Header]) -> bool:
        """Whether the answer is one without an end in time (Server-Sent Events, gRPC), and no author of a route has given it one: the
        timeout that goes without saying is for answers."""
        if self._pending is None or not self._pending.rule.timeout_unsaid:
            return False
        return speaks_grpc(said) or any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in said)

    @property
    def _given(self) -> float | None:
        """Seconds that a gRPC caller gives its call."""
        return timeout_of(self.head) if self.head is not None and is_grpc(self.head) else None

    def _refuse(self, refusal: Refusal) -> None:
        """Answers by `refusal`; where an answer has begun, cuts it off so that the client can tell."""
        note(self.outcome, refusal, self.answered)
        connection = self.connection
        if self.answered:
            self._forget()
            if connection.h1 is None and self._said is not None and speaks_grpc(self._said):
                self.outcome.grpc_status = status_of(refusal).decode()
                self._finish(trailers_of(refusal))
            else:
                connection.tear(self.number)
            self._over()
            return
        if refusal.close:
            connection.last_answer()
        known = identified(self.outcome, connection.shared.rng)
        said = refusal_answer(refusal, self.head, connection.shared.date, known)
        named(said, self.outcome, connection.shared.rng)
        pending = self._pending
        if pending is not None and pending.cors is not None:
            said = said[0], pending.cors.apply(said[1]), said[2]
        self._say(said)

    def _say(self, said: Said) -> None:
        """Sends an answer of the gateway's own."""
        connection = self.connection
        status, headers, body = said
        if not 200 <= status <= 599:
            status = 500
        self._drop()
        self.phase = ANSWERING
        if self._incomplete and connection.h1 is not None and not self._worth_draining():
            connection.last_answer()
        if connection.closes:
            headers.append((b"connection", b"close"))
        outcome = self.outcome
        try:
            connection.codec.send_head(self.number, status, headers, connection.h1 is None and not body)
        except ValueError:  # a policy's header that would split the answer
            status, headers, body = refusal_answer(InternalError(), self.head, connection.shared.date)
            connection.codec.send_head(self.number, status, headers, connection.h1 is None and not body)
        self.answered = True
        outcome.status = status
        for name, value in headers:
            if name == b"grpc-status":
                outcome.grpc_status = value.decode("latin-1")
        if self.head is not None and self.head.method == b"HEAD":
            body = b""
        connection.mark()
        if body:
            self._send(body)
        self._complete(None)

    def _cancel(self) -> None:
        self._orphan = self.phase == FORWARDING and self._forwarding is None
        waiting, self._waiting = self._waiting, None
        forwarding, self._forwarding = self._forwarding, None
        if waiting is not None:
            waiting.cancel()
        if forwarding is not None:
            forwarding.cancel()

    def _drop(self) -> None:
        """Lets go of the body that nobody will take."""
        if self.content is not None:
            self.content.drop()

    def _over(self) -> None:
        self.phase = OVER
        self._record()
        self._leave()

    def _record(self) -> None:
        outcome = self.outcome
        shared = self.connection.shared
        outcome.duration = monotonic() - self._began
        shared.requests -= 1
        if outcome.grants:
            release_slots(outcome)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        shared.telemetry.record(outcome)

    def _leave(self) -> None:
        if self.content is not None:
            self.content.drop()
        if self._out or self._ending is not None or self._stopped:
            self._forget()
        self.connection.left(self)

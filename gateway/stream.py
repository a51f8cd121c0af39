"""One request, from its head to its outcome: the client's side of an exchange (`gateway.exchange.Client`)."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final

from gateway.body import DRAIN_MOST, Body, show
from gateway.driver import Waiting
from gateway.exchange import Forwarding
from gateway.phases import ANSWERING, DRAINING, FORWARDING, GATHERING, OVER, SETTLING
from gateway.place import Place
from gateway.plan import Pending, Permit, Reply, Settled
from gateway.replies import Said, answer, note, refusal_answer
from gateway.sending import Sending
from gateway.timers import NEAR
from mesh.http import Header, RequestHead
from mesh.outcome import Outcome
from mesh.refusals import BodyTooLarge, ClientGone, IdleTimeout, InternalError, Overloaded, Refusal, UpstreamProtocol, UpstreamTimeout

if TYPE_CHECKING:
    from gateway.connection import Connection

INF: Final = float("inf")


class Stream(Sending):
    """Owns one request's outcome, and what is held of its body and of its answer."""

    __slots__ = (
        "_began",
        "_forwarding",
        "_orphan",
        "_pending",
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
        self.due = INF
        """Monotonic seconds at which the whole request must be over, or its rest drained."""
        self.wanted = False
        """The upstream's side takes the body."""
        self.content: Body | None = None
        """The request's body; None when it has none."""
        self._began = began
        self._pending: Pending | None = None
        self._waiting: Waiting | None = None
        self._forwarding: Forwarding | None = None
        self._orphan = False
        """Given up while `forward` had not returned yet."""
        self._sized = True
        self._timer: asyncio.TimerHandle | None = None

    # The request

    def begin(self, place: Place, ended: bool, expects: bool) -> None:
        """Routes the request and has its questions answered."""
        connection, head = self.connection, self.head
        assert head is not None
        shared = connection.shared
        if not ended:
            self.content = Body(connection.codec, self.number, expects)
        if shared.requests > shared.limits.requests:
            self._refuse(Overloaded(reason=f"more than {shared.limits.requests} requests are in progress"))
            return
        outcome = self.outcome
        routed = shared.route(head, connection.peer, place, outcome.started, shared.rng)
        if isinstance(routed, Refusal):
            self._refuse(routed)
            return
        self._pending = routed
        if self.content is None:
            if routed.rule.timeout is not None:
                self._limit_time()
            if routed.body_limit:
                routed.asking.body = b""
        elif routed.body_limit:
            self._gather(routed, head, self.content)
            return
        self._settle(routed)

    def _limit_time(self) -> None:
        """The rule's timeout runs from the end of the request (Gateway API GEP-1742; Envoy, "Route timeout")."""
        pending = self._pending
        if pending is None or pending.rule.timeout is None:
            return
        timeout = pending.rule.timeout
        shared = self.connection.shared
        self.due = (self._began if self.content is None else shared.loop.time()) + timeout
        self.connection.until(self.due)
        if timeout < NEAR:
            self._timer = shared.sweeper.soon(self.connection, timeout)

    def _gather(self, pending: Pending, head: RequestHead, content: Body) -> None:
        outcome, asking = self.outcome, pending.asking
        outcome.caller, outcome.route, outcome.template, outcome.service = asking.caller, asking.route, asking.template, asking.service
        if not pending.body_partial and head.body_length > pending.body_limit:
            self._refuse(BodyTooLarge(reason=f"{head.body_length} bytes announced; a policy may be shown {pending.body_limit}"))
            return
        content.let_continue(False)
        self.connection.mark()

    def _gathered(self, pending: Pending, content: Body) -> None:
        body = content.take()
        refusal = show(pending, body)
        if refusal is not None:
            self._refuse(refusal)
            return
        if body:
            content.keep(body, 0)
        self._settle(pending)

    def _settle(self, pending: Pending) -> None:
        self.phase = SETTLING
        settled = self.connection.shared.driver.drive(pending, self.outcome, self.settled)
        if isinstance(settled, Permit):
            self._forward(settled)
        elif isinstance(settled, Waiting):
            if self.phase == SETTLING:
                self._waiting = settled
        else:
            self._settled(settled)

    def settled(self, settled: Settled) -> None:
        """The driver's answer, when it had to wait for one."""
        if self.phase != SETTLING:
            return
        self._waiting = None
        try:
            self._settled(settled)
        except Exception as problem:
            self.connection.broken(self, problem)

    def _settled(self, settled: Settled) -> None:
        if isinstance(settled, Permit):
            self._forward(settled)
        elif isinstance(settled, Reply):
            said = settled.answer
            self.outcome.details = said.details
            self._say(answer(said.status, [*said.headers, *settled.response_headers], said.body, self.connection.shared.date))
        elif isinstance(settled, Refusal):
            self._refuse(settled)

    def _forward(self, permit: Permit) -> None:
        self.phase = FORWARDING
        forwarding = self.connection.shared.forwarder.forward(permit, self, ended=self.content is None)
        if self.phase != FORWARDING:  # answered, or refused, before it returned
            if self._orphan:
                forwarding.cancel()
            return
        self._forwarding = forwarding
        if self.wanted and self.content is not None:
            self._pass_on(forwarding, self.content)

    def body(self, data: bytes, credit: int) -> None:
        """Some of the request's body has come."""
        connection, content = self.connection, self.content
        if content is None:
            return
        size = len(data)
        self.outcome.bytes_received += size
        self.moved = connection.shared.sweeper.now
        phase = self.phase
        if phase > FORWARDING:
            content.thrown(data, credit)
            if phase == DRAINING and content.drained > DRAIN_MOST:
                self._drain_over()
        elif phase == FORWARDING and self.wanted and self._forwarding is not None and not content.held:
            if credit:
                connection.codec.consumed(self.number, credit)
            self._forwarding.body(data)
        elif phase == GATHERING and self._pending is not None:
            # No more than the policy may be shown is gathered, so the client may go on sending.
            connection.codec.consumed(self.number, credit)
            content.keep(data, 0)
            if content.held > self._pending.body_limit:
                self._gathered(self._pending, content)
        else:
            content.keep(data, credit)

    def end(self, trailers: list[Header] | None) -> None:
        """All of the request has come."""
        content = self.content
        if content is None:
            return
        content.ended = True
        content.trailers = trailers
        phase = self.phase
        if phase <= FORWARDING:
            self._limit_time()
        if phase == GATHERING:
            if self._pending is not None:
                self._gathered(self._pending, content)
        elif phase == FORWARDING:
            if self.wanted and self._forwarding is not None:
                self._pass_on(self._forwarding, content)
        elif phase == DRAINING:
            self._drain_over()

    def request_wanted(self, wanted: bool) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase != FORWARDING:
            return
        self.wanted = wanted
        content = self.content
        if wanted and content is not None:
            content.let_continue(self.outcome.bytes_received > 0)
            if self._forwarding is not None:
                self._pass_on(self._forwarding, content)
        self.connection.mark()

    def _pass_on(self, forwarding: Forwarding, content: Body) -> None:
        """Gives what is held to the upstream's side, and the end when it is there."""
        if content.held:
            self.connection.mark()
            forwarding.body(content.take())
        if content.ended and self.wanted and not content.passed and not content.held and self.phase == FORWARDING:
            content.passed = True
            forwarding.end(content.trailers)

    @property
    def full(self) -> bool:
        """Whether so much of the body is held that no more may be read (HTTP/1.1)."""
        content = self.content
        if content is None or content.held < self.connection.shared.limits.buffer:
            return False
        return self.phase in {SETTLING, FORWARDING}

    @property
    def _incomplete(self) -> bool:
        """Whether some of the request is still to come."""
        return self.content is not None and not self.content.ended

    # The answer

    def informational(self, status: int, headers: list[Header]) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase == FORWARDING and not self.answered:
            self.connection.codec.send_informational(self.number, status, headers)
            self.connection.mark()

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase != FORWARDING or self.answered:
            return
        connection = self.connection
        hold = False
        if self.content is not None and self._incomplete and connection.h1 is not None:
            self._sized = any(name == b"content-length" for name, _ in headers)
            hold = ended and self._sized
        try:
            connection.codec.send_head(self.number, status, headers, ended and not hold)
        except (ValueError, KeyError) as problem:
            self._cancel()
            self._refuse(UpstreamProtocol(reason=f"an answer that cannot be passed on: {problem}"))
            return
        self.answered = True
        self.moved = connection.shared.sweeper.now
        outcome = self.outcome
        outcome.status = status
        if not outcome.details:
            outcome.details = "via_upstream"
        if not connection.marked:
            connection.mark()
        if ended:
            self._forwarding = None
            if hold:
                self._complete(None)
            else:
                self._over()

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase == FORWARDING:
            self._forwarding = None
            self._complete(trailers)

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

    def _go_on(self) -> None:
        if self._forwarding is not None:
            self._forwarding.answer_wanted()

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
        return min(self.due, self.moved + self.connection.shared.limits.idle_stream)

    def expired(self, now: float) -> None:
        """Ends what takes too long."""
        if now >= self.due:
            self.refuse_request(UpstreamTimeout(reason="the rule's timeout has passed"))
        elif now >= self.deadline:
            on_client = self._incomplete and not self.full
            self.refuse_request(IdleTimeout(reason="nothing moved in either direction", code=0 if on_client else 504))

    def _refuse(self, refusal: Refusal) -> None:
        """Answers by `refusal`; where an answer has begun, cuts it off so that the client can tell."""
        note(self.outcome, refusal, self.answered)
        connection = self.connection
        if self.answered:
            self._forget()
            connection.tear(self.number)
            self._over()
            return
        if refusal.close:
            connection.last_answer()
        said = refusal_answer(refusal, self.head, connection.shared.date)
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

"""One request, from its head to its outcome: the client's side of an exchange (`gateway.exchange.Client`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from gateway.body import DRAIN_MOST, Body, show
from gateway.driver import Waiting
from gateway.ending import Ending
from gateway.exchange import Forwarding
from gateway.grpc_calls import is_grpc, timeout_of
from gateway.held_slots import guard_slots
from gateway.phases import DRAINING, FORWARDING, GATHERING, SETTLING
from gateway.place import Place
from gateway.plan import Pending, Permit, Reply, Settled
from gateway.replies import answer
from gateway.timers import NEAR
from identity.authenticator import KeysWanted
from identity.jwt import NO_KEYS
from mesh.http import Header, RequestHead
from mesh.refusals import BodyTooLarge, InvalidToken, Overloaded, Refusal, UpstreamProtocol

INF: Final = float("inf")


class KeysAwaited:
    """A request that waits for keys: in the place of a `Waiting`."""

    __slots__ = ("cancel",)

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel
        """The client has gone."""


class Stream(Ending):
    """The request's way, and its answer's. What is held, the outcome and the ends are its bases' (`gateway.sending`, `gateway.ending`)."""

    __slots__ = ()

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
        routed = shared.route(head, connection.peer, place, self.outcome.started, shared.rng)
        if type(routed) is Pending:
            self._routed(routed, head)
        elif isinstance(routed, KeysWanted):
            self.phase = SETTLING
            self._waiting = KeysAwaited(routed.keys.wait(partial(self._keys_came, place, head)))
        else:
            self._refuse(routed)

    def _keys_came(self, place: Place, head: RequestHead) -> None:
        """The keys that the request's token needs have been fetched, or they can't be had."""
        if self.phase != SETTLING:
            return
        self._waiting = None
        self.phase = GATHERING
        connection, content = self.connection, self.content
        shared = connection.shared
        try:
            routed = shared.route(head, connection.peer, place, self.outcome.started, shared.rng, waited=True)
            if isinstance(routed, KeysWanted):
                routed = InvalidToken(reason=NO_KEYS.message, told=NO_KEYS.message)
            if type(routed) is not Pending:
                self._refuse(routed)
                return
            self._routed(routed, head)
            if content is not None and content.ended:
                self._limit_time()
            if self.phase == GATHERING and content is not None:
                # Some of the body may be here already.
                held = content.take()
                if held:
                    content.keep(held, 0)
                if content.ended or content.held > routed.body_limit:
                    self._gathered(routed, content)
        except Exception as problem:
            connection.broken(self, problem)

    def _routed(self, routed: Pending, head: RequestHead) -> None:
        connection = self.connection
        shared = connection.shared
        self._pending = routed
        if self.content is None:
            timeout = routed.rule.timeout
            if timeout is not None:  # as in `_limit_time`
                self.due = due = self._began + timeout
                connection.deadline = min(connection.deadline, due)
                if timeout < NEAR:
                    self._timer = shared.sweeper.soon(connection, timeout)
            if routed.body_limit:
                routed.asking.body = b""
        else:
            if connection.h1 is None and is_grpc(head) and (given := timeout_of(head)) is not None:
                self._set_due(self._began + given, given)
            if routed.body_limit:
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
        self._set_due(min(self.due, (self._began if self.content is None else shared.loop.time()) + timeout), timeout)

    def _set_due(self, due: float, seconds: float) -> None:
        """Has the request end at `due`, which is `seconds` from now."""
        self.due = due
        self.connection.until(due)
        if seconds < NEAR:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.connection.shared.sweeper.soon(self.connection, seconds)

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
        if type(settled) is Permit:
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
        if self.outcome.grants:
            guard_slots(self.outcome, self.cut_off)
            if self.phase != FORWARDING:
                return
        forwarding = self.connection.shared.forwarder.forward(permit, self, ended=self.content is None)
        if self.phase != FORWARDING:  # answered, or refused, before it returned
            if self._orphan:
                forwarding.cancel()
            return
        self._forwarding = forwarding
        if self.wanted and self.content is not None:
            self._pass_on(forwarding, self.content)

    def cut_off(self, refusal: Refusal) -> None:
        """As `refuse_request`, from outside of the connection."""
        try:
            self.refuse_request(refusal)
        except Exception as problem:
            self.connection.broken(self, problem)

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
        self._said = headers
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

    def answer_shut(self) -> None:
        """As `gateway.exchange.Client`."""
        raise NotImplementedError("there is no tunnel")

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase == FORWARDING:
            self._forwarding = None
            self._complete(trailers)

    def _go_on(self) -> None:
        if self._forwarding is not None:
            self._forwarding.answer_wanted()

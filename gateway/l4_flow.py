"""A flow: the datagrams between one client's address and one of the gateway's, and the endpoint that they go to.

Decided at its first datagram, as a connection is; what comes meanwhile is held, within a bound. Its states, and what moves it on:

    SETTLING  policy and quota are asked           settled -> OPENING or REFUSED
    OPENING   the endpoint's name is looked up     opened -> OPEN, not opened -> REFUSED
    OPEN      datagrams go both ways               idle, refused by the endpoint -> OVER
    REFUSED   recorded; datagrams are dropped      `REFUSED_FOR` seconds -> OVER
    OVER      forgotten: the next datagram begins another

A refused flow is remembered for a while, so that a client that goes on sending is not asked about again for each datagram.
"""

from __future__ import annotations

import enum
import logging
import time
from typing import TYPE_CHECKING, Any

from gateway.held_slots import guard_slots, release_slots
from gateway.l4_asked import L4Asked
from gateway.l4_recheck import ask_again
from gateway.l4_upstream import FlowUpstream, OpeningFlow
from gateway.plan import L4Permit, Settled
from gateway.replies import note
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.refusals import InternalError, LocalReset, Refusal, UpstreamReset

if TYPE_CHECKING:
    from gateway.l4_udp import UdpPort

log = logging.getLogger("tollhouse.gateway")

REFUSED_FOR = 5.0
"""Seconds for which a refused flow is remembered."""
HELD = 16
"""Datagrams that are held until there is an endpoint; further ones are dropped, as a full queue of a network does."""
LARGEST = 65535
DATAGRAMS_A_TURN = 32


class State(enum.Enum):
    """See the module."""

    SETTLING = 1
    OPENING = 2
    OPEN = 3
    REFUSED = 4
    OVER = 5


SETTLING, OPENING, OPEN, REFUSED, OVER = State


class Flow(L4Asked):
    """Owns the socket towards the endpoint (`gateway.timers.Timed`). Its owner is the port."""

    __slots__ = (
        "_asked",
        "_held",
        "_opening",
        "_state",
        "_upstream",
        "answered",
        "began",
        "client",
        "deadline",
        "key",
        "last",
        "local",
        "port",
        "received",
        "sent",
    )

    def __init__(self, port: UdpPort, key: tuple[Any, ...], client: tuple[Any, ...], local: bytes, peer: Peer) -> None:
        """`client`: where answers go, as `socket.sendto` takes it; `local`: which address of the machine they come from, for `UdpPort`."""
        shared = port.shared
        super().__init__(peer, Outcome(None, peer, shared.key, port.serving.name if port.serving is not None else "", time.time()))
        self.port = port
        self.key = key
        self.client = client
        self.local = local
        self.deadline = shared.loop.time() + shared.limits.idle_flow
        self.answered = False
        """Whether the endpoint has ever answered. A flow of a forged address never is."""
        self.received = self.sent = 0
        """Datagrams from the client, and to it."""
        self.began = self._asked = self.last = shared.loop.time()
        self._state = SETTLING
        self._held: list[bytes] = []
        self._opening: OpeningFlow | None = None
        self._upstream: FlowUpstream | None = None

    @property
    def over(self) -> bool:
        """Whether it is forgotten."""
        return self._state is OVER

    def begin(self) -> None:
        """Routes it, and asks."""
        shared, serving = self.port.shared, self.port.serving
        shared.sweeper.watched.add(self)
        try:
            assert serving is not None
            shared.telemetry.flow_began(shared.key, serving.name)
            self._ask(shared, serving)
        except Exception as problem:  # one flow's defect is nobody else's
            self._defect(problem)

    @property
    def _settling(self) -> bool:
        return self._state is SETTLING

    def _settled(self, settled: Settled) -> None:
        if self._state is not SETTLING:
            return
        if isinstance(settled, Refusal):
            self._refuse(settled)
        elif isinstance(settled, L4Permit):
            self._state = OPENING
            guard_slots(self.outcome, self._refuse)
            if self._state is not OPENING:
                return
            opening = self.port.shared.forwarder.open_flow(settled, self.outcome, self._opened)
            if isinstance(opening, Refusal):
                self._refuse(opening)
            elif self._state is OPENING:
                self._opening = opening

    def _opened(self, result: FlowUpstream | Refusal) -> None:
        self._opening = None
        if isinstance(result, Refusal):
            self._refuse(result)
            return
        self._upstream = result
        self._state = OPEN
        shared = self.port.shared
        self.last = now = shared.loop.time()
        self.outcome.upstream_duration = now - self.began
        self.deadline = min(now + shared.limits.idle_flow, self._asked + shared.limits.stream_recheck)
        shared.poller.add_reader(result.fd, self._readable)
        held, self._held = self._held, []
        for data in held:
            self.datagram(data)

    # Datagrams

    def datagram(self, data: bytes) -> bool:
        """One from the client; False when the flow has ended and the datagram begins another."""
        state = self._state
        if state is OPEN:
            upstream = self._upstream
            assert upstream is not None
            if upstream.gone():  # the endpoint is no more, or left out: another will do
                self._end()
                return False
            self.last = self.port.shared.sweeper.now
            self.received += 1
            self.outcome.bytes_received += len(data)
            try:
                upstream.sock.send(data)
            except (BlockingIOError, InterruptedError):
                self.port.dropped("upstream_full")
            except OSError as problem:
                self._broken(problem)
            return True
        if state in {SETTLING, OPENING}:
            if len(self._held) < HELD:
                self._held.append(data)
            else:
                self.port.dropped("waiting")
        elif state is REFUSED:
            self.port.dropped("refused")
        return state is not OVER

    def _readable(self) -> None:
        upstream, port = self._upstream, self.port
        for _ in range(DATAGRAMS_A_TURN):
            if upstream is None or self._state is not OPEN:
                return
            try:
                data = upstream.sock.recv(LARGEST)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as problem:
                self._broken(problem)
                return
            if not self.answered:
                self.answered = True
                upstream.succeeded()
                port.unanswered.pop(self, None)
            self.last = port.shared.sweeper.now
            self.sent += 1
            self.outcome.bytes_sent += len(data)
            port.send(self, data)

    def _broken(self, problem: OSError) -> None:
        """The endpoint's machine says that nobody is there (ICMP), or the like."""
        upstream = self._upstream
        if upstream is not None:
            upstream.failed()
        note(self.outcome, UpstreamReset(reason=(problem.strerror or type(problem).__name__).lower()), True)
        self._end()

    # The end

    def expired(self, now: float) -> None:
        """As `gateway.timers.Timed`: still for too long, refused for long enough, or what was allowed long ago is asked about again."""
        shared, serving, pending = self.port.shared, self.port.serving, self._pending
        limits = shared.limits
        if self._state is not OPEN or now >= self.last + limits.idle_flow:
            self._end()
            return
        if now >= self._asked + limits.stream_recheck and serving is not None and serving.table is not None and pending is not None:
            self._asked = now
            try:
                ask_again(shared, serving.table, self.peer, pending, self.outcome, self._refuse)
            except Exception as problem:
                self._defect(problem)
        if self._state is OPEN:
            self.deadline = min(self.last + limits.idle_flow, self._asked + limits.stream_recheck)

    def end(self) -> None:
        """The gateway ends it."""
        if self._state not in {REFUSED, OVER}:
            note(self.outcome, LocalReset(reason="the gateway ended, or the listener is no more"), True)
        self._end()

    def make_room(self) -> None:
        """Ends it without a flag: it is not answered or not used, and another one wants its place."""
        self._end()

    def _defect(self, problem: Exception) -> None:
        log.error("a flow could not be carried on", exc_info=problem)
        self._refuse(InternalError(reason=repr(problem)))

    def _refuse(self, refusal: Refusal) -> None:
        if self._state in {REFUSED, OVER}:
            return
        note(self.outcome, refusal, True)
        for _ in self._held:
            self.port.dropped("refused")
        self._close()
        self._state = REFUSED
        self.deadline = self.port.shared.loop.time() + REFUSED_FOR
        self._record()

    def _end(self) -> None:
        state = self._state
        if state is OVER:
            return
        self._close()
        self._state = OVER
        self.port.shared.sweeper.watched.discard(self)
        if state is not REFUSED:
            self._record()
        self.port.forget(self)

    def _close(self) -> None:
        self._held.clear()
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            self.port.shared.poller.remove_reader(upstream.fd)
            upstream.close()

    def _record(self) -> None:
        shared, outcome = self.port.shared, self.outcome
        outcome.duration = shared.loop.time() - self.began
        release_slots(outcome)
        shared.telemetry.flow_ended(outcome, self.received, self.sent)

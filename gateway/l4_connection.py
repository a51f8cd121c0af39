"""One client's connection below HTTP: decided once, then bytes both ways. For listeners of protocol TCP and TLS.

Its states, and what moves it on:

    SETTLING    policy and quota are asked          settled -> CONNECTING or OVER
    CONNECTING  an endpoint is looked for           connected -> RELAYING, refused -> OVER
    RELAYING    bytes go both ways                  ended, broken, idle -> OVER
    OVER        recorded; nothing is called any more

Until an endpoint is connected nothing is read from the client: what it sends meanwhile waits in the kernel. A connection that is refused
is reset.
"""

from __future__ import annotations

import enum
import logging
import socket
import time
from typing import TYPE_CHECKING, Final

from gateway.held_slots import guard_slots, release_slots
from gateway.l4_asked import L4Asked
from gateway.l4_recheck import ask_again
from gateway.l4_relay import Relay
from gateway.l4_upstream import Connecting, L4Upstream
from gateway.plan import L4Permit, Settled
from gateway.replies import note
from gateway.shared import Shared
from gateway.wire import Wire
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.refusals import ClientGone, IdleTimeout, InternalError, LocalReset, Refusal, UpstreamReset

if TYPE_CHECKING:
    from gateway.serving import Serving

log = logging.getLogger("tollhouse.gateway")


class State(enum.Enum):
    """See the module."""

    SETTLING = 1
    CONNECTING = 2
    RELAYING = 3
    OVER = 4


SETTLING, CONNECTING, RELAYING, OVER = State


class L4Connection(L4Asked):
    """Owns a client's socket, and the endpoint's once there is one (`gateway.wire.Owner`, `gateway.timers.Timed`)."""

    __slots__ = (
        "_asked",
        "_began",
        "_connecting",
        "_last",
        "_relay",
        "_state",
        "_upstream",
        "deadline",
        "serving",
        "shared",
        "wire",
    )

    streams: Final = True
    """Something goes on for as long as it is there: never closed to make room for others."""

    def __init__(self, shared: Shared, serving: Serving, sock: socket.socket, peer: Peer) -> None:
        super().__init__(peer, Outcome(None, peer, shared.key, serving.name, time.time()))
        self.shared = shared
        self.serving = serving
        self.wire = Wire(shared.poller, sock, self)
        self.deadline = shared.loop.time() + shared.limits.idle_connection
        self._state = SETTLING
        self._began = self._asked = self._last = shared.loop.time()
        self._connecting: Connecting | None = None
        self._upstream: L4Upstream | None = None
        self._relay: Relay | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._state is OVER

    def start(self) -> None:
        """Begins: routes, asks, connects."""
        shared, serving = self.shared, self.serving
        serving.connections.add(self)
        shared.sweeper.watched.add(self)
        shared.telemetry.l4_accepted(shared.key, serving.name)
        try:
            self._ask(shared, serving)
        except Exception as problem:  # one connection's defect is nobody else's
            self._defect(problem)

    @property
    def _settling(self) -> bool:
        return self._state is SETTLING

    def _settled(self, settled: Settled) -> None:
        if self._state is not SETTLING:
            return
        if isinstance(settled, L4Permit):
            self._state = CONNECTING
            guard_slots(self.outcome, self._refuse)
            if self._state is not CONNECTING:
                return
            connecting = self.shared.forwarder.connect(settled, self.outcome, self._connected)
            if isinstance(connecting, Refusal):
                self._refuse(connecting)
            else:
                self._connecting = connecting
        elif isinstance(settled, Refusal):
            self._refuse(settled)

    def _connected(self, result: L4Upstream | Refusal) -> None:
        self._connecting = None
        if isinstance(result, Refusal):
            self._refuse(result)
            return
        shared = self.shared
        try:
            self._upstream = result
            self._state = RELAYING
            self.outcome.upstream_duration = shared.loop.time() - self._began
            upstream = Wire(shared.poller, result.made.sock, self)
            self._relay = relay = Relay(self.wire, upstream, shared.limits.buffer, self._moved, self._ended, shared.loop.call_later)
            shared.telemetry.l4_connected(self.outcome)
            self._last = shared.loop.time()
            self.deadline = self._next_look()
            relay.start()
        except Exception as problem:
            self._defect(problem)

    # From the wires

    def _moved(self) -> None:
        self._last = self.shared.sweeper.now

    def _next_look(self) -> float:
        """When it will have been still for too long, or is to be asked about again."""
        limits = self.shared.limits
        return min(self._last + limits.idle_connection, self._asked + limits.stream_recheck)

    def _ended(self, reason: str, upstream: bool) -> None:
        if reason:
            note(self.outcome, UpstreamReset(reason=reason) if upstream else ClientGone(reason=reason), True)
        self._over()

    def received(self, data: bytes) -> None:
        """As `gateway.wire.Owner`; not called: nothing is read before there is an endpoint."""

    def ended(self, clean: bool) -> None:
        """As `gateway.wire.Owner`; not called."""

    def lost(self, reason: str) -> None:
        """As `gateway.wire.Owner`; not called."""

    def drained(self) -> None:
        """As `gateway.wire.Owner`; not called."""

    # The end

    def expired(self, now: float) -> None:
        """As `gateway.timers.Timed`: nothing has moved for too long, or what was allowed long ago is asked about again."""
        limits = self.shared.limits
        if now >= self._last + limits.idle_connection:
            self._refuse(IdleTimeout(reason=f"nothing moved for {limits.idle_connection:g} s"))
            return
        table, pending = self.serving.table, self._pending
        if now >= self._asked + limits.stream_recheck and table is not None and pending is not None and self._state is RELAYING:
            self._asked = now
            try:
                ask_again(self.shared, table, self.peer, pending, self.outcome, self._refuse)
            except Exception as problem:
                self._defect(problem)
        self.deadline = self._next_look()

    def drain(self, grace: float = 0.0) -> None:
        """Nothing that can be told to the client: it has until whoever drains calls `abort`."""

    def abort(self) -> None:
        """Ends at once."""
        self._refuse(LocalReset(reason="the gateway ended, or the listener is no more"))

    def _defect(self, problem: Exception) -> None:
        log.error("a connection could not be carried on", exc_info=problem)
        self._refuse(InternalError(reason=repr(problem)))

    def _refuse(self, refusal: Refusal) -> None:
        if self._state is OVER:
            return
        note(self.outcome, refusal, True)
        self._over()

    def _over(self) -> None:
        if self._state is OVER:
            return
        connected = self._state is RELAYING
        self._state = OVER
        shared, outcome = self.shared, self.outcome
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        outcome.bytes_received, outcome.bytes_sent = self.wire.received, self.wire.sent
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.abort()
        else:
            self.wire.cut()
        if self._upstream is not None:
            self._upstream.release()
            self._upstream = None
        self.serving.connections.discard(self)
        shared.sweeper.watched.discard(self)
        outcome.duration = shared.loop.time() - self._began
        release_slots(outcome)
        shared.telemetry.l4_closed(outcome, connected)

"""The client's side of a request for a tunnel: a WebSocket, or CONNECT.

Until the answer's head it is a request like others, routed, asked about and counted as such; no body of it is shown to a policy, for it
has none. Once the tunnel is open no timeout of the route is set to it (Envoy, "Route timeouts"), only its own idle time. What goes through
it is counted, and it is recorded once, at its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.body import Body
from gateway.phases import FORWARDING
from gateway.plan import Pending
from gateway.replies import Said
from gateway.stream import INF, Stream
from mesh.http import Header, RequestHead
from mesh.outcome import Outcome

if TYPE_CHECKING:
    from gateway.connection import Connection


class TunnelStream(Stream):
    """As `gateway.stream.Stream`."""

    __slots__ = ("_ends", "_shut", "open")

    def __init__(self, connection: Connection, number: int, head: RequestHead | None, outcome: Outcome, began: float) -> None:
        super().__init__(connection, number, head, outcome, began)
        self.open = False
        self._ends = False
        """The upstream's direction has ended; some of it waits for room."""
        self._shut = False
        """The client has been told so."""

    def _gather(self, pending: Pending, head: RequestHead, content: Body) -> None:
        pending.asking.body = b""
        self._settle(pending)

    def _settle(self, pending: Pending) -> None:
        self._limit_time()
        super()._settle(pending)

    def end(self, trailers: list[Header] | None) -> None:
        """The client's direction has ended."""
        content = self.content
        if content is None:
            return
        content.ended = True
        if self.phase == FORWARDING and self.wanted and self._forwarding is not None:
            self._pass_on(self._forwarding, content)

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """As `gateway.exchange.Client`."""
        if self.head is None or not self.head.opens(status):
            self._no_tunnel()
            super().answer(status, headers, ended)
            return
        super().answer(status, headers, False)
        if self.phase != FORWARDING:
            return
        self.open = True
        self.due = INF
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.connection.opened()

    def _say(self, said: Said) -> None:
        self._no_tunnel()
        super()._say(said)

    def _no_tunnel(self) -> None:
        """The request is an ordinary one after all, and was complete with its head."""
        if not self.open and self.content is not None:
            self.content.ended = self.content.passed = True

    def answer_shut(self) -> None:
        """As `gateway.exchange.Client`."""
        if self.phase == FORWARDING and self.open:
            self._ends = True
            if self._out:
                self.connection.stalled = True
            else:
                self._tell_shut()

    def room(self) -> None:
        """As `gateway.sending.Sending.room`."""
        super().room()
        if self._ends and not self._out and not self._shut and self.phase == FORWARDING:
            self._tell_shut()

    def _tell_shut(self) -> None:
        self._shut = True
        self.connection.codec.send_body(self.number, b"", True)
        self.connection.shut()
        self.connection.until(self.deadline)

    def gone(self, reason: str) -> None:
        """As `Stream.gone`; but whom the upstream has told that there is no more may go without another word."""
        if self._shut and self.phase == FORWARDING:
            self._cancel()
            self._over()
        else:
            super().gone(reason)

    @property
    def _idle(self) -> float:
        limits = self.connection.shared.limits
        half = self._shut or (self.content is not None and self.content.ended)
        return limits.idle_tunnel if self.open and not half else limits.idle_stream

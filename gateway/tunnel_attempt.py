"""The upstream's side of a request for a tunnel: a WebSocket, or CONNECT.

Until the answer's head it is a request like others: it may be tried again, and it may be answered by something else. From then on what is
passed on is not HTTP, and each direction ends by itself.
"""

from __future__ import annotations

from gateway.attempt import ANSWERING, DONE, Attempt
from gateway.codec.events import ResponseReceived
from gateway.exchange import Client
from gateway.plan import Permit
from gateway.pool import Pool
from mesh.http import Header


class TunnelAttempt(Attempt):
    """As `gateway.attempt.Attempt`."""

    __slots__ = ("_shut", "tunnelling")

    def __init__(self, pool: Pool, permit: Permit, client: Client, ended: bool, http2: bool) -> None:
        super().__init__(pool, permit, client, ended, http2)
        self.tunnelling = False
        self._shut = False
        """The upstream's direction of the tunnel has ended."""

    def begin(self) -> None:
        """As `Attempt.begin`."""
        self._complete = False
        super().begin()

    def writable(self) -> None:
        """As `gateway.upstream.Stream.writable`. Only who has changed the protocol is sent what is not HTTP."""
        if self.tunnelling:
            super().writable()

    def answer(self, event: ResponseReceived) -> None:
        """As `gateway.upstream.Stream.answer`."""
        if not self._permit.plan.asking.head.opens(event.status):
            self._complete = True  # the request was, with its head
            super().answer(event)
            return
        self.tunnelling = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.deadline:
            self.deadline = 0.0
            self._pool.sweeper.watched.discard(self)
        super().answer(event)
        self.writable()

    def answer_shut(self) -> None:
        """As `gateway.upstream.Stream.answer_shut`."""
        if self._shut or self._state is not ANSWERING:
            return
        self._shut = True
        if self._complete:
            self._close()
        else:
            self._client.answer_shut()

    def end(self, trailers: list[Header] | None) -> None:
        """As `Forwarding.end`: the client's direction ends. Trailers mean nothing in a tunnel."""
        if self._complete or not self.tunnelling or self._state is DONE:
            return
        self._complete = True
        if self._connection is not None:
            self._connection.send_shut(self._number)
        if self._shut:
            self._close()

    def _close(self) -> None:
        """Both directions have ended."""
        self._state = DONE
        connection, self._connection = self._connection, None
        if connection is not None:
            self._give_back(connection)
            connection.leave(self._number)
        self._leave_place()
        self._client.answer_end(None)

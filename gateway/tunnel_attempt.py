"""The upstream's side of a request for a tunnel: a WebSocket, or CONNECT.

Until the answer's head it is a request like others: it may be tried again, and it may be answered by something else. From then on what is
passed on is not HTTP, and each direction ends by itself.

A tunnel of CONNECT ends here, unless it leads to another gateway, which is asked for it in turn: a connection of its own is made to the
endpoint, and no answer's head is waited for. To a service that is to be spoken to in TLS (BackendTLSPolicy) nothing but TLS goes through.
"""

from __future__ import annotations

from typing import Final

from gateway.attempt import ANSWERING, DONE, WAITING, Attempt
from gateway.codec.events import ResponseReceived
from gateway.exchange import Client
from gateway.lane import RAW
from gateway.plan import Permit
from gateway.pool import Pool
from gateway.upstream import Upstream
from mesh.http import CONNECT, UNKNOWN_LENGTH, WEBSOCKET, Header
from mesh.refusals import PlaintextTunnel, UpstreamProtocol

HANDSHAKE: Final = 0x16
"""The type of the record that a ClientHello comes in (RFC 8446 section 5.1)."""


LOOK: Final = 0.01
LOOKS: Final = 100
"""Seconds between two looks at what an upstream of HTTP/2 takes, and how many there are."""


class TunnelAttempt(Attempt):
    """As `gateway.attempt.Attempt`."""

    __slots__ = ("_looks", "_raw", "_shut", "_tls_only", "_websocket", "tunnelling")

    def __init__(self, pool: Pool, permit: Permit, client: Client, http2: bool) -> None:
        super().__init__(pool, permit, client, False, http2)
        cluster = pool.cluster
        self._websocket = permit.plan.asking.head.tunnel == WEBSOCKET
        self._looks = 0
        """How often it has been looked whether the upstream takes WebSockets."""
        self._raw = permit.plan.asking.head.tunnel == CONNECT and not cluster.gateway
        if self._raw:
            self.way = (RAW, "")
        self._tls_only = self._raw and cluster.tls is not None and cluster.tls.mode == "validate"
        """The client's first byte has yet to show that it speaks TLS."""
        self.tunnelling = False
        self._shut = False
        """The upstream's direction of the tunnel has ended."""

    def begin(self) -> None:
        """As `Attempt.begin`."""
        self._complete = False
        super().begin()

    def connected(self, connection: Upstream) -> None:
        """As `gateway.lane.Waiter.connected`."""
        if self._websocket and self._state is WAITING and not connection.codec.websockets:
            self._pool.released(connection)
            self._looks += 1
            if self._looks > LOOKS:
                self._leave_place()
                self._state = DONE
                self._client.refuse(UpstreamProtocol(reason="the upstream takes no WebSocket over HTTP/2 (RFC 8441)"))
            else:
                self._pool.loop.call_later(LOOK, self._look_again, connection)
            return
        super().connected(connection)
        if self._raw and self._connection is connection:
            self.answer(ResponseReceived(self._number, 200, [], b"", UNKNOWN_LENGTH, False))

    def _look_again(self, connection: Upstream) -> None:
        """The upstream may have said meanwhile what it takes: its settings come after the connection."""
        if self._state is not WAITING or self._place is None:
            return
        if connection.spent or not connection.codec.available:
            self.moved()
        else:
            self.connected(connection)

    def body(self, data: bytes) -> None:
        """As `Forwarding.body`."""
        if self._tls_only and data:
            self._tls_only = False
            if data[0] != HANDSHAKE:
                self._leave_connection()
                self._state = DONE
                self._leave_place()
                self._client.refuse(PlaintextTunnel(reason=f"the client's first byte is {data[0]}, and {HANDSHAKE} begins TLS"))
                return
        super().body(data)

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

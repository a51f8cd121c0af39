"""The example service: answers every request with JSON that says what arrived, over HTTP/1.1 and HTTP/2.

It does what every workload of a mesh should do: it takes connections from the mesh's gateways only, so that nobody can walk around
the policy by calling it directly.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec

from gateway.codec import events
from gateway.codec.h1 import Fields
from gateway.codec.h1_server import H1Server
from gateway.codec.h2_server import H2Server
from identity.files import IdentitySource
from identity.problems import IdentityError, IdentityProblem
from identity.tls import peer_of, server_context
from mesh.http import Header, RequestHead
from mesh.model import ClientValidation, ListenerTls
from mesh.peer import Peer
from tollhouse.sockets import shown_address

log = logging.getLogger("tollhouse.echo")

SHOWN_BODY: Final = 4096
"""Bytes of a request's body that are shown; the rest is only counted."""
MOST_CONNECTIONS: Final = 1000
IDLE: Final = 300.0
"""Seconds after which a connection on which nothing moves is closed."""


class Received:
    """One request on its way in."""

    __slots__ = ("body", "head", "size", "trailers")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self.body = b""
        self.size = 0
        self.trailers: list[Header] | None = None


class Echo:
    """One listening echo service. Its owner calls `start` and `close`."""

    def __init__(
        self, name: str, identity: IdentitySource | None, gateways: Collection[str], context: ssl.SSLContext | None = None
    ) -> None:
        """`gateways` are the SPIFFE IDs of which a peer must show one (empty: anybody). With `context` given, TLS is as it says and no
        client certificate is asked for (a service outside the mesh); with neither it nor `identity`, there is no TLS."""
        self.name = name
        self.gateways = frozenset(gateways)
        self._identity = identity
        self._fixed = context
        self._server: asyncio.Server | None = None
        self._forget: Callable[[], None] | None = None
        self.connections: set[EchoConnection] = set()
        self.address = ("", 0)

    async def start(self, host: str, port: int) -> None:
        """Listens at `host`:`port` (0: any). Raises OSError when it can't."""
        loop = asyncio.get_running_loop()
        context = self._context()
        try:
            self._server = await loop.create_server(
                lambda: EchoConnection(self), host, port, ssl=context, ssl_handshake_timeout=10.0 if context else None
            )
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror or str(problem), shown_address(host, port)) from None
        bound = self._server.sockets[0].getsockname()
        self.address = (bound[0], bound[1])

    def _context(self) -> ssl.SSLContext | None:
        if self._fixed is not None or self._identity is None:
            return self._fixed
        outer = server_context(MUTUAL, self._identity)
        current = [outer]

        def renewed(_: object) -> None:
            try:
                current[0] = server_context(MUTUAL, self._identity)  # type: ignore[arg-type]  # it is not None here
            except IdentityError as problem:
                log.error("%s: the new identity cannot be served: %s", self.name, problem)

        def choose(stream: Any, name: str | None, context: ssl.SSLContext) -> None:
            del name
            if current[0] is not context:
                stream.context = current[0]

        outer.sni_callback = choose
        self._forget = self._identity.on_change(renewed)
        return outer

    async def close(self) -> None:
        """Stops listening and ends the connections once what they are answering is answered."""
        if self._forget is not None:
            self._forget()
        if self._server is not None:
            self._server.close()
            for connection in list(self.connections):
                connection.drain()
            await self._server.wait_closed()

    def accepts(self, peer: Peer | IdentityProblem) -> str:
        """Why `peer` is refused; empty when it is welcome."""
        if isinstance(peer, IdentityProblem):
            return str(peer)
        if self.gateways and peer.principal not in self.gateways:
            return f"{peer.principal or 'a peer without an identity'} is not one of the mesh's gateways"
        return ""


MUTUAL: Final = ListenerTls(svid=True, client=ClientValidation(mode="require", source="trust_bundle"))


class EchoConnection(asyncio.Protocol):
    """One connection; a codec decides what is in its bytes."""

    def __init__(self, service: Echo) -> None:
        self.service = service
        self.peer = Peer()
        self.requests: dict[int, Received] = {}
        self.codec: H1Server | H2Server | None = None
        self.transport: asyncio.Transport | None = None
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is done: who is it?"""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        tls = transport.get_extra_info("ssl_object")
        validation = MUTUAL.client if self.service.gateways else None
        peer = peer_of(tls, validation, transport.get_extra_info("peername")[:2], transport.get_extra_info("sockname")[:2])
        why = self.service.accepts(peer)
        if why or isinstance(peer, IdentityProblem) or len(self.service.connections) >= MOST_CONNECTIONS:
            log.warning("%s: refused a connection: %s", self.service.name, why or "too many")
            transport.abort()
            return
        self.peer = peer
        self.codec = H2Server(b"https") if peer.alpn == "h2" else H1Server(b"https" if tls else b"http", Fields())
        self.service.connections.add(self)
        self._rearm()
        self._flush()

    def _rearm(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self.transport is not None:
            self._idle = asyncio.get_running_loop().call_later(IDLE, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Requests, or parts of them."""
        if self.codec is None:
            return
        self._rearm()
        while True:
            before = len(self.requests)
            for event in self.codec.receive(data):
                self._take(event)
            data = b""
            if before <= len(self.requests) or self.codec.closing or not isinstance(self.codec, H1Server):
                break
        self._flush()

    def _take(self, event: events.Event) -> None:
        codec = self.codec
        assert codec is not None
        if isinstance(event, events.RequestReceived):
            self.requests[event.stream] = Received(event.head)
            if event.expects_continue:
                codec.send_informational(event.stream, 100, [])
            if event.ended:
                self._answer(event.stream)
        elif isinstance(event, events.BodyReceived):
            request = self.requests.get(event.stream)
            if request is not None:
                request.size += len(event.data)
                request.body += event.data[: SHOWN_BODY - len(request.body)]
            codec.consumed(event.stream, event.credit)
        elif isinstance(event, events.Ended):
            if event.stream in self.requests:
                self.requests[event.stream].trailers = event.trailers
                self._answer(event.stream)
        elif isinstance(event, events.Refused):
            self.requests.pop(event.stream, None)
            codec.send_head(event.stream, event.refusal.answer_status, [(b"content-length", b"0")], True)
        elif isinstance(event, events.Reset):
            self.requests.pop(event.stream, None)

    def _answer(self, stream: int) -> None:
        request = self.requests.pop(stream)
        codec = self.codec
        assert codec is not None
        body = msgspec.json.encode(self._shown(request)) + b"\n"
        headers: list[Header] = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        head = request.head.method == b"HEAD"
        codec.send_head(stream, 200, headers, head)
        if not head:
            codec.send_body(stream, body, True)

    def _shown(self, request: Received) -> dict[str, Any]:
        head = request.head
        headers: dict[str, str | list[str]] = {}
        for name, value in head.headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            earlier = headers.get(key)
            headers[key] = text if earlier is None else [*earlier, text] if isinstance(earlier, list) else [earlier, text]
        return {
            "service": self.service.name,
            "method": head.method.decode("latin-1"),
            "authority": head.authority.decode("latin-1"),
            "path": head.target.decode("latin-1"),
            "protocol": head.version.decode("latin-1"),
            "gateway": self.peer.principal or None,
            "headers": headers,
            "bodyBytes": request.size,
            "body": request.body.decode("utf-8", "replace"),
            "trailers": {name.decode("latin-1"): value.decode("latin-1") for name, value in request.trailers or ()},
        }

    def _flush(self) -> None:
        if self.codec is None or self.transport is None:
            return
        data = self.codec.take()
        if data:
            self.transport.write(data)
        if self.codec.closing:
            self.transport.close()

    def drain(self) -> None:
        """Answers what is in progress and ends."""
        if self.codec is not None:
            self.codec.drain()
            self._flush()

    def eof_received(self) -> bool:
        """The peer sends no more."""
        if self.codec is not None:
            self.codec.eof()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        del exc
        if self._idle is not None:
            self._idle.cancel()
        self.service.connections.discard(self)

"""Upstreams that behave, and ones that do not, over real sockets; and the client's side of the seam, which writes down what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

from gateway.forward import UpstreamForwarder
from gateway.headers import changes_of
from gateway.limits import Limits
from gateway.plan import Permit, Plan
from identity.ca import Authority
from identity.files import StaticIdentity
from identity.tls import server_context
from mesh.http import HTTP11, UNKNOWN_LENGTH, Header, RequestHead
from mesh.model import (
    Backend,
    ClientValidation,
    Cluster,
    Endpoint,
    HeaderChange,
    ListenerTls,
    Match,
    RetryPolicy,
    Rule,
    Snapshot,
    UpstreamTls,
)
from mesh.outcome import Outcome
from mesh.peer import Caller, Peer
from mesh.questions import Asking
from mesh.refusals import Refusal

GATEWAY = "spiffe://shop.example/ns/edge/sa/ingress"
ORDERS = "spiffe://shop.example/ns/shop/sa/orders"
OTHER = "spiffe://shop.example/ns/shop/sa/other"
MESH = UpstreamTls(mode="mesh", sni="orders.shop")
PATIENCE = 10.0

T = TypeVar("T")


@functools.cache
def authority() -> Authority:
    return Authority.create("shop.example")


@functools.cache
def identity(spiffe_id: str) -> StaticIdentity:
    return StaticIdentity(authority().issue(spiffe_id, dns=["orders.shop"]))


class Connection:
    """An accepted connection, in a thread, with blocking calls."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""

    def head(self) -> bytes:
        """The next request's head; empty at the end."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.recv()
            if not data:
                return b""
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head

    def body(self, length: int) -> bytes:
        while len(self.buffer) < length:
            data = self.recv()
            if not data:
                break
            self.buffer += data
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return body

    def until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            data = self.recv()
            if not data:
                break
            self.buffer += data
        body, _, self.buffer = self.buffer.partition(end)
        return body + end

    def recv(self) -> bytes:
        try:
            return self.sock.recv(65536)
        except OSError:
            return b""

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def end(self) -> None:
        """In good order."""
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.settimeout(1)
                self.sock.unwrap()
        self.cut()

    def cut(self) -> None:
        """Without close_notify."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.sock.close()


Handler = Callable[[Connection], None]


class Upstream:
    """Accepts until it is stopped; each connection has a thread that runs `handler`."""

    def __init__(self, handler: Handler, spiffe_id: str | None = ORDERS, alpn: tuple[str, ...] = ("http/1.1",)) -> None:
        self.handler = handler
        self.context = None
        if spiffe_id is not None:
            tls = ListenerTls(svid=True, client=ClientValidation(), alpn=alpn)
            self.context = server_context(tls, identity(spiffe_id))
        self.accepted = 0
        self.connections: list[Connection] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listening.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.context is not None:
            try:
                sock = self.context.wrap_socket(sock, server_side=True)
            except OSError:
                sock.close()
                return
        connection = Connection(sock)
        self.connections.append(connection)
        self.handler(connection)

    def endpoint(self, *identities: str, weight: int = 1) -> Endpoint:
        return Endpoint(address="127.0.0.1", port=self.port, identities=identities or (ORDERS,), weight=weight)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for connection in self.connections:
            connection.cut()


@contextlib.contextmanager
def upstream(handler: Handler, spiffe_id: str | None = ORDERS, alpn: tuple[str, ...] = ("http/1.1",)) -> Iterator[Upstream]:
    made = Upstream(handler, spiffe_id, alpn)
    try:
        yield made
    finally:
        made.stop()


def serves(answer: bytes, close: bool = False) -> Handler:
    """Answers each request (without a body) with the same bytes."""

    def handler(connection: Connection) -> None:
        while connection.head():
            connection.send(answer)
            if close:
                connection.end()
                return

    return handler


def ok(body: bytes = b"fine") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def echoes(connection: Connection) -> None:
    """Answers with the request's head, and its body by its length or chunks, as the body."""
    while head := connection.head():
        body = b""
        if b"content-length: " in head:
            body = connection.body(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        elif b"transfer-encoding: chunked" in head:
            body = connection.until(b"0\r\n\r\n") if b"x-trailers" not in head else connection.until(b"x-sum: 3\r\n\r\n")
        connection.send(ok(head + b"\n\n" + body))


def slow(seconds: float) -> Handler:
    def handler(connection: Connection) -> None:
        while connection.head():
            time.sleep(seconds)
            connection.send(ok())

    return handler


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Recorder:
    """`gateway.exchange.Client`: writes down what it is told, and sends a body as it is wanted."""

    def __init__(self, loop: asyncio.AbstractEventLoop, body: Iterable[bytes] | None = None, trailers: list[Header] | None = None) -> None:
        self.loop = loop
        self.outcome = Outcome(None, Peer(), "edge/ingress", "https", 0.0)
        self.source = None if body is None else iter(body)
        self.request_trailers = trailers
        self.forwarding: Any = None
        self.wanted = False
        self.asked: list[bool] = []
        self.sent = 0
        self.infos: list[tuple[int, list[Header]]] = []
        self.status = 0
        self.headers: list[Header] = []
        self.body = b""
        self.keep_body = True
        self.received = 0
        self.takes = True
        self.most = 0
        self.trailers: list[Header] | None = None
        self.refusal: Refusal | None = None
        self.ended = False
        self.finished = asyncio.Event()
        self.calls_after_end = 0
        self.cancelled = False

    def _called(self) -> None:
        if self.ended or self.cancelled:
            self.calls_after_end += 1

    def started(self, forwarding: Any) -> None:
        self.forwarding = forwarding
        self.pump()

    def request_wanted(self, wanted: bool) -> None:
        self._called()
        self.asked.append(wanted)
        self.wanted = wanted
        self.pump()

    def pump(self) -> None:
        """Sends one piece in a turn of the loop, as a connection that reads would."""
        if self.wanted and self.forwarding is not None and self.source is not None and not self.ended and not self.cancelled:
            piece = next(self.source, None)
            if piece is None:
                self.source = None
                self.forwarding.end(self.request_trailers)
            else:
                self.sent += len(piece)
                self.forwarding.body(piece)
                self.loop.call_soon(self.pump)

    def informational(self, status: int, headers: list[Header]) -> None:
        self._called()
        self.infos.append((status, headers))

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        self._called()
        assert self.status == 0
        self.status = status
        self.headers = headers
        if ended:
            self._end()

    def answer_body(self, data: bytes) -> bool:
        self._called()
        assert self.status
        self.received += len(data)
        if self.keep_body:
            self.body += data
        return self.takes

    def answer_end(self, trailers: list[Header] | None) -> None:
        self._called()
        self.trailers = trailers
        self._end()

    def refuse(self, refusal: Refusal) -> None:
        self._called()
        self.refusal = refusal
        self._end()

    def _end(self) -> None:
        self.ended = True
        self.finished.set()


def permit(
    cluster: Cluster,
    method: bytes = b"GET",
    target: bytes = b"/orders",
    headers: list[Header] | None = None,
    body_length: int = 0,
    version: bytes = HTTP11,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008  # frozen
    backend_timeout: float | None = None,
    response_headers: tuple[Header, ...] = (),
    backend: Backend | None = None,
    rule_headers: HeaderChange | None = None,
) -> Permit:
    head = RequestHead(method, b"https", b"orders.shop", target, headers or [], version, body_length, target)
    backend = backend or Backend(weight=1, cluster=cluster.name, service="shop/orders")
    made = Rule(
        name="shop/orders#0",
        route="HTTPRoute shop/orders",
        namespace="shop",
        backends=(backend,),
        retry=retry,
        response_headers=rule_headers,
    )
    asking = Asking(head, Peer(), Caller(""), "edge/ingress", "https", made.name, "/**", "shop/orders", 0.0)
    plan = Plan(
        asking=asking,
        match=Match(rule=made, path_kind="prefix", path=b"", template="/**"),
        rule=made,
        backend=backend,
        cluster=cluster,
        method=method,
        target=target,
        authority=b"orders.shop",
        headers=headers or [],
        request_id=b"",
        trace=b"",
        timeout=15.0,
        backend_timeout=backend_timeout,
        edits=changes_of(rule_headers, backend.response_headers),
    )
    return Permit(plan=plan, headers=plan.headers, response_headers=response_headers)


def cluster_of(*endpoints: Endpoint, tls: UpstreamTls | None = MESH, **more: Any) -> Cluster:
    more = {"name": "shop/orders:443", **more}
    return Cluster(namespace="shop", service="orders", port=443, endpoints=endpoints, tls=tls, **more)


def snapshot_of(*clusters: Cluster) -> Snapshot:
    return Snapshot(version="1", clusters={cluster.name: cluster for cluster in clusters})


class World:
    """A forwarder on the running loop."""

    def __init__(self, limits: Limits | None = None, source: StaticIdentity | None = None, seed: int = 1) -> None:
        self.loop = asyncio.get_running_loop()
        self.forwarder = UpstreamForwarder(
            self.loop, identity=source or identity(GATEWAY), limits=limits or Limits(), rng=random.Random(seed)
        )

    def begin(
        self, permitted: Permit, body: Iterable[bytes] | None = None, trailers: list[Header] | None = None, takes: bool = True
    ) -> Recorder:
        client = Recorder(self.loop, body, trailers)
        client.takes = takes
        client.started(self.forwarder.forward(permitted, client, ended=body is None))
        return client

    async def ask(self, permitted: Permit, body: Iterable[bytes] | None = None, trailers: list[Header] | None = None) -> Recorder:
        client = self.begin(permitted, body, trailers)
        await asyncio.wait_for(client.finished.wait(), PATIENCE)
        await asyncio.sleep(0)
        assert not client.calls_after_end
        return client

    async def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        end = self.loop.time() + seconds
        while not condition():
            assert self.loop.time() < end, "it did not come to that in time"
            await asyncio.sleep(0.005)

    def endpoint_state(self, cluster: Cluster, at: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.forwarder.state()["clusters"][cluster.name]["endpoints"][at]
        return found


def run(conversation: Callable[[World], Awaitable[T]], limits: Limits | None = None, source: StaticIdentity | None = None) -> T:
    """Runs `conversation` with a forwarder on a loop of its own; whatever is raised in a callback, or logged, fails the test."""
    raised: list[object] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = raised.append  # type: ignore[method-assign]
    own = threading.get_ident()
    handler.addFilter(lambda record: record.thread == own)  # what threads of other tests still say is theirs
    log = logging.getLogger("tollhouse")

    def note(_: object, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), asyncio.CancelledError):
            raised.append(context)

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(note)
        world = World(limits, source)
        try:
            return await conversation(world)
        finally:
            await world.forwarder.close(0)

    log.addHandler(handler)
    try:
        found = asyncio.run(main())
    except AssertionError as failed:
        failed.add_note(f"raised in callbacks: {raised}")
        raise
    finally:
        log.removeHandler(handler)
    assert not raised, raised
    return found


UNKNOWN = UNKNOWN_LENGTH

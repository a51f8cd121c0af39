"""For the tests of the client's side: a gateway on real sockets, clients with real TLS, and an upstream's side that answers by itself."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import msgspec

from gateway.exchange import Client
from gateway.gateway import Gateway
from gateway.limits import Limits
from gateway.plan import Permit
from identity.ca import Authority
from identity.files import StaticIdentity
from identity.tls import client_context
from mesh.http import Header
from mesh.model import (
    Backend,
    ClientValidation,
    Cluster,
    DecisionPolicy,
    Endpoint,
    GatewayConfig,
    Listener,
    ListenerTls,
    Match,
    MeshSettings,
    Rule,
    Snapshot,
    UpstreamTls,
    VirtualHost,
)
from mesh.outcome import Outcome
from mesh.questions import Decision, DecisionQuestion, Grant, TokenQuestion
from mesh.refusals import UpstreamReset
from telemetry.record import Telemetry

GATEWAY = "spiffe://shop.example/ns/edge/sa/ingress"
WEB = "spiffe://shop.example/ns/shop/sa/web"
KEY = "edge/ingress"


@functools.cache
def authority(name: str = "shop.example", which: int = 0) -> Authority:
    return Authority.create(name)


@functools.cache
def web_identity() -> StaticIdentity:
    return StaticIdentity(authority().issue(WEB))


def gateway_identity() -> StaticIdentity:
    return StaticIdentity(authority().issue(GATEWAY, dns=["shop.example"]))


MUTUAL = ListenerTls(svid=True, client=ClientValidation())
SIMPLE = ListenerTls(svid=True)


def a_snapshot(*listeners: Listener, version: str = "1", mesh: MeshSettings | None = None) -> Snapshot:
    config = GatewayConfig(namespace="edge", name="ingress", listeners=listeners)
    cluster = Cluster(name="shop/web:80", namespace="shop", service="web", port=80, endpoints=(Endpoint(address="127.0.0.1", port=1),))
    return Snapshot(
        version=version,
        mesh=mesh or MeshSettings(trust_domain="shop.example"),
        gateways={config.key: config},
        clusters={cluster.name: cluster},
    )


def a_listener(port: int, name: str = "https", tls: ListenerTls | None = MUTUAL, hostname: str = "*", **rule: Any) -> Listener:
    backends = (Backend(weight=1, cluster="shop/web:80", service="shop/web"),)
    made = Rule(**({"name": "shop/web#0", "route": "HTTPRoute shop/web", "namespace": "shop", "backends": backends} | rule))
    match = Match(rule=made, path_kind="prefix", path=b"", template="/**")
    return Listener(
        name=name,
        port=port,
        protocol="HTTP" if tls is None else "HTTPS",
        hostname=hostname,
        tls=tls,
        hosts={hostname: VirtualHost(hostname=hostname, prefix={b"": (match,)})},
    )


class Answers:
    """Both of those that answer questions: `verdict` for every decision, later when `later` is set."""

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.grant = Grant(admitted=True)
        self.asked: list[tuple[DecisionQuestion, Callable[[Decision], None]]] = []

    def renewed(self, question: DecisionQuestion) -> DecisionQuestion:
        return question

    def recall(self, question: DecisionQuestion, now: float) -> Decision | None:
        return self.decision

    def ask(self, question: Any, done: Callable[[Any], None]) -> None:
        self.asked.append((question, done))

    def take(self, question: TokenQuestion, now: float) -> Grant | None:
        return self.grant

    def give_back(self, question: TokenQuestion) -> None: ...

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None: ...


class Exchange:
    """One request at the other side of the seam; what it does goes by its path."""

    def __init__(self, owner: Echo, permit: Permit, client: Client, ended: bool) -> None:
        self.owner, self.permit, self.client = owner, permit, client
        self.path = permit.plan.target
        self.received = 0
        self.chunks: list[bytes] = []
        self.trailers: list[Header] | None = None
        self.over = ended
        self.cancelled = False
        self.left = 0

    def go(self) -> Exchange:
        path, client = self.path, self.client
        owner = self.owner
        if path.startswith(b"/hello"):
            client.answer(200, [(b"content-length", b"5")], False)
            client.answer_body(b"hello")
            client.answer_end(None)
        elif path.startswith(b"/raise"):
            raise RuntimeError("a defect")
        elif path.startswith(b"/bad-header"):
            client.answer(200, [(b"x", b"a\r\nb: c")], True)
        elif path.startswith(b"/empty"):
            client.answer(204, [], True)
        elif path.startswith(b"/early"):
            client.answer(401, [(b"content-length", b"2")], False)
            client.answer_body(b"no")
            client.answer_end(None)
        elif path.startswith(b"/big"):
            self.left = int(path.rpartition(b"/")[2])
            client.answer(200, [], False)
            self.answer_wanted()
        elif path.startswith(b"/cut"):
            client.answer(200, [], False)
            client.answer_body(b"half")
            client.refuse(UpstreamReset(reason="reset"))
        elif path.startswith(b"/refuse"):
            client.refuse(UpstreamReset(reason="secret reason"))
        elif path.startswith((b"/echo", b"/sink")):
            if self.over:
                self.end(None)
            else:
                client.request_wanted(True)
        elif path.startswith(b"/trailers"):
            client.informational(103, [(b"link", b"</a>")])
            client.answer(200, [(b"trailer", b"x-sum")], False)
            client.answer_body(b"abc")
            client.answer_end([(b"x-sum", b"6")])
        owner.exchanges.append(self)
        return self

    def body(self, data: bytes) -> None:
        assert not self.cancelled
        self.received += len(data)
        self.owner.received += len(data)
        if self.path.startswith(b"/echo"):
            self.chunks.append(data)
        elif self.path.startswith(b"/raise-in-body"):
            raise RuntimeError("a defect")
        if self.path.startswith(b"/sink-slow"):
            self.client.request_wanted(False)

    def end(self, trailers: list[Header] | None) -> None:
        self.over, self.trailers = True, trailers
        if self.path.startswith((b"/echo", b"/sink")):
            body = b"".join(self.chunks) or b"%d" % self.received
            self.client.answer(200, [(b"content-length", b"%d" % len(body)), (b"x-principal", self.owner.principal(self.client))], False)
            self.client.answer_body(body)
            self.client.answer_end(None)

    def answer_wanted(self) -> None:
        assert not self.cancelled
        while self.left:
            data = b"x" * min(self.left, 16384)
            self.left -= len(data)
            self.owner.sent += len(data)
            if not self.client.answer_body(data):
                return
        self.client.answer_end(None)

    def cancel(self) -> None:
        self.cancelled = True


class Echo:
    """A `gateway.exchange.Forwarder` that answers by itself."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.received = self.sent = 0

    def forward(self, permit: Permit, client: Client, *, ended: bool) -> Exchange:
        return Exchange(self, permit, client, ended).go()

    @staticmethod
    def principal(client: Client) -> bytes:
        return client.outcome.peer.principal.encode()


class Door:
    """A running gateway and what its requests left."""

    def __init__(
        self, gateway: Gateway, port: int, forwarder: Echo, telemetry: Telemetry, answers: Answers, identity: StaticIdentity
    ) -> None:
        self.gateway, self.port, self.forwarder, self.telemetry, self.answers = gateway, port, forwarder, telemetry, answers
        self.identity = identity
        self.outcomes: list[Outcome] = []

    async def outcome(self, count: int = 1) -> Outcome:
        """The outcome number `count`, once it is there; and no more than that."""
        await until(lambda: len(self.outcomes) >= count)
        assert len(self.outcomes) == count, [(o.status, o.flag) for o in self.outcomes]
        return self.outcomes[-1]

    async def connect(
        self,
        identity: StaticIdentity | None = None,
        name: str | None = None,
        alpn: tuple[str, ...] = ("http/1.1",),
        now: float | None = None,
        context: ssl.SSLContext | None = None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = context or client_context(UpstreamTls(mode="mesh"), identity or web_identity(), alpn, now)
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name or "shop.example")

    def failures(self, reason: str, listener: str = "https") -> float:
        return self.telemetry._failures.value((KEY, listener, reason))


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)


def listening_socket() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    return sock


@asynccontextmanager
async def door(
    *listeners: Callable[[int], Listener], limits: Limits | None = None, identity: StaticIdentity | None = None, **rule: Any
) -> AsyncIterator[Door]:
    """A gateway with `listeners` (given the port), or one mutual listener whose rule has `rule`."""
    sock = listening_socket()
    port = sock.getsockname()[1]
    identity = identity or gateway_identity()
    forwarder, telemetry, answers = Echo(), Telemetry(), Answers()
    gateway = Gateway(
        asyncio.get_running_loop(),
        KEY,
        identity=identity,
        decider=answers,
        lessee=answers,
        forwarder=forwarder,
        telemetry=telemetry,
        limits=limits or Limits(),
        address="127.0.0.1",
        sockets={("127.0.0.1", port): sock},
    )
    made = Door(gateway, port, forwarder, telemetry, answers, identity)
    record = telemetry.record

    def kept(outcome: Outcome) -> None:
        made.outcomes.append(outcome)
        record(outcome)

    telemetry.record = kept
    gateway.apply(a_snapshot(*([make(port) for make in listeners] or [a_listener(port, **rule)])))
    try:
        yield made
    finally:
        gateway.close()
        assert gateway.requests == 0


async def answer(reader: asyncio.StreamReader, head_request: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the next answer."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
    lines = head.split(b"\r\n")
    status = int(lines[0].split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:] if line)}
    body = b""
    if head_request or status in {204, 304} or status < 200:
        return status, headers, body
    if b"content-length" in headers:
        body = await asyncio.wait_for(reader.readexactly(int(headers[b"content-length"])), 10)
    elif headers.get(b"transfer-encoding") == b"chunked":
        pieces = []
        while True:
            size = int(await asyncio.wait_for(reader.readuntil(b"\r\n"), 10), 16)
            if not size:
                while line := (await asyncio.wait_for(reader.readuntil(b"\r\n"), 10)).strip():
                    name, _, value = line.partition(b":")
                    headers[b"trailer " + name] = value.strip()
                break
            pieces.append(await asyncio.wait_for(reader.readexactly(size), 10))
            await reader.readexactly(2)
        body = b"".join(pieces)
    else:
        body = await asyncio.wait_for(reader.read(), 10)
    return status, headers, body


def get(path: bytes, headers: bytes = b"", method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    return method + b" " + path + b" " + version + b"\r\nhost: shop.example\r\n" + headers + b"\r\n"


def post(path: bytes, body: bytes, headers: bytes = b"") -> bytes:
    return get(path, b"content-length: %d\r\n" % len(body) + headers, b"POST") + body


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends."""
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except (ConnectionError, ssl.SSLError):
        return b""


def with_rule(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """The snapshot of another version."""
    return msgspec.structs.replace(snapshot, version="2", **changes)


POLICY = DecisionPolicy(name="shop/policy", level="rule", decision="shop.allow")


class H2Client:
    """An HTTP/2 client by the h2 library, over a stream pair."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.conn = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        self.conn.initiate_connection()
        self.answers: dict[int, dict[str, Any]] = {}
        self.goaway = False
        self.credit = True
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.conn.data_to_send())

    def request(
        self, path: bytes, method: bytes = b"GET", body: bytes | None = None, headers: tuple[Header, ...] = (), end: bool = True
    ) -> int:
        number: int = self.conn.get_next_available_stream_id()
        fields = [(b":method", method), (b":scheme", b"https"), (b":authority", b"shop.example"), (b":path", path), *headers]
        self.conn.send_headers(number, fields, end_stream=body is None and end)
        if body is not None:
            for at in range(0, max(len(body), 1), 16384):
                self.conn.send_data(number, body[at : at + 16384], end_stream=end and at + 16384 >= len(body))
        self.answers[number] = {"status": 0, "headers": {}, "body": b"", "over": False, "reset": None}
        self.flush()
        return number

    async def read(self) -> bool:
        data = await asyncio.wait_for(self.reader.read(65536), 10)
        if not data:
            return False
        for event in self.conn.receive_data(data):
            found = self.answers.get(getattr(event, "stream_id", 0) or 0, {})
            if isinstance(event, h2.events.ResponseReceived):
                fields = dict(event.headers)
                found["status"], found["headers"] = int(fields[b":status"]), fields
            elif isinstance(event, h2.events.DataReceived):
                found["body"] += event.data
                if self.credit:
                    self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.TrailersReceived):
                found["trailers"] = dict(event.headers)
            elif isinstance(event, h2.events.StreamReset):
                found["reset"] = int(event.error_code)
            elif isinstance(event, h2.events.ConnectionTerminated):
                self.goaway = True
                self.conn.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN  # the library takes it for the end
            if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                found["over"] = True
        self.flush()
        return True

    async def answer(self, number: int) -> dict[str, Any]:
        while not self.answers[number]["over"]:
            assert await self.read(), "the connection ended"
        return self.answers[number]

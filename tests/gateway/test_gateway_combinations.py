"""What must come through whichever versions the two sides speak: 1xx answers, trailers, events as they happen, HTTP/1.0, pipelining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from door_world import H2Client, answer, closed, get
from test_gateway_websocket import peer
from through_world import Through, through

Header = tuple[bytes, bytes]


class Said:
    """What an upstream was asked, and the ways to answer."""

    def __init__(self) -> None:
        self.headers: list[Header] = []
        self.method = self.path = b""
        self.body = b""
        self.trailers: list[Header] = []

    async def early(self, status: int, headers: list[Header]) -> None:
        raise NotImplementedError

    async def head(self, headers: list[Header]) -> None:
        raise NotImplementedError

    async def send(self, data: bytes) -> None:
        raise NotImplementedError

    async def end(self, trailers: list[Header]) -> None:
        raise NotImplementedError


Play = Callable[[Said, Callable[[], Awaitable[None]]], Awaitable[None]]


class H1Said(Said):
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        super().__init__()
        self.writer = writer

    async def early(self, status: int, headers: list[Header]) -> None:
        self.writer.write(b"HTTP/1.1 %d x\r\n" % status + b"".join(b"%b: %b\r\n" % field for field in headers) + b"\r\n")

    async def head(self, headers: list[Header]) -> None:
        lines = b"".join(b"%b: %b\r\n" % field for field in headers)
        self.writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n" + lines + b"\r\n")

    async def send(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n" % len(data) + data + b"\r\n")

    async def end(self, trailers: list[Header]) -> None:
        self.writer.write(b"0\r\n" + b"".join(b"%b: %b\r\n" % field for field in trailers) + b"\r\n")


class H2Said(Said):
    def __init__(self, conn: h2.connection.H2Connection, writer: asyncio.StreamWriter, number: int) -> None:
        super().__init__()
        self.conn, self.writer, self.number = conn, writer, number

    def flush(self) -> None:
        self.writer.write(self.conn.data_to_send())

    async def early(self, status: int, headers: list[Header]) -> None:
        self.conn.send_headers(self.number, [(b":status", b"%d" % status), *headers])
        self.flush()

    async def head(self, headers: list[Header]) -> None:
        self.conn.send_headers(self.number, [(b":status", b"200"), *headers])
        self.flush()

    async def send(self, data: bytes) -> None:
        self.conn.send_data(self.number, data)
        self.flush()

    async def end(self, trailers: list[Header]) -> None:
        if trailers:
            self.conn.send_headers(self.number, trailers, end_stream=True)
        else:
            self.conn.end_stream(self.number)
        self.flush()


async def h1_upstream(play: Play, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        said = H1Said(writer)
        lines = head.split(b"\r\n")
        said.method, said.path = lines[0].split(b" ")[:2]
        said.headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines[1:] if line)]

        async def body(said: Said = said) -> None:
            fields = dict(said.headers)
            if b"content-length" in fields:
                said.body = await reader.readexactly(int(fields[b"content-length"]))
            elif fields.get(b"transfer-encoding") == b"chunked":
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    said.body += (await reader.readexactly(size + 2))[:-2]
                while line := (await reader.readuntil(b"\r\n")).strip():
                    name, _, value = line.partition(b":")
                    said.trailers.append((name, value.strip()))

        await play(said, body)


async def h2_upstream(play: Play, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    conn.initiate_connection()
    writer.write(conn.data_to_send())
    running: list[asyncio.Task[None]] = []
    found: dict[int, tuple[Said, asyncio.Event]] = {}
    while data := await reader.read(65536):
        for event in conn.receive_data(data):
            number = getattr(event, "stream_id", 0)
            if isinstance(event, h2.events.RequestReceived):
                said, over = H2Said(conn, writer, number), asyncio.Event()
                found[number] = said, over
                fields = dict(event.headers)
                said.method, said.path = fields[b":method"], fields[b":path"]
                said.headers = [field for field in event.headers if not field[0].startswith(b":")]

                async def body(over: asyncio.Event = over) -> None:
                    await over.wait()

                running.append(asyncio.ensure_future(play(said, body)))
            elif isinstance(event, h2.events.DataReceived):
                found[number][0].body += event.data
                conn.acknowledge_received_data(event.flow_controlled_length, number)
            elif isinstance(event, h2.events.TrailersReceived):
                found[number][0].trailers += event.headers
            if isinstance(event, h2.events.StreamEnded):
                found[number][1].set()
        writer.write(conn.data_to_send())
    for task in running:
        task.cancel()


class Asked:
    """What a client got."""

    def __init__(self) -> None:
        self.early: list[tuple[int, dict[bytes, bytes]]] = []
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.trailers: dict[bytes, bytes] = {}


async def by_h1(made: Through, headers: tuple[Header, ...], body: bytes, trailers: tuple[Header, ...], expect: bool) -> Asked:
    asked = Asked()
    reader, writer = await made.plain()
    lines = b"".join(b"%b: %b\r\n" % field for field in headers)
    if expect:
        lines += b"expect: 100-continue\r\n"
    writer.write(get(b"/", lines + b"transfer-encoding: chunked\r\n", b"POST"))

    async def send() -> None:
        writer.write(b"%x\r\n%b\r\n0\r\n" % (len(body), body) + b"".join(b"%b: %b\r\n" % field for field in trailers) + b"\r\n")

    if not expect:
        await send()
    while True:
        status, fields, found = await answer(reader)
        if status >= 200:
            break
        asked.early.append((status, fields))
        if status == 100:
            await send()
    asked.status, asked.body = status, found
    asked.headers = fields
    asked.trailers = {name[8:]: value for name, value in fields.items() if name.startswith(b"trailer ")}
    writer.close()
    return asked


async def by_h2(made: Through, headers: tuple[Header, ...], body: bytes, trailers: tuple[Header, ...], expect: bool) -> Asked:
    asked = Asked()
    client = H2Client(*await made.plain())
    early = asyncio.Event()
    receive = client.conn.receive_data

    def watched(data: bytes) -> Any:
        events = receive(data)
        for event in events:
            if isinstance(event, h2.events.InformationalResponseReceived):
                fields = dict(event.headers)
                asked.early.append((int(fields[b":status"]), fields))
                early.set()
        return events

    client.conn.receive_data = watched
    more = ((b"expect", b"100-continue"),) if expect else ()
    number = client.request(b"/", b"POST", None, (*headers, *more), end=False)
    while expect and not early.is_set():
        await client.read()
    client.conn.send_data(number, body, end_stream=not trailers)
    if trailers:
        client.conn.send_headers(number, list(trailers), end_stream=True)
    client.flush()
    found = await client.answer(number)
    asked.status, asked.headers, asked.body, asked.trailers = found["status"], found["headers"], found["body"], found.get("trailers", {})
    return asked


CLIENTS = {"h1": by_h1, "h2": by_h2}
UPSTREAMS = {"h1": h1_upstream, "h2": h2_upstream}
both = pytest.mark.parametrize(("client", "upstream"), [(one, other) for one in CLIENTS for other in UPSTREAMS])


@asynccontextmanager
async def world(upstream: str, play: Play, **rule: Any) -> AsyncIterator[Through]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await UPSTREAMS[upstream](play, reader, writer)

    cluster = {"http2": "always" if upstream == "h2" else "auto"}
    async with asyncio.timeout(30), peer(serve) as port, through(port, cluster=cluster, **rule) as made:
        yield made


@both
def test_early_hints_continue_and_trailers(client: str, upstream: str) -> None:
    async def play(said: Said, body: Callable[[], Awaitable[None]]) -> None:
        heard.append(said)
        await said.early(103, [(b"link", b"</a.css>; rel=preload")])
        await said.early(103, [(b"link", b"</b.css>; rel=preload")])
        await body()
        await said.head([(b"content-type", b"text/plain"), (b"trailer", b"x-sum")])
        await said.send(b"answer to " + said.body)
        await said.end([(b"x-sum", b"42")])

    heard: list[Said] = []

    async def go() -> None:
        async with world(upstream, play) as made:
            asked = await CLIENTS[client](made, ((b"te", b"trailers"),), b"body", ((b"x-check", b"7"),), False)
            hints = [fields[b"link"] for status, fields in asked.early if status == 103]
            assert hints == [b"</a.css>; rel=preload", b"</b.css>; rel=preload"]
            assert (asked.status, asked.body) == (200, b"answer to body")
            assert asked.trailers == {b"x-sum": b"42"}
            assert heard[0].trailers == [(b"x-check", b"7")]
            assert (b"te", b"trailers") in heard[0].headers

    asyncio.run(go())


@both
def test_a_client_that_waits_for_continue(client: str, upstream: str) -> None:
    """The gateway itself says it once an upstream is there; the upstream's own is not passed on a second time."""

    async def play(said: Said, body: Callable[[], Awaitable[None]]) -> None:
        assert b"expect" not in dict(said.headers)
        await said.early(100, [])
        await body()
        await said.head([])
        await said.send(said.body)
        await said.end([])

    async def go() -> None:
        async with world(upstream, play) as made:
            asked = await CLIENTS[client](made, (), b"patience", (), True)
            assert (asked.status, asked.body) == (200, b"patience")
            assert [status for status, _ in asked.early] == [100]

    asyncio.run(go())


@both
def test_events_come_as_they_happen(client: str, upstream: str) -> None:
    """Each event is sent only once the client has the one before it: whoever gathered any would never end. No default timeout ends it."""
    step = asyncio.Event()

    async def play(said: Said, body: Callable[[], Awaitable[None]]) -> None:
        await body()
        await said.head([(b"content-type", b"text/event-stream")])
        for number in range(5):
            await said.send(b"data: %d\n\n" % number)
            await step.wait()
            step.clear()
        await said.end([])

    async def go() -> None:
        async with world(upstream, play, timeout=0.3, timeout_unsaid=True) as made:
            if client == "h1":
                reader, writer = await made.plain()
                writer.write(get(b"/"))
                for number in range(5):
                    await reader.readuntil(b"data: %d\n\n" % number)
                    await asyncio.sleep(0.15)
                    step.set()
                await reader.readuntil(b"0\r\n\r\n")
                writer.close()
            else:
                two = H2Client(*await made.plain())
                asked = two.request(b"/")
                for number in range(5):
                    while b"data: %d\n\n" % number not in two.answers[asked]["body"]:
                        await two.read()
                    await asyncio.sleep(0.15)
                    step.set()
                await two.answer(asked)

    asyncio.run(go())


@pytest.mark.parametrize("upstream", ["h1", "h2"])
def test_pipelined_requests_are_answered_in_order(upstream: str) -> None:
    async def play(said: Said, body: Callable[[], Awaitable[None]]) -> None:
        await body()
        await asyncio.sleep(0.1 if said.path == b"/0" else 0)
        await said.head([])
        await said.send(said.path + said.body)
        await said.end([])

    async def go() -> None:
        async with world(upstream, play) as made:
            reader, writer = await made.plain()
            posted = [b"", b"content-length: 2\r\n"]
            sent = [get(b"/%d" % number, posted[number % 2], (b"GET", b"POST")[number % 2]) + b"ab" * (number % 2) for number in range(40)]
            writer.write(b"".join(sent))
            for number in range(40):
                status, _, body = await answer(reader)
                assert (status, body) == (200, b"/%d" % number + (b"ab" if number % 2 else b""))
            writer.close()

    asyncio.run(go())


@pytest.mark.parametrize("upstream", ["h1", "h2"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_client_of_http_1_0(upstream: str, keep: bool) -> None:
    """It gets no chunks, no 1xx and no trailers, and keeps its connection only if it says so and the answer has a length."""

    async def play(said: Said, body: Callable[[], Awaitable[None]]) -> None:
        await said.early(103, [(b"link", b"</a>")])
        await body()
        await said.head([(b"content-length", b"5")] if keep and upstream == "h2" else [])
        await said.send(b"hello")
        await said.end([(b"x-sum", b"1")])

    async def go() -> None:
        async with world(upstream, play) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/", b"connection: keep-alive\r\n" if keep else b"", version=b"HTTP/1.0"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"transfer-encoding" not in head
            if keep and upstream == "h2":
                assert b"connection: keep-alive" in head
                assert await reader.readexactly(5) == b"hello"
                writer.write(get(b"/", version=b"HTTP/1.0"))
                assert (await answer(reader))[2] == b"hello"
            else:
                assert b"connection: close" in head
                assert await closed(reader) == b"hello"
            writer.close()

    asyncio.run(go())


@pytest.mark.parametrize("client", ["h1", "h2"])
@pytest.mark.parametrize(
    "said", [b"HTTP/1.0 200 OK\r\n\r\nold", b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\nconnection: keep-alive\r\n\r\nold"]
)
def test_an_upstream_of_http_1_0(client: str, said: bytes) -> None:
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(said)
            if b"keep-alive" not in said:
                return

    async def go() -> None:
        async with asyncio.timeout(20), peer(old) as port, through(port) as made:
            for _ in range(3):
                if client == "h1":
                    reader, writer = await made.plain()
                    writer.write(get(b"/"))
                    assert (await answer(reader))[::2] == (200, b"old")
                    writer.close()
                else:
                    two = H2Client(*await made.plain())
                    assert (await two.answer(two.request(b"/")))["body"] == b"old"
            assert {outcome.response_version for outcome in made.outcomes} == {"HTTP/1.0"}

    asyncio.run(go())

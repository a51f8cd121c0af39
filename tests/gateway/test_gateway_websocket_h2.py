"""WebSockets over HTTP/2 (RFC 8441): from HTTP/2 to HTTP/1.1, from HTTP/1.1 to HTTP/2, and from HTTP/2 to HTTP/2."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from door_world import POLICY, H2Client, get, until
from test_gateway_websocket import UPGRADE, dial, peer, websocket_echo
from test_gateway_websocket_cases import BYE, TEXT, frame, told
from through_world import MUTUAL, through
from websockets.asyncio.client import ClientConnection

from mesh.questions import Decision, Verdict

ASKED = (
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"http"),
    (b":authority", b"shop.example"),
    (b":path", b"/chat"),
    (b"sec-websocket-version", b"13"),
    (b"origin", b"https://shop.example"),
)


class H2Socket:
    """A WebSocket on one stream of an HTTP/2 client; frames are the test's own."""

    def __init__(self, client: H2Client) -> None:
        self.client = client
        self.number = 0

    async def open(self, headers: tuple[tuple[bytes, bytes], ...] = ASKED, ended: bool = False) -> dict[str, Any]:
        conn = self.client.conn
        while not conn.remote_settings.enable_connect_protocol:
            await self.client.read()
        self.number = conn.get_next_available_stream_id()
        conn.send_headers(self.number, list(headers), end_stream=ended)
        self.client.answers[self.number] = {"status": 0, "headers": {}, "body": b"", "over": False, "reset": None}
        self.client.flush()
        while not self.state["status"] and not self.state["over"]:
            await self.client.read()
        return self.state

    @property
    def state(self) -> dict[str, Any]:
        return self.client.answers[self.number]

    def send(self, data: bytes, ended: bool = False) -> None:
        self.client.conn.send_data(self.number, data, end_stream=ended)
        self.client.flush()

    async def frames(self, count: int) -> list[tuple[int, bytes]]:
        while len(told(b"\n\n" + self.state["body"])) < count and not self.state["over"]:
            await self.client.read()
        return told(b"\n\n" + self.state["body"])


def unmasked(data: bytes) -> tuple[bytes, bytes]:
    """A client's frames as a server's, and what is left over."""
    out = b""
    while len(data) >= 6:
        length, at = data[1] & 127, 2
        if length >= 126:
            at = 4 if length == 126 else 10
            length = int.from_bytes(data[2:at], "big")
        if len(data) < at + 4 + length:
            break
        mask, payload = data[at : at + 4], data[at + 4 : at + 4 + length]
        key = (mask * (length // 4 + 1))[:length]
        plain = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(length, "big")
        out += data[:1] + bytes([data[1] & 127]) + data[2:at] + plain
        data = data[at + 4 + length :]
    return out, data


async def h2_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, takes: bool = True) -> None:
    """An HTTP/2 server that echoes WebSockets (and `takes` them, or not)."""
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    conn.initiate_connection()
    if takes:
        conn.update_settings({h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 1})
    await asyncio.sleep(0.05)  # its settings come after the connection
    writer.write(conn.data_to_send())
    held: dict[int, bytes] = {}
    while data := await reader.read(65536):
        for event in conn.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                fields = dict(event.headers)
                assert (fields[b":method"], fields[b":protocol"], fields[b":path"]) == (b"CONNECT", b"websocket", b"/chat")
                assert not {b"upgrade", b"connection", b"sec-websocket-key"} & set(fields)
                if b"x-refuse" in fields:
                    conn.send_headers(event.stream_id, [(b":status", b"404"), (b"content-length", b"2")])
                    conn.send_data(event.stream_id, b"no", end_stream=True)
                    continue
                conn.send_headers(event.stream_id, [(b":status", b"200"), (b"x-by", b"h2")])
                held[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                out, held[event.stream_id] = unmasked(held[event.stream_id] + event.data)
                for at in range(0, len(out), 16384):
                    conn.send_data(event.stream_id, out[at : at + 16384])
                if out[-4:-2] == b"\x88\x02":
                    conn.end_stream(event.stream_id)
        writer.write(conn.data_to_send())


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(go())


@pytest.mark.parametrize("tls", [False, True])
def test_from_http_2_to_http_1_1(tls: bool) -> None:
    async def test() -> None:
        async with websocket_echo() as port, through(port, tls=MUTUAL if tls else None, timeout=0.3) as made:
            client = H2Client(*(await made.connect(alpn=("h2",)) if tls else await made.plain()))
            one, two = H2Socket(client), H2Socket(client)
            for socket in (one, two):
                state = await socket.open()
                assert state["status"] == 200
                assert not {b"sec-websocket-accept", b"upgrade", b"connection", b"content-length"} & set(state["headers"])
            one.send(frame(TEXT, b"hello"))
            two.send(frame(TEXT, b"x" * 10_000))
            assert await one.frames(1) == [(0x81, b"hello")]
            assert await two.frames(1) == [(0x81, b"x" * 10_000)]
            await asyncio.sleep(0.4)
            one.send(BYE)
            assert (await one.frames(2))[1] == (0x88, b"\x03\xe8")
            one.send(b"", True)
            await client.answer(one.number)
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (101, "-")
            assert outcome.head is not None
            assert (outcome.head.method, outcome.head.header(b"upgrade")) == (b"GET", b"websocket")
            two.send(frame(TEXT, b"still"))
            assert len(await two.frames(2)) == 2
            client.conn.reset_stream(two.number)
            client.flush()
            await until(lambda: len(made.outcomes) == 2)
            assert made.outcomes[1].flag == "DC"
            await until(lambda: made.pooled() == 0)

    run(test)


def test_from_http_1_1_to_http_2() -> None:
    async def test() -> None:
        async with peer(h2_echo) as port, through(port, cluster={"http2": "always"}) as made:
            client: ClientConnection
            async with dial(made, False) as client:
                assert client.response is not None
                assert client.response.headers["x-by"] == "h2"
                for message in ("hello", b"\0" * 40_000):
                    await client.send(message)
                    assert await client.recv() == message
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag, outcome.response_version) == (101, "-", "HTTP/2")
            async with dial(made, False) as client:
                await client.send("again")
                assert await client.recv() == "again"
            assert made.pooled() == 1

    run(test)


def test_from_http_2_to_http_2() -> None:
    async def test() -> None:
        async with peer(h2_echo) as port, through(port, cluster={"http2": "always"}) as made:
            socket = H2Socket(H2Client(*await made.plain()))
            assert (await socket.open())["status"] == 200
            socket.send(frame(TEXT, b"hello") + frame(TEXT, b"x" * 5000))
            assert await socket.frames(2) == [(0x81, b"hello"), (0x81, b"x" * 5000)]
            socket.send(BYE, True)
            state = await socket.client.answer(socket.number)
            assert state["reset"] is None
            assert (await made.outcome()).flag == "-"

    run(test)


def test_a_denial_and_an_ordinary_answer() -> None:
    async def test() -> None:
        async with peer(h2_echo) as port, through(port, cluster={"http2": "always"}, decisions=(POLICY,)) as made:
            socket = H2Socket(H2Client(*await made.plain()))
            made.answers.decision = Decision(verdict=Verdict.ALLOW)
            state = await socket.open((*ASKED, (b"x-refuse", b"1")))
            assert state["status"] == 404
            await socket.client.answer(socket.number)
            assert state["body"] == b"no"
            made.answers.decision = Decision(verdict=Verdict.DENY)
            assert (await socket.open())["status"] == 403
            assert made.outcomes[-1].flag == "UAEX"

    run(test)


@pytest.mark.parametrize("client", ["h1", "h2"])
def test_an_upstream_of_http_2_that_takes_none(client: str) -> None:
    async def none(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await h2_echo(reader, writer, takes=False)

    async def test() -> None:
        async with peer(none) as port, through(port, cluster={"http2": "always"}) as made:
            if client == "h1":
                reader, writer = await made.plain()
                writer.write(get(b"/chat", UPGRADE))
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 502 ")
                writer.close()
            else:
                assert (await H2Socket(H2Client(*await made.plain())).open())["status"] == 502
            assert (await made.outcome()).flag == "UPE"

    run(test)


def test_an_upstream_that_does_not_accept_our_key() -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.count(b"sec-websocket-key: ") == 1
        said = b"HTTP/1.1 101 x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: AAAA\r\n\r\n"
        writer.write(said)
        await reader.read()

    async def test() -> None:
        async with peer(odd) as port, through(port) as made:
            assert (await H2Socket(H2Client(*await made.plain())).open())["status"] == 502
            assert (await made.outcome()).flag == "UPE"

    run(test)

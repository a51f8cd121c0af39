"""WebSockets over HTTP/1.1: real peers by the `websockets` package, and what peers that are none of these would send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import websockets
from door_world import POLICY, answer, closed, get, until, web_identity
from through_world import MUTUAL, Through, through
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from gateway.limits import Limits
from identity.tls import client_context
from mesh.model import DecisionPolicy, UpstreamTls
from mesh.questions import Decision, Verdict

UPGRADE = b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n"
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echoing(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


@asynccontextmanager
async def websocket_echo(handler: Callable[[ServerConnection], Awaitable[None]] = echoing) -> AsyncIterator[int]:
    async with serve(handler, "127.0.0.1", 0, max_size=None) as server:
        yield next(iter(server.sockets)).getsockname()[1]


@asynccontextmanager
async def peer(handler: Peer) -> AsyncIterator[int]:
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def trusting() -> ssl.SSLContext:
    return client_context(UpstreamTls(mode="mesh"), web_identity(), ("http/1.1",), None)


def dial(made: Through, tls: bool, path: str = "/chat") -> connect:
    if tls:
        url, more = f"wss://shop.example:{made.port}{path}", {"host": "127.0.0.1", "ssl": trusting()}
    else:
        url, more = f"ws://127.0.0.1:{made.port}{path}", {}
    return connect(url, max_size=None, proxy=None, compression=None, **more)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(go())


@pytest.mark.parametrize("tls", [False, True])
def test_a_websocket_goes_through_and_is_recorded_once(tls: bool) -> None:
    async def test() -> None:
        async with websocket_echo() as port, through(port, tls=MUTUAL if tls else None, timeout=0.3, backend_timeout=0.3) as made:
            client: ClientConnection
            async with dial(made, tls) as client:
                for message in ("hello", b"\0\1", "x" * 70_000, b"y" * 1_000_000):
                    await client.send(message)
                    assert await client.recv() == message
                await asyncio.sleep(0.5)  # the route's timeouts are those of the answer's head
                await client.send("still here")
                assert await client.recv() == "still here"
                assert made.outcomes == []
                assert made.gateway.requests == 1
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag, outcome.details) == (101, "-", "via_upstream")
            assert outcome.bytes_received > 1_070_000
            assert outcome.bytes_sent > 1_070_000
            assert outcome.head is not None
            assert outcome.head.header(b"upgrade") == b"websocket"
            await until(lambda: made.pooled() == 0)

    run(test)


def test_a_policy_is_asked_and_its_denial_is_an_ordinary_answer() -> None:
    async def test() -> None:
        async with websocket_echo() as port, through(port, decisions=(POLICY,)) as made:
            made.answers.decision = Decision(verdict=Verdict.DENY)
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with dial(made, False):
                    pass
            assert refused.value.response.status_code == 403
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (403, "UAEX")
            question = outcome.decisions[0][0]
            assert question.asking.head.method == b"GET"
            assert question.asking.head.header(b"upgrade") == b"websocket"
            assert question.asking.head.header(b"sec-websocket-version") == b"13"

    run(test)


def test_a_policy_that_reads_bodies_waits_for_none() -> None:
    reading = DecisionPolicy(name="shop/policy", level="rule", decision="shop.allow", body_limit=100)

    async def test() -> None:
        async with websocket_echo() as port, through(port, decisions=(reading,)) as made:
            made.answers.decision = Decision(verdict=Verdict.ALLOW)
            async with dial(made, False) as client:
                await client.send("hello")
                assert await client.recv() == "hello"
            outcome = await made.outcome()
            assert outcome.decisions[0][0].asking.body == b""

    run(test)


def test_an_upstream_that_does_not_change_the_protocol_answers_as_ever() -> None:
    """What the client sent ahead is its next request then, and is asked about as such: nobody speaks past the gateway."""
    seen: list[bytes] = []

    async def ordinary(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno")

    async def test() -> None:
        async with peer(ordinary) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE) + get(b"/smuggled"))
            assert (await answer(reader))[::2] == (200, b"no")
            assert (await answer(reader))[::2] == (200, b"no")
            await until(lambda: len(made.outcomes) == 2)
            assert [outcome.template for outcome in made.outcomes] == ["/**", "/**"]
            assert [outcome.head.path for outcome in made.outcomes if outcome.head] == [b"/chat", b"/smuggled"]
            assert b"connection: upgrade\r\n" in seen[0]
            assert b"upgrade: websocket\r\n" in seen[0]
            assert b"upgrade" not in seen[1].lower()
            writer.close()

    run(test)


@pytest.mark.parametrize(
    "request_head",
    [
        get(b"/", b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"),
        get(b"/", b"connection: upgrade\r\nupgrade: spdy/3.1\r\n"),
        get(b"/", b"upgrade: websocket\r\n"),
        get(b"/", b"connection: keep-alive\r\nupgrade: websocket\r\n"),
        get(b"/", UPGRADE, b"POST"),
        get(b"/", UPGRADE + b"content-length: 0\r\n", b"PUT"),
        get(b"/", b"connection: upgrade, keep-alive\r\nupgrade: websocket\r\n", version=b"HTTP/1.0"),
        get(b"/", UPGRADE + b"content-length: 2\r\n") + b"ab",
        get(b"/", UPGRADE + b"transfer-encoding: chunked\r\n") + b"0\r\n\r\n",
    ],
)
def test_what_is_no_request_for_a_websocket_is_an_ordinary_request(request_head: bytes) -> None:
    seen: list[bytes] = []

    async def ordinary(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await reader.read()

    async def test() -> None:
        async with peer(ordinary) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(request_head)
            assert (await answer(reader))[::2] == (200, b"ok")
            assert b"\r\nupgrade:" not in seen[0].lower()
            assert b"\r\nconnection:" not in seen[0].lower()
            assert b"http2-settings" not in seen[0].lower()
            writer.close()

    run(test)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: other\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.0 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n",
    ],
)
def test_a_change_to_what_was_not_asked_for_is_an_error(said: bytes) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await reader.read()

    async def test() -> None:
        async with peer(odd) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE))
            assert (await answer(reader))[0] == 502
            assert (await made.outcome()).flag == "UPE"
            writer.close()

    run(test)


def test_an_ordinary_request_is_never_answered_by_101() -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED)
        await reader.read()

    async def test() -> None:
        async with peer(odd) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/"))
            assert (await answer(reader))[0] == 502
            writer.close()

    run(test)


def test_what_comes_with_the_heads_is_the_tunnels() -> None:
    async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED + b"first")
        writer.write(await reader.readexactly(5))
        await reader.read()

    async def test() -> None:
        async with peer(eager) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE) + b"ahead")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert b"connection: upgrade\r\nupgrade: websocket\r\n" in head
            assert b"transfer-encoding" not in head
            assert await reader.readexactly(10) == b"firstahead"
            writer.close()

    run(test)


def halves(port: int, tls: bool, first: str) -> bytes:
    """A client that blocks, since asyncio's TLS cannot be shut down by halves: what it got."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        sock = plain
        if tls:
            sock = trusting().wrap_socket(plain, server_hostname="shop.example", suppress_ragged_eofs=False)
        sock.sendall(get(b"/chat", UPGRADE))
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1000)
        got = head.partition(b"\r\n\r\n")[2]
        if first == "client":
            sock.sendall(b"all")
            if isinstance(sock, ssl.SSLSocket):
                sock.setblocking(False)
                with contextlib.suppress(ssl.SSLWantReadError):
                    sock._sslobj.shutdown()  # type: ignore[attr-defined]
                sock.setblocking(True)
            else:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ssl.SSLZeroReturnError):
            while data := sock.recv(65536):
                got += data
        if first == "upstream":
            sock.sendall(b"still" * 50_000)
            if isinstance(sock, ssl.SSLSocket):
                sock.unwrap()
        return got


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("first", ["client", "upstream"])
def test_each_direction_ends_by_itself(first: str, tls: bool) -> None:
    """The one that has not ended goes on: half a tunnel is one."""

    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED)
        if first == "upstream":
            writer.write(b"bye")
            writer.write_eof()
            got.append(await reader.read())
            return
        got.append(await reader.read())
        writer.write(b"late" * 50_000)
        await writer.drain()

    got: list[bytes] = []

    async def test() -> None:
        async with peer(half) as port, through(port, tls=MUTUAL if tls else None) as made:
            told = await asyncio.to_thread(halves, made.port, tls, first)
            await until(lambda: bool(got))
            if first == "upstream":
                assert (told, got) == (b"bye", [b"still" * 50_000])
            else:
                assert (told, got) == (b"late" * 50_000, [b"all"])
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (101, "-")
            await until(lambda: made.pooled() == 0)

    run(test)


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_who_does_not_read_holds_the_other_up(who: str) -> None:
    """Neither side's bytes pile up in the gateway."""
    sent = 0
    gone = asyncio.Event()

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED)
        if who == "client":
            await pour(reader, writer)
        else:
            writer.transport.pause_reading()
            await gone.wait()

    async def test() -> None:
        async with peer(upstream) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE))
            await reader.readuntil(b"\r\n\r\n")
            pouring = asyncio.create_task(pour(reader, writer)) if who == "upstream" else None
            if who == "client":
                reader._transport.pause_reading()  # type: ignore[attr-defined]
            before = -1
            for _ in range(200):
                await asyncio.sleep(0.05)
                if sent and sent == before:
                    break
                before = sent
            assert sent == before, "it never stopped"
            assert sent < 30_000_000, "more than what the kernel's buffers hold"
            connection = next(iter(made.gateway._connections()))
            assert connection.wire.backlog < 1_000_000
            if pouring is not None:
                pouring.cancel()
                writer.transport.abort()
                gone.set()
                return  # nothing is read from it, so nobody knows that it has gone
            writer.transport.abort()
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (101, "DC")

    run(test)


def test_a_tunnel_has_an_idle_time_of_its_own() -> None:
    async def test() -> None:
        async with websocket_echo() as port, through(port, limits=Limits(linger=0.1, idle_stream=0.2, idle_tunnel=1.2)) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE))
            await reader.readuntil(b"\r\n\r\n")
            began = asyncio.get_running_loop().time()
            await closed(reader)
            assert asyncio.get_running_loop().time() - began > 0.9
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (101, "SI")
            writer.close()

    run(test)


def test_a_tunnel_is_cut_at_the_end_of_the_drain() -> None:
    async def test() -> None:
        async with websocket_echo() as port, through(port) as made, dial(made, False) as client:
            draining = asyncio.create_task(made.gateway.drain(2.0))
            await asyncio.sleep(0.2)
            await client.send("still")
            assert await client.recv() == "still"
            await draining
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert (await made.outcome()).flag == "DC"

    run(test)


@pytest.mark.parametrize("dies", [b"", b"HTTP/1.1 101 Switching"])
def test_an_upstream_that_dies_before_its_answer(dies: bytes) -> None:
    async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(dies)

    async def test() -> None:
        async with peer(dying) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE))
            assert (await answer(reader))[0] == 502
            assert (await made.outcome()).flag == "UC"
            writer.close()

    run(test)


def test_an_upstream_that_is_cut_off_cuts_the_client_off() -> None:
    async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCHED + b"part")
        await writer.drain()
        await reader.readexactly(1)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def test() -> None:
        async with peer(dying) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE))
            await reader.readuntil(b"part")
            writer.write(b"!")
            assert await closed(reader) == b""
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (101, "UC")
            writer.close()

    run(test)


def test_an_upstream_that_speaks_http_2_and_takes_no_websocket() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0\0\0\4\0\0\0\0\0")  # SETTINGS, which say nothing
        await reader.read()

    async def test() -> None:
        async with peer(silent) as port, through(port, cluster={"http2": "always"}) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE))
            assert (await answer(reader))[0] == 502
            outcome = await made.outcome()
            assert (outcome.flag, outcome.details) == ("UPE", "upstream_protocol_error")
            writer.close()

    run(test)

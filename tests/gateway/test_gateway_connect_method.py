"""CONNECT: tunnels to where a route leads, and to nowhere else."""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from door_world import POLICY, H2Client, answer, authority, closed, gateway_identity, get, until
from test_gateway_websocket import peer
from through_world import MUTUAL, Through, through

from identity.tls import server_context
from mesh.model import ListenerTls, UpstreamTls
from mesh.questions import Decision, Verdict

VALIDATED = UpstreamTls(mode="validate", sni="shop.example", hostname="shop.example", roots=authority().bundle)


def connect(host: bytes = b"shop.example:80", headers: bytes = b"", version: bytes = b"HTTP/1.1") -> bytes:
    return b"CONNECT " + host + b" " + version + b"\r\n" + headers + b"\r\n"


async def shouting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello ")
    while data := await reader.read(65536):
        writer.write(data.upper())
        await writer.drain()
    writer.write(b" bye")


def run(test: Callable[[Through], Awaitable[None]], handler: Any = shouting, **more: Any) -> None:
    async def go() -> None:
        async with asyncio.timeout(30), peer(handler) as port, through(port, **{"method": b"CONNECT", **more}) as made:
            await test(made)

    asyncio.run(go())


@pytest.mark.parametrize(
    "request_",
    [
        connect(),
        connect(headers=b"host: shop.example:80\r\n"),
        connect(headers=b"host: shop.example\r\ncontent-length: 0\r\nproxy-connection: keep-alive\r\n"),
        connect(version=b"HTTP/1.0"),
        connect(b"SHOP.Example:80"),
    ],
)
def test_a_tunnel(request_: bytes) -> None:
    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(request_ + b"early ")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"content-length" not in head
        assert b"transfer-encoding" not in head
        writer.write(b"words")
        writer.write_eof()
        assert await reader.read() == b"hello EARLY WORDS bye"
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag, outcome.bytes_received, outcome.bytes_sent) == (200, "-", 11, 21)
        assert outcome.head is not None
        assert (outcome.head.method, outcome.head.authority) == (b"CONNECT", b"shop.example:80")
        await until(lambda: made.pooled() == 0)
        writer.close()

    run(test)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (connect(b"shop.example:81"), 404),
        (connect(b"shop.example:8080"), 404),
        (connect(b"shop.example"), 400),
        (connect(b"/"), 400),
        (connect(b"http://shop.example:80/"), 400),
        (connect(b"user@shop.example:80"), 400),
        (connect(b"shop.example:80", b"host: other.example:80\r\n"), 400),
        (connect(b"shop.example:80", b"host: shop.example:80\r\nhost: shop.example:80\r\n"), 400),
        (connect(b"shop.example:80", b"content-length: 3\r\n"), 400),
        (connect(b"shop.example:80", b"transfer-encoding: chunked\r\n"), 400),
        (connect(b"sh%6fp.example:80"), 400),
        (connect(b"shop.example:99999"), 400),
        (get(b"/"), 404),
    ],
)
def test_no_tunnel(request_: bytes, status: int) -> None:
    """What is refused reaches nobody, and what came with it is no request of its own."""

    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(request_ + (get(b"/smuggled") if request_.startswith(b"CONNECT") else b""))
        assert (await answer(reader))[0] == status
        if request_.startswith(b"CONNECT"):
            assert await closed(reader) == b""
        assert len(made.outcomes) == 1
        assert made.outcomes[0].attempts == 0
        assert made.pooled() == 0
        writer.close()

    run(test)


def test_a_route_that_does_not_name_the_method_takes_no_tunnel() -> None:
    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(connect())
        assert (await answer(reader))[0] == 405
        assert made.pooled() == 0
        writer.close()

    run(test, method=b"")


def test_a_policy_is_asked() -> None:
    async def test(made: Through) -> None:
        made.answers.decision = Decision(verdict=Verdict.DENY)
        reader, writer = await made.plain()
        writer.write(connect(headers=b"proxy-authorization: Basic eDp5\r\n") + b"\x16early")
        status, headers, _ = await answer(reader)
        assert (status, headers[b"connection"]) == (403, b"close")
        assert await closed(reader) == b""
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (403, "UAEX")
        head = outcome.decisions[0][0].asking.head
        assert (head.method, head.authority, head.header(b"proxy-authorization")) == (b"CONNECT", b"shop.example:80", b"Basic eDp5")
        assert made.pooled() == 0
        writer.close()

    run(test, decisions=(POLICY,))


def test_an_endpoint_that_is_not_there() -> None:
    async def go() -> None:
        async with through(1, method=b"CONNECT", cluster={"connect_timeout": 1.0}) as made:
            reader, writer = await made.plain()
            writer.write(connect())
            assert (await answer(reader))[0] == 503
            outcome = await made.outcome()
            assert (outcome.status, outcome.flag) == (503, "UF")
            assert outcome.attempts == 3
            writer.close()

    asyncio.run(go())


def secure_echo() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = server_context(ListenerTls(svid=True, alpn=("http/1.1",)), gateway_identity())
    client = ssl.create_default_context(cadata=authority().bundle.decode())
    return server, client


async def secure_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTPS server: TLS begins on the connection itself, so that the tunnel carries nothing else."""
    await writer.start_tls(secure_echo()[0])
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret")
    await writer.drain()
    await reader.read()


@pytest.mark.parametrize("tls", [None, VALIDATED])
def test_https_of_a_real_client_by_way_of_the_gateway(tls: UpstreamTls | None) -> None:
    def ask(port: int) -> bytes:
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=secure_echo()[1], timeout=10)
        connection.set_tunnel("shop.example", 80)
        connection.request("GET", "/")
        body = connection.getresponse().read()
        connection.close()
        return body

    async def test(made: Through) -> None:
        assert await asyncio.to_thread(ask, made.port) == b"secret"
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (200, "-")

    run(test, secure_http, cluster={"tls": tls})


def test_what_should_be_tls_never_becomes_plaintext() -> None:
    got: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())

    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(connect() + b"GET / HTTP/1.1\r\n\r\n")
        await closed(reader)
        outcome = await made.outcome()
        assert (outcome.flag, outcome.details) == ("DPE", "tunnel_not_tls")
        await until(lambda: bool(got))
        assert got == [b""]
        writer.close()

    run(test, plain, cluster={"tls": VALIDATED})


def test_another_gateway_is_asked_for_the_tunnel() -> None:
    """By mTLS, with CONNECT; what it answers is what the client gets."""
    heads: list[bytes] = []

    async def next_gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        if b"refuse" in heads[-1]:
            writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
            writer.write(await reader.read())

    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(connect(b"far.example:9999") + b"!")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length" not in head
        writer.write_eof()
        assert await reader.read() == b"hello!"
        assert heads[0].startswith(b"CONNECT far.example:9999 HTTP/1.1\r\nhost: far.example:9999\r\n")
        assert b"transfer-encoding" not in heads[0]
        writer.close()
        reader, writer = await made.plain()
        writer.write(connect(b"refuse.example:9999"))
        assert (await answer(reader))[::2] == (403, b"no")
        assert await closed(reader) == b""
        writer.close()

    run(test, next_gateway, cluster={"gateway": True})


@pytest.mark.parametrize("tls", [None, MUTUAL])
def test_many_bytes(tls: ListenerTls | None) -> None:
    async def test(made: Through) -> None:
        reader, writer = await (made.connect() if tls else made.plain())
        writer.write(connect())
        await reader.readuntil(b"hello ")

        async def pour() -> None:
            for _ in range(100):
                writer.write(b"a" * 50_000)
                await writer.drain()

        pouring = asyncio.create_task(pour())
        assert await reader.readexactly(5_000_000) == b"A" * 5_000_000
        await pouring
        writer.close()
        assert (await made.outcome()).bytes_sent >= 5_000_000

    run(test, tls=tls)


@pytest.mark.parametrize("secure", [False, True])
def test_a_tunnel_on_a_stream_of_http_2(secure: bool) -> None:
    async def test(made: Through) -> None:
        client = H2Client(*(await made.connect(alpn=("h2",)) if secure else await made.plain()))
        conn = client.conn
        for number in (1, 3):
            conn.send_headers(number, [(b":method", b"CONNECT"), (b":authority", b"shop.example:80")])
            conn.send_data(number, b"words %d" % number)
            client.answers[number] = {"status": 0, "headers": {}, "body": b"", "over": False, "reset": None}
        client.flush()
        for number in (1, 3):
            while client.answers[number]["body"] != b"hello WORDS %d" % number:
                assert await client.read()
            assert client.answers[number]["status"] == 200
            assert b"content-length" not in client.answers[number]["headers"]
            conn.end_stream(number)
            client.flush()
            found = await client.answer(number)
            assert (found["body"], found["reset"]) == (b"hello WORDS %d bye" % number, None)
        await until(lambda: len(made.outcomes) == 2)
        assert {(outcome.status, outcome.flag) for outcome in made.outcomes} == {(200, "-")}

    run(test, tls=MUTUAL if secure else None)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":authority", b"shop.example:81")], 404),
        ([(b":authority", b"shop.example")], 0),
        ([], 0),
        ([(b":authority", b"shop.example:80"), (b":path", b"/")], 0),
        ([(b":authority", b"shop.example:80"), (b":scheme", b"http")], 0),
        ([(b":authority", b"shop.example:80"), (b"content-length", b"3")], 0),
        ([(b":authority", b"shop.example:80"), (b"host", b"admin.example:80")], 0),
    ],
)
def test_no_tunnel_on_a_stream_of_http_2(fields: list[tuple[bytes, bytes]], status: int) -> None:
    async def test(made: Through) -> None:
        client = H2Client(*await made.plain())
        client.conn.config.validate_outbound_headers = False
        client.conn.send_headers(1, [(b":method", b"CONNECT"), *fields])
        client.answers[1] = {"status": 0, "headers": {}, "body": b"", "over": False, "reset": None}
        client.flush()
        found = await client.answer(1)
        assert found["status"] == status
        assert status or found["reset"] == 1
        assert made.pooled() == 0

    run(test)

"""gRPC-Web from a browser, gRPC to the server: the server is the gRPC project's own."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any

import pytest
from door_world import POLICY, H2Client, answer, get, until
from hypothesis import given
from hypothesis import strategies as st
from test_gateway_grpc import World, run
from test_gateway_websocket import peer
from through_world import through

from gateway.choice import Choice
from gateway.grpc_web import Base64, web_content
from mesh.model import Backend, Cluster, Rule, Snapshot
from mesh.questions import Decision, Verdict

BINARY = b"application/grpc-web+proto"
TEXT = b"application/grpc-web-text+proto"


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def frames(body: bytes) -> list[tuple[int, bytes]]:
    found = []
    while body:
        size = int.from_bytes(body[1:5], "big")
        found.append((body[0], body[5 : 5 + size]))
        body = body[5 + size :]
    return found


def decoded(text: bytes) -> bytes:
    """base64 with padding in the middle, as gRPC-Web's own client reads it: four characters at a time."""
    return b"".join(base64.b64decode(text[at : at + 4]) for at in range(0, len(text), 4))


async def call(made: World, version: str, content: bytes, method: bytes, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    sent = b"".join(base64.b64encode(body[at : at + 7]) for at in range(0, len(body), 7)) if b"text" in content else body
    path = b"/shop.Orders/" + method
    if version == "h1":
        reader, writer = await made.made.plain()
        lines = b"content-type: %b\r\nx-grpc-web: 1\r\ncontent-length: %d\r\n" % (content, len(sent))
        writer.write(get(path, lines, b"POST") + sent)
        status, headers, got = await answer(reader)
        writer.close()
    else:
        client = H2Client(*await made.made.plain())
        found: Any = await client.answer(client.request(path, b"POST", sent, ((b"content-type", content), (b"x-grpc-web", b"1"))))
        status, headers, got = found["status"], found["headers"], found["body"]
        assert "trailers" not in found
    return status, headers, decoded(got) if b"text" in content else got


@pytest.mark.parametrize("version", ["h1", "h2"])
@pytest.mark.parametrize("content", [BINARY, TEXT, b"application/grpc-web", b"application/grpc-web-text"])
def test_calls(version: str, content: bytes) -> None:
    async def test(made: World) -> None:
        status, headers, body = await call(made, version, content, b"unary", framed(b"hello"))
        assert (status, headers[b"content-type"]) == (200, content)
        assert headers[b"x-first"] == b"1"
        (kind, message), (last, trailers) = frames(body)
        assert (kind, message, last) == (0, b"HELLO", 0x80)
        lines = set(trailers.decode().split("\r\n"))
        assert {"grpc-status: 0", "x-last: 2"} <= lines
        _, _, body = await call(made, version, content, b"server", framed(b"200"))
        assert [int(message) for kind, message in frames(body) if not kind] == list(range(200))
        assert frames(body)[-1][0] == 0x80
        outcome = made.made.outcomes[0]
        assert (outcome.status, outcome.flag, outcome.grpc_status) == (200, "-", "0")
        assert outcome.head is not None
        assert outcome.head.header(b"content-type") == content

    run(test)


@pytest.mark.parametrize("content", [BINARY, TEXT])
def test_a_failing_call(content: bytes) -> None:
    async def test(made: World) -> None:
        _, headers, body = await call(made, "h1", content, b"unary", framed(b"fail"))
        said = dict(line.split(": ", 1) for _, frame in frames(body) for line in frame.decode().split("\r\n") if line)
        said |= {name.decode(): value.decode() for name, value in headers.items()}
        assert said["grpc-status"] == "15"
        assert said["x-why"] == "broken"

    run(test)


@pytest.mark.parametrize("content", [BINARY, TEXT])
def test_a_refusal_is_one_that_the_caller_understands(content: bytes) -> None:
    async def test(made: World) -> None:
        made.made.answers.decision = Decision(verdict=Verdict.DENY)
        status, headers, body = await call(made, "h1", content, b"unary", framed(b"a"))
        assert (status, headers[b"content-type"], headers[b"grpc-status"], body) == (200, content, b"7", b"")

    run(test, decisions=(POLICY,))


@pytest.mark.parametrize("sent", [b"AAAA!AAA", b"AAA", b"A===", b"AAAAAA", b"===="])
def test_what_is_no_base64_is_refused_and_the_call_given_up(sent: bytes) -> None:
    async def test(made: World) -> None:
        reader, writer = await made.made.plain()
        lines = b"content-type: %b\r\ncontent-length: %d\r\n" % (TEXT, len(sent))
        writer.write(get(b"/shop.Orders/unary", lines, b"POST") + sent)
        status, headers, _ = await answer(reader)
        assert (status, headers[b"grpc-status"]) == (200, b"13")
        assert (await made.made.outcome()).flag == "DPE"
        await until(lambda: not made.made.gateway.requests)
        writer.close()

    run(test)


def test_a_service_that_speaks_grpc_web_itself_gets_it_as_it_came() -> None:
    async def native(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-type: application/grpc-web-text+proto" in head
        body = await reader.readexactly(8)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\ncontent-type: application/grpc-web-text+proto\r\n\r\n" + body)

    async def go() -> None:
        async with asyncio.timeout(20), peer(native) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/", b"content-type: %b\r\ncontent-length: 8\r\n" % TEXT, b"POST") + b"AAAAAAAA")
            status, headers, body = await answer(reader)
            assert (status, headers[b"content-type"], body) == (200, TEXT, b"AAAAAAAA")
            writer.close()

    asyncio.run(go())


@given(st.lists(st.binary(max_size=20), max_size=10), st.data())
def test_base64_in_pieces(messages: list[bytes], data: st.DataObject) -> None:
    text = b"".join(base64.b64encode(message) for message in messages)
    decoder, found, at = Base64(), b"", 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        found += decoder.decode(text[at : at + size])
        at += size
    assert found == b"".join(messages)
    assert decoder.complete


def test_base64_that_is_none() -> None:
    with pytest.raises((ValueError, binascii.Error)):
        Base64().decode(b"AA=A")


@pytest.mark.parametrize(
    ("content", "web"),
    [(BINARY, True), (TEXT, True), (b"application/grpc-web;x", True), (b"application/grpc", False), (b"application/grpc-webs", False)],
)
def test_what_is_grpc_web(content: bytes, web: bool) -> None:
    assert bool(web_content([(b"content-type", content)])) is web


@pytest.mark.parametrize(
    ("http2", "grpc", "bridges"),
    [("always", False, True), ("auto", False, False), ("auto", True, True), ("never", True, False), ("always", True, True)],
)
def test_who_is_spoken_to_in_grpc(http2: str, grpc: bool, bridges: bool) -> None:
    rule = Rule(name="shop/r#0", route="GRPCRoute shop/r", namespace="shop", grpc=grpc)
    cluster = Cluster(name="shop/a:80", namespace="shop", service="a", port=80, http2=http2)  # type: ignore[arg-type]
    choice = Choice(rule, Backend(weight=1, cluster=cluster.name), Snapshot(version="1", clusters={cluster.name: cluster}))
    assert choice.bridges is bridges

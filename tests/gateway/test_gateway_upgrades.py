"""What asks for another protocol than WebSocket: an ordinary request, in which nothing of that reaches the upstream."""

from __future__ import annotations

import asyncio

import pytest
from door_world import answer, closed, get
from test_gateway_websocket import peer, run
from through_world import through

SETTINGS = b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
ASKED = {
    "h2c": b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n" + SETTINGS,
    "h2c, in other letters": b"Connection: Upgrade,HTTP2-Settings\r\nUpgrade:H2C\r\n" + SETTINGS,
    "h2c without its settings": b"connection: upgrade\r\nupgrade: h2c\r\n",
    "h2c that the connection does not name": b"upgrade: h2c\r\n" + SETTINGS,
    "h2c as one of several": b"connection: upgrade, http2-settings\r\nupgrade: foo/1, h2c\r\n" + SETTINGS,
    "h2c in two fields": b"connection: upgrade\r\nupgrade: foo\r\nupgrade: h2c\r\n" + SETTINGS,
    "TLS": b"connection: upgrade\r\nupgrade: TLS/1.2\r\n",
    "something else": b"connection: upgrade\r\nupgrade: irc/6.9\r\n",
    "nothing": b"connection: upgrade\r\nupgrade:\r\n",
}


class Upstream:
    """Notes each head that it gets, and answers with 200, or with `said`."""

    def __init__(self, said: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok") -> None:
        self.said = said
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.said)


@pytest.mark.parametrize("headers", ASKED.values(), ids=ASKED.keys())
def test_it_is_answered_as_if_it_had_not_asked(headers: bytes) -> None:
    async def test() -> None:
        upstream = Upstream()
        async with peer(upstream) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/a", headers))
            status, said, body = await answer(reader)
            assert (status, body) == (200, b"ok")
            assert b"upgrade" not in said
            (head,) = upstream.heads
            assert not any(word in head.lower() for word in (b"upgrade", b"http2-settings", b"h2c"))
            # The connection goes on in HTTP/1.1.
            writer.write(get(b"/b"))
            assert (await answer(reader))[0] == 200
            writer.close()

    run(test)


@pytest.mark.parametrize("headers", [ASKED["h2c"], ASKED["h2c without its settings"]])
def test_what_is_sent_ahead_in_another_protocol_ends_the_connection_and_goes_nowhere(headers: bytes) -> None:
    async def test() -> None:
        upstream = Upstream()
        async with peer(upstream) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/a", headers) + PREFACE)
            assert (await answer(reader))[0] == 200
            rest = await closed(reader)
            assert rest.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 505 "))
            assert len(upstream.heads) == 1

    run(test)


@pytest.mark.parametrize("token", [b"h2c", b"websocket", b"irc/6.9"])
def test_an_upstream_that_changes_the_protocol_all_the_same_is_in_error(token: bytes) -> None:
    async def test() -> None:
        upstream = Upstream(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: " + token + b"\r\n\r\nsmuggled")
        async with peer(upstream) as port, through(port) as made:
            reader, writer = await made.plain()
            writer.write(get(b"/a", b"connection: upgrade\r\nupgrade: " + token.replace(b"websocket", b"h2c") + b"\r\n"))
            status, _, body = await answer(reader)
            assert status == 502
            assert b"smuggled" not in body
            assert (await made.outcome()).flag == "UPE"

    run(test)


def test_beside_a_websocket_nothing_else_is_passed_on() -> None:
    async def test() -> None:
        upstream = Upstream()
        async with peer(upstream) as port, through(port) as made:
            reader, writer = await made.plain()
            key = b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            writer.write(get(b"/a", b"connection: upgrade, http2-settings\r\nupgrade: h2c, websocket\r\n" + SETTINGS + key))
            assert (await answer(reader))[0] == 200
            (head,) = upstream.heads
            assert b"upgrade: websocket\r\n" in head.lower()
            assert not any(word in head.lower() for word in (b"http2-settings", b"h2c"))
            writer.close()

    run(test)

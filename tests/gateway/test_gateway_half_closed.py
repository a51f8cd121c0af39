"""Clients that shut their sending side down and still read (docs/decisions/0004-half-closed-clients.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from door_world import answer, closed, get, post, until
from test_gateway_websocket import peer
from through_world import MUTUAL, Through, through


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"content-length: 4" in head:
            await reader.readexactly(4)
        await asyncio.sleep(0.1)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")


def run(test: Callable[[Through], Awaitable[None]], tls: bool = False) -> None:
    async def go() -> None:
        async with asyncio.timeout(20), peer(slow) as port, through(port, tls=MUTUAL if tls else None) as made:
            await test(made)

    asyncio.run(go())


@pytest.mark.parametrize("request_", [get(b"/"), post(b"/", b"body"), get(b"/", version=b"HTTP/1.0")])
def test_a_complete_request_is_answered(request_: bytes) -> None:
    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(request_)
        writer.write_eof()
        status, headers, body = await answer(reader)
        assert (status, body) == (200, b"hello")
        assert headers[b"connection"] == b"close"
        assert await closed(reader) == b""
        assert (await made.outcome()).flag == "-"
        await until(lambda: made.gateway.connections == 0)
        writer.close()

    run(test)


def test_so_are_pipelined_ones_but_for_one_that_is_not_complete() -> None:
    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(get(b"/1") + get(b"/2") + get(b"/3") + b"GET /4 HTTP/1.1\r\nho")
        writer.write_eof()
        for _ in range(3):
            assert (await answer(reader))[::2] == (200, b"hello")
        assert await closed(reader) == b""
        await until(lambda: len(made.outcomes) == 3)
        await until(lambda: made.gateway.connections == 0)
        writer.close()

    run(test)


@pytest.mark.parametrize("tls", [False, True])
def test_a_request_that_is_not_complete_is_given_up(tls: bool) -> None:
    async def test(made: Through) -> None:
        _, writer = await (made.connect() if tls else made.plain())
        writer.write(get(b"/", b"content-length: 4\r\n", b"POST") + b"ab")
        await until(lambda: made.gateway.requests == 1)
        if tls:
            writer.close()
        else:
            writer.write_eof()
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (499, "DC")
        writer.close()

    run(test, tls)


def test_under_tls_a_client_that_ends_has_gone() -> None:
    async def test(made: Through) -> None:
        _, writer = await made.connect()
        writer.write(get(b"/"))
        await until(lambda: made.gateway.requests == 1)
        writer.close()
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (499, "DC")

    run(test, True)


def test_an_idle_client_that_ends_is_let_go() -> None:
    async def test(made: Through) -> None:
        reader, writer = await made.plain()
        writer.write(get(b"/"))
        assert (await answer(reader))[0] == 200
        writer.write_eof()
        assert await closed(reader) == b""
        await until(lambda: made.gateway.connections == 0)
        writer.close()

    run(test)

"""Slots of concurrency limits: one is held for each request in progress, and given back however the request ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from door_world import answer, closed, get, until
from l4_world import backend, conversation, free_port, gateway_yaml, l4, route_yaml, service_yaml, tcp
from test_gateway_l4_policy import QUOTA
from test_gateway_websocket import SWITCHED, UPGRADE, peer
from through_world import Through, through

from mesh.filters import RetryPolicy
from mesh.model import QuotaLimit
from mesh.questions import Grant, SlotGrant, TokenQuestion
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.slot_lease import HOLD

LIMIT = QuotaLimit(name="shop/web/slots", level="route", per=(), tokens=0, concurrency=2, timeout=5.0)
TOKENS = QuotaLimit(name="shop/web/tokens", level="route", per=(), tokens=1, interval=3600.0, burst=1, timeout=5.0)
Upstream = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def limited(upstream: Upstream, *limits: QuotaLimit, **more: Any) -> AsyncIterator[tuple[Through, QuotaLessee]]:
    """A gateway whose one rule has the limits, with a real lessee."""
    async with asyncio.timeout(30), peer(upstream) as port, through(port, quota=limits or (LIMIT,), **more) as made:
        lessee = QuotaLessee(MemoryStore(), holder="g")
        made.gateway._shared.driver._lessee = lessee
        try:
            yield made, lessee
        finally:
            await lessee.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """The client is no more."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def gone(lessee: QuotaLessee) -> None:
    await until(lambda: lessee.slots.in_use == 0)


async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An upstream that never answers."""
    await reader.readuntil(b"\r\n\r\n")
    await reader.read()


async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with a body that never ends."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ntick\r\n")
    await reader.read()


async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers by half, and resets."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
    await writer.drain()
    writer.transport.abort()


async def hints(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says 103 first."""
    while True:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


async def quickly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers at once, HEAD without a body."""
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        body = b"" if head.startswith(b"HEAD") else b"ok"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n" + body)


async def tunnels(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Opens a tunnel and echoes."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(SWITCHED)
    while data := await reader.read(100):
        writer.write(data)


def test_no_more_are_in_progress_than_the_limit_says() -> None:
    async def run() -> None:
        async with limited(waits) as (made, lessee):
            clients = [await made.plain() for _ in range(3)]
            for _, writer in clients[:2]:
                writer.write(get(b"/"))
            await until(lambda: lessee.slots.in_use == 2)
            reader, writer = clients[2]
            writer.write(get(b"/"))
            status, headers, _ = await answer(reader)
            fields = dict(headers)
            assert status == 429 and fields[b"retry-after"] == b"1"
            assert fields[b"ratelimit-policy"] == b'"slots";q=2;qu="concurrent-requests"'
            assert fields[b"ratelimit"] == b'"slots";r=0'
            refused = await made.outcome()
            assert (refused.flag, refused.limit) == ("RL", LIMIT.name) and "no slot left" in refused.reason
            reset(clients[0][1])
            await until(lambda: lessee.slots.in_use == 1)
            writer.write(get(b"/"))
            await until(lambda: lessee.slots.in_use == 2)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("upstream", "head"),
    [(quickly, get(b"/")), (quickly, get(b"/", method=b"HEAD")), (hints, get(b"/")), (breaks, get(b"/"))],
    ids=["answered", "HEAD", "1xx", "broken off"],
)
def test_a_slot_is_given_back_with_the_end_of_the_answer(upstream: Upstream, head: bytes) -> None:
    async def run() -> None:
        async with limited(upstream) as (made, lessee):
            for _ in range(5):  # more than there are slots
                reader, writer = await made.plain()
                writer.write(head)
                await reader.readuntil(b"\r\n\r\n")
                await until(lambda: made.outcomes)
                assert made.outcomes.pop().status == 200
                await gone(lessee)
                writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("upstream", [waits, slowly], ids=["before the answer", "within the answer"])
@pytest.mark.parametrize("how", ["reset", "drain"])
def test_a_slot_is_given_back_when_a_client_goes_and_when_the_gateway_ends(upstream: Upstream, how: str) -> None:
    async def run() -> None:
        async with limited(upstream) as (made, lessee):
            for _ in range(3):
                reader, writer = await made.plain()
                writer.write(get(b"/"))
                await until(lambda: lessee.slots.in_use == 1)
                if upstream is slowly:
                    await reader.readuntil(b"tick")
                if how == "drain":
                    await made.gateway.drain(0.1)
                    await gone(lessee)
                    return
                reset(writer)
                await gone(lessee)

    asyncio.run(run())


def test_a_slot_is_given_back_after_a_timeout_and_held_over_retries() -> None:
    tries = 0

    async def fails(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        while True:
            await reader.readuntil(b"\r\n\r\n")
            tries += 1
            writer.write(b"HTTP/1.1 503 no\r\ncontent-length: 0\r\n\r\n")

    async def run() -> None:
        async with limited(waits, timeout=0.2) as (made, lessee):
            reader, writer = await made.plain()
            writer.write(get(b"/"))
            assert (await answer(reader))[0] == 504
            await gone(lessee)
        one = msgspec.structs.replace(LIMIT, concurrency=1)
        retry = RetryPolicy(statuses=(503,), attempts=3, backoff=0.01)
        async with limited(fails, one, retry=retry) as (made, lessee):
            reader, writer = await made.plain()
            writer.write(get(b"/"))
            assert (await answer(reader))[0] == 503
            assert tries > 1  # each with the one slot
            await gone(lessee)

    asyncio.run(run())


def test_a_tunnel_holds_its_slot_until_it_is_closed() -> None:
    async def run() -> None:
        async with limited(tunnels) as (made, lessee):
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE) + b"hello")
            await reader.readuntil(b"hello")
            assert lessee.slots.in_use == 1
            writer.close()
            await gone(lessee)

    asyncio.run(run())


def test_a_request_that_another_limit_or_a_fault_refuses_holds_no_slot() -> None:
    async def run() -> None:
        async with limited(waits, LIMIT, TOKENS) as (made, lessee):
            one, other = await made.plain(), await made.plain()
            one[1].write(get(b"/"))
            await until(lambda: lessee.slots.in_use == 1)
            other[1].write(get(b"/"))
            assert (await answer(other[0]))[0] == 429
            assert lessee.slots.in_use == 1
            reset(one[1])
            await gone(lessee)

    asyncio.run(run())


class Later(QuotaLessee):
    """A lessee whose answers come when the test says."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(), holder="g")
        self.held: list[Callable[[], None]] = []

    def take(self, question: TokenQuestion, now: float) -> Grant | None:
        return None

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        self.held.append(lambda: QuotaLessee.ask(self, question, done))


@pytest.mark.parametrize("shadow", [False, True])
def test_a_slot_that_comes_when_the_client_has_gone_is_given_back(shadow: bool) -> None:
    async def run() -> None:
        limit = msgspec.structs.replace(LIMIT, shadow=shadow)
        async with limited(quickly, limit) as (made, _):
            lessee = Later()
            made.gateway._shared.driver._lessee = lessee
            reader, writer = await made.plain()
            writer.write(get(b"/"))
            await until(lambda: lessee.held)
            if shadow:  # nobody waits for it
                assert (await answer(reader))[0] == 200
            reset(writer)
            await until(lambda: made.outcomes)
            lessee.held.pop()()
            assert lessee.slots.in_use == 0
            await lessee.close()

    asyncio.run(run())


@pytest.mark.parametrize("upstream", [waits, slowly, tunnels], ids=["waiting", "answering", "tunnel"])
def test_what_outlives_the_lease_of_a_strict_limit_is_cut_off(upstream: Upstream) -> None:
    async def run() -> None:
        strict = msgspec.structs.replace(LIMIT, strict=True)
        async with limited(upstream, strict) as (made, lessee):
            reader, writer = await made.plain()
            writer.write(get(b"/chat", UPGRADE) + b"tick" if upstream is tunnels else get(b"/"))
            await until(lambda: lessee.slots.in_use == 1)
            if upstream is not waits:
                await reader.readuntil(b"tick")
            ((_, lease),) = lessee.slots.leases()
            lease.until = 0.0
            lessee.slots._lapse(lease)
            await closed(reader) if upstream is not waits else await answer(reader)
            outcome = await made.outcome()
            assert (outcome.flag, outcome.limit) == ("RLSE", LIMIT.name) and "lapsed" in outcome.reason
            assert lessee.slots.in_use == 0 and lessee.slots.cut == 1

    asyncio.run(run())


CONNECTIONS = QUOTA.replace("tokens: 1", "concurrency: 1").replace(", per: [address]", "")


@conversation
async def test_connections_below_http_hold_slots_too() -> None:
    port = free_port()

    async def talks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    yaml = (gateway_yaml(tcp(port)), route_yaml("TCPRoute", "r", "a"))
    async with backend(talks) as one, l4(*yaml, service_yaml("a", one), CONNECTIONS) as made:
        lessee = QuotaLessee(MemoryStore(), holder="g")
        made.gateway._shared.driver._lessee = lessee
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.readexactly(5) == b"hello"
            assert lessee.slots.in_use == 1
            with contextlib.suppress(ConnectionError):
                other, closing = await asyncio.open_connection("127.0.0.1", port)
                assert await other.read() == b""
                closing.close()
            writer.close()
            await gone(lessee)
            await asyncio.sleep(HOLD * 2)  # a refusal holds for so long
        await lessee.close()


def test_a_grant_of_a_slot_is_told_apart() -> None:
    async def run() -> None:
        lessee = QuotaLessee(MemoryStore(), holder="g")
        found: list[Grant] = []
        lessee.ask(TokenQuestion(LIMIT, ()), found.append)
        assert isinstance(found[0], SlotGrant)
        found[0].slot.release()
        found[0].slot.release()
        assert lessee.slots.in_use == 0
        await lessee.close()

    asyncio.run(run())

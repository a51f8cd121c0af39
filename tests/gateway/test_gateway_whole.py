"""Both sides together: clients, the gateway, and real upstreams."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from door_world import (
    MUTUAL,
    H2Client,
    answer,
    get,
    post,
    until,
)
from through_world import Through, through

from gateway.limits import Limits


class Upstream:
    """An HTTP/1.1 server by hand: echoes, counts, is slow, or goes away."""

    def __init__(self) -> None:
        self.read = self.gone = self.connections = 0
        self.go = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone += 1
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        path = lines[0].split()[1]
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:] if line)}
        size = int(fields.get(b"content-length", b"0"))
        if path == b"/slow-upload":
            await self.go.wait()
        body = b""
        left = size
        while left:
            data = await reader.read(min(left, 65536))
            if not data:
                raise ConnectionError
            left -= len(data)
            self.read += len(data)
            body = data if size > 1_000_000 else body + data
        if path == b"/hang":
            await reader.readexactly(1)
        if path == b"/die":
            return False
        if path.startswith(b"/big/"):
            total = int(path[5:])
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
            while total:
                piece = min(total, 65536)
                total -= piece
                writer.write(b"b" * piece)
                await writer.drain()
            return True
        said = body if path == b"/echo" else b"%d" % self.read
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
        return True


class Whole(Through):
    upstream: Upstream


@asynccontextmanager
async def whole(limits: Limits | None = None) -> AsyncIterator[Whole]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with through(port, Whole, tls=MUTUAL, limits=limits or Limits(), drain=1.0, timeout=20.0) as made:
            made.upstream = upstream
            yield made
    finally:
        server.close()


def run(test: Callable[[Whole], Awaitable[None]]) -> None:
    async def go() -> None:
        async with whole(Limits(linger=0.1)) as made:
            await test(made)

    asyncio.run(go())


@pytest.mark.parametrize("http2", [False, True])
def test_requests_and_answers(http2: bool) -> None:
    async def test(made: Whole) -> None:
        bodies = [b"x" * size for size in (0, 1, 100, 20_000, 200_000)]
        if http2:
            client = H2Client(*await made.connect(alpn=("h2",)))
            for body in bodies[:4]:
                found = await client.answer(client.request(b"/echo", b"POST", body, ((b"content-length", b"%d" % len(body)),)))
                assert (found["status"], found["body"]) == (200, body)
        else:
            reader, writer = await made.connect()
            for body in bodies:
                writer.write(post(b"/echo", body))
                status, _, found_body = await answer(reader)
                assert (status, found_body) == (200, body)
        outcome = made.outcomes[-1]
        assert (outcome.flag, outcome.attempts, outcome.cluster) == ("-", 1, "shop/web:80")
        assert outcome.endpoint.startswith("127.0.0.1:")
        assert made.upstream.connections == 1

    run(test)


def test_a_great_upload_through_a_slow_upstream_is_not_held() -> None:
    size = 100 << 20

    async def test(made: Whole) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/slow-upload", b"content-length: %d\r\n" % size, b"POST"))
        sent = 0

        async def send() -> None:
            nonlocal sent
            piece = b"u" * 65536
            while sent < size:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sending = asyncio.create_task(send())
        last = -1
        while sent != last:
            last = sent
            await asyncio.sleep(0.1)
        assert 0 < sent < size // 2, "it stands still as long as the upstream reads nothing"
        made.upstream.go.set()
        await sending
        assert (await answer(reader))[2] == b"%d" % size
        assert made.outcomes[-1].bytes_received == size
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000, "kilobytes"

    run(test)


def test_a_great_download_to_a_slow_client_is_not_held() -> None:
    size = 100 << 20

    async def test(made: Whole) -> None:
        reader, writer = await made.connect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        writer.write(get(b"/big/%d" % size))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.3)
        assert made.outcomes == []
        left = size
        while left:
            left -= len(await reader.read(65536))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000, "kilobytes"
        await until(lambda: len(made.outcomes) == 1)
        assert made.outcomes[0].bytes_sent == size

    run(test)


def test_a_client_that_vanishes_frees_its_upstream() -> None:
    async def test(made: Whole) -> None:
        _, writer = await made.connect()
        writer.write(get(b"/hang"))
        await until(lambda: made.upstream.connections == 1)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await until(lambda: made.upstream.gone == 1)
        assert made.outcomes[0].flag == "DC"

    run(test)


def test_an_upstream_that_goes_away() -> None:
    async def test(made: Whole) -> None:
        reader, writer = await made.connect()
        writer.write(post(b"/die", b"x"))
        assert (await answer(reader))[0] in {502, 503}
        assert made.outcomes[0].flag == "UC"
        writer.write(get(b"/echo"))
        assert (await answer(reader))[0] == 200

    run(test)


def test_many_clients_at_once() -> None:
    async def test(made: Whole) -> None:
        async def one(at: int) -> None:
            reader, writer = await made.connect()
            for turn in range(20):
                body = b"%d-%d" % (at, turn) * 50
                writer.write(post(b"/echo", body))
                assert (await answer(reader))[2] == body
            writer.close()

        await asyncio.gather(*[one(at) for at in range(20)])
        assert len(made.outcomes) == 400
        assert {outcome.flag for outcome in made.outcomes} == {"-"}

    run(test)

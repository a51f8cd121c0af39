"""The end of a gateway: nothing new, what is in progress is finished, and all of it within a bound."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from door_world import Door, H2Client, answer, closed, door, get, until

from gateway.limits import Limits


def run(test: Callable[[Door], Awaitable[None]], **options: object) -> None:
    async def whole() -> None:
        async with door(limits=Limits(linger=0.2), **options) as made:  # type: ignore[arg-type]
            await test(made)

    asyncio.run(whole())


def test_requests_in_progress_are_finished() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/never"))
        client = H2Client(*await made.connect(alpn=("h2",)))
        number = client.request(b"/never")
        idle_reader, _ = await made.connect()
        await until(lambda: len(made.forwarder.exchanges) == 2)
        draining = asyncio.create_task(made.gateway.drain(10))
        await asyncio.sleep(0.05)
        assert not made.gateway.ready
        with pytest.raises(OSError):
            await made.connect()
        while not client.goaway:
            await client.read()
        assert await closed(idle_reader) == b""
        assert not draining.done()
        for exchange in made.forwarder.exchanges:
            exchange.client.answer(200, [(b"content-length", b"2")], False)
            exchange.client.answer_body(b"ok")
            exchange.client.answer_end(None)
        status, headers, body = await answer(reader)
        assert (status, body, headers[b"connection"]) == (200, b"ok", b"close")
        assert await closed(reader) == b""
        assert (await client.answer(number))["body"] == b"ok"
        assert await closed(client.reader) == b""
        await asyncio.wait_for(draining, 5)
        assert made.gateway.connections == 0
        assert [outcome.flag for outcome in made.outcomes] == ["-", "-"]

    run(test)


def test_a_request_that_was_under_way_is_still_answered() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        await answer(reader)
        draining = asyncio.create_task(made.gateway.drain(10))
        await asyncio.sleep(0.05)
        writer.write(get(b"/hello"))
        status, headers, _ = await answer(reader)
        assert (status, headers[b"connection"]) == (200, b"close")
        assert await closed(reader) == b""
        await draining

    run(test)


def test_it_does_not_take_longer_than_it_may() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/never"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        started = time.monotonic()
        await made.gateway.drain(0.5)
        assert 0.4 < time.monotonic() - started < 3
        await closed(reader)
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (499, "DC")
        assert made.forwarder.exchanges[0].cancelled
        assert made.gateway.connections == 0
        made.gateway.apply(made.gateway._snapshot)
        assert made.gateway.listening == ()

    run(test)


def test_with_nobody_there_it_is_immediate() -> None:
    async def test(made: Door) -> None:
        started = time.monotonic()
        await made.gateway.drain(30)
        assert time.monotonic() - started < 1

    run(test)


def test_no_request_is_lost_while_clients_go_on_asking() -> None:
    async def test(made: Door) -> None:
        answered = lost = 0

        async def client() -> None:
            nonlocal answered, lost
            reader, writer = await made.connect()
            while True:
                writer.write(get(b"/hello"))
                try:
                    headers = (await answer(reader))[1]
                except (ConnectionError, asyncio.IncompleteReadError):
                    lost += 1
                    return
                answered += 1
                if headers.get(b"connection") == b"close":
                    return
                await asyncio.sleep(0.01)

        clients = [asyncio.create_task(client()) for _ in range(10)]
        await until(lambda: answered > 50)
        await made.gateway.drain(10)
        await asyncio.gather(*clients)
        assert lost == 0
        assert len(made.outcomes) == answered

    run(test)

"""Whole conversations, cut into any pieces and broken off anywhere: answers in order, one outcome for each request, nothing left over."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from door_world import Door, a_listener, answer, door, get, until
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import Limits

logging.getLogger("asyncio").setLevel(logging.CRITICAL)

Request = tuple[bytes, int, bool]
"""Path, bytes of body (negative for none), chunked."""

paths = st.sampled_from([b"/hello", b"/echo", b"/refuse", b"/early", b"/trailers", b"/empty", b"/big/70000", b"/a%2fb"])
requests = st.lists(st.tuples(paths, st.sampled_from([-1, 0, 1, 700, 20_000, 60_000]), st.booleans()), min_size=1, max_size=6)
STATUS = {b"/refuse": 502, b"/early": 401, b"/empty": 204, b"/a%2fb": 400}


def written(request: Request) -> bytes:
    path, size, chunked = request
    if size < 0:
        return get(path)
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    if not chunked:
        return get(path, b"content-length: %d\r\n" % size, b"POST") + body
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 5000]), body[at : at + 5000]) for at in range(0, size, 5000))
    return get(path, b"transfer-encoding: chunked\r\n", b"POST") + chunks + b"0\r\n\r\n"


def converse(whole: Any) -> None:
    failures: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failures.append(record)

    handler = Handler(logging.WARNING)
    logging.getLogger("tollhouse").addHandler(handler)

    async def run() -> None:
        async with door(lambda port: a_listener(port, "http", None), limits=Limits(linger=3.0)) as made:
            await whole(made)

    try:
        asyncio.run(run())
    finally:
        logging.getLogger("tollhouse").removeHandler(handler)
    assert not failures, [record.getMessage() for record in failures]


@settings(max_examples=250, deadline=None)
@given(requests, st.lists(st.integers(1, 30_000), min_size=1, max_size=10), st.integers(0, 3))
def test_every_request_has_its_answer_and_its_outcome(asked: list[Request], pieces: list[int], pause: int) -> None:
    async def whole(made: Door) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        data = b"".join(map(written, asked))

        async def send() -> None:
            at = turn = 0
            while at < len(data):
                size = max(pieces[turn % len(pieces)], len(data) // 200)
                writer.write(data[at : at + size])
                at += size
                turn += 1
                for _ in range(pause):
                    await asyncio.sleep(0)
                await writer.drain()

        sending = asyncio.create_task(send())
        for path, size, _ in asked:
            status, headers, body = await answer(reader)
            if status == 103:
                status, headers, body = await answer(reader)
            assert status == STATUS.get(path, 200)
            if path == b"/echo":
                assert len(body) == max(size, 1)
            elif path.startswith(b"/big"):
                assert len(body) == 70_000
            if headers.get(b"connection") == b"close":
                # An answer that came before all of a large request: the rest of the conversation is not had.
                assert size > 0
                break
        else:
            await sending
            await until(lambda: len(made.outcomes) == len(asked))
            assert [outcome.status for outcome in made.outcomes] == [STATUS.get(path, 200) for path, _, _ in asked]
        sending.cancel()
        writer.transport.abort()
        await until(lambda: made.gateway.connections == 0)

    # An answer of the upstream's that is chunked and early ends the connection: such requests come without a body here.
    asked = [
        (path, -1, False) if path.startswith((b"/big", b"/trailers", b"/hello", b"/empty")) else (path, size, c) for path, size, c in asked
    ]
    converse(whole)


@settings(max_examples=250, deadline=None)
@given(requests, st.floats(0, 1), st.booleans())
def test_a_client_may_break_off_anywhere(asked: list[Request], share: float, reset: bool) -> None:
    async def whole(made: Door) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", made.port)
        data = b"".join(map(written, asked))
        data = data[: int(len(data) * share)]
        writer.write(data)
        for _ in range(5):
            await asyncio.sleep(0)
        if reset:
            writer.transport.abort()
        else:
            writer.close()
        await until(lambda: made.gateway.connections == 0)
        assert len(made.outcomes) <= len(asked)
        over = {id(outcome) for outcome in made.outcomes}
        assert len(over) == len(made.outcomes)
        for exchange in made.forwarder.exchanges:
            assert id(exchange.client.outcome) in over
        assert not made.gateway._shared.sweeper.watched

    converse(whole)

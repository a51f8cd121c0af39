"""Our gRPC client against grpcio's server, and against servers that break, stop, or never begin."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import grpc
import pytest
from grpc import aio

from gateway import grpc_channel, grpc_connection
from gateway.codec import h2_frames as h2
from gateway.codec.events import Ended, RequestReceived
from gateway.codec.h2_server import H2Server
from gateway.grpc_channel import GrpcChannel, GrpcChannels, split_target
from gateway.grpc_unary import result_of, timeout_text
from pdp.rpc import MAX_ANSWER, Code, Result
from tests.servers import free_port

METHOD = b"/test.Echo/Echo"
Unary = Callable[[bytes, Any], Awaitable[bytes]]


@asynccontextmanager
async def grpcio(echo: Unary, *options: tuple[str, Any]) -> AsyncIterator[str]:
    """A server of the reference implementation."""
    server = aio.server(options=list(options))
    handler = grpc.method_handlers_generic_handler("test.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def scripted(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that says what `talk` says, once for each connection."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def opened(target: str, *, pings: bool = True) -> GrpcChannel:
    return GrpcChannels(asyncio.get_running_loop()).open(target, pings=pings)


async def call(channel: GrpcChannel, message: bytes = b"hello", seconds: float = 10.0, **metadata: str) -> Result:
    """A call's result; a second one fails the test."""
    result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in metadata.items()]
    channel.start(METHOD, fields, message, seconds, result.set_result)
    async with asyncio.timeout(20):
        return await result


async def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not reached():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def echo(message: bytes, _: Any) -> bytes:
    return message


def run(work: Awaitable[None]) -> None:
    async def all_of_it() -> None:
        await work

    asyncio.run(all_of_it())


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_messages_of_every_size_go_there_and_back(size: int) -> None:
    async def conversation() -> None:
        async with grpcio(echo, ("grpc.max_receive_message_length", 16 << 20)) as target:
            channel = opened(target)
            assert await call(channel, bytes(size)) == Result(Code.OK, "", bytes(size))
            assert channel.held == 0
            channel.close()

    run(conversation())


def test_metadata_deadline_and_statuses_are_as_the_reference_understands_them() -> None:
    seen: list[Any] = []

    async def picky(message: bytes, context: Any) -> bytes:
        seen.append((dict(context.invocation_metadata())["x-word"], context.time_remaining()))
        context.set_trailing_metadata((("x-end", "yes"),))
        if message != b"hello":
            await context.abort(grpc.StatusCode(grpc.StatusCode.FAILED_PRECONDITION), "no: 100 % ünlikely")
        return b"x"

    async def conversation() -> None:
        async with grpcio(picky) as target:
            channel = opened(target)
            fine = await call(channel, x_word="w", seconds=7.0)
            assert (fine.code, fine.message, fine.trailer(b"x-end")) == (Code.OK, b"x", "yes")
            failed = await call(channel, b"other", x_word="w")
            assert (failed.code, failed.details, failed.trailer(b"x-end")) == (Code.FAILED_PRECONDITION, "no: 100 % ünlikely", "yes")
            channel.close()
        assert seen[0][0] == "w"
        assert 5.0 < seen[0][1] <= 7.0

    run(conversation())


def test_more_calls_than_the_server_takes_wait_for_their_turn() -> None:
    now = most = 0

    async def busy(message: bytes, _: Any) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return message

    async def conversation() -> None:
        async with grpcio(busy, ("grpc.max_concurrent_streams", 5)) as target:
            channel = opened(target)
            assert (await call(channel)).code is Code.OK  # the settings have come
            results = await asyncio.gather(*(call(channel, b"%d" % number) for number in range(60)))
            assert [each.message for each in results] == [b"%d" % number for number in range(60)]
            assert most <= 5
            channel.close()

    run(conversation())


def test_a_call_that_is_given_up_is_reset_and_the_others_go_on() -> None:
    cancelled = asyncio.Event()

    async def slow(message: bytes, _: Any) -> bytes:
        if message == b"slow":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.set()
                raise
        return message

    async def conversation() -> None:
        async with grpcio(slow) as target:
            channel = opened(target)
            told: list[Result] = []
            given_up = channel.start(METHOD, (), b"slow", 30.0, told.append)
            assert (await call(channel)).code is Code.OK
            given_up.cancel()
            given_up.cancel()
            async with asyncio.timeout(10):
                await cancelled.wait()
            assert (await call(channel)).code is Code.OK
            waiting = opened(f"127.0.0.1:{free_port()}")
            waiting.start(METHOD, (), b"x", 30.0, told.append).cancel()
            assert not told
            assert (channel.held, waiting.held) == (0, 0)
            for each in (channel, waiting):
                each.close()

    run(conversation())


def test_who_is_away_is_said_at_once_and_found_again() -> None:
    async def conversation() -> None:
        port = free_port()
        channel = opened(f"127.0.0.1:{port}")
        assert (await call(channel)).details == "connection refused"
        assert (await call(channel)).code is Code.UNAVAILABLE
        server = aio.server()
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)}),)
        )
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await until(lambda: channel._connection is not None)  # without being asked
        assert (await call(channel)).code is Code.OK
        # A server that ends in good order: what it has is answered, and what comes then finds nobody.
        await server.stop(1)
        assert (await call(channel)).code is Code.UNAVAILABLE
        channel.close()
        assert (await call(channel)).details == "the channel is closed"

    run(conversation())


def frames(*parts: bytes) -> bytes:
    return h2.settings({}) + b"".join(parts)


def speaking(*said: bytes, piece: int = 1 << 20, end: bool = True) -> Any:
    """A server that reads a little, says all of that in pieces, and goes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        whole = b"".join(said)
        for at in range(0, len(whole), piece):
            writer.write(whole[at : at + piece])
            await writer.drain()
            if piece < 100:
                await asyncio.sleep(0)
        if not end:
            await reader.read()
        writer.close()

    return talk


def answer(body: bytes, trailers: bytes = b"\x40\x0bgrpc-status\x010", number: int = 1) -> bytes:
    """Frames of an answer: `:status: 200`, a content type, a body and trailers."""
    head = b"\x88\x5f\x10application/grpc"
    return (
        h2.frame(h2.HEADERS, h2.END_HEADERS, number, head)
        + h2.frame(h2.DATA, 0, number, body)
        + h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, number, trailers)
    )


def message(text: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(text)) + text


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_an_answer_may_come_in_pieces(piece: int) -> None:
    async def conversation() -> None:
        async with scripted(speaking(frames(answer(message(b"fine"))), piece=piece)) as target:
            channel = opened(target)
            assert await call(channel) == Result(Code.OK, "", b"fine")
            channel.close()

    run(conversation())


RESET = h2.rst_stream(1, 2)
WRONG = {
    "not HTTP/2": (b"HTTP/1.1 400 Bad Request\r\n\r\n", Code.UNAVAILABLE),
    "nothing at all": (b"", Code.UNAVAILABLE),
    "half a frame": (frames()[:5], Code.UNAVAILABLE),
    "a reset": (frames(RESET), Code.INTERNAL),
    "a reset for calm": (frames(h2.rst_stream(1, 11)), Code.RESOURCE_EXHAUSTED),
    "a body before a head": (frames(h2.frame(h2.DATA, 0, 1, b"x")), Code.INTERNAL),
    "a head that can't be decoded": (frames(h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff")), Code.UNAVAILABLE),
    "half a message": (frames(answer(message(b"fine")[:-1])), Code.INTERNAL),
    "two messages": (frames(answer(message(b"a") + message(b"b"))), Code.INTERNAL),
    "a compressed message": (frames(answer(b"\1" + message(b"a")[1:])), Code.INTERNAL),
    "no status": (frames(answer(message(b"a"), b"\x40\x01a\x01b")), Code.UNKNOWN),
    "a status that there is not": (frames(answer(message(b"a"), b"\x40\x0bgrpc-status\x0299")), Code.UNKNOWN),
    "a status that is no number": (frames(answer(message(b"a"), b"\x40\x0bgrpc-status\x02ok")), Code.UNKNOWN),
    "HTTP's word for away": (frames(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, b"\x48\x03503")), Code.UNAVAILABLE),
    "HTTP's word for no such thing": (frames(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, b"\x8d")), Code.UNIMPLEMENTED),
    "an answer of something else": (
        frames(
            h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\x88\x5f\x09text/html"),
            h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, b"\x40\x0bgrpc-status\x010"),
        ),
        Code.UNKNOWN,
    ),
    "it goes away": (frames(h2.goaway(0, 0)), Code.UNAVAILABLE),
    "trailers alone": (
        frames(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, b"\x88\x5f\x10application/grpc\x40\x0bgrpc-status\x015")),
        Code.NOT_FOUND,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_server_that_says_something_else_is_an_error_of_its_kind(what: str) -> None:
    said, code = WRONG[what]

    async def conversation() -> None:
        async with scripted(speaking(said)) as target:
            channel = opened(target)
            result = await call(channel)
            assert (result.code, result.message) == (code, b"")
            assert result.details or code is Code.NOT_FOUND
            assert channel.held == 0
            channel.close()

    run(conversation())


def test_an_answer_without_end_is_given_up() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        writer.write(frames(h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\x88\x5f\x10application/grpc")))
        while not writer.is_closing() and not reader.at_eof():
            writer.write(h2.frame(h2.DATA, 0, 1, bytes(16384)))
            await writer.drain()
            await asyncio.sleep(0)

    async def conversation() -> None:
        with mock.patch.object(grpc_connection, "MAX_ANSWER", 50_000):
            async with scripted(talk) as target:
                channel = opened(target)
                assert (await call(channel)).code is Code.RESOURCE_EXHAUSTED
                channel.close()

    run(conversation())


class Goer:
    """A server that goes away after each `after` answers, having looked at no more than those."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.connections = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        codec, left, last = H2Server(b"http"), self.after, 0
        while data := await reader.read(65536):
            for event in codec.receive(data):
                if isinstance(event, RequestReceived) and left:
                    last = event.stream
                if isinstance(event, Ended) and left:
                    left -= 1
                    codec.send_head(event.stream, 200, [(b"content-type", b"application/grpc")], False)
                    codec.send_body(event.stream, message(b"fine"), False)
                    codec.send_trailers(event.stream, [(b"grpc-status", b"0")])
            writer.write(codec.take())
            if not left:
                writer.write(h2.goaway(last, 0))
                break
        await writer.drain()
        writer.close()


def test_what_a_server_that_goes_away_has_not_looked_at_is_sent_once_more() -> None:
    async def conversation() -> None:
        goer = Goer(3)
        async with scripted(goer.talk) as target:
            channel = opened(target)
            assert {(await call(channel)).code for _ in range(2)} == {Code.OK}
            # The third is answered, the fourth asked again on another connection.
            assert {each.code for each in await asyncio.gather(*(call(channel) for _ in range(2)))} == {Code.OK}
            assert goer.connections == 2
            channel.close()

    run(conversation())


def test_a_connection_that_has_served_and_is_closed_costs_no_call() -> None:
    served = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        codec = H2Server(b"http")
        answered = 0
        while data := await reader.read(65536):
            for event in codec.receive(data):
                if isinstance(event, Ended):
                    if answered:  # the second question finds the connection closing
                        writer.transport.abort()
                        return
                    answered += 1
                    served += 1
                    codec.send_head(event.stream, 200, [(b"content-type", b"application/grpc")], False)
                    codec.send_body(event.stream, message(b"fine"), False)
                    codec.send_trailers(event.stream, [(b"grpc-status", b"0")])
            writer.write(codec.take())
        writer.close()

    async def conversation() -> None:
        async with scripted(talk) as target:
            channel = opened(target)
            assert {(await call(channel)).code for _ in range(4)} == {Code.OK}
            assert served == 4
            channel.close()

    run(conversation())


@pytest.fixture
def impatient() -> Iterator[None]:
    with mock.patch.object(grpc_connection, "SILENT", 0.1), mock.patch.object(grpc_connection, "GRACE", 0.1):
        yield


@pytest.mark.usefixtures("impatient")
def test_a_server_that_has_vanished_is_found_out() -> None:
    connections = 0

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    async def conversation() -> None:
        async with scripted(mute) as target:
            asked = opened(target)
            gone = await call(asked)
            assert gone.code is Code.UNAVAILABLE
            assert "has said nothing" in gone.details
            assert connections == 1
            asked.close()

            foreign = opened(target, pings=False)
            told: list[Result] = []
            waiting = foreign.start(METHOD, (), b"x", 10.0, told.append)
            await until(lambda: foreign._connection is None and bool(foreign._old))
            assert not told  # it may be slow
            waiting.cancel()
            foreign.close()

    run(conversation())


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_only_slow_is_waited_for() -> None:
    async def slow(message: bytes, _: Any) -> bytes:
        await asyncio.sleep(0.7)
        return message

    async def conversation() -> None:
        # Pings without pause are an attack to grpcio; ours are few.
        async with grpcio(slow, ("grpc.http2.min_recv_ping_interval_without_data_ms", 10), ("grpc.http2.max_ping_strikes", 0)) as target:
            channel = opened(target)
            assert (await call(channel)).code is Code.OK
            channel.close()

    run(conversation())


def test_what_waits_is_bounded() -> None:
    async def conversation() -> None:
        with mock.patch.object(grpc_channel, "HELD", 2000):
            async with scripted(speaking(frames(), end=False)) as target:
                channel = opened(target)
                told: list[Result] = []
                for _ in range(2):
                    channel.start(METHOD, (), bytes(900), 10.0, told.append)
                assert (await call(channel, bytes(900))).code is Code.RESOURCE_EXHAUSTED
                channel.close()
                assert [each.code for each in told] == [Code.UNAVAILABLE] * 2

    run(conversation())


def test_targets_and_timeouts() -> None:
    assert split_target("pdp.example:9191") == ("pdp.example", 9191)
    assert split_target("[::1]:9191") == ("::1", 9191)
    for wrong in ("", "pdp", "pdp:", ":1", "pdp:0", "pdp:70000", "::1:9191", "pdp:1x", "dns:///pdp:1"):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            split_target(wrong)
    assert [timeout_text(seconds) for seconds in (0.0, 0.0004, 1.5, 99_999.0, 1e9, 1e12)] == [
        b"1m", b"1m", b"1500m", b"99999000m", b"99999999S", b"99999999S",
    ]  # fmt: skip
    assert result_of(200, [], b"", [(b"grpc-status", b"0")]).code is Code.UNKNOWN
    assert MAX_ANSWER > 1 << 20

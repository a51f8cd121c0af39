"""A connection's life: slow and idle clients, HTTP/2 beside HTTP/1.1, and defects that stay where they are."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable

import h2.exceptions
import hpack
import msgspec
import pytest
from door_world import POLICY, SIMPLE, WEB, Door, H2Client, a_listener, answer, closed, door, get, until

from gateway.codec.h2 import STREAM_WINDOW
from gateway.connection import Connection
from gateway.limits import Limits
from tests import install


def run(test: Callable[[Door], Awaitable[None]], *listeners: object, **options: object) -> None:
    async def whole() -> None:
        async with door(*listeners, **options) as made:  # type: ignore[arg-type]
            await test(made)

    asyncio.run(whole())


def test_a_head_that_comes_too_slowly() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        started = time.monotonic()

        async def trickle() -> None:
            for byte in get(b"/hello", b"x: " + b"y" * 1000 + b"\r\n"):
                writer.write(bytes((byte,)))
                await asyncio.sleep(0.02)

        trickling = asyncio.create_task(trickle())
        status, headers, _ = await answer(reader)
        assert (status, headers[b"connection"]) == (408, b"close")
        assert time.monotonic() - started < 3
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (408, "DT")
        assert outcome.duration >= 0.5
        await closed(reader)
        trickling.cancel()
        await until(lambda: made.gateway.connections == 0)

    run(test, limits=Limits(head_timeout=0.5, linger=0.2))


@pytest.mark.parametrize("ends_at", ["preface", "settings", "frame", "continuation"])
def test_a_head_of_http2_that_does_not_end_ends_its_connection(ends_at: str) -> None:
    head = hpack.Encoder().encode([(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"shop.example"), (b":path", b"/hello")])
    preface, settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\4\0\0\0\0\0"
    whole = preface + settings + bytes((0, 0, len(head), 1, 1, 0, 0, 0, 1)) + head + b"\0\0\1\x09\0\0\0\0\1x"
    at = {"preface": 20, "settings": len(preface) + 5, "frame": len(preface) + 9 + 9 + 5, "continuation": len(whole)}[ends_at]

    async def test(made: Door) -> None:
        reader, writer = await made.connect(alpn=("h2",))
        writer.write(whole[:at])
        said = await closed(reader)
        assert said.endswith(b"\0\0\x08\7\0\0\0\0\0\0\0\0\0\0\0\0\x0b"), "GOAWAY, ENHANCE_YOUR_CALM"
        await until(lambda: made.gateway.connections == 0)

    run(test, limits=Limits(head_timeout=0.4, linger=0.2))


def test_in_http2_a_body_and_an_idle_connection_may_take_longer_than_a_head() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect(alpn=("h2",))
        client = H2Client(reader, writer)
        first = client.request(b"/hello")
        assert (await client.answer(first))["status"] == 200
        number = client.request(b"/hello", b"POST", end=False)
        client.conn.send_data(number, b"x" * 200, end_stream=True)
        data = client.conn.data_to_send()
        writer.write(data[:50])
        await asyncio.sleep(1.0)
        writer.write(data[50:])
        assert (await client.answer(number))["status"] == 200

    run(test, limits=Limits(head_timeout=0.3))


def test_the_time_of_a_head_begins_anew_with_each() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        for count in range(1, 4):
            request = get(b"/hello")
            writer.write(request[:10])
            await asyncio.sleep(0.4)
            writer.write(request[10:])
            assert (await answer(reader))[0] == 200
            outcome = await made.outcome(count)
            assert outcome.started <= time.time() - 0.35, "from the first byte"

    run(test, limits=Limits(head_timeout=0.8))


def test_an_idle_connection_is_closed() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        await answer(reader)
        assert await closed(reader) == b""
        assert len(made.outcomes) == 1
        writer.close()
        await until(lambda: made.gateway.connections == 0)

    run(test, limits=Limits(idle_connection=0.5, linger=0.2))


def test_a_client_that_does_not_read_its_answer_is_given_up() -> None:
    async def test(made: Door) -> None:
        _, writer = await made.connect()
        writer.transport.pause_reading()
        writer.write(get(b"/big/50000000"))
        await until(lambda: len(made.outcomes) == 1, 10)
        assert made.outcomes[0].flag == "SI"
        assert made.forwarder.exchanges[0].cancelled
        await until(lambda: made.gateway.connections == 0)
        writer.transport.abort()

    run(test, limits=Limits(idle_stream=0.6))


def test_a_defect_of_the_codec_ends_one_connection(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def test(made: Door) -> None:
        good_reader, good = await made.connect()
        good.write(get(b"/hello"))
        await answer(good_reader)
        reader, writer = await made.connect()
        writer.write(get(b"/never"))
        await until(lambda: len(made.forwarder.exchanges) == 2)
        connection = next(c for c in made.gateway._connections() if c.streams)

        def broken(self: Connection, *_: object) -> None:
            if self is connection:
                raise RuntimeError("a defect")

        monkeypatch.setattr(Connection, "_take", broken)
        writer.write(b"x")
        await closed(reader)
        monkeypatch.undo()
        outcome = await made.outcome(2)
        assert outcome.flag == "DC"
        assert made.forwarder.exchanges[1].cancelled
        good.write(get(b"/hello"))
        assert (await answer(good_reader))[0] == 200

    run(test)
    assert "a defect" in caplog.text


def test_http2_by_alpn() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2", "http/1.1")))
        numbers = [client.request(b"/echo", b"POST", b"body %d" % at) for at in range(50)]
        for at, number in enumerate(numbers):
            found = await client.answer(number)
            assert (found["status"], found["body"]) == (200, b"body %d" % at)
        assert found["headers"][b"x-principal"] == WEB.encode()
        number = client.request(b"/trailers")
        assert (await client.answer(number))["trailers"] == {b"x-sum": b"6"}
        number = client.request(b"/refuse", headers=((b"content-type", b"application/grpc"),), method=b"POST")
        found = await client.answer(number)
        assert (found["status"], found["headers"][b"grpc-status"]) == (200, b"14")
        assert (await made.outcome(52)).peer.alpn == "h2"

    run(test)


def test_http2_in_plaintext_with_prior_knowledge() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await asyncio.open_connection("127.0.0.1", made.port))
        assert (await client.answer(client.request(b"/hello")))["body"] == b"hello"

    run(test, lambda port: a_listener(port, "http", None))


def test_streams_do_not_wait_for_each_other() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2",)))
        never = client.request(b"/never")
        big = client.request(b"/big/300000")
        cut = client.request(b"/cut")
        raising = client.request(b"/raise")
        assert (await client.answer(client.request(b"/hello")))["body"] == b"hello"
        assert len((await client.answer(big))["body"]) == 300_000
        assert (await client.answer(cut))["reset"] is not None
        assert (await client.answer(raising))["status"] == 500
        client.conn.reset_stream(never, 8)
        client.flush()
        outcome = await made.outcome(5)
        assert (outcome.status, outcome.flag) == (499, "DC")
        assert made.forwarder.exchanges[0].cancelled
        assert (await client.answer(client.request(b"/hello")))["body"] == b"hello"

    run(test)


def test_an_answer_waits_for_the_streams_window() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2",)))
        client.credit = False
        number = client.request(b"/big/1000000")
        while len(client.answers[number]["body"]) < 65535:
            await client.read()
        await asyncio.sleep(0.1)
        assert made.forwarder.sent <= 65535 + 16384 * 3
        assert not made.outcomes
        client.credit = True
        client.conn.acknowledge_received_data(65535, number)
        client.flush()
        assert len((await client.answer(number))["body"]) == 1_000_000
        assert (await made.outcome()).bytes_sent == 1_000_000

    run(test)


def test_an_upload_waits_for_the_upstream() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2",)))
        await client.answer(client.request(b"/hello"))
        number = client.request(b"/never", b"POST", b"", end=False)
        await until(lambda: len(made.forwarder.exchanges) == 2)
        while client.conn.local_flow_control_window(number) > 0:
            client.conn.send_data(number, b"u" * min(16384, client.conn.local_flow_control_window(number)))
        client.flush()
        await asyncio.sleep(0.1)
        connection = next(iter(made.gateway._connections()))
        content = connection.streams[number].content
        assert content is not None
        await until(lambda: content.held == STREAM_WINDOW)
        assert (await client.answer(client.request(b"/hello")))["body"] == b"hello"
        assert client.conn.local_flow_control_window(number) == 0
        made.forwarder.exchanges[1].client.request_wanted(True)
        while client.conn.local_flow_control_window(number) == 0:
            await client.read()
        assert made.forwarder.received == STREAM_WINDOW

    run(test)


def test_an_early_answer_to_an_upload_keeps_the_connection() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2",)))
        number = client.request(b"/early", b"POST", b"a" * 1000, end=False)
        found = await client.answer(number)
        assert (found["status"], found["body"]) == (401, b"no")
        assert (await client.answer(client.request(b"/hello")))["body"] == b"hello"
        await made.outcome(2)

    run(test)


def test_a_policy_may_be_shown_more_than_a_window() -> None:
    async def test(made: Door) -> None:
        from mesh.questions import Decision, Verdict

        made.answers.decision = Decision(verdict=Verdict.ALLOW)
        client = H2Client(*await made.connect(alpn=("h2",)))
        number = client.request(b"/echo", b"POST", b"", end=False)
        left = 200_000
        while left:
            room = min(16384, left, client.conn.local_flow_control_window(number))
            if room <= 0:
                await client.read()
                continue
            left -= room
            client.conn.send_data(number, b"u" * room, end_stream=not left)
            client.flush()
        assert len((await client.answer(number))["body"]) == 200_000

    run(test, decisions=(msgspec.structs.replace(POLICY, body_limit=250_000),))


def test_a_breach_of_http2_ends_the_connection_and_is_recorded() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2",)))
        never = client.request(b"/never")
        await until(lambda: len(made.forwarder.exchanges) == 1)
        client.writer.write(b"\0\0\1\xff\0\0\0\0\0x" + b"\0\0\4\3\0\0\0\0\0abcd")
        try:
            while await client.read():
                pass
        except h2.exceptions.ProtocolError:
            pass
        assert client.goaway
        outcome = await made.outcome(2)
        assert {(o.status, o.flag) for o in made.outcomes} == {(0, "DPE"), (499, "DC")}, outcome
        assert made.forwarder.exchanges[0].cancelled
        assert never == 1

    run(test, limits=Limits(linger=0.2))


def test_http2_heads_that_are_refused() -> None:
    async def test(made: Door) -> None:
        client = H2Client(*await made.connect(alpn=("h2",)))
        found = await client.answer(client.request(b"/" + b"a" * 20_000))
        assert found["status"] == 414
        assert found["body"].endswith(b".\n")
        assert (await made.outcome()).flag == "DPE"
        assert (await client.answer(client.request(b"/hello")))["status"] == 200

    run(test)


def test_connections_are_counted() -> None:
    async def test(made: Door) -> None:
        _, writer = await made.connect()
        client = H2Client(*await made.connect(alpn=("h2",)))
        await client.answer(client.request(b"/hello"))
        page = made.telemetry.page().decode()
        assert 'tollhouse_connections_active{gateway="edge/ingress",listener="https"} 2' in page
        writer.close()
        client.writer.close()
        await until(lambda: 'tollhouse_connections_active{gateway="edge/ingress",listener="https"} 0' in made.telemetry.page().decode())
        assert not made.gateway._shared.sweeper.watched

    run(test)


def test_h2spec_finds_nothing_wrong_over_tls() -> None:
    async def test(made: Door) -> None:
        command = [
            str(install.install("h2spec")),
            "--strict",
            "-h",
            "127.0.0.1",
            "-p",
            str(made.port),
            "-o",
            "3",
            "-P",
            "/echo",
            "-t",
            "-k",
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = await asyncio.wait_for(process.communicate(), 60)
        assert b" 0 failed" in output, output[-4000:].decode(errors="replace")

    run(test, lambda port: a_listener(port, tls=SIMPLE))

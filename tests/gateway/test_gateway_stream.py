"""Requests over mutual TLS and HTTP/1.1: answers, refusals, bodies both ways, and one outcome for each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from door_world import POLICY, WEB, Door, a_listener, answer, closed, door, get, post, until

from gateway.limits import Limits
from mesh.filters import Redirect
from mesh.questions import Decision, Verdict
from mesh.refusals import UpstreamReset


def run(test: Callable[[Door], Awaitable[None]], **options: object) -> None:
    async def whole() -> None:
        async with door(**options) as made:  # type: ignore[arg-type]
            await test(made)

    asyncio.run(whole())


def test_a_connection_is_kept_and_its_peer_known() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        for count in range(1, 4):
            writer.write(get(b"/echo"))
            status, headers, body = await answer(reader)
            assert (status, body, headers[b"x-principal"]) == (200, b"0", WEB.encode())
            outcome = await made.outcome(count)
            assert (outcome.status, outcome.flag, outcome.route, outcome.service) == (200, "-", "shop/web#0", "shop/web")
            assert outcome.bytes_sent == 1
            assert outcome.details == "via_upstream"
            assert 0 <= outcome.duration < 5
        assert made.gateway.connections == 1

    run(test)


def test_pipelined_requests_are_answered_in_order() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(b"".join(post(b"/echo", b"body %d" % at) for at in range(40)))
        for at in range(40):
            assert (await answer(reader))[2] == b"body %d" % at
        await made.outcome(40)

    run(test)


def test_a_request_sent_ahead_waits_for_the_answer_before_it() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/never") + get(b"/hello"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        await asyncio.sleep(0.05)
        assert len(made.forwarder.exchanges) == 1
        exchange = made.forwarder.exchanges[0]
        exchange.client.answer(200, [(b"content-length", b"1")], False)
        exchange.client.answer_body(b"a")
        exchange.client.answer_end(None)
        assert (await answer(reader))[2] == b"a"
        assert (await answer(reader))[2] == b"hello"
        await made.outcome(2)

    run(test)


def test_more_requests_than_may_be_sent_ahead_are_not_read() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        sent = get(b"/hello", b"x-filler: " + b"f" * 1000 + b"\r\n")
        writer.write(get(b"/never") + sent * 4000)
        await until(lambda: len(made.forwarder.exchanges) == 1)
        connection = next(iter(made.gateway._connections()))
        await until(lambda: not connection.wire.reading)
        assert connection.h1 is not None
        assert connection.h1.waiting <= 3 * 65536
        made.forwarder.exchanges[0].client.answer(204, [], True)
        assert (await answer(reader))[0] == 204
        for _ in range(4000):
            assert (await answer(reader))[2] == b"hello"
        await made.outcome(4001)

    run(test)


@pytest.mark.parametrize(
    ("sent", "status", "flag"),
    [
        (b"GARBAGE\r\n\r\n", 400, "DPE"),
        (get(b"/hello", b"content-length: 3\r\ntransfer-encoding: chunked\r\n", b"POST") + b"0\r\n\r\n", 400, "DPE"),
        (get(b"/hello", b"transfer-encoding: gzip\r\n", b"POST"), 400, "DPE"),
        (get(b"/hello", b"x: " + b"y" * 70_000 + b"\r\n"), 431, "DPE"),
        (get(b"/" + b"a" * 20_000), 414, "DPE"),
        (get(b"/hello", b"a: b\r\n" * 200), 431, "DPE"),
        (get(b"/hello", version=b"HTTP/3.0"), 505, "DPE"),
        (get(b"/hello", b"expect: miracles\r\n"), 417, "DPE"),
        (get(b"/a%2fb"), 400, "DPE"),
    ],
)
def test_requests_that_are_refused(sent: bytes, status: int, flag: str) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(sent)
        found, headers, body = await answer(reader)
        assert found == status
        assert headers[b"server"] == b"tollhouse"
        assert body.endswith(b".\n")
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (status, flag)
        if b"%2f" not in sent:
            assert headers[b"connection"] == b"close"
            assert await closed(reader) == b""
            await until(lambda: made.gateway.connections == 0)

    run(test)


def test_the_reason_of_a_refusal_is_not_told() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/refuse") + get(b"/hello"))
        status, headers, body = await answer(reader)
        assert (status, body) == (502, (UpstreamReset.sentence + "\n").encode())
        assert b"secret" not in b"".join(headers.values())
        assert (await answer(reader))[0] == 200
        outcome = (await made.outcome(2), made.outcomes[0])[1]
        assert (outcome.flag, outcome.reason) == ("UC", "secret reason")

    run(test)


def test_a_grpc_caller_is_refused_in_its_own_words() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(post(b"/refuse", b"", b"content-type: application/grpc+proto\r\n"))
        status, headers, body = await answer(reader)
        assert (status, body, headers[b"grpc-status"], headers[b"content-type"]) == (200, b"", b"14", b"application/grpc")
        assert headers[b"grpc-message"] == UpstreamReset.sentence.encode()
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag, outcome.grpc_status) == (200, "UC", "14")

    run(test)


def test_head_gets_no_body() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/refuse", method=b"HEAD") + get(b"/hello"))
        status, headers, _ = await answer(reader, head_request=True)
        assert status == 502
        assert int(headers[b"content-length"]) > 0
        assert (await answer(reader))[2] == b"hello"

    run(test)


def test_answers_with_trailers_and_informational_ones() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/trailers"))
        assert (await answer(reader))[0] == 103
        status, headers, body = await answer(reader)
        assert (status, body, headers[b"trailer x-sum"]) == (200, b"abc", b"6")
        writer.write(get(b"/empty"))
        assert (await answer(reader))[0] == 204

    run(test)


def test_a_cut_off_answer_can_be_told_from_a_complete_one() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/cut"))
        rest = await closed(reader)
        assert rest.startswith(b"HTTP/1.1 200")
        assert not rest.endswith(b"0\r\n\r\n")
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (200, "UC")

    run(test)


def test_a_header_that_would_split_the_answer_is_the_upstreams_fault() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/bad-header"))
        assert (await answer(reader))[0] == 502
        assert (await made.outcome()).flag == "UPE"
        assert made.forwarder.exchanges[0].cancelled

    run(test)


def test_a_defect_ends_one_request_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def test(made: Door) -> None:
        other_reader, other = await made.connect()
        other.write(get(b"/never"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        reader, writer = await made.connect()
        writer.write(get(b"/raise"))
        assert (await answer(reader))[0] == 500
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag) == (500, "IE")
        exchange = made.forwarder.exchanges[0]
        exchange.client.answer(204, [], True)
        assert (await answer(other_reader))[0] == 204

    run(test)
    assert "a defect" in caplog.text


def test_a_large_upload_is_never_held() -> None:
    size = 8 << 20

    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/sink-slow", b"content-length: %d\r\n" % size, b"POST"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        exchange = made.forwarder.exchanges[0]

        async def send() -> None:
            for _ in range(size // 65536):
                writer.write(b"u" * 65536)
                await writer.drain()

        sending = asyncio.create_task(send())
        connection = next(iter(made.gateway._connections()))
        held = 0
        taken = -1
        while not exchange.over:
            stream = next(iter(connection.streams.values()), None)
            if stream is not None and stream.content is not None:
                held = max(held, stream.content.held)
            if exchange.received == taken:
                exchange.client.request_wanted(True)
            taken = exchange.received
            await asyncio.sleep(0)
        await sending
        assert (await answer(reader))[2] == b"%d" % size
        assert held <= 32 * 1024 + 16 * 1024 * 4, held
        assert (await made.outcome()).bytes_received == size

    run(test)


def test_an_upload_that_nobody_takes_stops_at_the_client() -> None:
    async def test(made: Door) -> None:
        _, writer = await made.connect()
        writer.write(get(b"/never", b"content-length: 100000000\r\n", b"POST"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        connection = next(iter(made.gateway._connections()))
        for _ in range(200):
            writer.write(b"u" * 65536)
        await until(lambda: not connection.wire.reading)
        stream = next(iter(connection.streams.values()))
        await asyncio.sleep(0.1)
        assert stream.content is not None
        assert stream.content.held <= 32 * 1024 + 16 * 1024 * 4
        writer.transport.abort()

    run(test)


def test_an_answer_waits_for_a_client_that_does_not_read() -> None:
    size = 24 << 20

    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.transport.pause_reading()
        writer.write(get(b"/big/%d" % size))
        await until(lambda: made.forwarder.sent > 0)
        last = -1
        while made.forwarder.sent != last:
            last = made.forwarder.sent
            await asyncio.sleep(0.1)
        assert last < size
        connection = next(iter(made.gateway._connections()))
        assert connection.wire.backlog <= 3 * 32 * 1024
        writer.transport.resume_reading()
        assert len((await answer(reader))[2]) == size
        assert (await made.outcome()).bytes_sent == size

    run(test)


def test_a_client_that_vanishes_is_recorded_and_its_upstream_told() -> None:
    async def test(made: Door) -> None:
        _, writer = await made.connect()
        writer.write(get(b"/echo", b"content-length: 10\r\n", b"POST") + b"half")
        await until(lambda: bool(made.forwarder.exchanges) and made.forwarder.exchanges[0].received == 4)
        writer.transport.abort()
        outcome = await made.outcome()
        assert (outcome.status, outcome.flag, outcome.bytes_received) == (499, "DC", 4)
        assert made.forwarder.exchanges[0].cancelled
        await until(lambda: made.gateway.connections == 0)

    run(test)


def test_continue_is_sent_when_the_upstream_wants_the_body() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/never", b"content-length: 3\r\nexpect: 100-continue\r\n", b"POST"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 0.1)
        exchange = made.forwarder.exchanges[0]
        exchange.path = b"/echo"
        exchange.client.request_wanted(True)
        assert (await answer(reader))[0] == 100
        writer.write(b"abc")
        assert (await answer(reader))[2] == b"abc"

    run(test)


def test_a_client_that_waits_for_continue_is_refused_and_closed() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/refuse", b"content-length: 3\r\nexpect: 100-continue\r\n", b"POST"))
        status, headers, _ = await answer(reader)
        assert (status, headers[b"connection"]) == (502, b"close")
        await closed(reader)
        writer.close()

    run(test)


@pytest.mark.parametrize(("path", "status"), [(b"/refuse", 502), (b"/early", 401)])
def test_a_small_rest_of_an_answered_request_is_read_and_the_connection_kept(path: bytes, status: int) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(path, b"content-length: 1000\r\n", b"POST") + b"a" * 400)
        assert (await answer(reader))[0] == status
        await made.outcome()
        writer.write(b"a" * 600 + get(b"/hello"))
        assert (await answer(reader))[2] == b"hello"
        await made.outcome(2)

    run(test)


@pytest.mark.parametrize("length", [b"content-length: 1000000", b"transfer-encoding: chunked"])
def test_a_large_rest_is_not(length: bytes) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/refuse", length + b"\r\n", b"POST"))
        status, headers, _ = await answer(reader)
        assert status == 502
        assert (b"connection" in headers) == (b"1000000" in length)
        for _ in range(8):
            writer.write(b"4000\r\n" + b"a" * 0x4000 + b"\r\n")
        await closed(reader)
        await made.outcome()

    run(test, limits=Limits(linger=1.0))


def test_a_rest_that_does_not_come_is_not_waited_for_long() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/refuse", b"content-length: 10\r\n", b"POST"))
        assert (await answer(reader))[0] == 502
        assert await closed(reader) == b""
        writer.close()
        await until(lambda: made.gateway.connections == 0)
        await made.outcome()

    run(test, limits=Limits(linger=0.2))


def test_a_policy_sees_the_body() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/echo", b"content-length: 6\r\n", b"POST") + b"abc")
        await asyncio.sleep(0.05)
        assert not made.answers.asked
        writer.write(b"def")
        await until(lambda: len(made.answers.asked) == 1)
        question, done = made.answers.asked[0]
        assert (question.asking.body, question.asking.body_complete) == (b"abcdef", True)
        done(Decision(verdict=Verdict.ALLOW))
        assert (await answer(reader))[2] == b"abcdef"
        assert (await made.outcome()).bytes_received == 6

    run(test, decisions=(msgspec.structs.replace(POLICY, body_limit=10),))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("framing", [b"content-length: 30\r\n", b"transfer-encoding: chunked\r\n"])
def test_a_body_longer_than_a_policy_may_see(partial: bool, framing: bytes) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        body = b"a" * 30
        writer.write(get(b"/echo", framing, b"POST") + (b"1e\r\n" + body + b"\r\n0\r\n\r\n" if b"chunked" in framing else body))
        if not partial:
            assert (await answer(reader))[0] == 413
            assert not made.answers.asked
            assert (await made.outcome()).details == "payload_too_large"
            return
        await until(lambda: len(made.answers.asked) == 1)
        question, done = made.answers.asked[0]
        assert (question.asking.body, question.asking.body_complete) == (body[:10], False)
        done(Decision(verdict=Verdict.ALLOW))
        assert (await answer(reader))[2] == body

    run(test, decisions=(msgspec.structs.replace(POLICY, body_limit=10, body_partial=partial),))


def test_a_client_that_leaves_while_its_policy_is_asked() -> None:
    async def test(made: Door) -> None:
        _, writer = await made.connect()
        writer.write(get(b"/hello"))
        await until(lambda: len(made.answers.asked) == 1)
        writer.transport.abort()
        assert (await made.outcome()).flag == "DC"
        made.answers.asked[0][1](Decision(verdict=Verdict.ALLOW))
        await asyncio.sleep(0.05)
        assert not made.forwarder.exchanges
        await made.outcome()

    run(test, decisions=(POLICY,))


def test_a_denial_and_its_headers() -> None:
    async def test(made: Door) -> None:
        made.answers.decision = Decision(verdict=Verdict.DENY, reason="not you", body=b"go away", headers=((b"x-why", b"policy"),))
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        status, headers, body = await answer(reader)
        assert (status, headers[b"x-why"], body) == (403, b"policy", b"go away")
        outcome = await made.outcome()
        assert (outcome.flag, outcome.reason != "") == ("UAEX", True)
        assert not made.forwarder.exchanges

    run(test, decisions=(POLICY,))


def test_a_redirect() -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/a"))
        status, headers, _ = await answer(reader)
        assert (status, headers[b"location"][:19]) == (302, b"https://other.examp")
        assert (await made.outcome()).flag == "-"

    run(test, redirect=Redirect(hostname=b"other.example"), backends=())


@pytest.mark.parametrize("timeout", [0.2, 1.2])
def test_the_rules_timeout(timeout: float) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(get(b"/never"))
        assert (await answer(reader))[0] == 504
        outcome = await made.outcome()
        assert outcome.flag == "UT"
        assert timeout <= outcome.duration < timeout + 1
        assert made.forwarder.exchanges[0].cancelled
        writer.write(get(b"/hello"))
        assert (await answer(reader))[2] == b"hello"

    run(test, timeout=timeout)


@pytest.mark.parametrize(("sent", "status"), [(get(b"/never"), 504), (get(b"/echo", b"content-length: 9\r\n", b"POST") + b"a", 408)])
def test_a_request_on_which_nothing_moves(sent: bytes, status: int) -> None:
    async def test(made: Door) -> None:
        reader, writer = await made.connect()
        writer.write(sent)
        assert (await answer(reader))[0] == status
        assert (await made.outcome()).flag == "SI"

    run(test, limits=Limits(idle_stream=0.5, linger=0.2))


def test_no_more_requests_than_there_is_room_for() -> None:
    async def test(made: Door) -> None:
        _, first = await made.connect()
        first.write(get(b"/never"))
        await until(lambda: len(made.forwarder.exchanges) == 1)
        reader, writer = await made.connect()
        writer.write(get(b"/hello"))
        status, headers, _ = await answer(reader)
        assert (status, headers[b"connection"]) == (503, b"close")
        assert (await made.outcome()).flag == "OM"

    run(test, limits=Limits(requests=1))


def test_what_a_listener_in_plaintext_serves() -> None:
    async def whole() -> None:
        async with door(lambda port: a_listener(port, "http", None)) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            for piece in (b"P", b"OST /echo HTTP/1.1\r\nhost: a\r\ncontent-", b"length: 3\r\n\r\na", b"bc"):
                writer.write(piece)
                await asyncio.sleep(0.02)
            assert (await answer(reader))[2] == b"abc"
            writer.write(get(b"/cut", version=b"HTTP/1.0"))
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await made.outcome(2)

    asyncio.run(whole())

"""HTTP/1.1 towards clients, after the head: one request after the other, answers, and the end."""

from __future__ import annotations

import pytest
from codec_world import Said, transcript

from gateway.codec.h1 import Fields
from gateway.codec.h1_server import H1Server

CLOSE = b"connection: close\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n"


def server(**limits: int) -> H1Server:
    return H1Server(b"https", Fields(), **limits)


def answered(codec: H1Server, number: int = 1) -> bytes:
    """What a plain answer to request `number` looks like."""
    codec.send_head(number, 200, [(b"content-length", b"2")], False)
    codec.send_body(number, b"ok", True)
    return codec.take()


def get(*fields: bytes, line: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"\r\n".join((line, b"host: shop", *fields, b"", b""))


def request(line: bytes, *fields: tuple[bytes, bytes], length: int = 0, ended: bool = True, expects: bool = False, number: int = 1) -> Said:
    return ("request", number, line, fields, length, ended, expects)


# One request after the other


def test_requests_sent_ahead_wait() -> None:
    post = get(b"content-length: 3", line=b"POST /1 HTTP/1.1") + b"abc"
    chunked = get(b"transfer-encoding: chunked", line=b"POST /2 HTTP/1.1") + b"1\r\nz\r\n0\r\n\r\n"
    last = get(line=b"GET /3 HTTP/1.1")
    codec = server()
    assert [event[0] for event in transcript(codec.receive(post + chunked + last[:5]))] == ["request", "body", "end"]
    assert codec.waiting == len(chunked) + 5
    assert codec.receive(last[5:]) == []
    assert codec.receive(b"") == []
    assert answered(codec) == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    assert [event[:2] for event in transcript(codec.receive(b""))] == [("request", 2), ("body", 2), ("end", 2)]
    assert codec.waiting == len(last)
    answered(codec, 2)
    assert transcript(codec.receive(b"")) == [request(b"GET shop /3 HTTP/1.1", number=3)]
    assert codec.waiting == 0
    answered(codec, 3)
    assert (codec.closing, codec.streams) == (False, 0)


def test_a_request_that_could_be_read_as_a_body_is_only_read_after_it() -> None:
    data = get(b"content-length: 30") + get(line=b"GET /smuggled HTTP/1.1")[:30] + get(line=b"GET /2 HTTP/1.1")
    codec = server()
    assert transcript(codec.receive(data))[1] == ("body", 1, b"GET /smuggled HTTP/1.1\r\nhost: ")
    answered(codec)
    assert transcript(codec.receive(b"")) == [request(b"GET shop /2 HTTP/1.1", number=2)]


def test_a_head_that_is_no_head_is_not_answered_as_the_request_before_it() -> None:
    codec = server()
    codec.receive(get(line=b"HEAD / HTTP/1.1"))
    assert answered(codec) == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"
    assert transcript(codec.receive(b"garbage\r\n\r\n")) == [("refused", 2, 400)]
    assert answered(codec, 2).endswith(b"\r\n\r\nok")


@pytest.mark.parametrize(
    ("line", "field", "closes", "says"),
    [
        (b"GET / HTTP/1.1", b"a: b", False, b""),
        (b"GET / HTTP/1.1", b"connection: close", True, CLOSE),
        (b"GET / HTTP/1.1", b"connection: x, CLOSE", True, CLOSE),
        (b"GET / HTTP/1.1", b"connection: keep-alive, close", True, CLOSE),
        (b"GET / HTTP/1.0", b"a: b", True, CLOSE),
        (b"GET / HTTP/1.0", b"connection: keep-alive", False, b"connection: keep-alive\r\n"),
        (b"GET / HTTP/1.0", b"connection: Keep-Alive", False, b"connection: keep-alive\r\n"),
    ],
)
def test_whether_the_connection_goes_on(line: bytes, field: bytes, closes: bool, says: bytes) -> None:
    codec = server()
    codec.receive(get(field, line=line))
    assert answered(codec) == b"HTTP/1.1 200 OK\r\n" + says + b"content-length: 2\r\n\r\nok"
    assert codec.closing is closes
    assert codec.receive(get()) == [] if closes else transcript(codec.receive(get()))[0][1] == 2


# Answers


def test_an_answer_without_a_length_is_chunked() -> None:
    codec = server()
    codec.receive(get())
    codec.send_head(1, 200, [(b"a", b"b")], False)
    codec.send_body(1, b"x" * 17, False)
    codec.send_body(1, b"", False)
    codec.send_trailers(1, [(b"x-sum", b"1")])
    assert codec.take() == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\na: b\r\n\r\n11\r\n" + b"x" * 17 + b"\r\n0\r\nx-sum: 1\r\n\r\n"
    assert not codec.closing


def test_an_answer_without_a_length_lasts_until_the_end_for_an_old_client() -> None:
    codec = server()
    codec.receive(get(b"connection: keep-alive", line=b"GET / HTTP/1.0"))
    codec.send_head(1, 200, [], False)
    codec.send_body(1, b"abc", False)
    codec.send_trailers(1, [(b"x-sum", b"1")])
    assert codec.take() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"
    assert codec.closing


@pytest.mark.parametrize(
    ("method", "status", "headers", "ended", "expected"),
    [
        (b"GET", 200, [], True, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        (b"GET", 299, [], True, b"HTTP/1.1 299 \r\ncontent-length: 0\r\n\r\n"),
        (b"GET", 204, [], True, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", 204, [(b"content-length", b"2")], False, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", 304, [(b"content-length", b"2")], False, b"HTTP/1.1 304 Not Modified\r\ncontent-length: 2\r\n\r\n"),
        (b"HEAD", 200, [(b"content-length", b"2")], False, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"),
        (b"HEAD", 200, [], False, b"HTTP/1.1 200 OK\r\n\r\n"),
        (b"HEAD", 200, [], True, b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
)
def test_answers_without_a_body(method: bytes, status: int, headers: list[tuple[bytes, bytes]], ended: bool, expected: bytes) -> None:
    codec = server()
    codec.receive(get(line=method + b" / HTTP/1.1"))
    codec.send_head(1, status, headers, ended)
    if not ended:
        codec.send_body(1, b"no", True)
    assert codec.take() == expected
    assert (codec.closing, codec.streams) == (False, 0)


def test_an_answer_longer_than_announced_is_cut_and_the_connection_ends() -> None:
    codec = server()
    codec.receive(get() + get())
    codec.send_head(1, 200, [(b"content-length", b"3")], False)
    codec.send_body(1, b"abHTTP/1.1 200 OK\r\n\r\n", False)
    codec.send_body(1, b"more", True)
    assert codec.take() == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabH"
    assert codec.closing
    assert codec.receive(b"") == []


@pytest.mark.parametrize("body", [b"", b"ab"])
def test_an_answer_shorter_than_announced_ends_the_connection(body: bytes) -> None:
    codec = server()
    codec.receive(get() + get())
    codec.send_head(1, 200, [(b"content-length", b"3")], False)
    codec.send_body(1, body, True)
    assert codec.closing
    assert codec.receive(b"") == []


def test_an_answer_before_the_request_has_come_ends_the_connection() -> None:
    codec = server()
    codec.receive(get(b"content-length: 10") + b"abc")
    codec.send_head(1, 413, [], True)
    assert codec.take() == b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n"
    assert codec.closing
    assert codec.receive(b"defghijGET / HTTP/1.1\r\nhost: shop\r\n\r\n") == []


SPLITS = (b"a\r\nset-cookie: x", b"a\nb", b"a\rb", b"a\0b", b"\r\n", b"\r\n\r\n<html>")


@pytest.mark.parametrize("value", SPLITS)
def test_no_value_splits_an_answer(value: bytes) -> None:
    codec = server()
    codec.receive(CHUNKED + b"0\r\n\r\n")
    for headers in ([(b"a", value)], [(b"b", b"c"), (b"a", value)], [(b"a", value), (b"b", b"c")], [(value, b"c")]):
        with pytest.raises(ValueError, match="line break"):
            codec.send_head(1, 200, headers, True)
        with pytest.raises(ValueError, match="line break"):
            codec.send_informational(1, 103, headers)
    assert codec.take() == b""
    codec.send_head(1, 200, [], False)
    with pytest.raises(ValueError, match="line break"):
        codec.send_trailers(1, [(b"a", value)])
    assert codec.take() == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("length", [b"-1", b"+1", b"1_0", b" 1", b"", b"0x1", b"1,1"])
def test_no_answer_announces_what_is_no_length(length: bytes) -> None:
    codec = server()
    codec.receive(get())
    with pytest.raises(ValueError, match="number"):
        codec.send_head(1, 200, [(b"content-length", length)], False)
    assert answered(codec).endswith(b"ok")


@pytest.mark.parametrize("status", [99, 600, 0, -1])
def test_no_answer_has_a_status_that_is_none(status: int) -> None:
    codec = server()
    codec.receive(get())
    with pytest.raises(KeyError):
        codec.send_head(1, status, [], True)


def test_informational_answers() -> None:
    codec = server()
    codec.receive(get(b"expect: 100-continue", b"content-length: 1"))
    codec.send_informational(1, 100, [])
    codec.send_informational(1, 103, [(b"link", b"</a>")])
    codec.send_informational(2, 103, [])
    assert codec.take() == b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    codec.send_head(1, 200, [], False)
    codec.take()
    codec.send_informational(1, 103, [])
    assert codec.take() == b""


def test_an_old_client_gets_no_informational_answers() -> None:
    codec = server()
    codec.receive(get(line=b"GET / HTTP/1.0"))
    codec.send_informational(1, 103, [])
    assert codec.take() == b""


def test_orders_for_another_request_are_not_followed() -> None:
    codec = server()
    codec.receive(get())
    for number in (0, 2, 99):
        codec.send_head(number, 200, [], True)
        codec.send_body(number, b"x", True)
        codec.send_trailers(number, [(b"a", b"b")])
        codec.reset(number, 2)
    assert (codec.take(), codec.closing) == (b"", False)
    answered(codec)
    assert answered(codec) == b""
    codec.send_trailers(1, [])
    codec.reset(1, 2)
    assert (codec.take(), codec.closing) == (b"", False)
    assert [event[1] for event in transcript(codec.receive(get()))] == [2]


def test_a_body_without_a_head_ends_the_connection() -> None:
    for order in ("send_body", "send_trailers"):
        codec = server()
        codec.receive(get())
        if order == "send_body":
            codec.send_body(1, b"x", True)
        else:
            codec.send_trailers(1, [(b"a", b"b")])
        assert (codec.take(), codec.closing) == (b"", True)


def test_a_second_head_is_not_sent() -> None:
    codec = server()
    codec.receive(get())
    codec.send_head(1, 200, [], False)
    codec.send_head(1, 500, [], True)
    codec.send_body(1, b"x", True)
    assert codec.take() == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"


# The end


@pytest.mark.parametrize(
    ("data", "events", "closing"),
    [
        (b"", [], True),
        (b"GET / HT", [], True),
        (get(), [("reset", 1, 8, False)], False),
        (get(b"content-length: 3") + b"a", [("reset", 1, 8, False)], False),
        (CHUNKED + b"1\r\n", [("reset", 1, 8, False)], False),
    ],
)
def test_a_client_that_goes(data: bytes, events: list[object], closing: bool) -> None:
    codec = server()
    codec.receive(data)
    assert transcript(codec.eof()) == events
    assert codec.closing is closing
    assert codec.receive(get()) == []
    assert codec.eof() == []


def test_a_reset_ends_the_connection() -> None:
    codec = server()
    codec.receive(get())
    codec.send_head(1, 200, [(b"content-length", b"5")], False)
    codec.reset(1, 2)
    assert codec.closing
    codec.send_body(1, b"hello", True)
    codec.send_informational(1, 103, [])
    assert codec.take() == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"
    assert codec.receive(get()) == []


def test_a_drain_ends_an_idle_connection_at_once_and_a_busy_one_after_its_answer() -> None:
    idle = server()
    idle.drain()
    assert idle.closing
    assert idle.receive(get()) == []
    busy = server()
    busy.receive(get() + get())
    busy.drain()
    assert not busy.closing
    assert CLOSE in answered(busy)
    assert busy.closing
    assert busy.receive(b"") == []


def test_there_is_no_window_and_no_credit() -> None:
    codec = server()
    assert codec.window(1) > 1 << 20
    codec.consumed(1, 5)
    assert codec.take() == b""

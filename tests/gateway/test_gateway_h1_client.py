"""HTTP/1.1 towards upstreams: orders in, bytes out; bytes in, events out."""

from __future__ import annotations

import pytest
from codec_world import Said, feed, head, pieces, transcript

from gateway.codec.h1 import Fields
from gateway.codec.h1_client import MAX_INFORMATIONAL, H1Client
from mesh.http import UNKNOWN_LENGTH, RequestHead


def client(**limits: int) -> H1Client:
    return H1Client(Fields(), **limits)


def asked(method: bytes = b"GET", **limits: int) -> H1Client:
    """A client whose one request is complete."""
    codec = client(**limits)
    assert codec.request(head(method), [], b"/", b"shop", True) == 1
    codec.take()
    return codec


def response(status: int, *fields: tuple[bytes, bytes], version: bytes = b"HTTP/1.1", length: int = -1, ended: bool = False) -> Said:
    return ("response", 1, status, fields, version, length, ended)


LENGTH2 = (b"content-length", b"2")
# what comes -> events, whether the connection can be used again
READ = {
    "an answer of a known length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", [response(200, LENGTH2, length=2), "ok"], True),
    "no reason": (b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok", [response(200, LENGTH2, length=2), "ok"], True),
    "no reason and no space": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", [response(200, LENGTH2, length=2), "ok"], True),
    "a reason beyond ASCII": (b"HTTP/1.1 200 \xc3\xa4\r\ncontent-length: 2\r\n\r\nok", [response(200, LENGTH2, length=2), "ok"], True),
    "no body": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        [response(200, (b"content-length", b"0"), length=0, ended=True)],
        True,
    ),
    "chunked": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\nset-cookie: a\r\n\r\n",
        [response(200), ("body", 1, b"ok"), ("end", 1, ((b"x-sum", b"1"),))],
        True,
    ),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", [response(204, length=0, ended=True)], True),
    "204 with a length of 0": (
        b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n",
        [response(204, (b"content-length", b"0"), length=0, ended=True)],
        True,
    ),
    "204 with a length": (b"HTTP/1.1 204 x\r\ncontent-length: 2\r\n\r\n", [response(204, LENGTH2, length=0, ended=True)], False),
    "204 with a coding": (b"HTTP/1.1 204 x\r\ntransfer-encoding: chunked\r\n\r\n", [response(204, length=0, ended=True)], False),
    "304 with a length": (b"HTTP/1.1 304 x\r\ncontent-length: 2\r\n\r\n", [response(304, LENGTH2, length=0, ended=True)], True),
    "fields about the connection": (
        b"HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nx-hop: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\ncontent-length: 2\r\n\r\nok",
        [response(200, LENGTH2, length=2), "ok"],
        True,
    ),
    "a Connection field cannot take the length off": (
        b"HTTP/1.1 200 OK\r\nConnection: content-length\r\ncontent-length: 2\r\n\r\nok",
        [response(200, LENGTH2, length=2), "ok"],
        True,
    ),
    "close": (b"HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 2\r\n\r\nok", [response(200, LENGTH2, length=2), "ok"], False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", [response(200, LENGTH2, version=b"HTTP/1.0", length=2), "ok"], False),
    "HTTP/1.0, persistent": (
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok",
        [response(200, LENGTH2, version=b"HTTP/1.0", length=2), "ok"],
        True,
    ),
    "bytes after the answer": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        [response(200, LENGTH2, length=2), "ok"],
        False,
    ),
    "bytes after a chunked answer": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        [response(200), "ok"],
        False,
    ),
    "bytes after an answer without a body": (
        b"HTTP/1.1 304 x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        [response(304, length=0, ended=True)],
        False,
    ),
    "informational answers first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 x\r\nlink: a\r\nconnection: b\r\n\r\nHTTP/1.1 204 x\r\n\r\n",
        [("informational", 1, 100, ()), ("informational", 1, 103, ((b"link", b"a"),)), response(204, length=0, ended=True)],
        True,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_reads(case: str) -> None:
    data, expected, again = READ[case]
    events = []
    for event in expected:
        events += [("body", 1, b"ok"), ("end", 1, None)] if event == "ok" else [event]
    for parts in ([data], pieces(data, range(len(data)))):
        codec = asked()
        assert transcript(feed(codec, parts)) == events
        assert (codec.available, codec.closing, codec.streams) == ((1, False, 0) if again else (0, True, 0))


OK = b"HTTP/1.1 200 OK\r\n"
REFUSED = {
    "a line that is none": b"hello\r\n\r\n",
    "an empty line": b"\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "HTTP/0.9": b"<html></html>\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\n\r\n",
    "a version in lower case": b"http/1.1 200 OK\r\n\r\n",
    "no space": b"HTTP/1.1200 OK\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status of two digits and nothing": b"HTTP/1.1 20\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a status with a sign": b"HTTP/1.1 -20 OK\r\n\r\n",
    "a status beyond 599": b"HTTP/1.1 600 x\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 x\r\n\r\n",
    "an upgrade that nobody asked for": b"HTTP/1.1 101 x\r\nupgrade: h2c\r\n\r\n",
    "length and chunked": OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
    "two lengths": OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n",
    "the same length twice": OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\n",
    "a list of lengths": OK + b"content-length: 2, 2\r\n\r\n",
    "a negative length": OK + b"content-length: -2\r\n\r\n",
    "gzip, chunked": OK + b"transfer-encoding: gzip, chunked\r\n\r\n",
    "chunked in HTTP/1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    "a folded line": OK + b"a: b\r\n c\r\ncontent-length: 0\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\ncontent-length: 0\n\n",
    "a bare CR": OK + b"a: b\rc: d\r\n\r\n",
    "a NUL": OK + b"a: \0\r\n\r\n",
    "a space before the colon": OK + b"content-length : 2\r\n\r\n",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    data = REFUSED[case]
    for parts in ([data + b"\r\n\r\n"], pieces(data + b"\r\n\r\n", range(len(data)))):
        codec = asked()
        assert transcript(feed(codec, parts)) == [("refused", 1, 502)]
        assert (codec.available, codec.closing) == (0, True)
        assert codec.receive(OK + b"content-length: 0\r\n\r\n") == []
        assert codec.eof() == []


@pytest.mark.parametrize("body", [b"x\r\n", b"2\r\nokk", b"2\r\nok\n", b"0\r\na\r\n\r\n"])
def test_a_broken_body_is_refused(body: bytes) -> None:
    codec = asked()
    events = transcript(codec.receive(OK + b"transfer-encoding: chunked\r\n\r\n" + body))
    assert events[0][0] == "response"
    assert events[-1] == ("refused", 1, 502)
    assert not any(event[0] == "end" for event in events)
    assert codec.closing


@pytest.mark.parametrize("step", [1, 100_000])
@pytest.mark.parametrize(("size", "fine"), [(1000, True), (1001, False)])
def test_the_size_of_a_head(size: int, fine: bool, step: int) -> None:
    lines = OK + b"content-length: 0\r\na: "
    data = lines + b"x" * (size - len(lines)) + b"\r\n\r\n"
    events = transcript(feed(asked(max_head=1000), pieces(data, range(0, len(data), step))))
    assert [event[0] for event in events] == (["response"] if fine else ["refused"])


@pytest.mark.parametrize(("count", "fine"), [(10, True), (11, False)])
def test_the_number_of_fields(count: int, fine: bool) -> None:
    events = transcript(asked(max_fields=10).receive(OK + b"a: b\r\n" * count + b"\r\n"))
    assert events[0][0] == ("response" if fine else "refused")


def test_there_are_only_so_many_informational_answers() -> None:
    codec = asked()
    assert len(codec.receive(b"HTTP/1.1 103 x\r\n\r\n" * MAX_INFORMATIONAL)) == MAX_INFORMATIONAL
    assert transcript(codec.receive(b"HTTP/1.1 103 x\r\n\r\n")) == [("refused", 1, 502)]


@pytest.mark.parametrize("fields", [b"content-length: 1000\r\n", b"transfer-encoding: chunked\r\n", b""])
def test_the_answer_to_head_has_no_body(fields: bytes) -> None:
    codec = asked(b"HEAD")
    (event,) = transcript(codec.receive(OK + fields + b"\r\n"))
    assert event[5:] == (0, True)
    assert codec.available == 1


def test_an_answer_without_a_length_lasts_until_the_end() -> None:
    codec = asked()
    assert transcript(codec.receive(OK + b"\r\nab") + codec.receive(b"c") + codec.eof()) == [
        response(200),
        ("body", 1, b"abc"),
        ("end", 1, None),
    ]
    assert codec.closing


@pytest.mark.parametrize("data", [b"", OK[:11], OK + b"content-length: 2\r\n\r\no", OK + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n"])
def test_an_upstream_that_goes(data: bytes) -> None:
    codec = asked()
    codec.receive(data)
    assert transcript(codec.eof()) == [("reset", 1, 2, False)]
    assert codec.closing
    assert codec.eof() == []


@pytest.mark.parametrize("data", [OK + b"content-length: 0\r\n\r\n", b"\r\n", b"x"])
def test_bytes_that_nobody_asked_for_end_the_connection(data: bytes) -> None:
    for codec in (client(), asked()):
        if codec.streams:
            codec.receive(OK + b"content-length: 0\r\n\r\n")
        assert codec.available == 1
        assert codec.receive(b"") == []
        assert codec.available == 1
        assert codec.receive(data) == []
        assert (codec.available, codec.closing) == (0, True)


# Requests


def sent(request: RequestHead, headers: list[tuple[bytes, bytes]], ended: bool) -> bytes:
    codec = client()
    codec.request(request, headers, b"/x", b"shop:80", ended)
    return codec.take()


LINE = b" /x HTTP/1.1\r\nhost: shop:80\r\n"
REQUESTS = {
    "get": (head(), [(b"a", b"b")], True, b"GET" + LINE + b"a: b\r\n\r\n"),
    "no headers": (head(), [], True, b"GET" + LINE + b"\r\n"),
    "post without a body": (head(b"POST"), [], True, b"POST" + LINE + b"content-length: 0\r\n\r\n"),
    "post that says so": (head(b"POST"), [(b"content-length", b"0")], True, b"POST" + LINE + b"content-length: 0\r\n\r\n"),
    "delete without a body": (head(b"DELETE"), [], True, b"DELETE" + LINE + b"\r\n"),
    "a length": (head(b"POST", body_length=3), [], False, b"POST" + LINE + b"content-length: 3\r\n\r\n"),
    "a length that it says": (
        head(b"POST", body_length=3),
        [(b"content-length", b"3")],
        False,
        b"POST" + LINE + b"content-length: 3\r\n\r\n",
    ),
    "no length": (head(b"GET", body_length=UNKNOWN_LENGTH), [], False, b"GET" + LINE + b"transfer-encoding: chunked\r\n\r\n"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests(case: str) -> None:
    request, headers, ended, expected = REQUESTS[case]
    assert sent(request, headers, ended) == expected


@pytest.mark.parametrize("bad", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_nothing_splits_a_request(bad: bytes) -> None:
    for method, headers, target, authority in (
        (b"GET", [(b"a", bad)], b"/", b"shop"),
        (b"GET", [(bad, b"a")], b"/", b"shop"),
        (b"GET", [], b"/" + bad, b"shop"),
        (b"GET", [], b"/", bad),
        (bad, [], b"/", b"shop"),
        (b"GET", [], b"/ HTTP/1.1", b"shop"),
        (b"GET", [], b"/", b"shop evil"),
        (b"GET /", [], b"/", b"shop"),
        (b"GET", [], b"/a\tb", b"shop"),
    ):
        codec = client()
        with pytest.raises(ValueError, match=r"line break|white space"):
            codec.request(head(method), headers, target, authority, True)
        assert (codec.take(), codec.available) == (b"", 1)


def test_a_request_at_a_time() -> None:
    codec = asked()
    with pytest.raises(ValueError, match="busy"):
        codec.request(head(), [], b"/", b"shop", True)
    codec.receive(OK + b"content-length: 0\r\n\r\n")
    assert codec.request(head(), [], b"/", b"shop", True) == 2


def test_a_body_of_a_known_length() -> None:
    codec = client()
    codec.request(head(b"POST", body_length=3), [], b"/", b"shop", False)
    codec.take()
    codec.send_body(1, b"ab", False)
    codec.send_body(1, b"c", False)
    codec.send_trailers(1, [(b"x", b"dropped")])
    assert codec.take() == b"abc"
    codec.send_body(1, b"late", True)
    assert codec.take() == b""
    codec.receive(OK + b"content-length: 0\r\n\r\n")
    assert codec.available == 1


@pytest.mark.parametrize("body", [b"", b"ab", b"abcd"])
def test_a_body_of_another_length_than_announced_ends_the_connection(body: bytes) -> None:
    codec = client()
    codec.request(head(b"POST", body_length=3), [], b"/", b"shop", False)
    codec.take()
    codec.send_body(1, body, True)
    assert (codec.closing, codec.available) == (True, 0)
    assert len(codec.take()) < 3


def test_a_chunked_body_with_trailers() -> None:
    codec = client()
    codec.request(head(b"POST", body_length=UNKNOWN_LENGTH), [], b"/", b"shop", False)
    codec.take()
    codec.send_body(1, b"ab", False)
    codec.send_body(1, b"", False)
    codec.send_trailers(1, [(b"x", b"y")])
    assert codec.take() == b"2\r\nab\r\n0\r\nx: y\r\n\r\n"


@pytest.mark.parametrize("value", [b"a\r\nb", b"a\0"])
def test_no_trailer_splits_a_request(value: bytes) -> None:
    codec = client()
    codec.request(head(b"POST", body_length=UNKNOWN_LENGTH), [], b"/", b"shop", False)
    codec.take()
    with pytest.raises(ValueError, match="line break"):
        codec.send_trailers(1, [(b"x", value)])


def test_an_answer_before_the_request_is_complete_ends_the_connection() -> None:
    codec = client()
    codec.request(head(b"POST", body_length=10), [], b"/", b"shop", False)
    assert transcript(codec.receive(b"HTTP/1.1 413 x\r\ncontent-length: 2\r\n\r\nno"))[1:] == [("body", 1, b"no"), ("end", 1, None)]
    assert (codec.closing, codec.available) == (True, 0)
    codec.take()
    codec.send_body(1, b"0123456789", True)
    assert codec.take() == b""


def test_an_answer_while_the_request_is_sent_lets_it_end() -> None:
    codec = client()
    codec.request(head(b"POST", body_length=4), [], b"/", b"shop", False)
    codec.receive(OK + b"content-length: 2\r\n\r\no")
    codec.send_body(1, b"1234", True)
    assert transcript(codec.receive(b"k"))[-1] == ("end", 1, None)
    assert codec.available == 1


def test_orders_for_another_request_are_not_followed() -> None:
    codec = client()
    codec.request(head(b"POST", body_length=4), [], b"/", b"shop", False)
    codec.take()
    codec.send_body(2, b"1234", True)
    codec.send_trailers(0, [(b"a", b"b")])
    codec.reset(7, 8)
    assert (codec.take(), codec.closing) == (b"", False)


def test_a_reset_ends_the_connection() -> None:
    codec = asked()
    codec.reset(1, 8)
    assert (codec.closing, codec.available, codec.streams) == (True, 0, 0)
    assert codec.receive(OK + b"content-length: 0\r\n\r\n") == []
    with pytest.raises(ValueError, match="busy"):
        codec.request(head(), [], b"/", b"shop", True)


def test_there_is_no_window_and_no_credit() -> None:
    codec = client()
    assert codec.window(1) > 1 << 20
    codec.consumed(1, 5)
    assert codec.take() == b""

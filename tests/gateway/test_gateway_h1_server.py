"""HTTP/1.1 towards clients: bytes in, events out; orders in, bytes out."""

from __future__ import annotations

import pytest
from codec_world import Said, feed, pieces, transcript

from gateway.codec.h1 import Fields
from gateway.codec.h1_server import H1Server

CLOSE = b"connection: close\r\n"


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


PLAIN = request(b"GET shop / HTTP/1.1")

READ = {
    "the least that there can be": (get(), [PLAIN]),
    "names in lower case, values without the white space around them": (
        get(b"X-A: \t b c \t", b"x-B:", b"X-a:d"),
        [request(b"GET shop / HTTP/1.1", (b"x-a", b"b c"), (b"x-b", b""), (b"x-a", b"d"))],
    ),
    "values beyond ASCII stay": (get(b"a: \xff\xe9"), [request(b"GET shop / HTTP/1.1", (b"a", b"\xff\xe9"))]),
    "a tab within a value": (get(b"a: b\tc"), [request(b"GET shop / HTTP/1.1", (b"a", b"b\tc"))]),
    "empty lines before it": (b"\r\n\r\n" + get(), [PLAIN]),
    "the host in lower case": (b"GET /A HTTP/1.1\r\nHost: SHOP:80\r\n\r\n", [request(b"GET shop:80 /A HTTP/1.1")]),
    "a method that nobody knows": (get(line=b"BREW / HTTP/1.1"), [request(b"BREW shop / HTTP/1.1")]),
    "a method in lower case is another method": (get(line=b"get / HTTP/1.1"), [request(b"get shop / HTTP/1.1")]),
    "asterisk form": (get(line=b"OPTIONS * HTTP/1.1"), [request(b"OPTIONS shop * HTTP/1.1")]),
    "absolute form": (get(line=b"GET http://SHOP/a?b HTTP/1.1"), [request(b"GET shop /a?b HTTP/1.1")]),
    "absolute form without a path": (get(line=b"GET http://shop HTTP/1.1"), [request(b"GET shop / HTTP/1.1")]),
    "absolute form with only a query": (get(line=b"GET https://shop?a HTTP/1.1"), [request(b"GET shop /?a HTTP/1.1")]),
    "fields about the connection": (
        get(b"Connection: keep-alive, X-Hop", b"Keep-Alive: timeout=5", b"X-Hop: 1", b"Proxy-Connection: close", b"a: b"),
        [request(b"GET shop / HTTP/1.1", (b"a", b"b"))],
    ),
    "an upgrade that is not taken": (
        get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        [PLAIN],
    ),
    "te with connection": (get(b"Connection: te", b"te: trailers"), [PLAIN]),
    "a body of a known length": (
        get(b"content-length: 3", line=b"POST / HTTP/1.1") + b"abc",
        [
            request(b"POST shop / HTTP/1.1", (b"content-length", b"3"), length=3, ended=False),
            ("body", 1, b"abc"),
            ("end", 1, None),
        ],
    ),
    "a body of no bytes": (get(b"content-length: 0"), [request(b"GET shop / HTTP/1.1", (b"content-length", b"0"))]),
    "a length with zeros before it": (
        get(b"content-length: 0003") + b"abc",
        [request(b"GET shop / HTTP/1.1", (b"content-length", b"0003"), length=3, ended=False), ("body", 1, b"abc"), ("end", 1, None)],
    ),
    "a chunked body": (
        get(b"Transfer-Encoding: Chunked") + b"3\r\nabc\r\n00A\r\n0123456789\r\n0\r\n\r\n",
        [request(b"GET shop / HTTP/1.1", length=-1, ended=False), ("body", 1, b"abc0123456789"), ("end", 1, None)],
    ),
    "a chunked body of no bytes": (
        get(b"transfer-encoding: chunked") + b"0\r\n\r\n",
        [request(b"GET shop / HTTP/1.1", length=-1, ended=False), ("end", 1, None)],
    ),
    "chunk extensions are dropped": (
        get(b"transfer-encoding: chunked") + b'3;a="b;c"\r\nabc\r\n1 ;x\r\nd\r\n0;last\r\n\r\n',
        [request(b"GET shop / HTTP/1.1", length=-1, ended=False), ("body", 1, b"abcd"), ("end", 1, None)],
    ),
    "trailers, without what frames, routes or proves": (
        get(b"transfer-encoding: chunked")
        + b"1\r\na\r\n0\r\nX-Sum: 1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: evil\r\nAuthorization: x\r\nCookie: y\r\n"
        + b"Connection: close\r\nTe: gzip\r\nExpect: 100-continue\r\n\r\n",
        [request(b"GET shop / HTTP/1.1", length=-1, ended=False), ("body", 1, b"a"), ("end", 1, ((b"x-sum", b"1"),))],
    ),
    "expect": (
        get(b"Expect: 100-Continue", b"content-length: 1"),
        [request(b"GET shop / HTTP/1.1", (b"content-length", b"1"), length=1, ended=False, expects=True)],
    ),
    "expect, from a client that is too old for it": (
        get(b"expect: 100-continue", b"content-length: 1", line=b"POST / HTTP/1.0"),
        [request(b"POST shop / HTTP/1.0", (b"content-length", b"1"), length=1, ended=False)],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_reads(case: str) -> None:
    data, events = READ[case]
    assert transcript(server().receive(data)) == events
    assert transcript(feed(server(), pieces(data, range(len(data))))) == events


REFUSED = {
    # What says where a message ends
    "length and chunked": (400, get(b"content-length: 3", b"transfer-encoding: chunked")),
    "chunked and length": (400, get(b"transfer-encoding: chunked", b"content-length: 3")),
    "two lengths": (400, get(b"content-length: 3", b"content-length: 4")),
    "the same length twice": (400, get(b"content-length: 3", b"content-length: 3")),
    "the same length twice, spelled differently": (400, get(b"Content-Length: 3", b"content-length: 3")),
    "a list of lengths": (400, get(b"content-length: 3, 3")),
    "a negative length": (400, get(b"content-length: -1")),
    "a length with a plus": (400, get(b"content-length: +1")),
    "a length in hex": (400, get(b"content-length: 0x10")),
    "a length with white space in it": (400, get(b"content-length: 1 0")),
    "a length with an underscore": (400, get(b"content-length: 1_0")),
    "a length that is a fraction": (400, get(b"content-length: 1.0")),
    "a length of no digits": (400, get(b"content-length:")),
    "a length in digits beyond ASCII": (400, get("content-length: ٣".encode())),
    "a length that overflows": (400, get(b"content-length: 18446744073709551617")),
    "chunked twice": (400, get(b"transfer-encoding: chunked", b"transfer-encoding: chunked")),
    "chunked, chunked": (400, get(b"transfer-encoding: chunked, chunked")),
    "gzip, chunked": (400, get(b"transfer-encoding: gzip, chunked")),
    "chunked and identity": (400, get(b"transfer-encoding: chunked", b"transfer-encoding: identity")),
    "identity": (400, get(b"transfer-encoding: identity")),
    "an unknown coding": (400, get(b"transfer-encoding: xchunked")),
    "chunked, in quotes": (400, get(b'transfer-encoding: "chunked"')),
    "chunked with a parameter": (400, get(b"transfer-encoding: chunked;a=b")),
    "chunked with a vertical tab": (400, get(b"transfer-encoding: \x0bchunked")),
    "no coding": (400, get(b"transfer-encoding:")),
    "a list with nothing in it": (400, get(b"transfer-encoding: ,chunked")),
    "chunked in HTTP/1.0": (400, get(b"transfer-encoding: chunked", line=b"POST / HTTP/1.0")),
    "a space before the colon": (400, get(b"transfer-encoding : chunked")),
    "a tab before the colon": (400, get(b"content-length\t: 3")),
    "a space before the name": (400, get(b" transfer-encoding: chunked")),
    "a folded line": (400, get(b"a: b", b" c")),
    "a folded length": (400, get(b"content-length:", b"\t3")),
    "a folded line at first": (400, b"GET / HTTP/1.1\r\n host: shop\r\n\r\n"),
    "an underlined name with a space": (400, get(b"content length: 3")),
    "a line without a colon": (400, get(b"transfer-encoding chunked")),
    "a name of no characters": (400, get(b": chunked")),
    "a name beyond ASCII": (400, get(b"transfer-encod\xc4\xb1ng: chunked")),
    "a name with a NUL": (400, get(b"content-length\0: 3")),
    "a NUL in a value": (400, get(b"a: b\0c")),
    "DEL in a value": (400, get(b"a: b\x7fc")),
    "a bare CR in a value": (400, get(b"a: b\rtransfer-encoding: chunked")),
    "a bare LF in a value": (400, get(b"a: b\ntransfer-encoding: chunked")),
    "a bare LF between lines": (400, b"GET / HTTP/1.1\nhost: shop\n\n"),
    "a bare LF after the request line": (400, b"GET / HTTP/1.1\nhost: shop\r\n\r\n"),
    "LF CR": (400, b"GET / HTTP/1.1\n\rhost: shop\r\n\r\n"),
    "CR CR LF": (400, get(b"a: b\r")),
    # The request line
    "HTTP/0.9": (400, b"GET /\r\n\r\n"),
    "two spaces": (400, get(line=b"GET  / HTTP/1.1")),
    "a tab in place of a space": (400, get(line=b"GET\t/ HTTP/1.1")),
    "a space at the end": (400, get(line=b"GET / HTTP/1.1 ")),
    "a space within the target": (400, get(line=b"GET /a b HTTP/1.1")),
    "a space at first": (400, get(line=b" GET / HTTP/1.1")),
    "no method": (400, get(line=b"/ / HTTP/1.1")),
    "a method with a colon": (400, get(line=b"G:T / HTTP/1.1")),
    "a version in lower case": (400, get(line=b"GET / http/1.1")),
    "no version": (400, get(line=b"GET / HELLO")),
    "HTTP/1.2": (505, get(line=b"GET / HTTP/1.2")),
    "HTTP/1.10": (505, get(line=b"GET / HTTP/1.10")),
    "HTTP/2.0": (505, get(line=b"GET / HTTP/2.0")),
    "the preface of HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "an asterisk for GET": (400, get(line=b"GET * HTTP/1.1")),
    "a target without a slash": (400, get(line=b"GET a HTTP/1.1")),
    "authority form": (400, get(line=b"GET shop:80 HTTP/1.1")),
    "another scheme": (400, get(line=b"GET ftp://shop/ HTTP/1.1")),
    "absolute form for another host": (400, get(line=b"GET http://evil/ HTTP/1.1")),
    "absolute form with a user": (400, get(line=b"GET http://evil@shop/ HTTP/1.1")),
    "absolute form with another port": (400, get(line=b"GET http://shop:81/ HTTP/1.1")),
    "a target beyond ASCII": (400, get(line=b"GET /\xc3\xa9 HTTP/1.1")),
    "no host": (400, b"GET / HTTP/1.1\r\na: b\r\n\r\n"),
    "no host in HTTP/1.0": (400, b"GET / HTTP/1.0\r\n\r\n"),
    "an empty host": (400, b"GET / HTTP/1.1\r\nhost:\r\n\r\n"),
    "two hosts": (400, get(b"host: evil")),
    "the same host twice": (400, get(b"Host: shop")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    # The rest
    "an expectation that nobody has": (417, get(b"expect: 200-ok")),
    **{
        f"a Connection field that names {name.decode()}": (400, get(b"connection: close, " + name, name + b": 1"))
        for name in (b"Authorization", b"content-type", b"cookie", b"x-forwarded-for", b"x-forwarded-proto", b"forwarded", b"via")
    },
    "a Connection field that names the length": (400, get(b"content-length: 3", b"connection: content-length")),
    "a Connection field that names the host": (400, get(b"connection: host")),
    "a Connection field that names the coding": (400, get(b"transfer-encoding: chunked", b"connection: transfer-encoding")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    status, data = REFUSED[case]
    after = b"GET /second HTTP/1.1\r\nhost: shop\r\n\r\n"
    codec = server()
    assert transcript(codec.receive(data + after)) == [("refused", 1, status)]
    assert codec.receive(after) == []
    assert (codec.streams, codec.waiting, codec.closing) == (1, 0, False)
    codec.send_head(1, status, [(b"content-length", b"1")], False)
    codec.send_body(1, b"x", True)
    assert CLOSE in codec.take()
    assert codec.closing
    assert transcript(feed(server(), pieces(data, range(len(data))))) == [("refused", 1, status)]


CHUNKED = get(b"transfer-encoding: chunked", line=b"POST / HTTP/1.1")
BROKEN_BODIES = {
    "a size that is no number": b"x\r\n",
    "a size with a prefix": b"0x3\r\nabc\r\n",
    "a negative size": b"-1\r\n",
    "a size with a plus": b"+3\r\nabc\r\n",
    "a size with a space before it": b" 3\r\nabc\r\n",
    "a size with an underscore": b"1_0\r\n",
    "a size of no digits": b"\r\nabc\r\n",
    "an extension without a size": b";a\r\nabc\r\n",
    "a size that overflows": b"10000000000000003\r\nabc\r\n",
    "a size of very many zeros": b"0" * 100 + b"3\r\nabc\r\n",
    "a size line that does not end": b"3;" + b"a" * 300,
    "a bare LF after the size": b"3\nabc\r\n",
    "a bare CR in an extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "a NUL in an extension": b"3;a\0\r\nabc\r\n",
    "a bare LF in an extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "more data than announced": b"3\r\nabcd\r\n",
    "less data than announced": b"5\r\nabc\r\n0\r\n\r\n",
    "a bare LF after the data": b"3\r\nabc\n0\r\n\r\n",
    "a bare CR after the data": b"3\r\nabc\r0\r\n\r\n",
    "a trailer without a colon": b"0\r\nabc\r\n\r\n",
    "a folded trailer": b"0\r\na: b\r\n c\r\n\r\n",
    "a trailer with a space before the colon": b"0\r\na : b\r\n\r\n",
    "a bare LF in trailers": b"0\r\na: b\nc: d\r\n\r\n",
    "trailers that are too long": b"0\r\n" + b"a: " + b"b" * 17000,
    "too many trailers": b"0\r\n" + b"a: b\r\n" * 101 + b"\r\n",
    "nearly nothing but extensions": (b"1;" + b"e" * 200 + b"\r\na\r\n") * 200,
}


@pytest.mark.parametrize("case", BROKEN_BODIES)
def test_a_broken_body_ends_the_request(case: str) -> None:
    data = CHUNKED + BROKEN_BODIES[case]
    for parts in ([data], pieces(data, range(len(data)))):
        codec = server()
        events = transcript(feed(codec, parts))
        assert events[0][0] == "request"
        assert events[-1] == ("refused", 1, 400)
        assert not any(event[0] in ("end", "request") for event in events[1:])
        assert transcript(codec.receive(get())) == []
        assert b"HTTP/1.1 200 OK\r\nconnection: close" in answered(codec)
        assert codec.closing


def test_extensions_that_the_data_makes_up_for_are_fine() -> None:
    chunk = b"100;chunk-signature=" + b"f" * 64 + b"\r\n" + b"d" * 256 + b"\r\n"
    events = transcript(server().receive(CHUNKED + chunk * 1000 + b"0\r\n\r\n"))
    assert events[1:] == [("body", 1, b"d" * 256_000), ("end", 1, None)]


# Limits, exactly


def head_of(size: int) -> bytes:
    """A head of `size` bytes, without the empty line that ends it."""
    lines = b"GET / HTTP/1.1\r\nhost: shop\r\na: "
    return lines + b"x" * (size - len(lines)) + b"\r\n\r\n"


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize(("size", "fine"), [(1000, True), (1001, False)])
def test_the_size_of_a_head(size: int, fine: bool, step: int) -> None:
    data = head_of(size)
    events = transcript(feed(server(max_head=1000), pieces(data, range(0, len(data), step))))
    assert [event[0] for event in events] == (["request"] if fine else ["refused"])
    assert fine or events[0][2] == 431


def test_a_head_that_is_too_large_is_refused_before_it_ends() -> None:
    codec = server(max_head=1000)
    assert codec.receive(head_of(5000)[:1003]) == []
    assert transcript(codec.receive(b"x")) == [("refused", 1, 431)]


@pytest.mark.parametrize(("count", "fine"), [(9, True), (10, False)])
def test_the_number_of_fields(count: int, fine: bool) -> None:
    events = transcript(server(max_fields=10).receive(get(*[b"a: b"] * count)))
    assert events[0][0] == ("request" if fine else "refused")
    assert fine or events[0][2] == 431


@pytest.mark.parametrize("step", [1, 100_000])
@pytest.mark.parametrize(("size", "fine"), [(500, True), (501, False)])
def test_the_size_of_a_target(size: int, fine: bool, step: int) -> None:
    data = get(line=b"GET /" + b"a" * (size - 1) + b" HTTP/1.1")
    events = transcript(feed(server(max_target=500), pieces(data, range(0, len(data), step))))
    assert events[0][0] == ("request" if fine else "refused")
    assert fine or events[0][2] == 414


@pytest.mark.parametrize("step", [1, 100_000])
def test_a_method_that_does_not_end(step: int) -> None:
    data = get(line=b"G" * 700 + b" / HTTP/1.1")
    assert transcript(feed(server(max_target=500), pieces(data, range(0, len(data), step)))) == [("refused", 1, 414)]
    assert transcript(feed(server(max_target=500), [b"G" * 600])) == [("refused", 1, 414)]


@pytest.mark.parametrize("trailers", [b"a: " + b"b" * (16 * 1024 - 3), b"a: b\r\n" * 99 + b"a: b"])
def test_the_most_trailers(trailers: bytes) -> None:
    data = CHUNKED + b"0\r\n" + trailers + b"\r\n\r\n"
    whole = transcript(server().receive(data))
    assert whole[-1][0] == "end"
    assert len(whole[-1][2]) == trailers.count(b":")
    assert transcript(feed(server(), pieces(data, range(len(data))))) == whole


@pytest.mark.parametrize("size", [255, 256, 257])
def test_the_longest_line_of_a_chunk(size: int) -> None:
    data = CHUNKED + b"3;" + b"e" * (size - 2) + b"\r\nabc\r\n0\r\n\r\n"
    whole = transcript(server().receive(data))
    assert whole[-1][0] == ("end" if size <= 256 else "refused")
    assert transcript(feed(server(), pieces(data, range(len(data)))))[-1] == whole[-1]


# What is kept


def test_lines_are_kept_within_bounds_and_without_credentials() -> None:
    fields = Fields(capacity=10, longest=30)
    lines = [b"Authorization: Bearer x", b"cookie: a=b", b"Proxy-Authorization: y", b"long: " + b"x" * 30]
    for number in range(8):
        codec = H1Server(b"https", fields)
        codec.receive(get(*lines, b"a: %d" % number))
        assert not any(line in fields.kept for line in lines)
    assert b"a: 7" in fields.kept
    for number in range(1000):
        fields.read(b"b: %d" % number)
        assert len(fields.kept) <= 10


@pytest.mark.parametrize("first", [get(b"content-length: 5", b"x: \xff"), get(b"Content-length:5", b"a: b")])
def test_what_is_kept_changes_nothing(first: bytes) -> None:
    fields = Fields()
    seen = [transcript(H1Server(b"https", fields).receive(first)) for _ in range(3)]
    assert seen[0] == seen[1] == seen[2]


def test_a_head_that_comes_byte_by_byte_is_looked_at_once() -> None:
    data = head_of(60_000)
    codec = server()
    for at in range(0, len(data) - 1):
        codec.receive(data[at : at + 1])
    partial = codec._partial
    assert partial is not None
    assert isinstance(partial.data, bytearray)  # grows in place: no copy of all of it for each byte
    assert codec.waiting == len(data) - 1
    assert transcript(codec.receive(data[-1:]))[0][0] == "request"

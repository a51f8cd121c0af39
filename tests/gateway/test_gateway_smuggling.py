"""Request smuggling and path confusion, on real sockets: what policy saw is what the upstream got, or nothing got there.

The corpus is of what is known to have split proxies from servers: lengths that contradict each other, framing that is nearly right, fields
that begin lines of their own once HTTP/2 is written as HTTP/1.1, targets and hosts that say two things, and paths with more than one
reading. The upstream's bytes are read by a reader of this file, which takes nothing that two readers could take in two ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import h2.config
import h2.connection
import pytest
from door_world import POLICY, Answers, H2Client, get
from test_gateway_websocket import peer
from through_world import Through, through

from mesh.questions import Decision, Verdict

ALLOW = Decision(verdict=Verdict.ALLOW)
Request = tuple[bytes, bytes, bytes]
"""Method, target and host."""


class Watching(Answers):
    """Allows everything, and keeps what it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.saw: list[Request] = []

    def renewed(self, question: Any) -> Any:
        return question

    def recall(self, question: Any, now: float) -> Decision:
        head = question.asking.head
        self.saw.append((head.method, head.path + (b"" if head.query is None else b"?" + head.query), head.authority))
        return ALLOW


def read_all(data: bytes) -> list[Request]:
    """The requests in what an upstream got. Fails on anything that is not plainly one request after the other."""
    found: list[Request] = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"a head that does not end: {head!r}"
        assert head.count(b"\n") == head.count(b"\r\n") == head.count(b"\r"), f"a bare CR or LF: {head!r}"
        assert b"\0" not in head
        start, *lines = head.split(b"\r\n")
        method, target, version = start.split(b" ")
        assert version == b"HTTP/1.1"
        fields: dict[bytes, bytes] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            assert colon
            assert name == name.strip().lower()
            assert name not in fields or name not in {b"host", b"content-length", b"transfer-encoding"}, f"{name!r} twice"
            fields[name] = value.strip()
        assert not (b"content-length" in fields and b"transfer-encoding" in fields)
        assert fields.get(b"transfer-encoding", b"chunked") == b"chunked"
        if b"content-length" in fields:
            size = int(fields[b"content-length"])
            assert len(data) >= size
            data = data[size:]
        elif b"transfer-encoding" in fields:
            while True:
                line, end, data = data.partition(b"\r\n")
                assert end
                size = int(line, 16)
                if not size:
                    break
                assert data[size : size + 2] == b"\r\n"
                data = data[size + 2 :]
            if data.startswith(b"\r\n"):
                data = data[2:]
            else:
                trailers, _, data = data.partition(b"\r\n\r\n")
                assert not {line.partition(b":")[0] for line in trailers.split(b"\r\n")} & {
                    b"host",
                    b"content-length",
                    b"transfer-encoding",
                }
        found.append((method, target, fields[b"host"]))
    return found


class Upstream:
    """Answers whatever looks like the end of a head or of a body, and keeps every byte, by connection."""

    def __init__(self) -> None:
        self.got: list[bytearray] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = bytearray()
        self.got.append(mine)
        answered = 0
        while data := await reader.read(65536):
            mine += data
            try:
                complete = len(read_all(bytes(mine)))
            except (AssertionError, ValueError, KeyError):
                continue
            for _ in range(complete - answered):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            answered = complete


def run(play: Callable[[Through], Awaitable[None]]) -> tuple[list[Request], list[Request]]:
    """What policy saw and what the upstream got."""
    watching, upstream = Watching(), Upstream()

    async def go() -> None:
        async with asyncio.timeout(20), peer(upstream.serve) as port, through(port, decisions=(POLICY,), timeout=2.0) as made:
            made.gateway._shared.driver._decider = watching
            await play(made)

    asyncio.run(go())
    return watching.saw, [request for got in upstream.got for request in read_all(bytes(got))]


async def said(made: Through, data: bytes) -> bytes:
    """What the gateway says to `data`, after which the client sends no more."""
    reader, writer = await made.plain()
    writer.write(data)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


def post(fields: bytes, body: bytes) -> bytes:
    return b"POST /front HTTP/1.1\r\nhost: shop.example\r\n" + fields + b"\r\n" + body


SMUGGLED = b"GET /admin HTTP/1.1\r\nhost: shop.example\r\n\r\n"
CHUNKED = b"0\r\n\r\n"
REFUSED = {
    "both lengths": post(b"content-length: 4\r\ntransfer-encoding: chunked\r\n", CHUNKED + SMUGGLED),
    "both lengths, the other way": post(b"transfer-encoding: chunked\r\ncontent-length: 4\r\n", CHUNKED + SMUGGLED),
    "two lengths": post(b"content-length: 0\r\ncontent-length: 44\r\n", SMUGGLED),
    "two equal lengths": post(b"content-length: 2\r\ncontent-length: 2\r\n", b"ab" + SMUGGLED),
    "a list of lengths": post(b"content-length: 2, 2\r\n", b"ab" + SMUGGLED),
    "a signed length": post(b"content-length: +2\r\n", b"ab" + SMUGGLED),
    "a length in hex": post(b"content-length: 0x2\r\n", b"ab" + SMUGGLED),
    "a length with an underscore": post(b"content-length: 1_0\r\n", b"ab" + SMUGGLED),
    "an empty length": post(b"content-length:\r\n", SMUGGLED),
    "a length in other digits": post("content-length: \u0662\r\n".encode(), SMUGGLED),
    "a coding before chunked": post(b"transfer-encoding: gzip, chunked\r\n", CHUNKED),
    "a coding after chunked": post(b"transfer-encoding: chunked, identity\r\n", CHUNKED + SMUGGLED),
    "chunked twice": post(b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", CHUNKED + SMUGGLED),
    "chunked and x": post(b"transfer-encoding: chunked\r\ntransfer-encoding: x\r\n", CHUNKED + SMUGGLED),
    "xchunked": post(b"transfer-encoding: xchunked\r\n", CHUNKED + SMUGGLED),
    "chunked with a vertical tab": post(b"transfer-encoding: \x0bchunked\r\n", CHUNKED + SMUGGLED),
    "chunked in quotes": post(b'transfer-encoding: "chunked"\r\n', CHUNKED + SMUGGLED),
    "an empty coding": post(b"transfer-encoding:\r\n", CHUNKED + SMUGGLED),
    "a space before the colon": post(b"transfer-encoding : chunked\r\n", CHUNKED + SMUGGLED),
    "a tab before the colon": post(b"content-length\t: 44\r\n", SMUGGLED),
    "a folded length": post(b"content-length:\r\n 44\r\n", SMUGGLED),
    "a folded field": post(b"x: a\r\n transfer-encoding: chunked\r\n", CHUNKED + SMUGGLED),
    "a field before any": b"GET / HTTP/1.1\r\n x: 1\r\nhost: shop.example\r\n\r\n",
    "a bare LF in a head": b"GET / HTTP/1.1\r\nhost: shop.example\nx: 1\r\n\r\n" + SMUGGLED,
    "a bare CR in a head": b"GET / HTTP/1.1\r\nhost: shop.example\r\nx: 1\rtransfer-encoding: chunked\r\n\r\n",
    "only LFs": b"GET / HTTP/1.1\nhost: shop.example\n\n" + SMUGGLED,
    "a NUL in a value": b"GET / HTTP/1.1\r\nhost: shop.example\r\nx: a\0b\r\n\r\n",
    "a NUL in a name": b"GET / HTTP/1.1\r\nhost: shop.example\r\nx\0: a\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nhost: shop.example\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKED + SMUGGLED,
    "a chunk that is longer than it says": post(b"transfer-encoding: chunked\r\n", b"1\r\nab\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk size with a sign": post(b"transfer-encoding: chunked\r\n", b"-1\r\na\r\n0\r\n\r\n"),
    "a chunk size of 0x1": post(b"transfer-encoding: chunked\r\n", b"0x1\r\na\r\n0\r\n\r\n"),
    "a chunk size that overflows": post(b"transfer-encoding: chunked\r\n", b"10000000000000001\r\na\r\n0\r\n\r\n"),
    "a chunk size with a space": post(b"transfer-encoding: chunked\r\n", b"1 1\r\na\r\n0\r\n\r\n"),
    "a chunk that ends with LF": post(b"transfer-encoding: chunked\r\n", b"1\na\r\n0\r\n\r\n" + SMUGGLED),
    "a chunk extension with a LF": post(b"transfer-encoding: chunked\r\n", b"1;a=\n5\r\na\r\n0\r\n\r\n" + SMUGGLED),
    "two hosts": b"GET / HTTP/1.1\r\nhost: shop.example\r\nhost: admin.example\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "an empty host": b"GET / HTTP/1.1\r\nhost:\r\n\r\n",
    "a host with a path": b"GET / HTTP/1.1\r\nhost: shop.example/admin\r\n\r\n",
    "a host with a user": b"GET / HTTP/1.1\r\nhost: shop.example@admin.example\r\n\r\n",
    "a host with a space": b"GET / HTTP/1.1\r\nhost: shop.example admin\r\n\r\n",
    "a list of hosts": b"GET / HTTP/1.1\r\nhost: shop.example, admin.example\r\n\r\n",
    "another absolute host": b"GET http://admin.example/ HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "an absolute host with a user": b"GET http://shop.example@admin.example/ HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "an absolute target of another scheme": b"GET ftp://shop.example/ HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "an absolute target with a backslash": b"GET http://shop.example\\admin HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "a tab in the line": b"GET\t/ HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "a space in the target": b"GET /a /admin HTTP/1.1\r\nhost: shop.example\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nhost: shop.example\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "a lower-case version": b"GET / http/1.1\r\nhost: shop.example\r\n\r\n",
    "a fragment": get(b"/a#/admin"),
    "an escaped slash": get(b"/a%2fadmin"),
    "an escaped backslash": get(b"/a%5cadmin"),
    "a backslash": get(b"/a\\..\\admin"),
    "an escaped NUL": get(b"/a%00"),
    "an escaped line end": get(b"/a%0d%0ax: 1"),
    "overlong UTF-8": get(b"/%c0%ae%c0%ae/admin"),
    "a dot segment with a parameter": get(b"/a/..;/admin"),
    "half an escape": get(b"/a%2"),
    "an escape of no hex": get(b"/%zz"),
    "bytes beyond ASCII": get("/\u00e9".encode()),
    "a Connection field that names Host": get(b"/", b"connection: host\r\n"),
    "a Connection field that names a length": get(b"/", b"connection: content-length\r\ncontent-length: 0\r\n"),
    "a Connection field that names what a gateway says": get(b"/", b"connection: x-forwarded-for\r\n"),
    "a name with an underscore": get(b"/", b"content_length: 4\r\n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_of_it_reaches_anybody(name: str) -> None:
    answers: list[bytes] = []

    async def play(made: Through) -> None:
        answers.append(await said(made, REFUSED[name]))

    saw, got = run(play)
    assert answers[0].startswith(b"HTTP/1.1 4") or answers[0].startswith(b"HTTP/1.1 5"), answers
    assert answers[0].count(b"HTTP/1.1 ") == 1, "what came after it was taken for a request"
    assert b"/admin" not in b"".join(target for _, target, _ in (*saw, *got))
    assert len(got) <= len(saw)


ONE_READING = {
    "absolute form": (b"GET http://shop.example/a?b HTTP/1.1\r\nhost: shop.example\r\n\r\n", [(b"GET", b"/a?b")]),
    "absolute form in capitals": (b"GET HTTP://SHOP.example/a HTTP/1.1\r\nhost: Shop.Example\r\n\r\n", [(b"GET", b"/a")]),
    "absolute form without a path": (b"GET http://shop.example?q HTTP/1.1\r\nhost: shop.example\r\n\r\n", [(b"GET", b"/?q")]),
    "dots": (get(b"/a/../admin/./x"), [(b"GET", b"/admin/x")]),
    "dots beyond the root": (get(b"/../../admin"), [(b"GET", b"/admin")]),
    "escaped dots": (get(b"/a/%2e%2e/admin"), [(b"GET", b"/admin")]),
    "dots escaped twice": (get(b"/a/%252e%252e/admin"), [(b"GET", b"/a/%252e%252e/admin")]),
    "doubled slashes": (get(b"//admin///x"), [(b"GET", b"/admin/x")]),
    "escaped letters": (get(b"/%61dmin"), [(b"GET", b"/admin")]),
    "escapes in lower case": (get(b"/%c3%a9"), [(b"GET", b"/%C3%A9")]),
    "a query that looks like a path": (get(b"/a?/../admin"), [(b"GET", b"/a?/../admin")]),
    "a query with escapes": (get(b"/a?x=%2e%2e%2f"), [(b"GET", b"/a?x=%2e%2e%2f")]),
    "a parameter": (get(b"/a;v=1/b"), [(b"GET", b"/a;v=1/b")]),
    "a request in a body": (post(b"content-length: %d\r\n" % len(SMUGGLED), SMUGGLED), [(b"POST", b"/front")]),
    "a request in a chunk": (
        post(b"transfer-encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)),
        [(b"POST", b"/front")],
    ),
    "chunked in capitals": (post(b"Transfer-Encoding: Chunked\r\n", CHUNKED) + SMUGGLED, [(b"POST", b"/front"), (b"GET", b"/admin")]),
    "extensions and trailers": (
        post(b"transfer-encoding: chunked\r\n", b"1;x=y\r\na\r\n0\r\nhost: admin\r\ncontent-length: 9\r\nx: 1\r\n\r\n") + get(b"/next"),
        [(b"POST", b"/front"), (b"GET", b"/next")],
    ),
    "a length on GET": (get(b"/a", b"content-length: 2\r\n") + b"ab" + get(b"/b"), [(b"GET", b"/a"), (b"GET", b"/b")]),
    "an empty line before a request": (b"\r\n\r\n" + get(b"/a"), [(b"GET", b"/a")]),
    "pipelined": (b"".join(get(b"/%d" % number) for number in range(20)), [(b"GET", b"/%d" % number) for number in range(20)]),
    "an asterisk in a path": (b"OPTIONS /* HTTP/1.1\r\nhost: shop.example\r\n\r\n", [(b"OPTIONS", b"/*")]),
    "a method in lower case": (get(b"/a", method=b"get"), [(b"get", b"/a")]),
}


@pytest.mark.parametrize("name", ONE_READING)
def test_what_has_one_reading_is_read_so_by_everybody(name: str) -> None:
    sent, expected = ONE_READING[name]

    async def play(made: Through) -> None:
        answer = await said(made, sent)
        assert answer.count(b"HTTP/1.1 200 ") == len(expected), answer

    saw, got = run(play)
    assert saw == got
    assert [request[:2] for request in got] == expected
    assert {host for _, _, host in got} == {b"shop.example"}


GOOD = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"shop.example"), (b":path", b"/front")]


def replaced(name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    return [(key, value if key == name else before) for key, before in GOOD]


DOWNGRADED = {
    "a line end in a value": [*GOOD, (b"x", b"a\r\ntransfer-encoding: chunked")],
    "a LF in a value": [*GOOD, (b"x", b"a\ntransfer-encoding: chunked")],
    "a NUL in a value": [*GOOD, (b"x", b"a\0b")],
    "a line end in a name": [*GOOD, (b"x: a\r\ntransfer-encoding", b"chunked")],
    "a colon in a name": [*GOOD, (b"transfer-encoding: chunked\r\nx", b"a")],
    "a name in capitals": [*GOOD, (b"X", b"a")],
    "an empty name": [*GOOD, (b"", b"a")],
    "transfer-encoding": [*GOOD, (b"transfer-encoding", b"chunked")],
    "connection": [*GOOD, (b"connection", b"close")],
    "upgrade": [*GOOD, (b"upgrade", b"websocket"), (b"connection", b"upgrade")],
    "te": [*GOOD, (b"te", b"chunked")],
    "a line end in the path": replaced(b":path", b"/ HTTP/1.1\r\nhost: shop.example\r\n\r\nGET /admin"),
    "a space in the path": replaced(b":path", b"/ HTTP/1.1 /admin"),
    "a line end in the method": replaced(b":method", b"GET / HTTP/1.1\r\nx: y\r\n\r\nGET"),
    "a space in the method": replaced(b":method", b"GET /admin HTTP/1.1\r\nx:"),
    "a line end in the authority": replaced(b":authority", b"shop.example\r\nx: y"),
    "a path in the authority": replaced(b":authority", b"shop.example/admin"),
    "a user in the authority": replaced(b":authority", b"shop.example@admin.example"),
    "an empty path": replaced(b":path", b""),
    "a path without a slash": replaced(b":path", b"admin"),
    "an absolute path": replaced(b":path", b"http://admin.example/"),
    "an unknown pseudo-header": [*GOOD, (b":admin", b"1")],
    "two paths": [*GOOD, (b":path", b"/admin")],
    "a pseudo-header after a field": [*GOOD[:3], (b"x", b"a"), GOOD[3]],
    "another host": [*GOOD, (b"host", b"admin.example")],
    "two hosts": [*GOOD, (b"host", b"shop.example"), (b"host", b"shop.example")],
    "two lengths": [*GOOD, (b"content-length", b"4"), (b"content-length", b"5")],
    "a length that is none": [*GOOD, (b"content-length", b"+4")],
    "a length shorter than the body": [*GOOD, (b"content-length", b"2")],
    "a length longer than the body": [*GOOD, (b"content-length", b"400")],
    "a status": [*GOOD, (b":status", b"200")],
    "an escaped slash": replaced(b":path", b"/a%2fadmin"),
    "dots with a parameter": replaced(b":path", b"/a/..;/admin"),
}


@pytest.mark.parametrize("name", DOWNGRADED)
def test_nothing_of_it_is_written_as_http_1_1(name: str) -> None:
    async def play(made: Through) -> None:
        client = H2Client(*await made.plain())
        client.conn = h2.connection.H2Connection(
            h2.config.H2Configuration(
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
            )
        )
        client.conn.initiate_connection()
        client.writer.write(client.conn.data_to_send()[24:])  # the preface has been sent
        number = 1
        client.conn.send_headers(number, DOWNGRADED[name])
        client.conn.send_data(number, b"body" + SMUGGLED, end_stream=True)
        client.answers[number] = {"status": 0, "headers": {}, "body": b"", "over": False, "reset": None}
        client.flush()
        while not client.answers[number]["over"] and await client.read():
            pass
        assert client.answers[number]["reset"] is not None or client.answers[number]["status"] >= 400

    saw, got = run(play)
    assert got == []
    assert b"/admin" not in b"".join(target for _, target, _ in saw)


def test_a_good_request_of_http_2_is_written_as_one() -> None:
    async def play(made: Through) -> None:
        client = H2Client(*await made.plain())
        number = client.request(b"/a/%2e./b?c", b"POST", b"body" + SMUGGLED, ((b"x", b"y"),))
        assert (await client.answer(number))["status"] == 200

    saw, got = run(play)
    assert saw == got == [(b"POST", b"/b?c", b"shop.example")]

"""HTTP/1.1: whatever comes, and however it is cut, there is one way to read it."""

from __future__ import annotations

import re
from typing import Any

from codec_world import Said, feed, pieces, said, transcript
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.codec.events import Ended, Event, Refused, RequestReceived
from gateway.codec.h1 import NOT_IN_TRAILERS, Fields
from gateway.codec.h1_client import SPECIAL as CLIENT_SPECIAL
from gateway.codec.h1_client import H1Client
from gateway.codec.h1_server import SPECIAL, H1Server
from mesh.http import UNKNOWN_LENGTH, RequestHead

KNOWN = Fields()
"""Shared by all connections here, as in a worker: what one of them has taught it must not change what another one reads."""

# Conversations, and what an attacker makes of them

NASTY = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"1", b"\xff", b"\x0b", b"+", b"-", b"0x", b"_",
    b"Content-Length: 3\r\n", b"content-length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"transfer-encoding : chunked\r\n",
    b" chunked", b"0\r\n\r\n", b"3\r\nabc\r\n", b"\r\n folded", b"Connection: content-length\r\n", b"connection: close\r\n",
    b"HTTP/1.0", b"HTTP/1.1\r\n", b"GET /evil HTTP/1.1\r\nHost: shop\r\n\r\n", b"expect: 100-continue\r\n", b"host: evil\r\n", b";ext=1",
]  # fmt: skip

token = st.text("abcXYZ-09", min_size=1, max_size=6).map(str.encode)
value = st.binary(max_size=12).map(lambda raw: bytes(c for c in raw if c in b"\t" or 0x20 <= c != 0x7F).strip(b" \t"))
field = st.tuples(token.map(lambda name: b"x-" + name.lower()), value)
body = st.lists(st.binary(min_size=1, max_size=300), max_size=5)


def chunked(parts: list[bytes], trailers: list[tuple[bytes, bytes]]) -> bytes:
    out = b"".join(b"%X\r\n%b\r\n" % (len(part), part) for part in parts)
    return out + b"0\r\n" + b"".join(b"%b: %b\r\n" % pair for pair in trailers) + b"\r\n"


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """One request, as it should be."""
    lines = [
        draw(st.sampled_from([b"GET / HTTP/1.1", b"POST /a?b HTTP/1.1", b"GET http://shop/x HTTP/1.1", b"HEAD /h HTTP/1.0"])),
        b"Host: shop",
    ]
    lines += [name + b":" + content for name, content in draw(st.lists(field, max_size=3))]
    parts = draw(body)
    how = draw(st.sampled_from(["none", "length", "chunked"]))
    content = b""
    if how == "length":
        content = b"".join(parts)
        lines.append(b"Content-Length: %d" % len(content))
    elif how == "chunked" and lines[0].endswith(b"1"):
        content = chunked(parts, draw(st.lists(field, max_size=2)))
        lines.append(b"Transfer-Encoding: chunked")
    return b"\r\n".join((*lines, b"", b"")) + content


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Some requests, with something wrong somewhere, perhaps."""
    data = b"".join(draw(st.lists(messages(), min_size=1, max_size=4)))
    for where, how, what in draw(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 2), st.sampled_from(NASTY)), max_size=3)):
        at = where % (len(data) + 1)
        data = data[:at] + (what if how < 2 else b"") + data[at + (how > 0) :]
    return data


def served(parts: list[bytes]) -> tuple[list[Said], H1Server]:
    """What a server says that answers each request once it is complete."""
    codec = H1Server(b"https", KNOWN, max_head=2000, max_fields=20, max_target=500)
    out: list[Event] = []
    for part in parts:
        events = codec.receive(part)
        while events:
            out += events
            last = events[-1]
            if not isinstance(last, Ended | Refused) and not (isinstance(last, RequestReceived) and last.ended):
                break
            codec.send_head(last.stream, 200, [(b"content-length", b"2")], False)
            codec.send_body(last.stream, b"ok", True)
            assert codec.take()
            events = codec.receive(b"")
    return transcript(out), codec


def settled(events: list[Said]) -> list[Said]:
    """Without what depends on how much of a broken message came at once: its last data, and which of its faults was seen first."""
    if events and events[-1][0] == "refused":
        end = len(events) - 1
        if end and events[end - 1][0] == "body":
            end -= 1
        return [*events[:end], events[-1][:2]]
    return events


@settings(max_examples=500, deadline=None)
@given(streams(), st.lists(st.integers(0, 1 << 30), max_size=8), st.booleans())
def test_cuts_change_nothing(data: bytes, cuts: list[int], all_of_them: bool) -> None:
    whole, codec = served([data])
    cut, same = served(pieces(data, range(len(data)) if all_of_them else cuts))
    assert settled(cut) == settled(whole)
    assert (codec.closing, codec.streams) == (same.closing, same.streams)


# A second reader, which knows only where messages end

HEAD = re.compile(rb"(?:\r\n)*([^ \r\n\0]+) ([^ \r\n\0]+) HTTP/1\.[01]\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)*)\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n\0]*)?\r\n")
TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r\n)*\r\n")


def second_reader(data: bytes) -> list[tuple[bytes, bytes]]:
    """(method, body) of each whole request, up to the first byte that could mean two things."""
    out: list[tuple[bytes, bytes]] = []
    at = 0
    while head := HEAD.match(data, at):
        at = head.end()
        fields = [line.partition(b":") for line in head[3].split(b"\r\n")[:-1]]
        lengths = [text.strip(b" \t") for name, _, text in fields if name.lower() == b"content-length"]
        codings = [text.strip(b" \t").lower() for name, _, text in fields if name.lower() == b"transfer-encoding"]
        content = b""
        if codings:
            if codings != [b"chunked"] or lengths:
                break
            while chunk := CHUNK.match(data, at):
                size = int(chunk[1], 16)
                at = chunk.end()
                if not size:
                    break
                content += data[at : at + size]
                at += size
                if data[at : at + 2] != b"\r\n":
                    return out
                at += 2
            else:
                break
            end = TRAILERS.match(data, at)
            if not end:
                break
            at = end.end()
        elif lengths:
            if len(lengths) > 1 or not re.fullmatch(rb"[0-9]+", lengths[0]) or at + int(lengths[0]) > len(data):
                break
            content = data[at : at + int(lengths[0])]
            at += len(content)
        out.append((head[1], content))
    return out


def complete(events: list[Said]) -> list[tuple[bytes, bytes]]:
    out: list[tuple[bytes, bytes]] = []
    content = b""
    for event in events:
        if event[0] == "request":
            method, content = event[2].split(b" ")[0], b""
            if event[5]:
                out.append((method, b""))
        elif event[0] == "body":
            content += event[2]
        elif event[0] == "end":
            out.append((method, content))
    return out


@settings(max_examples=1000, deadline=None)
@given(streams())
def test_no_other_reader_sees_other_requests(data: bytes) -> None:
    events, _ = served([data])
    read = complete(events)
    assert read == second_reader(data)[: len(read)]


@settings(max_examples=200, deadline=None)
@given(st.lists(messages(), min_size=1, max_size=4))
def test_all_good_requests_are_read(good: list[bytes]) -> None:
    events, codec = served(good)
    assert not any(event[0] == "refused" for event in events)
    count = next((at for at, one in enumerate(good, 1) if one.partition(b"\r\n")[0].endswith(b"HTTP/1.0")), len(good))
    assert complete(events) == [pair for one in good for pair in second_reader(one)][:count]
    assert codec.closing is good[count - 1].partition(b"\r\n")[0].endswith(b"HTTP/1.0")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(NASTY)), max_size=20))
def test_nothing_raises(parts: list[bytes]) -> None:
    codec = H1Server(b"https", KNOWN, max_head=200, max_target=100)
    events = transcript(feed(codec, parts))
    assert sum(event[0] == "refused" for event in events) <= 1
    assert not events or "refused" not in [event[0] for event in events[:-1]]
    codec.eof()
    client = H1Client(KNOWN, max_head=200)
    client.request(RequestHead(b"GET", b"https", b"shop", b"/", [], b"HTTP/1.1", 0), [], b"/", b"shop", True)
    events = transcript(feed(client, [b"HTTP/1.1 200 OK\r\n", *parts]))
    assert not events or "refused" not in [event[0] for event in events[:-1]]
    client.eof()
    assert client.closing


# What one side writes the other one reads


def told(events: list[Event]) -> list[Any]:
    return [event[2:] if event[0] == "body" else event for event in map(said, events)]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"GET", b"POST", b"DELETE", b"BREW"]),
    st.lists(field, max_size=4),
    body,
    st.sampled_from(["none", "length", "chunked"]),
    st.lists(field, max_size=2),
    st.lists(st.integers(0, 5000), max_size=6),
)
def test_what_the_client_writes_the_server_reads_and_back(
    method: bytes, headers: list[tuple[bytes, bytes]], parts: list[bytes], how: str, trailers: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    content = b"".join(parts)
    length = {"none": 0, "length": len(content), "chunked": UNKNOWN_LENGTH}[how]
    client, server = H1Client(KNOWN), H1Server(b"https", KNOWN)
    for number in (1, 2):
        ended = how == "none"
        client.request(RequestHead(method, b"https", b"shop", b"/a?b", [], b"HTTP/2", length), headers, b"/a?b", b"shop", ended)
        if not ended:
            for part in parts:
                client.send_body(number, part, False)
            client.send_trailers(number, trailers)
        events = transcript(feed(server, pieces(client.take(), cuts)))
        extra = [(b"content-length", b"%d" % length)] if how == "length" or (ended and method == b"POST") else []
        expected: list[Said] = [("request", number, method + b" shop /a?b HTTP/1.1")]
        assert events[0][:3] == expected[0]
        assert sorted(events[0][3]) == sorted([*headers, *extra])
        assert events[0][4] == (0 if how == "length" and not content else length)
        kept = tuple(trailers) if how == "chunked" and trailers else None
        body_events: list[Said] = [("body", number, content)] if content and not ended else []
        assert events[1:] == [*body_events, *([] if events[0][5] else [("end", number, kept)])]

        sized = [(b"content-length", b"%d" % len(content))] if how == "length" else []
        server.send_informational(number, 103, headers)
        server.send_head(number, 200, [*headers, *sized], False)
        for part in parts:
            server.send_body(number, part, False)
        server.send_trailers(number, trailers)
        answer = transcript(feed(client, pieces(server.take(), cuts)))
        assert answer[0] == ("informational", number, 103, tuple(headers))
        assert answer[1] == (
            "response",
            number,
            200,
            (*headers, *sized),
            b"HTTP/1.1",
            len(content) if sized else -1,
            (sized and not content) or False,
        )
        kept = tuple(trailers) if not sized and trailers else None
        body_events = [("body", number, content)] if content else []
        assert answer[2:] == [*body_events, *([] if answer[1][6] else [("end", number, kept)])]
        assert (client.available, server.streams, client.closing, server.closing) == (1, 0, False, False)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=4), st.sampled_from([200, 404, 204]))
def test_no_header_of_an_answer_makes_two_answers(headers: list[tuple[bytes, bytes]], status: int) -> None:
    server = H1Server(b"https", KNOWN)
    server.receive(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")
    try:
        server.send_head(1, status, headers, True)
    except ValueError:
        assert server.take() == b""
        return
    written = server.take()
    assert written.count(b"\r\n\r\n") == 1
    assert written.endswith(b"\r\n\r\n")
    framing = int(not any(name == b"content-length" for name, _ in headers) and status != 204)
    assert written.count(b"\r\n") == 2 + len(headers) + framing


def test_what_is_taken_off_is_what_frames() -> None:
    assert {b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"keep-alive"} <= SPECIAL
    assert CLIENT_SPECIAL < SPECIAL
    assert SPECIAL - {b"host", b"expect"} <= NOT_IN_TRAILERS

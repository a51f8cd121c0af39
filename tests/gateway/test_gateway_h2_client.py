"""HTTP/2 towards upstreams: orders in, frames out; frames in, events out."""

from __future__ import annotations

from typing import Any

import pytest
from codec_h2_world import OK, Peer, data, goaway, raw, rst, settings
from codec_world import head, transcript

from gateway.codec.h2_client import MAX_INFORMATIONAL, MAX_STREAMS, H2Client
from mesh.http import UNKNOWN_LENGTH


def world(**limits: int) -> tuple[H2Client, Peer]:
    codec = H2Client(**limits)
    return codec, Peer(codec, client=False)


def ask(codec: H2Client, method: bytes = b"GET", *, ended: bool = True, length: int = UNKNOWN_LENGTH) -> int:
    return codec.request(head(method, body_length=0 if ended else length), [], b"/", b"shop", ended)


def response(status: int, *fields: tuple[bytes, bytes], length: int = -1, ended: bool = False) -> tuple[Any, ...]:
    return ("response", 1, status, fields, b"HTTP/2", length, ended)


def test_a_request() -> None:
    codec, peer = world()
    headers = [(b"a", b"b"), (b"authorization", b"Bearer x"), (b"cookie", b"y"), (b"cookie", b"z" * 20)]
    assert codec.request(head(b"POST", body_length=3), headers, b"/x?y", b"shop:80", False) == 1
    codec.send_body(1, b"ab", False)
    codec.send_body(1, b"c", False)
    codec.send_trailers(1, [(b"x-sum", b"1")])
    codec.send_body(1, b"late", True)
    start = ((b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"shop:80"), (b":path", b"/x?y"))
    assert peer.wrote() == [
        ("headers", 1, (*start, *headers, (b"content-length", b"3")), False),
        ("data", 1, b"ab", False),
        ("data", 1, b"c", False),
        ("headers", 1, ((b"x-sum", b"1"),), True),
    ]
    table = codec._encoder._entries
    assert (b"a", b"b") in table
    assert (b"cookie", b"z" * 20) in table
    assert not any(value in (b"Bearer x", b"y") for _, value in table)


@pytest.mark.parametrize("bad", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_nothing_splits_a_request(bad: bytes) -> None:
    codec, peer = world()
    for method, headers, target, authority in (
        (b"GET", [(b"a", bad)], b"/", b"shop"),
        (b"GET", [], b"/" + bad, b"shop"),
        (b"GET", [], b"/", bad),
        (bad, [], b"/", b"shop"),
        (b"GET", [], b"/ HTTP/1.1", b"shop"),
        (b"GET", [], b"/", b"shop evil"),
    ):
        with pytest.raises(ValueError, match=r"control character|white space"):
            codec.request(head(method), headers, target, authority, True)
    assert (peer.wrote(), codec.streams) == ([], 0)
    assert ask(codec) == 1


READ = {
    "a body": (
        [(*OK, (b"content-length", b"2"))],
        data(1, b"o") + data(1, b"k", ended=True),
        [response(200, (b"content-length", b"2"), length=2), ("body", 1, b"ok"), ("end", 1, None)],
    ),
    "a body without a length": (
        [(*OK, (b"a", b"b"))],
        data(1, b"ok", padding=5) + data(1, ended=True),
        [response(200, (b"a", b"b")), ("body", 1, b"ok"), ("end", 1, None)],
    ),
    "informational answers first": (
        [((b":status", b"100"),), ((b":status", b"103"), (b"link", b"a")), OK],
        data(1, b"ok", ended=True),
        [("informational", 1, 100, ()), ("informational", 1, 103, ((b"link", b"a"),)), response(200), ("body", 1, b"ok"), ("end", 1, None)],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_reads(case: str) -> None:
    heads, body, events = READ[case]
    sent = b"".join
    for size in (1, 10_000):
        codec, peer = world()
        ask(codec)
        whole = sent([peer.head(1, fields, ended=False) for fields in heads]) + body
        parts = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert transcript(event for part in parts for event in codec.receive(part)) == events
        assert (codec.streams, codec.closing) == (0, False)


def test_trailers() -> None:
    codec, peer = world()
    ask(codec)
    trailers = [(b"grpc-status", b"0"), (b"set-cookie", b"a"), (b"content-length", b"9")]
    events = transcript(codec.receive(peer.head(1, OK, ended=False) + data(1, b"ok") + peer.head(1, trailers)))
    assert events == [response(200), ("body", 1, b"ok"), ("end", 1, ((b"grpc-status", b"0"),))]
    assert codec.streams == 0


@pytest.mark.parametrize(
    ("method", "fields", "ended"),
    [
        (b"HEAD", (*OK, (b"content-length", b"1000")), True),
        (b"HEAD", (*OK, (b"content-length", b"1000")), False),
        (b"GET", ((b":status", b"304"), (b"content-length", b"1000")), True),
        (b"GET", ((b":status", b"304"), (b"content-length", b"1000")), False),
        (b"GET", ((b":status", b"204"),), False),
    ],
)
def test_answers_without_a_body(method: bytes, fields: tuple[tuple[bytes, bytes], ...], ended: bool) -> None:
    codec, peer = world()
    ask(codec, method)
    events = transcript(codec.receive(peer.head(1, fields, ended=ended) + (b"" if ended else data(1, ended=True))))
    assert events[0][5:] == (0, ended)
    assert events[1:] == ([] if ended else [("end", 1, None)])
    assert codec.streams == 0


MALFORMED = {
    "no status": ((b"a", b"b"),),
    "a status of two digits": ((b":status", b"20"),),
    "a status that is no number": ((b":status", b"abc"),),
    "a status beyond 599": ((b":status", b"600"),),
    "a status below 100": ((b":status", b"099"),),
    "two statuses": (*OK, *OK),
    "a status after a field": ((b"a", b"b"), *OK),
    "an upgrade": ((b":status", b"101"),),
    "a path in an answer": (*OK, (b":path", b"/")),
    "upper case": (*OK, (b"A", b"b")),
    "CR LF": (*OK, (b"a", b"b\r\nc: d")),
    "NUL": (*OK, (b"a", b"\0")),
    "connection": (*OK, (b"connection", b"close")),
    "transfer-encoding": (*OK, (b"transfer-encoding", b"chunked")),
    "two lengths": (*OK, (b"content-length", b"1"), (b"content-length", b"1")),
    "a length that is none": (*OK, (b"content-length", b"-1")),
    "a head that is too large": (*OK, (b"a", b"b" * 1001)),
    "too many fields": (*OK, *[(b"a", b"b")] * 11),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_answer_costs_its_stream(case: str) -> None:
    codec, peer = world(max_head=1000, max_fields=10)
    ask(codec)
    ask(codec)
    peer.wrote()
    assert transcript(codec.receive(peer.head(1, MALFORMED[case], ended=False))) == [("refused", 1, 502)]
    assert peer.wrote() == [("rst", 1, 1)]
    assert codec.receive(data(1, b"late", ended=True)) == []
    assert [event[:3] for event in transcript(codec.receive(peer.head(3, OK)))] == [("response", 3, 200)]
    assert (codec.streams, codec.closing) == (0, False)


BODIES = {
    "longer": ((b"content-length", b"2"), data(1, b"abc"), b"GET", b"200"),
    "longer, in pieces": ((b"content-length", b"2"), data(1, b"ab") + data(1, b"c"), b"GET", b"200"),
    "shorter": ((b"content-length", b"2"), data(1, b"a", ended=True), b"GET", b"200"),
    "none": ((b"content-length", b"2"), data(1, ended=True), b"GET", b"200"),
    "to HEAD": ((b"content-length", b"2"), data(1, b"ab", ended=True), b"HEAD", b"200"),
    "of 204": ((b"a", b"b"), data(1, b"ab", ended=True), b"GET", b"204"),
    "of 304": ((b"content-length", b"2"), data(1, b"ab", ended=True), b"GET", b"304"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_of_another_length_costs_its_stream(case: str) -> None:
    field, sent, method, status = BODIES[case]
    codec, peer = world()
    ask(codec, method)
    ask(codec)
    events = transcript(codec.receive(peer.head(1, ((b":status", status), field), ended=False) + sent))
    assert events[0][0] == "response"
    assert events[-1] == ("refused", 1, 502)
    assert not any(event[0] == "end" for event in events)
    assert [event[:2] for event in transcript(codec.receive(peer.head(3, OK)))] == [("response", 3)]


def test_a_length_and_no_body() -> None:
    codec, peer = world()
    ask(codec)
    assert transcript(codec.receive(peer.head(1, (*OK, (b"content-length", b"2"))))) == [("refused", 1, 502)]


def test_there_are_only_so_many_informational_answers() -> None:
    codec, peer = world()
    ask(codec)
    early = peer.head(1, ((b":status", b"103"),), ended=False)
    assert len(codec.receive(early * MAX_INFORMATIONAL)) == MAX_INFORMATIONAL
    assert transcript(codec.receive(early)) == [("refused", 1, 502)]
    assert (codec.streams, codec.closing) == (0, False)


# Ends


def test_goaway_lets_what_was_taken_be_answered() -> None:
    codec, peer = world()
    for _ in range(3):
        ask(codec)
    assert codec.available == MAX_STREAMS - 3
    assert transcript(codec.receive(goaway(3))) == [("goaway", 3), ("reset", 5, 7, True)]
    assert (codec.available, codec.streams, codec.closing) == (0, 2, False)
    with pytest.raises(ValueError, match="no more"):
        ask(codec)
    assert codec.receive(peer.head(5, OK)) == []
    codec.receive(peer.head(1, OK))
    assert not codec.closing
    events = codec.receive(peer.head(3, OK, ended=False) + data(3, b"x", ended=True) + goaway(3))
    assert [event[0] for event in transcript(events)] == ["response", "body", "end", "goaway"]
    assert codec.closing


def test_a_first_goaway_that_names_no_stream_ends_nothing() -> None:
    codec, _ = world()
    ask(codec)
    assert transcript(codec.receive(goaway(2**31 - 1))) == [("goaway", 2**31 - 1)]
    assert (codec.streams, codec.available) == (1, 0)
    assert transcript(codec.receive(goaway(0))) == [("goaway", 0), ("reset", 1, 7, True)]
    assert codec.closing


@pytest.mark.parametrize(("code", "unprocessed"), [(7, True), (8, False), (2, False), (0, False)])
def test_an_upstream_that_resets(code: int, unprocessed: bool) -> None:
    codec, peer = world()
    ask(codec)
    assert transcript(codec.receive(rst(1, code))) == [("reset", 1, code, unprocessed)]
    assert codec.streams == 0
    assert codec.receive(peer.head(1, OK) if code == 99 else b"") == []


def test_an_upstream_that_resets_after_its_answer_did_not_want_the_rest() -> None:
    codec, peer = world()
    ask(codec, b"POST", ended=False)
    events = transcript(codec.receive(peer.head(1, OK, ended=False) + data(1, b"ok", ended=True) + rst(1, 0)))
    assert [event[0] for event in events] == ["response", "body", "end"]
    assert codec.streams == 0
    peer.wrote()
    codec.send_body(1, b"more", True)
    assert peer.wrote() == []


def test_we_reset() -> None:
    codec, peer = world()
    ask(codec)
    peer.wrote()
    codec.reset(1, 8)
    codec.reset(1, 8)
    assert peer.wrote() == [("rst", 1, 8)]
    # What was under way is nobody's, and the compression goes on.
    assert codec.receive(peer.head(1, (*OK, (b"new", b"field")), ended=False) + data(1, b"x")) == []
    ask(codec)
    assert transcript(codec.receive(peer.head(3, (*OK, (b"new", b"field")))))[0][3] == ((b"new", b"field"),)


def test_an_upstream_that_goes() -> None:
    codec, peer = world()
    ask(codec)
    codec.receive(peer.head(1, OK, ended=False) + data(1, b"x"))
    assert transcript(codec.eof()) == [("reset", 1, 8, False)]
    assert (codec.closing, codec.available) == (True, 0)


def test_as_many_streams_as_the_upstream_wants() -> None:
    codec, peer = world()
    codec.receive(settings((3, 2)))
    assert codec.available == 2
    ask(codec)
    ask(codec)
    assert codec.available == 0
    with pytest.raises(ValueError, match="no more"):
        ask(codec)
    codec.receive(peer.head(1, OK))
    assert codec.available == 1
    codec.receive(settings((3, 0)))
    assert codec.available == 0
    codec.receive(settings((3, 2**32 - 1)))
    assert codec.available == MAX_STREAMS - 1


BREACHES = {
    "HTTP/1.1": lambda peer: b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a push": lambda peer: raw(5, 4, 1, b"\0\0\0\2\x82"),
    "an answer that nobody asked for": lambda peer: peer.head(3, OK),
    "a request": lambda peer: peer.head(2, [(b":method", b"GET")]),
    "a push, in a frame that is not whole": lambda peer: raw(5, 0, 1, b""),
    "settings that say that pushes are taken": lambda peer: settings((2, 1)),
    "data on a stream that nobody has begun": lambda peer: data(3, b"x"),
    "data on a stream of the upstream's": lambda peer: data(2, b"x"),
    "a head after the end": lambda peer: peer.head(1, OK) + peer.head(1, OK),
    "a whole extended CONNECT that is taken back": lambda peer: settings((8, 1)) + settings((8, 0)),
}


@pytest.mark.parametrize("early", [True, False])
def test_an_answer_out_of_order_costs_its_stream(early: bool) -> None:
    codec, peer = world()
    ask(codec)
    ask(codec)
    peer.wrote()
    sent = data(1, b"x") if early else peer.head(1, ((b":status", b"103"),))
    assert transcript(codec.receive(sent)) == [("refused", 1, 502)]
    assert peer.wrote() == [("rst", 1, 1)]
    assert codec.receive(data(1, b"late")) == []
    assert [event[:3] for event in transcript(codec.receive(peer.head(3, OK)))] == [("response", 3, 200)]


@pytest.mark.parametrize("case", BREACHES)
def test_a_breach_ends_the_connection(case: str) -> None:
    codec, peer = world()
    ask(codec)
    assert transcript(codec.receive(BREACHES[case](peer)))[-1] == ("refused", 0, 502)
    assert (codec.closing, codec.streams, codec.available) == (True, 0, 0)

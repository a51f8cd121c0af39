"""HTTP/2 towards clients: frames in, events out; orders in, frames out."""

from __future__ import annotations

from typing import Any

import pytest
from codec_h2_world import GET, POST, Peer, data, raw, rst, settings
from codec_world import transcript

from gateway.codec.h2_server import H2Server


def world(**limits: int) -> tuple[H2Server, Peer]:
    codec = H2Server(b"https", **limits)
    return codec, Peer(codec)


def asked(codec: H2Server, peer: Peer, number: int = 1, *, ended: bool = True) -> None:
    """A request that has come."""
    (event, *_) = codec.receive(peer.head(number, GET if ended else POST, ended=ended))
    assert transcript([event])[0][0] == "request"


def request(line: bytes, *fields: tuple[bytes, bytes], length: int = 0, ended: bool = True, expects: bool = False) -> tuple[Any, ...]:
    return ("request", 1, line + b" HTTP/2", fields, length, ended, expects)


METHOD, SCHEME, AUTHORITY, PATH = GET
READ = {
    "the least that there can be": (GET, request(b"GET shop /")),
    "in another order": ((PATH, AUTHORITY, METHOD, SCHEME), request(b"GET shop /")),
    "the authority in lower case": ((METHOD, SCHEME, (b":authority", b"SHOP:1"), PATH), request(b"GET shop:1 /")),
    "only a host": ((METHOD, SCHEME, PATH, (b"host", b"Shop")), request(b"GET shop /")),
    "a host that is the authority": ((*GET, (b"host", b"SHOP")), request(b"GET shop /")),
    "the scheme is the connection's": ((METHOD, (b":scheme", b"ftp"), AUTHORITY, PATH), request(b"GET shop /")),
    "asterisk form": (((b":method", b"OPTIONS"), SCHEME, AUTHORITY, (b":path", b"*")), request(b"OPTIONS shop *")),
    "cookies in one": (
        (*GET, (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")),
        request(b"GET shop /", (b"x", b"y"), (b"cookie", b"a=1; b=2")),
    ),
    "te: trailers": ((*GET, (b"te", b"trailers")), request(b"GET shop /", (b"te", b"trailers"))),
    "expect": ((*GET, (b"expect", b"100-Continue")), request(b"GET shop /", expects=True)),
    "a length of 0": ((*GET, (b"content-length", b"0")), request(b"GET shop /", (b"content-length", b"0"))),
    "values beyond ASCII": ((*GET, (b"a", b"\xff")), request(b"GET shop /", (b"a", b"\xff"))),
}


@pytest.mark.parametrize("case", READ)
def test_reads(case: str) -> None:
    fields, event = READ[case]
    codec, peer = world()
    assert transcript(codec.receive(peer.head(1, fields))) == [event]


PROTOCOL = 1
MALFORMED = {
    "no method": (SCHEME, AUTHORITY, PATH),
    "no scheme": (METHOD, AUTHORITY, PATH),
    "no path": (METHOD, SCHEME, AUTHORITY),
    "no authority": (METHOD, SCHEME, PATH),
    "an empty authority": (METHOD, SCHEME, (b":authority", b""), PATH),
    "an empty path": (METHOD, SCHEME, AUTHORITY, (b":path", b"")),
    "an empty method": ((b":method", b""), SCHEME, AUTHORITY, PATH),
    "a method with a space": ((b":method", b"GET /x HTTP/1.1"), SCHEME, AUTHORITY, PATH),
    "two methods": (METHOD, METHOD, SCHEME, AUTHORITY, PATH),
    "two paths": (*GET, PATH),
    "two authorities": (*GET, AUTHORITY),
    "a pseudo-header after a field": (METHOD, SCHEME, AUTHORITY, (b"a", b"b"), PATH),
    "an unknown pseudo-header": (*GET, (b":admin", b"1")),
    "a status in a request": (*GET, (b":status", b"200")),
    "a path with a space": (METHOD, SCHEME, AUTHORITY, (b":path", b"/ HTTP/1.1")),
    "a path that splits": (METHOD, SCHEME, AUTHORITY, (b":path", b"/\r\nx: y")),
    "an authority that splits": (METHOD, SCHEME, (b":authority", b"a\r\nx: y"), PATH),
    "an authority with a NUL": (METHOD, SCHEME, (b":authority", b"a\0"), PATH),
    "another host": (*GET, (b"host", b"evil")),
    "two hosts": (*GET, (b"host", b"shop"), (b"host", b"shop")),
    "a name in upper case": (*GET, (b"X-A", b"b")),
    "a name with a space": (*GET, (b"a b", b"c")),
    "a name with a colon": (*GET, (b"a:b", b"c")),
    "a name with a line break": (*GET, (b"a\r\nb", b"c")),
    "an empty name": (*GET, (b"", b"c")),
    "a name beyond ASCII": (*GET, (b"\xc3\xa9", b"c")),
    "a value with CR LF": (*GET, (b"a", b"b\r\nc: d")),
    "a value with LF": (*GET, (b"a", b"b\nc")),
    "a value with CR": (*GET, (b"a", b"b\rc")),
    "a value with NUL": (*GET, (b"a", b"b\0")),
    "white space before a value": (*GET, (b"a", b" b")),
    "white space after a value": (*GET, (b"a", b"b\t")),
    "connection": (*GET, (b"connection", b"close")),
    "transfer-encoding": (*GET, (b"transfer-encoding", b"chunked")),
    "keep-alive": (*GET, (b"keep-alive", b"timeout=5")),
    "proxy-connection": (*GET, (b"proxy-connection", b"close")),
    "upgrade": (*GET, (b"upgrade", b"h2c")),
    "te": (*GET, (b"te", b"gzip")),
    "te, and more": (*GET, (b"te", b"trailers, gzip")),
    "a length without a body": (*GET, (b"content-length", b"5")),
    "a length that is none": (*GET, (b"content-length", b"+0")),
    "an empty length": (*GET, (b"content-length", b"")),
    "two lengths": (*GET, (b"content-length", b"0"), (b"content-length", b"0")),
    "a list of lengths": (*GET, (b"content-length", b"0, 0")),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_costs_its_stream(case: str) -> None:
    codec, peer = world()
    events = transcript(codec.receive(peer.head(1, MALFORMED[case]) + peer.head(3, GET)))
    assert events[0] == ("refused", 1, 400)
    assert [event[:2] for event in events[1:]] == [("request", 3)]
    assert peer.wrote() == [("rst", 1, PROTOCOL)]
    codec.send_head(1, 400, [], True)  # nobody would read it
    codec.send_body(1, b"x", True)
    assert peer.wrote() == []
    assert not codec.closing


REFUSED = {
    "extended CONNECT": (405, ((b":method", b"CONNECT"), (b":protocol", b"websocket"), SCHEME, AUTHORITY, PATH)),
    "an expectation": (417, (*GET, (b"expect", b"200-ok"))),
    "a long target": (414, (METHOD, SCHEME, AUTHORITY, (b":path", b"/" + b"a" * 500))),
    "many fields": (431, (*GET, *[(b"a", b"b")] * 11)),
    "a large head": (431, (*GET, (b"a", b"b" * 1000))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_is_answered(case: str) -> None:
    status, fields = REFUSED[case]
    codec, peer = world(max_head=1000, max_fields=10, max_target=500)
    assert transcript(codec.receive(peer.head(1, fields, ended=False))) == [("refused", 1, status)]
    # What else it sends is thrown away, without a word and without keeping the window.
    assert codec.receive(data(1, b"x" * 100) + data(1, b"y")) == []
    assert transcript(codec.receive(peer.head(1, [(b"x-sum", b"1")]))) == []
    codec.send_head(1, status, [(b"content-length", b"2")], False)
    codec.send_body(1, b"no", True)
    assert peer.wrote() == [
        ("headers", 1, ((b":status", b"%d" % status), (b"content-length", b"2")), False),
        ("data", 1, b"no", True),
    ]
    assert (codec.streams, codec.closing) == (0, False)
    asked(codec, peer, 3)


def test_a_refused_request_that_goes_on_is_asked_to_stop() -> None:
    codec, peer = world(max_head=1000)
    codec.receive(peer.head(1, (*POST, (b"a", b"b" * 1000)), ended=False))
    codec.send_head(1, 431, [], True)
    assert peer.wrote()[-1] == ("rst", 1, 0)
    assert codec.streams == 0


def test_the_answer_to_a_refused_request_may_be_given_up_as_well() -> None:
    codec, peer = world(max_head=1000)
    codec.receive(settings((4, 0)) + peer.head(1, (*GET, (b"a", b"b" * 1000))))
    codec.send_head(1, 431, [], False)
    codec.send_body(1, b"no", True)
    assert transcript(codec.receive(rst(1))) == [("reset", 1, 8, False)]
    assert codec.streams == 0


def test_data_that_was_under_way_when_a_request_was_answered_is_no_flood() -> None:
    codec, peer = world()
    asked(codec, peer, ended=False)
    codec.send_head(1, 413, [], True)
    for _ in range(2000):
        assert codec.receive(data(1, b"x" * 1000)) == []
        codec.take()
    asked(codec, peer, 3)


@pytest.mark.parametrize(("size", "fine"), [(1000, True), (1001, False)])
def test_the_size_of_a_head(size: int, fine: bool) -> None:
    codec, peer = world(max_head=1000)
    rest = size - sum(len(name) + len(value) for name, value in GET) - 1
    (event,) = transcript(codec.receive(peer.head(1, (*GET, (b"a", b"b" * rest)))))
    assert event[0] == ("request" if fine else "refused")


def test_a_head_that_is_small_only_while_it_is_compressed() -> None:
    codec, peer = world()
    codec.receive(peer.head(1, (*GET, (b"a", b"b" * 3900))))
    codec.send_head(1, 200, [], True)
    block = peer.encoder.encode(list(GET))
    (event,) = transcript(codec.receive(raw(1, 5, 3, block + b"\xbe" * 16000)))  # 62 MB of fields, by their index
    assert event == ("refused", 3, 431)
    codec.send_head(3, 431, [], True)
    asked(codec, peer, 5)


def test_trailers_that_are_small_only_while_they_are_compressed() -> None:
    codec, peer = world()
    codec.receive(peer.head(1, (*POST, (b"a", b"b" * 3900)), ended=False))
    assert transcript(codec.receive(raw(1, 5, 1, b"\xbe" * 16000))) == [("refused", 1, 400)]
    asked(codec, peer, 3)


# Bodies


def test_a_body_with_padding_and_trailers() -> None:
    codec, peer = world()
    sent = peer.head(1, (*POST, (b"content-length", b"5")), ended=False)
    sent += data(1, b"ab", padding=7) + data(1, b"") + data(1, b"cde") + peer.head(1, [(b"x-sum", b"1"), (b"authorization", b"me")])
    events = codec.receive(sent)
    assert transcript(events)[1:] == [("body", 1, b"abcde"), ("end", 1, ((b"x-sum", b"1"),))]
    assert [event.credit for event in events if hasattr(event, "credit")] == [13]


def test_small_frames_of_a_body_that_come_together_are_told_together() -> None:
    codec, peer = world()
    codec.receive(peer.head(1, POST, ended=False) + peer.head(3, POST, ended=False))
    first = codec.receive(data(1, b"a" * 100) + data(1, b"b" * 100) + data(3, b"c" * 100) + data(1, b"d" * 100))
    assert [(event.stream, event.data[:1], len(event.data), event.credit) for event in first] == [  # type: ignore[attr-defined]
        (1, b"a", 200, 200),
        (3, b"c", 100, 100),
        (1, b"d", 100, 100),
    ]
    large = codec.receive(data(1, b"e" * 5000) + data(1, b"f" * 5000))
    assert [len(event.data) for event in large] == [5000, 5000]  # type: ignore[attr-defined]


LENGTHS = {
    "longer": (data(1, b"123456"), b""),
    "longer, in pieces": (data(1, b"12345") + data(1, b"6"), b"12345"),
    "shorter": (data(1, b"1234", ended=True), b"1234"),
    "none": (data(1, b"", ended=True), b""),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_a_body_of_another_length_costs_its_stream(case: str) -> None:
    sent, before = LENGTHS[case]
    codec, peer = world()
    events = transcript(codec.receive(peer.head(1, (*POST, (b"content-length", b"5")), ended=False) + sent))
    assert events[1:] == ([("body", 1, before)] if before else []) + [("refused", 1, 400)]
    assert peer.wrote() == [("rst", 1, PROTOCOL)]
    assert codec.receive(data(1, b"more")) == []
    asked(codec, peer, 3)


def test_trailers_do_not_make_up_for_a_short_body() -> None:
    codec, peer = world()
    codec.receive(peer.head(1, (*POST, (b"content-length", b"5")), ended=False) + data(1, b"123"))
    assert transcript(codec.receive(peer.head(1, [(b"content-length", b"3"), (b"a", b"b")]))) == [("refused", 1, 400)]
    assert peer.wrote() == [("rst", 1, PROTOCOL)]


@pytest.mark.parametrize(
    "trailers",
    [
        [(b":path", b"/x")],
        [(b"A", b"b")],
        [(b"a", b"b\r\nc: d")],
        [(b"connection", b"close")],
        [(b"a", b"b")] * 101,
        [(b"a", b"b" * 2000)] * 9,
    ],
)
def test_malformed_trailers_cost_their_stream(trailers: list[tuple[bytes, bytes]]) -> None:
    codec, peer = world()
    asked(codec, peer, ended=False)
    assert transcript(codec.receive(peer.head(1, trailers))) == [("refused", 1, 400)]
    assert peer.wrote() == [("rst", 1, PROTOCOL)]


# Answers


def test_an_answer() -> None:
    codec, peer = world()
    asked(codec, peer)
    codec.send_informational(1, 103, [(b"link", b"a")])
    codec.send_head(1, 200, [(b"a", b"b"), (b"connection", b"close"), (b"transfer-encoding", b"chunked")], False)
    codec.send_informational(1, 103, [])
    codec.send_head(1, 500, [], True)
    codec.send_body(1, b"hello", False)
    codec.send_trailers(1, [(b"x-sum", b"1")])
    codec.send_body(1, b"late", True)
    codec.send_trailers(1, [(b"late", b"1")])
    assert peer.wrote() == [
        ("headers", 1, ((b":status", b"103"), (b"link", b"a")), False),
        ("headers", 1, ((b":status", b"200"), (b"a", b"b")), False),
        ("data", 1, b"hello", False),
        ("headers", 1, ((b"x-sum", b"1"),), True),
    ]
    assert codec.streams == 0


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"GET", 204), (b"GET", 304)])
def test_an_answer_without_a_body(method: bytes, status: int) -> None:
    codec, peer = world()
    codec.receive(peer.head(1, ((b":method", method), *GET[1:])))
    codec.send_head(1, status, [(b"a", b"b")], False)
    codec.send_body(1, b"no", False)
    codec.send_trailers(1, [(b"x", b"y")])
    assert peer.wrote() == [("headers", 1, ((b":status", b"%d" % status), (b"a", b"b")), False), ("data", 1, b"", True)]


def test_an_answer_before_all_of_the_request_asks_it_to_stop() -> None:
    codec, peer = world()
    asked(codec, peer, ended=False)
    codec.send_head(1, 413, [], True)
    assert peer.wrote() == [("headers", 1, ((b":status", b"413"),), True), ("rst", 1, 0)]
    assert codec.streams == 0
    assert codec.receive(data(1, b"still on its way")) == []
    asked(codec, peer, 3)


@pytest.mark.parametrize("value", [b"a\r\nb", b"a\nb", b"\0"])
def test_no_value_splits_an_answer(value: bytes) -> None:
    codec, peer = world()
    asked(codec, peer)
    with pytest.raises(ValueError, match="control character"):
        codec.send_head(1, 200, [(b"a", value)], True)
    with pytest.raises(ValueError, match="control character"):
        codec.send_informational(1, 103, [(b"a", value)])
    codec.send_head(1, 200, [], False)
    with pytest.raises(ValueError, match="control character"):
        codec.send_trailers(1, [(b"a", value)])
    codec.send_body(1, b"", True)
    assert [frame[0] for frame in peer.wrote()] == ["headers", "data"]


def test_orders_for_streams_that_are_not_there_are_not_followed() -> None:
    codec, peer = world()
    for number in (0, 1, 2, 77):
        codec.send_informational(number, 103, [])
        codec.send_head(number, 200, [], True)
        codec.send_body(number, b"x", True)
        codec.send_trailers(number, [(b"a", b"b")])
        codec.reset(number, 8)
        codec.consumed(number, 100)
        assert codec.window(number) == 0
    assert peer.wrote() == []


@pytest.mark.parametrize("trailers", [False, True])
def test_a_body_without_a_head_is_a_reset(trailers: bool) -> None:
    codec, peer = world()
    asked(codec, peer)
    if trailers:
        codec.send_trailers(1, [(b"a", b"b")])
    else:
        codec.send_body(1, b"x", True)
    assert peer.wrote() == [("rst", 1, 2)]
    assert codec.streams == 0


def test_we_reset() -> None:
    codec, peer = world()
    asked(codec, peer)
    codec.reset(1, 8)
    codec.reset(1, 8)
    assert peer.wrote() == [("rst", 1, 8)]
    codec.send_head(1, 200, [], True)
    assert (peer.wrote(), codec.streams) == ([], 0)


@pytest.mark.parametrize("code", [0, 8])
def test_a_client_that_resets_is_heard(code: int) -> None:
    codec, peer = world()
    asked(codec, peer)
    assert transcript(codec.receive(rst(1, code))) == [("reset", 1, code, False)]
    assert codec.streams == 0


def test_a_client_that_goes() -> None:
    codec, peer = world()
    asked(codec, peer, 1)
    asked(codec, peer, 3, ended=False)
    assert transcript(codec.eof()) == [("reset", 1, 8, False), ("reset", 3, 8, False)]
    assert (codec.closing, codec.streams) == (True, 0)
    assert codec.receive(peer.head(5, GET)) == []

"""HTTP/2 beside the `h2` library: the same frames to both, and the same events, or a refusal of the same class.

Where the two differ on purpose, `STRICTER` and `OTHERWISE` say so with the text that allows it. `h2` ends the connection for a malformed
message, where RFC 9113 section 8.1.1 has a stream error: what is compared is the code.
"""

from __future__ import annotations

import operator
import os
from typing import Any

from codec_h2_world import GET, OK, POST, PREFACE, Peer, data, ping, raw, rst, window
from codec_h2_world import settings as settings_frame
from codec_world import head
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes
from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.codec import events as ev
from gateway.codec.h1 import NOT_IN_TRAILERS
from gateway.codec.h2 import CONNECTION_WINDOW, STREAM_WINDOW
from gateway.codec.h2_client import H2Client
from gateway.codec.h2_server import H2Server

Said = tuple[Any, ...]

FUZZ = os.environ.get("TOLLHOUSE_FUZZ", "")
"""How many conversations to try, new ones each time; without it always the same thousand: what two codecs differ in is found by looking
for it, not by a run of the tests that happens on it."""
EXAMPLES = int(FUZZ or 1000)

STRICTER = {
    "a first frame that is not SETTINGS": "9113/3.4: that each side's preface is, or begins with, SETTINGS that are no acknowledgement",
    "a header value with a control character": "9110/5.5: CR, LF and NUL are invalid, other control characters may be refused",
    "which HTTP2 does not have": "9113/8.2.1: names are tokens in lower case",
    "a pseudo-header with a control character or white space": "9113/8.3.1: :path and :authority are what RFC 3986 lets them be",
    "no method, or one that is not a token": "9110/9.1",
    "a Content-Length that is not one number": "9110/8.6: a list, or one that is repeated, is refused",
    "more than one Host": "9110/7.2",
    "a Host that is not the authority": "9113/8.3.1",
    "CONNECT": "9110/9.3.6: answered with 405, as is one for a protocol that is not served",
    "expectation": "9110/10.1.1: 417",
    "a Content-Length, and no body": "9113/8.1.1",
    "a protocol, and a method that is not CONNECT": "8441/4: :protocol is for CONNECT",
    "status ": "9110/15: a status is 100 to 599, and 101 is not of HTTP/2 (9113/8.6)",
    "an answer without a status": "9113/8.3.2",
    "no authority": "9110/7.2: a request says whom it is for",
    "a body longer than its head says": "9113/8.1.1, which `h2` forgets once trailers have come",
    "a body shorter than its head says": "9113/8.1.1",
    "which is unknown or there twice": "9113/8.3",
    "a TE field that is not `trailers`": "9113/8.2.2",
    "trailers that do not end their stream": "9113/8.1",
    "a setting for extended CONNECT": "8441/3: it is not taken back",
    "a server that says that it takes pushes": "9113/6.5.2",
    "a stream that depends on itself": "7540/5.3.1",
    "a window update of nothing": "9113/6.9",
    "a frame on a stream that has not begun": "9113/5.1, 6.4 and 6.9",
    "a push, which nobody asked for": "9113/8.4: whatever is in it",
    "a window that grows beyond its bounds": "9113/6.9: the reserved bit is no part of the increment",
    "a frame on a stream that is over": "9113/5.1: STREAM_CLOSED",
    "a head on a stream that is over": "9113/5.1: STREAM_CLOSED",
    "a head after the end of its stream": "9113/5.1: STREAM_CLOSED",
    "padding as long as its frame": "9113/6.1 and 6.2: PROTOCOL_ERROR",
    "of the wrong size": "9113/6: FRAME_SIZE_ERROR",
    "the continuation of no head": "9113/6.10: PROTOCOL_ERROR",
    "a head without the priority that it says it has": "9113/6.2: FRAME_SIZE_ERROR",
    "a padded frame without its length": "9113/4.2",
}
"""What we refuse and the library takes: part of the reason that we give, and why."""

OTHERWISE = {
    "content-length header": "9110/8.6: no 1xx answer has one, and it is taken off; of others `MALFORMED` tests the same",
    "in state ConnectionState.CLOSED": "9113/6.8: a GOAWAY ends nothing that is in progress",
    "invalid padding": "9113/6.1 and 6.2: a payload may be its padding and nothing else",
    "non-compliant data": "9113/6.9: the reserved bit of a window update is ignored, and one of nothing for a stream that is over",
}
"""What the library refuses and we take: part of its text, and why."""

SAME_CLASS = {
    (1, 9): "9113/4.3: what cannot be decoded is a COMPRESSION_ERROR",
}
"""Codes of the library's and ours that stand for one class of error, and why."""


def oracle(client: bool) -> H2Connection:
    """The library, set up as we are."""
    conn = H2Connection(H2Configuration(client_side=client, header_encoding=None, normalize_inbound_headers=False))
    conn.local_settings.initial_window_size = STREAM_WINDOW
    conn.local_settings.max_concurrent_streams = 100
    conn.local_settings.max_header_list_size = 120 * 1024
    if client:
        conn.local_settings.enable_push = 0
    conn.local_settings.acknowledge()
    conn.initiate_connection()
    conn.increment_flow_control_window(CONNECTION_WINDOW - 65535)
    conn.local_settings[SettingCodes.ENABLE_CONNECT_PROTOCOL] = 1
    return conn


def codes(written: bytes) -> list[int]:
    """The codes of the resets and GOAWAYs among the frames."""
    found = []
    while written:
        length = int.from_bytes(written[:3], "big")
        if written[3] in (3, 7):
            found.append(int.from_bytes(written[9 + length - 4 : 9 + length] if written[3] == 3 else written[13:17], "big"))
        written = written[9 + length :]
    return found


def theirs(conn: H2Connection, sent: bytes) -> tuple[list[Said], list[int], str]:
    """What the library says of a frame: events, or the codes of its refusal and the text."""
    said: list[Said] = []
    try:
        for event in conn.receive_data(sent):
            if isinstance(event, InformationalResponseReceived):
                fields = [field for field in event.headers or () if field[0] != b"content-length"]
                said.append(("head", event.stream_id, essence(fields)))
            elif isinstance(event, RequestReceived | ResponseReceived):
                said.append(("head", event.stream_id, essence(event.headers)))
            elif isinstance(event, TrailersReceived):
                kept = [field for field in event.headers or () if field[0] not in NOT_IN_TRAILERS]  # 9110/6.5.1
                said += [("trailers", event.stream_id, essence(kept))] if kept else []
            elif isinstance(event, DataReceived):
                conn.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
                if event.data:
                    said.append(("data", event.stream_id, bytes(event.data)))
            elif isinstance(event, StreamEnded):
                said.append(("end", event.stream_id))
            elif isinstance(event, StreamReset) and event.remote_reset:
                said.append(("reset", event.stream_id, int(event.error_code or 0)))
    except H2Error as problem:
        return said, codes(conn.data_to_send()) or [1], repr(problem)
    return said, codes(conn.data_to_send()), ""


def essence(fields: Any) -> tuple[Any, ...]:
    """Fields as both would tell them: pseudo-headers and others, cookies in one, what is taken off taken off, white space as well."""
    plain = [(bytes(name), bytes(value).strip(b" \t")) for name, value in fields]
    cookies = b"; ".join(value for name, value in plain if name == b"cookie").strip()
    gone = (b"cookie", b"host", b"expect", b":scheme", b":authority")
    kept = [(n, v) for n, v in plain if n not in gone]
    return (tuple(sorted(kept)), cookies)


def ours(codec: H2Server | H2Client, sent: bytes) -> tuple[list[Said], list[int], str]:
    """What we say of a frame, in the same form."""
    said: list[Said] = []
    why = ""
    for event in codec.receive(sent):
        if isinstance(event, ev.RequestReceived):
            fields = [(b":method", event.head.method), (b":path", event.head.target), *event.head.headers]
            said.append(("head", event.stream, essence(fields)))
        elif isinstance(event, ev.ResponseReceived | ev.Informational):
            said.append(("head", event.stream, essence([(b":status", b"%d" % event.status), *event.headers])))
        if isinstance(event, ev.BodyReceived):
            codec.consumed(event.stream, event.credit)
            said.append(("data", event.stream, event.data))
        elif isinstance(event, ev.Ended):
            if event.trailers is not None:
                said.append(("trailers", event.stream, essence(event.trailers)))
            said.append(("end", event.stream))
        elif isinstance(event, ev.RequestReceived | ev.ResponseReceived) and event.ended:
            said.append(("end", event.stream))
        elif isinstance(event, ev.Reset):
            said.append(("reset", event.stream, event.code))
        elif isinstance(event, ev.Refused):
            why = event.refusal.reason or "refused"
    found = codes(codec.take())
    return said, found if found or not why else [0], why


def agree(codec: H2Server | H2Client, conn: H2Connection, sent: bytes) -> bool:
    """Both say the same of a frame; False once one of them has refused it."""
    expected, code, text = theirs(conn, sent)
    said, our_code, why = ours(codec, sent)
    if not text and code == [5] and not our_code:
        code = []  # for a stream that we have reset itself: RFC 9113 section 5.1 has such frames ignored, the library resets it again
    if not code and not our_code:
        if said != expected and isinstance(codec, H2Client):  # 9113/8.1: after its answer an upstream may reset what it does not want
            expected = [one for one in expected if not (one[0] == "reset" and one[1] in codec._done)]
        assert said == expected
        return True
    if code and our_code:
        pair = (code[-1], our_code[-1])
        note(f"both refuse, {pair}")
        assert why == "" or pair[0] == pair[1] or pair in SAME_CLASS or any(part in why for part in STRICTER), (text, pair, why, sent)
    elif our_code:
        note(f"we refuse: {why[:40]}")
        assert any(part in why for part in STRICTER), (why, expected, sent)
    elif sent[3] == 10:
        note("ALTSVC (RFC 7838), which we do not know and ignore whatever it says (RFC 9113 section 4.1)")
    elif int.from_bytes(sent[5:9], "big") in codec._dropped:
        note("what comes for a stream that was reset is ignored (RFC 9113 section 5.1)")
    else:
        note(f"the library refuses: {text[:40]}")
        assert any(part in text for part in OTHERWISE), (text, said, sent)
    return False


names = [
    b"a",
    b"A",
    b"",
    b":path",
    b":status",
    b":protocol",
    b"cookie",
    b"content-length",
    b"te",
    b"connection",
    b"host",
    b"expect",
    b"\xff",
]
first = operator.itemgetter(0)
extra = st.lists(
    st.one_of(
        st.sampled_from([(b"a", b"b"), (b"x-long", b"y" * 300), (b"cookie", b"k=v"), (b"te", b"trailers"), (b"content-length", b"3")]),
        st.tuples(
            st.sampled_from(names),
            st.sampled_from([b"", b"0", b"3", b"+3", b"shop", b"trailers", b"a\r\nb", b"100-continue", b"\0", b" v\t", b"\x7f"]),
        ),
    ),
    max_size=3,
)
stream = st.sampled_from([1, 1, 1, 3, 3, 5, 7])
odd_stream = st.sampled_from([0, 1, 2, 3, 9, 2**31 - 1])
number = st.sampled_from([0, 1, 5, 100, 16384, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1])
frames = st.one_of(
    st.tuples(st.just("head"), stream, st.booleans(), extra, st.booleans()),
    st.tuples(st.just("head"), stream, st.just(False), st.just([]), st.booleans()),
    st.tuples(st.just("trailers"), stream, extra, st.booleans()),
    st.tuples(st.just("data"), stream, st.integers(0, 9), st.booleans(), st.one_of(st.none(), st.integers(0, 20))),
    st.tuples(st.just("rst"), stream, number),
    st.tuples(st.just("window"), st.one_of(stream, odd_stream), number),
    st.tuples(
        st.just("settings"),
        st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 77]), number), max_size=2, unique_by=first),
    ),
    st.tuples(st.just("ping")),
    st.tuples(st.just("priority"), odd_stream, odd_stream),
    st.tuples(st.just("raw"), st.integers(0, 12), st.integers(0, 255), odd_stream, st.binary(max_size=12)),
    st.tuples(st.just("answer"), stream, st.booleans()),
    st.tuples(st.just("reset"), stream),
)


def written(peer: Peer, what: tuple[Any, ...], client: bool) -> bytes:
    kind, *rest = what
    if kind == "head":
        first = ((b":status", b"103"),) if rest[1] and client else OK if client else POST if rest[1] else GET
        return peer.head(rest[0], (*first, *rest[2]), ended=rest[3])
    if kind == "trailers":
        return peer.head(rest[0], rest[1], ended=rest[2])
    if kind == "data":
        return data(rest[0], b"x" * rest[1], ended=rest[2], padding=rest[3])
    if kind == "settings":
        return settings_frame(*rest[0])
    if kind == "priority":
        return raw(2, 0, rest[0], rest[1].to_bytes(4, "big") + b"\x10")
    return {"rst": rst, "window": window, "ping": ping, "raw": raw}[kind](*rest)


@settings(max_examples=EXAMPLES, derandomize=not FUZZ, deadline=None)
@given(st.lists(frames, max_size=25))
def test_a_server_agrees(script: list[tuple[Any, ...]]) -> None:
    codec, conn = H2Server(b"https", websockets=True), oracle(False)
    peer = Peer(codec)
    conn.receive_data(PREFACE + settings_frame())
    conn.data_to_send()
    for what in script:
        if what[0] in ("answer", "reset"):
            open_ = codec._streams.get(what[1])
            if open_ is None or open_.began:
                continue
            if what[0] == "reset":
                codec.reset(what[1], 8)
                conn.reset_stream(what[1], 8)
            else:
                codec.send_head(what[1], 200, [], what[2])
                conn.send_headers(what[1], [(b":status", b"200")], end_stream=what[2])
                if what[2] and not open_.ended_by_peer:
                    conn.reset_stream(what[1], 0)
            codec.take()
            conn.data_to_send()
        elif not agree(codec, conn, written(peer, what, False)):
            return


@settings(max_examples=EXAMPLES, derandomize=not FUZZ, deadline=None)
@given(st.lists(frames, max_size=25))
def test_a_client_agrees(script: list[tuple[Any, ...]]) -> None:
    codec, conn = H2Client(), oracle(True)
    peer = Peer(codec, client=False)
    conn.receive_data(settings_frame())
    for at in range(3):
        where = codec.request(head(b"POST" if at else b"GET", body_length=0 if not at else -1), [], b"/", b"shop", not at)
        fields = ((b":method", b"POST" if at else b"GET"), *GET[1:])
        conn.send_headers(where, list(fields), end_stream=not at)
    codec.take()
    conn.data_to_send()
    for what in script:
        if what[0] == "reset":
            if what[1] in codec._streams:
                codec.reset(what[1], 8)
                conn.reset_stream(what[1], 8)
                codec.take()
                conn.data_to_send()
        elif what[0] == "answer":
            open_ = codec._streams.get(what[1])
            if open_ is not None and not open_.ended_by_us:
                codec.send_body(what[1], b"", True)
                conn.end_stream(what[1])
                codec.take()
                conn.data_to_send()
        elif not agree(codec, conn, written(peer, what, True)):
            return

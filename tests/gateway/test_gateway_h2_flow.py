"""HTTP/2 flow control, both ways: nobody sends more than there is room for, and no room is lost."""

from __future__ import annotations

from typing import Any

import pytest
from codec_h2_world import GET, OK, POST, Peer, data, raw, rst, settings, window
from codec_world import head, transcript
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gateway.codec.events import BodyReceived
from gateway.codec.h2 import CONNECTION_WINDOW, IDLE_FRAMES, STREAM_WINDOW
from gateway.codec.h2_client import H2Client
from gateway.codec.h2_server import H2Server
from mesh.http import UNKNOWN_LENGTH


def answering(*first: bytes) -> tuple[H2Server, Peer]:
    """A server whose request 1 has its head sent."""
    codec = H2Server(b"https")
    peer = Peer(codec)
    for frame in first:
        codec.receive(frame)
    codec.receive(peer.head(1, GET))
    codec.send_head(1, 200, [], False)
    peer.wrote()
    return codec, peer


def bodies(frames: list[tuple[Any, ...]], number: int = 1) -> bytes:
    return b"".join(frame[2] for frame in frames if frame[:2] == ("data", number))


def test_what_there_is_no_room_for_waits() -> None:
    codec, peer = answering(settings((4, 5)))
    assert codec.window(1) == 5
    codec.send_body(1, b"hello world", False)
    assert bodies(peer.wrote()) == b"hello"
    assert codec.window(1) == 0
    assert codec.receive(window(1, 3)) == []
    assert bodies(peer.wrote()) == b" wo"
    assert transcript(codec.receive(window(1, 10))) == [("writable", 1)]
    assert bodies(peer.wrote()) == b"rld"
    assert codec.window(1) == 7
    codec.send_body(1, b"!", True)
    assert peer.wrote() == [("data", 1, b"!", True)]


def test_the_end_waits_for_the_body() -> None:
    codec, peer = answering(settings((4, 0)))
    assert codec.window(1) == 0
    codec.send_body(1, b"abc", False)
    codec.send_trailers(1, [(b"a", b"b")])
    assert peer.wrote() == []
    assert codec.receive(window(1, 100)) == []
    assert peer.wrote() == [("data", 1, b"abc", False), ("headers", 1, ((b"a", b"b"),), True)]
    assert codec.streams == 0


def test_an_end_without_a_body_needs_no_room() -> None:
    codec, peer = answering(settings((4, 0)))
    codec.send_body(1, b"", True)
    assert peer.wrote() == [("data", 1, b"", True)]


def test_the_connection_has_a_window_too() -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    codec.receive(settings((4, 100_000)) + peer.head(1, GET) + peer.head(3, GET))
    for number in (1, 3):
        codec.send_head(number, 200, [], False)
    codec.send_body(1, b"a" * 65535, False)
    assert (codec.window(1), codec.window(3)) == (0, 0)
    events = transcript(codec.receive(window(0, 10)))
    assert sorted(events) == [("writable", 1), ("writable", 3)]
    codec.send_body(3, b"b" * 10, True)
    codec.send_body(1, b"c", True)
    frames = peer.wrote()
    assert (bodies(frames), bodies(frames, 3)) == (b"a" * 65535, b"b" * 10)
    codec.receive(window(0, 1))
    assert peer.wrote() == [("data", 1, b"c", True)]


def test_the_connections_window_goes_to_those_who_wait_in_turn() -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    numbers = (5, 1, 3, 65, 9)
    for number in sorted(numbers):
        codec.receive(peer.head(number, GET))
        codec.send_head(number, 200, [], False)
    codec.receive(window(0, 5) + b"".join(window(number, 100_000) for number in numbers))
    codec.send_body(5, b"a" * (65535 + 5), False)
    for number in numbers:
        codec.send_body(number, b"b" * 30, False)
    peer.wrote()
    for _ in range(3):
        served = []
        for _ in numbers:
            codec.receive(window(0, 10))
            served += [frame[1] for frame in peer.wrote() if frame[0] == "data"]
        assert served == list(numbers)


def test_a_window_may_shrink_below_zero_and_grow_again() -> None:
    codec, peer = answering()
    codec.send_body(1, b"a" * 60_000, False)
    peer.wrote()
    codec.receive(settings((4, 10)))
    assert codec.window(1) == 0
    codec.send_body(1, b"b", False)
    assert codec.receive(window(1, 60_000 - 10)) == []
    assert bodies(peer.wrote()) == b""
    assert transcript(codec.receive(settings((4, 12)))) == [("writable", 1)]
    assert bodies(peer.wrote()) == b"b"
    assert codec.window(1) == 1


def test_frames_are_no_larger_than_the_peer_takes() -> None:
    codec, peer = answering(settings((4, 100_000)))
    codec.send_body(1, b"a" * 40_000, False)
    assert [len(frame[2]) for frame in peer.wrote()] == [16384, 16384, 7232]
    codec.receive(settings((5, 20_000)))
    codec.send_body(1, b"a" * 25_000, True)
    assert [len(frame[2]) for frame in peer.wrote()] == [20_000, 5_000]


def test_a_client_waits_as_well() -> None:
    codec = H2Client()
    peer = Peer(codec, client=False)
    codec.receive(settings((4, 2)))
    codec.request(head(b"POST", body_length=UNKNOWN_LENGTH), [], b"/", b"shop", False)
    codec.send_body(1, b"abc", True)
    assert bodies(peer.wrote()) == b"ab"
    codec.receive(peer.head(1, OK))  # an early answer: the rest is not wanted, but may still be sent
    codec.receive(window(1, 1))
    assert peer.wrote() == [("data", 1, b"c", True)]
    assert codec.streams == 0


def test_room_is_made_when_a_body_is_consumed() -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    events = codec.receive(peer.head(1, POST, ended=False) + data(1, b"a" * 16000) * 4)
    got = [event for event in events if isinstance(event, BodyReceived)]
    assert not any(frame[0] == "window" for frame in peer.wrote())
    for event in got:
        codec.consumed(1, event.credit)
    codec.consumed(1, 10**9)  # no more than was held
    assert sum(frame[2] for frame in peer.wrote() if frame[:2] == ("window", 1)) <= 64_000
    assert codec._streams[1].held == 0


def test_a_client_that_sends_more_than_its_window_is_in_breach() -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    events = codec.receive(peer.head(1, POST, ended=False) + data(1, b"a" * 16384) * 4 + data(1, b"x"))
    assert transcript(events)[-1] == ("refused", 0, 400)
    assert STREAM_WINDOW == 4 * 16384


def room(codec: H2Server | H2Client) -> int:
    """The connection's window as the peer will see it once what has been processed is given back."""
    return codec._room + codec._owed


step = st.one_of(
    st.tuples(
        st.sampled_from(["open", "end", "rst", "reset", "answer", "early", "consume", "half", "drain", "trailers", "bad"]),
        st.integers(0, 3),
    ),
    st.tuples(st.just("data"), st.integers(0, 3), st.integers(0, 9000), st.one_of(st.none(), st.integers(0, 255))),
)


@examples(max_examples=300, deadline=None)
@given(st.lists(step, max_size=60), st.booleans())
def test_the_connections_window_never_leaks(steps: list[tuple[Any, ...]], declared: bool) -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    next_number = 1
    open_streams: list[int] = []
    held: list[tuple[int, int]] = []
    over: set[int] = set()
    for kind, which, *more in steps:
        number = open_streams[which] if which < len(open_streams) else 0
        sent = b""
        if kind == "open" and len(open_streams) < 4:
            fields = (*POST, (b"content-length", b"7000")) if declared else POST
            sent = peer.head(next_number, fields, ended=False)
            open_streams.append(next_number)
            next_number += 2
        elif not number:
            continue
        elif kind == "data" and number not in over:
            sent = data(number, b"x" * more[0], padding=more[1])
        elif kind == "end" and number not in over:
            sent = data(number, ended=True)
            over.add(number)
        elif kind == "trailers" and number not in over:
            sent = peer.head(number, [(b"a", b"b")])
            over.add(number)
        elif kind == "bad" and number not in over:
            sent = peer.head(number, [(b"A", b"b")])
            over.add(number)
        elif kind == "rst":
            sent = rst(number)
            open_streams.remove(number)
        elif kind == "reset":
            codec.reset(number, 8)
        elif kind in ("answer", "early"):
            codec.send_head(number, 200, [], kind == "early")
            codec.send_body(number, b"ok", True)
        elif kind == "consume":
            for stream, credit in held:
                codec.consumed(stream, credit)
            held.clear()
        elif kind == "half" and held:
            codec.consumed(*held.pop())
        elif kind == "drain":
            codec.drain()
        for event in codec.receive(sent):
            if isinstance(event, BodyReceived):
                held.append((event.stream, event.credit))
        if codec.closing:
            return
        owed = sum(stream.held for stream in codec._streams.values())
        assert room(codec) + owed == CONNECTION_WINDOW
        assert owed <= sum(credit for _, credit in held)
    for stream in list(codec._streams):
        codec.reset(stream, 8)
    assert room(codec) == CONNECTION_WINDOW
    assert not codec._streams
    assert not codec._starved


@pytest.mark.parametrize("how", ["reset", "rst", "answer", "malformed"])
def test_what_nobody_consumed_is_given_back(how: str) -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    for number in range(1, 101, 2):
        codec.receive(peer.head(number, (*POST, (b"content-length", b"50000")), ended=False))
        for _ in range(3):
            codec.receive(data(number, b"x" * 16000))
        if how == "reset":
            codec.reset(number, 8)
        elif how == "rst":
            codec.receive(rst(number))
        elif how == "answer":
            codec.send_head(number, 413, [], True)
        else:
            codec.receive(data(number, b"x" * 5000))
        codec.receive(data(number, b"late"))
        peer.wrote()
        assert room(codec) == CONNECTION_WINDOW
    assert not codec.closing


def test_a_long_download_is_no_flood_of_window_updates() -> None:
    codec, peer = answering()
    for _ in range(3 * IDLE_FRAMES):
        codec.send_body(1, b"x" * 4096, False)
        codec.receive(window(1, 4096) + window(0, 4096))
    assert not codec.closing
    assert len(bodies(peer.wrote())) == 3 * IDLE_FRAMES * 4096
    codec.receive(window(1, 1) * (IDLE_FRAMES + 1))
    assert codec.closing


def test_settings_are_acknowledged_before_what_they_allow() -> None:
    codec, peer = answering(settings((4, 0)))
    codec.send_body(1, b"hello", True)
    assert peer.wrote() == []
    codec.receive(settings((4, 1)))
    assert codec.take() == raw(4, 1, 0) + data(1, b"h")

"""HTTP/2 towards clients: how a connection ends, and what it takes to end one."""

from __future__ import annotations

import pytest
from codec_h2_world import GET, POST, Peer, data, goaway, ping, raw, rst, settings, window
from codec_world import transcript

from gateway.codec.h2 import IDLE_FRAMES, RESETS
from gateway.codec.h2_frames import FRAME
from gateway.codec.h2_sending import DONE, DROPPED
from gateway.codec.h2_server import H2Server


def world(**limits: int) -> tuple[H2Server, Peer]:
    codec = H2Server(b"https", **limits)
    return codec, Peer(codec)


def asked(codec: H2Server, peer: Peer, number: int = 1, *, ended: bool = True) -> None:
    """A request that has come."""
    (event, *_) = codec.receive(peer.head(number, GET if ended else POST, ended=ended))
    assert transcript([event])[0][0] == "request"


# Ends


def test_a_drain_refuses_what_comes_after_and_ends_what_is_there() -> None:
    codec, peer = world()
    asked(codec, peer, 1, ended=False)
    codec.drain()
    codec.drain()
    assert peer.wrote() == [("goaway", 1, 0)]
    assert not codec.closing
    assert codec.receive(peer.head(3, GET)) == []
    assert peer.wrote() == [("rst", 3, 7)]
    assert transcript(codec.receive(data(1, b"x", ended=True))) == [("body", 1, b"x"), ("end", 1, None)]
    codec.send_head(1, 200, [], True)
    assert peer.wrote() == [("headers", 1, ((b":status", b"200"),), True)]
    assert codec.closing


def test_an_idle_connection_ends_at_once() -> None:
    codec, peer = world()
    codec.drain()
    assert codec.closing
    assert peer.wrote() == [("goaway", 0, 0)]


@pytest.mark.parametrize("apart", [False, True])
def test_a_client_that_takes_no_more_streams_still_has_its_answers(apart: bool) -> None:
    codec, peer = world()
    sent = [peer.head(1, POST, ended=False), goaway(0), data(1, b"x", ended=True)]
    events = transcript(event for part in (sent if apart else [b"".join(sent)]) for event in codec.receive(part))
    assert [event[0] for event in events] == ["request", "goaway", "body", "end"]
    assert not codec.closing
    codec.send_head(1, 200, [], True)
    assert peer.wrote() == [("headers", 1, ((b":status", b"200"),), True)]
    assert codec.closing


BREACHES = {
    "no preface": None,
    "a stream number that goes back": lambda peer: peer.head(5, GET) + peer.head(3, GET),
    "an even stream number": lambda peer: peer.head(2, GET),
    "data on stream 0": lambda peer: data(0, b"x"),
    "data on an idle stream": lambda peer: data(1, b"x"),
    "a frame that is too large": lambda peer: raw(0, 0, 1, bytes(FRAME + 1)),
    "the head of a frame that is too large": lambda peer: raw(0, 0, 1, bytes(FRAME + 1))[:9],
    "padding longer than the frame": lambda peer: peer.head(1, POST, ended=False) + raw(0, 8, 1, b"\x05abc"),
    "a push promise": lambda peer: peer.head(1, GET) + raw(5, 4, 1, b"\0\0\0\2\x82"),
    "an initial window that is too large": lambda peer: settings((4, 2**31)),
    "a window that overflows": lambda peer: window(0, 2**31 - 1),
    "a window update of nothing": lambda peer: window(0, 0),
    "a PING of the wrong size": lambda peer: raw(6, 0, 0, b"short"),
    "a GOAWAY of the wrong size": lambda peer: raw(7, 0, 0, b"short"),
    "a GOAWAY on a stream": lambda peer: raw(7, 0, 1, bytes(8)),
    "CONTINUATION out of nowhere": lambda peer: raw(9, 4, 1, b"\x82"),
    "another frame within a head": lambda peer: raw(1, 0, 1, b"\x82") + ping(),
    "a head that HPACK does not know": lambda peer: raw(1, 5, 1, b"\xff\xff\xff\xff"),
    "a flood of CONTINUATION": lambda peer: raw(1, 0, 1, b"\x82") + raw(9, 0, 1, b"") * 1000,
    "a head beyond all bounds that never ends": lambda peer: raw(1, 0, 1, b"\x82") + raw(9, 0, 1, bytes(16384)) * 8,
    "a flood of PING": lambda peer: ping() * (IDLE_FRAMES + 1),
    "a flood of SETTINGS": lambda peer: settings() * (IDLE_FRAMES + 1),
    "a flood of PRIORITY": lambda peer: raw(2, 0, 1, b"\0\0\0\0\x10") * (IDLE_FRAMES + 1),
    "a flood of window updates": lambda peer: window(0, 1) * (IDLE_FRAMES + 1),
    "a flood of unknown frames": lambda peer: raw(77, 0, 0) * (IDLE_FRAMES + 1),
    "a flood of empty data": lambda peer: peer.head(1, POST, ended=False) + data(1) * (IDLE_FRAMES + 1),
    "a flood of padding": lambda peer: peer.head(1, POST, ended=False) + data(1, padding=0) * (IDLE_FRAMES + 1),
    "a flood of resets": lambda peer: b"".join(peer.head(n, GET) + rst(n) for n in range(1, 2 * RESETS + 2, 2)),
    "a flood of malformed requests": lambda peer: b"".join(peer.head(n, GET[:3]) for n in range(1, 2 * RESETS + 2, 2)),
    "a flood of requests made to be reset": lambda peer: b"".join(
        peer.head(n, GET) + window(n, 2**31 - 1) for n in range(1, 2 * RESETS + 2, 2)
    ),
    "too many settings at once": lambda peer: settings(*[(code, 1) for code in range(100, 133)]),
}


@pytest.mark.parametrize("case", BREACHES)
def test_a_breach_ends_the_connection(case: str) -> None:
    if BREACHES[case] is None:
        codec = H2Server(b"https")
        assert transcript(codec.receive(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")) == [("refused", 0, 400)]
        codec.take()
    else:
        codec, peer = world()
        assert transcript(codec.receive(BREACHES[case](peer)))[-1] == ("refused", 0, 400)
        assert "goaway" in [frame[0] for frame in peer.wrote()]
    assert (codec.closing, codec.streams) == (True, 0)
    assert codec.receive(ping()) == []
    codec.send_head(1, 200, [], True)
    codec.consumed(1, 5)
    codec.drain()
    assert codec.take() == b""
    assert codec.eof() == []


def test_what_is_no_flood() -> None:
    codec, peer = world()
    for number in range(1, 8 * RESETS, 4):
        codec.receive(peer.head(number, GET))
        codec.send_head(number, 200, [], True)
        codec.receive(peer.head(number + 2, GET) + rst(number + 2) + ping() * (IDLE_FRAMES // 2))
    assert not codec.closing
    assert codec.streams == 0


def test_more_streams_than_there_may_be_are_refused_alone() -> None:
    codec, peer = world(max_streams=3)
    events = transcript(codec.receive(b"".join(peer.head(number, GET) for number in range(1, 11, 2))))
    assert [event[:2] for event in events] == [("request", 1), ("request", 3), ("request", 5)]
    assert peer.wrote() == [("rst", 7, 7), ("rst", 9, 7)]
    codec.send_head(1, 200, [], True)
    asked(codec, peer, 11)
    sent = b"".join(peer.head(number, GET) for number in range(13, 13 + 2 * (RESETS // 2), 2))
    assert codec.receive(sent) == []
    assert (codec.streams, codec.closing) == (3, False)


def test_trailers_that_do_not_end_their_stream_cost_it() -> None:
    codec, peer = world()
    asked(codec, peer, ended=False)
    assert transcript(codec.receive(peer.head(1, [(b"a", b"b")], ended=False))) == [("refused", 1, 400)]
    assert peer.wrote() == [("rst", 1, 1)]
    asked(codec, peer, 3)


def test_settings_that_nobody_knows_are_not_kept() -> None:
    codec, peer = world()
    for block in range(100, 10_000, 20):
        assert codec.receive(settings(*[(code, 7) for code in range(block, block + 20)])) == []
    asked(codec, peer)


def test_our_compression_remembers_only_so_much() -> None:
    codec, peer = world()
    codec.receive(settings((1, 2**31)))
    for number in range(1, 401, 2):
        codec.receive(peer.head(number, GET) + settings((1, number)) + settings((1, 2**30)))
        codec.send_head(number, 200, [(b"x-%d" % number, b"y" * 200)], True)
        assert peer.wrote()[-1][:2] == ("headers", number)
    assert codec._encoder._size <= 4096
    assert sum(len(name) + len(value) + 32 for name, value in codec._encoder._entries) == codec._encoder._size
    for size in range(500):
        codec.receive(settings((1, 3 * size)))
    assert len(codec._encoder._resized) <= 2
    codec.receive(peer.head(401, GET))
    codec.send_head(401, 200, [(b"a", b"b")], True)
    assert peer.wrote()[-1] == ("headers", 401, ((b":status", b"200"), (b"a", b"b")), True)


def test_streams_that_are_over_are_forgotten() -> None:
    codec, peer = world()
    for number in range(1, 6001, 2):
        codec.receive(peer.head(number, GET))
        codec.send_head(number, 200, [], True)
        codec.take()
    for number in range(6001, 12001, 2):
        codec.receive(peer.head(number, GET))
        codec.reset(number, 8)
        codec.take()
    assert codec.streams == 0
    assert len(codec._dropped) <= DROPPED
    assert len(codec._done) <= DONE


def test_priorities_and_unknown_frames_mean_nothing() -> None:
    codec, peer = world()
    assert codec.receive(raw(2, 0, 9, b"\0\0\0\0\x10") + raw(99, 255, 1, b"?")) == []
    fields = peer.encoder.encode(list(GET))
    assert transcript(codec.receive(raw(1, 0x25, 1, b"\x80\0\0\0\xff" + fields))) == [
        ("request", 1, b"GET shop / HTTP/2", (), 0, True, False)
    ]

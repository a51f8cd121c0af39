"""Extended CONNECT (RFC 8441) in HTTP/2: WebSockets asked for, opened, refused and ended one direction at a time."""

from __future__ import annotations

import pytest
from codec_h2_world import PREFACE, Peer, data, rst, settings
from codec_world import head, transcript

from gateway.codec.events import RequestReceived, ResponseReceived
from gateway.codec.h2_client import H2Client
from gateway.codec.h2_server import H2Server
from mesh.http import WEBSOCKET, RequestHead

ASK = (
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"https"),
    (b":authority", b"shop"),
    (b":path", b"/chat"),
    (b"sec-websocket-version", b"13"),
)


def asked() -> tuple[H2Server, Peer, RequestHead]:
    codec = H2Server(b"https", websockets=True)
    peer = Peer(codec)
    (event,) = codec.receive(peer.head(1, ASK, ended=False))
    assert isinstance(event, RequestReceived)
    assert not event.ended
    return codec, peer, event.head


def test_clients_are_told_only_where_it_is_served() -> None:
    told = (8).to_bytes(2, "big") + (1).to_bytes(4, "big")
    assert told in H2Server(b"https", websockets=True).take()
    assert told not in H2Server(b"https").take()


def test_a_websocket() -> None:
    codec, peer, request = asked()
    assert (request.method, request.tunnel, request.target) == (b"GET", WEBSOCKET, b"/chat")
    assert request.headers == [(b"sec-websocket-version", b"13"), (b"upgrade", b"websocket")]
    accepted = [(b"upgrade", b"websocket"), (b"sec-websocket-accept", b"x"), (b"sec-websocket-protocol", b"chat")]
    codec.send_head(1, 101, accepted, False)
    codec.send_body(1, b"hello", True)
    assert peer.wrote() == [
        ("headers", 1, ((b":status", b"200"), (b"sec-websocket-protocol", b"chat")), False),
        ("data", 1, b"hello", True),
    ]
    # Its own direction has ended; the client's goes on.
    assert transcript(codec.receive(data(1, b"bye", ended=True))) == [("body", 1, b"bye"), ("end", 1, None)]
    assert (codec.streams, codec.closing) == (0, False)


def test_a_websocket_that_is_refused() -> None:
    codec, peer, _ = asked()
    codec.send_head(1, 403, [(b"content-length", b"2")], False)
    codec.send_body(1, b"no", True)
    assert peer.wrote() == [
        ("headers", 1, ((b":status", b"403"), (b"content-length", b"2")), False),
        ("data", 1, b"no", True),
        ("rst", 1, 0),
    ]
    assert codec.streams == 0


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        (((b":method", b"GET"), *ASK[1:]), ("refused", 1, 400)),
        (ASK[:-2], ("refused", 1, 400)),
        ((*ASK, (b"content-length", b"3")), ("refused", 1, 400)),
        ((ASK[0], (b":protocol", b"connect-udp"), *ASK[2:]), ("refused", 1, 405)),
    ],
)
def test_what_is_no_request_for_one(fields: tuple[tuple[bytes, bytes], ...], event: tuple[object, ...]) -> None:
    codec = H2Server(b"https", websockets=True)
    peer = Peer(codec)
    assert transcript(codec.receive(peer.head(1, fields, ended=False))) == [event]


def test_nobody_is_sent_a_change_of_protocol() -> None:
    codec = H2Server(b"https")
    peer = Peer(codec)
    codec.receive(peer.head(1, ((b":method", b"GET"), *ASK[2:5])))
    with pytest.raises(ValueError, match="nobody asked"):
        codec.send_head(1, 101, [], False)


def asking() -> tuple[H2Client, Peer]:
    codec = H2Client()
    peer = Peer(codec, client=False)
    codec.receive(settings((8, 1)))
    assert codec.websockets
    request = head()
    request.tunnel = WEBSOCKET
    headers = [(b"upgrade", b"websocket"), (b"sec-websocket-key", b"k"), (b"sec-websocket-version", b"13")]
    assert codec.request(request, headers, b"/chat", b"shop", True) == 1
    ((kind, _, fields, ended),) = peer.wrote()
    assert (kind, sorted(fields), ended) == ("headers", sorted(ASK[:2] + ASK[2:]), False)
    return codec, peer


@pytest.mark.parametrize("ended", [False, True])
def test_an_upstream_that_takes_one(ended: bool) -> None:
    codec, peer = asking()
    event, *rest = codec.receive(peer.head(1, ((b":status", b"200"),), ended=ended))
    assert isinstance(event, ResponseReceived)
    assert (event.status, event.ended) == (101, False)
    assert transcript(rest) == ([("end", 1, None)] if ended else [])
    codec.send_body(1, b"hi", True)
    assert peer.wrote() == [("data", 1, b"hi", True)]
    if not ended:
        assert transcript(codec.receive(data(1, b"x") + rst(1))) == [("body", 1, b"x"), ("reset", 1, 8, False)]
    assert codec.streams == 0


def test_an_upstream_that_refuses_one() -> None:
    codec, peer = asking()
    events = codec.receive(peer.head(1, ((b":status", b"404"),), ended=False) + data(1, b"no", ended=True))
    assert [event[0] for event in transcript(events)] == ["response", "body", "end"]
    assert peer.wrote() == [("data", 1, b"", True)]
    assert codec.streams == 0


def test_an_upstream_that_has_none() -> None:
    codec = H2Client()
    Peer(codec, client=False)
    request = head()
    request.tunnel = WEBSOCKET
    with pytest.raises(ValueError, match="takes none"):
        codec.request(request, [], b"/", b"shop", True)
    assert codec.streams == 0
    assert codec.take().removeprefix(PREFACE) == b""

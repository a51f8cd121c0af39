"""The handshake's key and acceptance, where only one of the two sides speaks HTTP/1.1."""

from __future__ import annotations

import re

import pytest
from codec_world import transcript

from gateway.codec.h1 import Fields
from gateway.codec.h1_client import H1Client
from gateway.codec.h1_server import H1Server
from gateway.codec.websocket_key import accepted
from mesh.http import HTTP2, WEBSOCKET, RequestHead

ASKED = [(b"upgrade", WEBSOCKET), (b"sec-websocket-version", b"13")]


def test_the_example_of_the_rfc() -> None:
    assert accepted(b"dGhlIHNhbXBsZSBub25jZQ==") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def asked() -> tuple[H1Client, bytes]:
    """A request of HTTP/2 on its way to HTTP/1.1, and the key that it was given."""
    client = H1Client(Fields())
    head = RequestHead(b"GET", b"https", b"shop", b"/chat", ASKED, HTTP2, -1, tunnel=WEBSOCKET)
    client.request(head, ASKED, b"/chat", b"shop", False)
    sent = client.take()
    assert b"transfer-encoding" not in sent
    found = re.findall(rb"sec-websocket-key: ([A-Za-z0-9+/]{22}==)\r\n", sent)
    assert len(found) == 1
    return client, found[0]


def test_an_upstream_is_given_a_key_and_has_to_accept_it() -> None:
    client, key = asked()
    assert asked()[1] != key
    said = b"HTTP/1.1 101 x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: %b\r\n\r\nframes"
    events = transcript(client.receive(said % accepted(key)))
    assert [event[0] for event in events] == ["response", "body"]


@pytest.mark.parametrize("said", [b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n", b""])
def test_one_that_does_not_is_no_websocket(said: bytes) -> None:
    client, _ = asked()
    events = transcript(client.receive(b"HTTP/1.1 101 x\r\nupgrade: websocket\r\nconnection: upgrade\r\n" + said + b"\r\n"))
    assert [event[0] for event in events] == ["refused"]


def test_a_client_has_its_key_accepted_when_its_upstream_cannot() -> None:
    server = H1Server(b"https", Fields())
    server.receive(
        b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    server.send_head(1, 101, [(b"x-by", b"h2")], False)
    assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in server.take()

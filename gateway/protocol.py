"""Which HTTP a client's connection speaks: by ALPN under TLS, by its first bytes in plaintext."""

from __future__ import annotations

from typing import Final

from gateway.codec.events import ServerCodec
from gateway.codec.h1_server import H1Server
from gateway.codec.h2_server import H2Server
from gateway.shared import Shared
from mesh.model import Listener

PREFACE: Final = b"PRI * HTTP/2.0\r\n"
"""How an HTTP/2 client that has prior knowledge begins in plaintext (RFC 9113 section 3.4)."""


def codec_for(shared: Shared, listener: Listener, http2: bool) -> ServerCodec:
    """A codec for a new connection of `listener`."""
    limits = shared.limits
    scheme = b"http" if listener.tls is None else b"https"
    if http2:
        return H2Server(
            scheme,
            max_streams=limits.streams,
            max_head=limits.head,
            max_fields=limits.fields,
            max_target=limits.target,
            websockets=True,
        )
    return H1Server(scheme, shared.fields, limits.head, limits.fields, limits.target)

"""The key and its acceptance in a WebSocket's handshake over HTTP/1.1 (RFC 6455 sections 4.1 and 4.2.2).

They prove that both sides mean it, and HTTP/2 has none of it (RFC 8441 section 5): where one side speaks the one and the other the other,
the HTTP/1.1 codecs make them.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import Final

from mesh.http import Header

KEY: Final = b"sec-websocket-key"
ACCEPT: Final = b"sec-websocket-accept"
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key() -> bytes:
    """A key that nobody has used."""
    return base64.b64encode(secrets.token_bytes(16))


def accepted(key: bytes) -> bytes:
    """What accepts `key`."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def value_of(headers: list[Header], wanted: bytes) -> bytes:
    """The value of a field; empty for none."""
    return next((value for name, value in headers if name == wanted), b"")

"""What a TLS client says before anything is decided: its ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3), read from plain bytes.

For listeners that share a port: which one a connection belongs to, and so which client certificates it asks for, must be known before
OpenSSL is given the connection. It is also how plain HTTP on a TLS port is told from noise. Sans-io; nothing is consumed.
"""

from __future__ import annotations

import msgspec

from identity.problems import IdentityProblem

MAX_BYTES = 64 * 1024
"""Of a ClientHello with its record headers; post-quantum key shares take some 2 kB."""

_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _ALPN = 0, 16
_HTTP_METHODS = (b"GET ", b"POST", b"PUT ", b"HEAD", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC", b"PRI ")


class ClientHello(msgspec.Struct, frozen=True, gc=False):
    """The parts that choose a listener."""

    server_name: str = ""
    """SNI, lower-case, without a final dot; empty for none."""
    alpn: tuple[str, ...] = ()


def read_hello(data: bytes | bytearray | memoryview) -> ClientHello | IdentityProblem | None:
    """The ClientHello that `data`, the first bytes of a connection, holds; None when more is needed; or why it is none.

    The problem's reason is `plain_http`, `not_tls` or `bad_record`.
    """
    data = bytes(data)
    if not data:
        return None
    if data[0] != _HANDSHAKE:
        if any(method.startswith(data[:4]) for method in _HTTP_METHODS):
            if len(data) < 4:
                return None
            return IdentityProblem("plain_http", "the client speaks plain HTTP to a TLS port; it should use https")
        return IdentityProblem("not_tls", "the client does not speak TLS")
    message = bytearray()
    at = 0
    while at + 5 <= len(data):
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at] != _HANDSHAKE or data[at + 1] != 3 or not 0 < length <= 1 << 14:
            return IdentityProblem("not_tls", "the client does not speak TLS")
        message += data[at + 5 : at + 5 + length]
        at += 5 + length
        if message and message[0] != _CLIENT_HELLO:
            return IdentityProblem("bad_record", "the client's first TLS message is not a ClientHello")
        if len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4], "big"):
            try:
                return _hello(_Reader(bytes(message[4 : 4 + int.from_bytes(message[1:4], "big")])))
            except (IndexError, UnicodeDecodeError):
                return IdentityProblem("bad_record", "the client's ClientHello is malformed")
    if len(data) > MAX_BYTES:
        return IdentityProblem("bad_record", f"the client's ClientHello is longer than {MAX_BYTES} bytes")
    return None


class _Reader:
    """Reads length-prefixed fields; raises IndexError beyond the end."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise IndexError
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def field(self, size: int) -> bytes:
        return self.take(self.number(size))

    def __bool__(self) -> bool:
        return self._at < len(self._data)


def _hello(reader: _Reader) -> ClientHello:
    reader.take(2 + 32)  # legacy_version, random
    reader.field(1)  # legacy_session_id
    reader.field(2)  # cipher_suites
    reader.field(1)  # legacy_compression_methods
    name = ""
    alpn: tuple[str, ...] = ()
    extensions = _Reader(reader.field(2)) if reader else _Reader(b"")
    seen: set[int] = set()
    while extensions:
        kind, body = extensions.number(2), _Reader(extensions.field(2))
        # Of two the gateway might go by one and the backend by the other (RFC 8446 section 4.2 forbids them).
        if kind in seen:
            raise IndexError
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _server_name(body)
        elif kind == _ALPN:
            alpn = _protocols(body)
    return ClientHello(name, alpn)


def _server_name(body: _Reader) -> str:
    names = _Reader(body.field(2))
    found = ""
    while names:
        kind, value = names.number(1), names.field(2)
        if kind == 0:
            if found or not value or b"\0" in value:  # one name, and no more than it seems to be (RFC 6066 section 3)
                raise IndexError
            found = value.decode("ascii").lower()
    if body:
        raise IndexError
    # OpenSSL takes a name with a final dot for another one; to DNS they are the same.
    return found.rstrip(".")


def _protocols(body: _Reader) -> tuple[str, ...]:
    listed = _Reader(body.field(2))
    found = []
    while listed:
        found.append(listed.field(1).decode("latin-1"))
    return tuple(found)

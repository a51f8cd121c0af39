"""What HTTP/2 lets a field be, in heads and trailers (RFC 9113 section 8.2)."""

from __future__ import annotations

from typing import Final

from gateway.codec.bytesets import only, without
from gateway.codec.h1 import FORBIDDEN, MAX_TRAILERS, TOKEN
from mesh.http import Header

MAX_TRAILER_FIELDS: Final = 100
MALFORMED: Final = FORBIDDEN + b"\r\n"
_WELL_FORMED: Final = without(MALFORMED)
_NO_SPACE: Final = without(MALFORMED + b" \t")
HOP_BY_HOP: Final = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"http2-settings"))
_LOWER_TOKEN: Final = only(bytes(byte for byte in TOKEN if not 0x41 <= byte <= 0x5A))
_SPACE: Final = (b" ", b"\t")

_good_names: set[bytes] = set()
"""Header names that have been looked at; begun again when there are many."""


class Malformed(Exception):
    """A message whose fields break the rules; its text is for the log."""


def check_fields(headers: list[Header]) -> None:
    """Raises `Malformed` for a name or value that no field may have, and for fields about the connection (RFC 9113 section 8.2)."""
    values = b"".join([value for _, value in headers])
    if values.translate(_WELL_FORMED) != values:
        raise Malformed("a header value with a control character")
    for name, value in headers:
        if name not in _good_names:
            if not name or name.translate(_LOWER_TOKEN) != name or name in HOP_BY_HOP:
                raise Malformed(f"the header name {name[:64]!r}, which HTTP/2 does not have")
            if len(_good_names) >= 4096:
                _good_names.clear()
            if len(name) <= 128:
                _good_names.add(name)
        if value[:1] in _SPACE or value[-1:] in _SPACE:
            raise Malformed("a header value with white space around it")
        if name == b"te" and value.lower() != b"trailers":
            raise Malformed("a TE field that is not `trailers`")


def check_trailers(trailers: list[Header]) -> None:
    """As `check_fields`, and that there are not too many of them."""
    if len(trailers) > MAX_TRAILER_FIELDS or sum([len(name) + len(value) for name, value in trailers]) > MAX_TRAILERS:
        raise Malformed("trailers that are too long")  # before any of them is copied
    check_fields(trailers)


def check_values(headers: list[Header], *start: bytes) -> None:
    """Raises ValueError for a value of ours that HTTP/2 cannot carry, or for white space in `start`, what a request begins with."""
    values = b"".join([value for _, value in headers])
    if values.translate(_WELL_FORMED) != values:
        raise ValueError("a header with a control character in it")
    joined = b"".join(start)
    if joined.translate(_NO_SPACE) != joined:
        raise ValueError("a method, target or authority with white space in it")

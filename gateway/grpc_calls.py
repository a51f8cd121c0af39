"""What gRPC says in HTTP: who speaks it, how long a call may take, and the statuses of calls that are refused.

After PROTOCOL-HTTP2.md and http-grpc-status-mapping.md of github.com/grpc/grpc.
"""

from __future__ import annotations

import binascii
from typing import Final
from urllib.parse import unquote_to_bytes

from gateway.grpc_web import web_content
from mesh.http import Header, RequestHead
from mesh.refusals import BrokenBackend, OverQuota, Refusal, UpstreamReset, UpstreamTimeout

BY_STATUS: Final = {400: b"13", 401: b"16", 403: b"7", 404: b"12", 429: b"8", 502: b"14", 503: b"14", 504: b"14"}
"""By HTTP status; but 429 is RESOURCE_EXHAUSTED, which is what a quota means to gRPC."""
BY_RESET: Final = {
    0: b"13",
    1: b"13",
    2: b"13",
    3: b"13",
    4: b"13",
    6: b"13",
    7: b"14",
    8: b"1",
    9: b"13",
    10: b"13",
    11: b"8",
    12: b"7",
}
"""By the code of an RST_STREAM (RFC 9113 section 7)."""
DEADLINE_EXCEEDED: Final = b"4"
UNKNOWN: Final = b"2"
RESOURCE_EXHAUSTED: Final = b"8"
"""Whatever HTTP status the limit's author chose."""
UNAVAILABLE: Final = b"14"
"""Also of a route's backend that is not there: Gateway API, `GRPCRouteRule.backendRefs`."""
LONGEST_TIMEOUT: Final = 8
"""Digits of a `grpc-timeout`."""
_TYPES: Final = b"type.googleapis.com/google.rpc."
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_UNSAFE: Final = frozenset(range(256)) - frozenset(range(0x20, 0x7F)) | {0x25}


def is_grpc(head: RequestHead | None) -> bool:
    """Whether the caller is a gRPC client (`application/grpc`, also with `+proto` and the like)."""
    if head is None or head.method != b"POST":
        return False
    return speaks_grpc(head.headers)


def speaks_grpc(headers: list[Header]) -> bool:
    """Whether a message's content is gRPC's."""
    for name, value in headers:
        if name == b"content-type":
            return value.startswith(b"application/grpc") and value[16:17] in {b"", b"+", b";", b" "}
    return False


def answers_as(head: RequestHead | None) -> bytes:
    """The content type in which a caller of gRPC, or of gRPC-Web, understands a refusal; empty for any other caller."""
    if head is None or head.method != b"POST":
        return b""
    return b"application/grpc" if speaks_grpc(head.headers) else web_content(head.headers)


def timeout_of(head: RequestHead) -> float | None:
    """Seconds that the caller gives the call, from its beginning (`grpc-timeout`); None when it says nothing, or nothing that is one."""
    for name, value in head.headers:
        if name == b"grpc-timeout":
            digits, unit = value[:-1], _UNITS.get(value[-1:])
            if unit is None or not digits.isdigit() or len(digits) > LONGEST_TIMEOUT:
                return None
            return int(digits) * unit
    return None


def status_of(refusal: Refusal) -> bytes:
    """The `grpc-status` of a call that is refused so."""
    if isinstance(refusal, UpstreamTimeout):
        return DEADLINE_EXCEEDED
    if isinstance(refusal, OverQuota):
        return RESOURCE_EXHAUSTED
    if isinstance(refusal, BrokenBackend):
        return UNAVAILABLE
    if isinstance(refusal, UpstreamReset) and refusal.reset >= 0:
        return BY_RESET.get(refusal.reset, UNKNOWN)
    return BY_STATUS.get(refusal.answer_status, UNKNOWN)


def trailers_of(refusal: Refusal) -> list[Header]:
    """How the end of a refused call is told."""
    said = [(b"grpc-status", status_of(refusal)), (b"grpc-message", percent_encoded(refusal.told or refusal.sentence))]
    if isinstance(refusal, OverQuota) and refusal.retry_after > 0:
        said.append((b"grpc-status-details-bin", binascii.b2a_base64(_details(refusal), newline=False).rstrip(b"=")))
    return said


def _details(refusal: OverQuota) -> bytes:
    """`google.rpc.Status` with `RetryInfo` (when to try again) and `QuotaFailure` (the limit): google/rpc/error_details.proto."""
    message = (refusal.told or refusal.sentence).encode()
    milliseconds = -int(-refusal.retry_after * 1000 // 1)
    delay = _number(1, milliseconds // 1000) + _number(2, milliseconds % 1000 * 1_000_000)
    limit = refusal.limit.rpartition("/")[2].encode()
    failure = _field(1, _field(1, b"limit:" + limit) + _field(2, message))
    return b"".join(
        (
            _number(1, int(RESOURCE_EXHAUSTED)),
            _field(2, message),
            _field(3, _field(1, _TYPES + b"RetryInfo") + _field(2, _field(1, delay))),
            _field(3, _field(1, _TYPES + b"QuotaFailure") + _field(2, failure)),
        )
    )


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes on the wire of protocol buffers."""
    return bytes((number << 3 | 2,)) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    """A field with a number; 0 goes without saying."""
    return bytes((number << 3,)) + _varint(value) if value else b""


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def percent_encoded(text: str) -> bytes:
    """`grpc-message`'s encoding: printable ASCII but `%` as it is."""
    return b"".join(b"%%%02X" % byte if byte in _UNSAFE else bytes((byte,)) for byte in text.encode())


def percent_decoded(value: bytes) -> str:
    """The text of a `grpc-message`; what is not encoded as it should be is taken as it is."""
    return unquote_to_bytes(value).decode("utf-8", "replace")

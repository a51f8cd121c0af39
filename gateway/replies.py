"""What the gateway itself says to a client: refusals, redirects, and the same to gRPC callers.

A refusal's client reads one sentence; the reason stays in the log. A gRPC caller gets a "Trailers-Only" answer (gRPC over HTTP2,
"Responses"): its libraries understand nothing else. `server: tollhouse` tells these answers from those of an upstream.
"""

from __future__ import annotations

from typing import Final

from mesh.http import Header, RequestHead
from mesh.outcome import Outcome
from mesh.refusals import BrokenBackend, Refusal

SERVER: Final[Header] = (b"server", b"tollhouse")
TEXT: Final[Header] = (b"content-type", b"text/plain; charset=utf-8")
GRPC: Final[Header] = (b"content-type", b"application/grpc")
GRPC_STATUS: Final = {400: b"13", 401: b"16", 403: b"7", 404: b"12", 429: b"8", 502: b"14", 503: b"14", 504: b"14"}
"""By HTTP status (grpc/doc/http-grpc-status-mapping.md); but 429 is RESOURCE_EXHAUSTED, which is what a quota means to gRPC."""
UNKNOWN: Final = b"2"
UNAVAILABLE: Final = b"14"
"""What a backend is that is not there (Gateway API, `GRPCRouteRule.backendRefs`)."""
BODILESS: Final = frozenset((204, 304))
_UNSAFE: Final = frozenset(range(256)) - frozenset(range(0x20, 0x7F)) | {0x25}


Said = tuple[int, list[Header], bytes]
"""Status, headers and body of an answer of the gateway's own."""


def is_grpc(head: RequestHead | None) -> bool:
    """Whether the caller is a gRPC client (`application/grpc`, also with `+proto` and the like)."""
    if head is None or head.method != b"POST":
        return False
    for name, value in head.headers:
        if name == b"content-type":
            return value.startswith(b"application/grpc") and value[16:17] in {b"", b"+", b";", b" "}
    return False


def note(outcome: Outcome, refusal: Refusal, answered: bool) -> None:
    """Writes down why a request ended; its status too, unless the client has been `answered` with another."""
    outcome.flag = refusal.flag
    outcome.details = refusal.details
    outcome.reason = refusal.reason
    if not answered:
        outcome.status = refusal.answer_status


def refusal_answer(refusal: Refusal, head: RequestHead | None, date: bytes) -> Said:
    """How `refusal` is told to the client of `head` (None when no head could be read)."""
    status = refusal.answer_status
    extra = refusal.headers
    if is_grpc(head):
        headers = [
            GRPC,
            (b"grpc-status", UNAVAILABLE if isinstance(refusal, BrokenBackend) else GRPC_STATUS.get(status, UNKNOWN)),
            (b"grpc-message", percent_encoded(refusal.sentence)),
            *(field for field in extra if field[0] not in {b"content-type", b"content-length", b"grpc-status", b"grpc-message"}),
        ]
        return 200, headers, b""
    body = refusal.sentence.encode() + b"\n" if refusal.body is None else refusal.body
    return answer(status, extra, body, date)


def answer(status: int, extra: tuple[Header, ...] | list[Header], body: bytes, date: bytes) -> Said:
    """An answer with `extra` headers and `body`; framing, `date`, `server` and (with a body) a content type are added."""
    if status in BODILESS:
        body = b""
    headers = [field for field in extra if field[0] != b"content-length"]
    names = {name for name, _ in headers}
    if body and b"content-type" not in names:
        headers.append(TEXT)
    if status not in BODILESS:
        headers.append((b"content-length", b"%d" % len(body)))
    if b"date" not in names:
        headers.append((b"date", date))
    if b"server" not in names:
        headers.append(SERVER)
    return status, headers, body


def percent_encoded(text: str) -> bytes:
    """`grpc-message`'s encoding: printable ASCII but `%` as it is."""
    return b"".join(b"%%%02X" % byte if byte in _UNSAFE else bytes((byte,)) for byte in text.encode())

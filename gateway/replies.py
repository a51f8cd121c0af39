"""What the gateway itself says to a client: refusals, redirects, and the same to gRPC callers.

A refusal's client reads one sentence; the reason stays in the log. A gRPC caller gets a "Trailers-Only" answer (gRPC over HTTP2,
"Responses"): its libraries understand nothing else. `server: tollhouse` tells these answers from those of an upstream.
"""

from __future__ import annotations

import random
from typing import Final

from gateway.grpc_calls import answers_as, trailers_of
from gateway.headers import REQUEST_ID
from gateway.trace import identifiers
from mesh.http import Header, RequestHead
from mesh.outcome import Outcome
from mesh.refusals import QuotaRefusal, Refusal

SERVER: Final[Header] = (b"server", b"tollhouse")
TEXT: Final[Header] = (b"content-type", b"text/plain; charset=utf-8")
BODILESS: Final = frozenset((204, 304))
_LONGEST_ID: Final = 128
_PLAIN: Final = bytes(byte if (chr(byte).isalnum() and byte < 0x80) or byte in b"-_.:" else 0x5F for byte in range(256))


Said = tuple[int, list[Header], bytes]
"""Status, headers and body of an answer of the gateway's own."""


def note(outcome: Outcome, refusal: Refusal, answered: bool) -> None:
    """Writes down why a request ended; its status too, unless the client has been `answered` with another."""
    outcome.flag = refusal.flag
    outcome.details = refusal.details
    outcome.reason = refusal.reason
    if isinstance(refusal, QuotaRefusal):
        outcome.limit = refusal.limit
    if not answered:
        outcome.status = refusal.answer_status


def refusal_answer(refusal: Refusal, head: RequestHead | None, date: bytes, request_id: bytes = b"") -> Said:
    """How `refusal` is told to the client of `head` (None when no head could be read)."""
    status = refusal.answer_status
    extra = refusal.headers
    if content := answers_as(head):
        headers = [
            (b"content-type", content),
            *trailers_of(refusal),
            *(field for field in extra if field[0] not in {b"content-type", b"content-length", b"grpc-status", b"grpc-message"}),
        ]
        return 200, headers, b""
    body: bytes
    if refusal.parts:
        body = _cleaned(request_id).join(refusal.parts) if len(refusal.parts) > 1 else refusal.parts[0]
    else:
        body = (refusal.told or refusal.sentence).encode() + b"\n" if refusal.body is None else refusal.body
    return answer(status, extra, body, date)


def _cleaned(request_id: bytes) -> bytes:
    """A request's id as it may stand in any kind of text: a gateway in front of this one may have been given it by anybody."""
    return request_id[:_LONGEST_ID].translate(_PLAIN)


def named(said: Said, outcome: Outcome, rng: random.Random) -> None:
    """Gives a refusal's answer the id by which its request is found in the logs; one that has none yet gets one."""
    identified(outcome, rng)
    if all(name != REQUEST_ID for name, _ in said[1]):
        said[1].append((REQUEST_ID, outcome.request_id))


def identified(outcome: Outcome, rng: random.Random) -> bytes:
    """The id of a request; one that has none yet gets one."""
    if not outcome.request_id:
        outcome.request_id = identifiers(rng)[0]
    return outcome.request_id


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

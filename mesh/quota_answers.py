"""How a quota's refusal is told to its client: status, headers, and a body with a few operators in it (Envoy's `%NAME%`).

An operator stands for one of a handful of values, all of them the gateway's own or cleaned before they are put in: nothing that a client
sends gets into an answer. `%%` is a per cent sign.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from mesh import formats
from mesh.documents import FieldPath
from mesh.schema import Duration, Faults, Fields, Items, Number, Text, listed, nearest

OPERATORS: Final = ("LIMIT", "POLICY", "RETRY_AFTER", "REMAINING", "QUOTA", "WINDOW", "REQUEST_ID", "RESPONSE_CODE")
"""`LIMIT`: the limit's name; `POLICY`: its policy's `namespace/name`; `RETRY_AFTER`: seconds, as in the header; `REMAINING`: tokens left;
`QUOTA` and `WINDOW`: the burst, and the seconds that it takes to fill; `REQUEST_ID`: as in `x-request-id`; `RESPONSE_CODE`: the status."""
MOST_BODY: Final = 16_384
"""Characters of a body as its author writes it."""
MOST_OPERATORS: Final = 64
LONGEST_JITTER: Final = 3600.0
"""Seconds."""
OURS: Final = frozenset(
    (
        "connection",
        "content-length",
        "content-type",
        "date",
        "grpc-message",
        "grpc-status",
        "grpc-status-details-bin",
        "keep-alive",
        "proxy-connection",
        "ratelimit",
        "ratelimit-policy",
        "retry-after",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    )
)
"""Headers of an answer that the gateway writes itself."""
_PARTS: Final = re.compile(r"%([A-Za-z0-9_]*)%")

Template = tuple[bytes, ...]
"""Text, the name of an operator, text, ...: every second part is a name."""


class QuotaAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How a policy's refusals are told."""

    status: int = 429
    headers: tuple[tuple[bytes, Template], ...] = ()
    """Names in lower case."""
    content_type: bytes = b""
    """Empty for plain text."""
    body: Template | None = None
    """None for the sentence that goes without saying."""
    jitter: float = 0.0
    """Seconds by which clients are told to come back later at most, so that they do not all come at once."""


def template(text: str) -> Template:
    """Reads a template. Raises ValueError, worded for its author."""
    parts = _PARTS.split(text)
    if any("%" in part for part in parts[::2]):
        raise ValueError("has a % that begins no operator; write %% for a per cent sign")
    made: list[str] = [""]
    for at, part in enumerate(parts):
        if at % 2 == 0:
            made[-1] += part
        elif not part:
            made[-1] += "%"
        elif part not in OPERATORS:
            near = nearest(part.upper(), OPERATORS)
            hint = f"did you mean %{near}%?" if near else f"there is {listed([f'%{name}%' for name in OPERATORS], 'and')}"
            raise ValueError(f"%{part}% is no operator; {hint}")
        else:
            made += [part, ""]
    if len(made) > 2 * MOST_OPERATORS + 1:
        raise ValueError(f"has {len(made) // 2} operators; at most {MOST_OPERATORS} are allowed")
    return tuple(part.encode() for part in made)


def _template_problem(text: str) -> str:
    try:
        template(text)
    except UnicodeEncodeError:
        return "has half of a character (a surrogate by itself)"
    except ValueError as problem:
        return f"{problem}"
    return ""


def _header_problem(text: str) -> str:
    if wrong := formats.header_value(text) or _template_problem(text):
        return wrong
    if not text.isascii():
        return f"{formats.shown(text)} can't be the value of a header here: it has characters outside ASCII"
    return "can't tell %REQUEST_ID%; the answer has x-request-id by itself" if "%REQUEST_ID%" in text else ""


def _header_name(text: str) -> str:
    if wrong := formats.header_name(text):
        return wrong
    return f"{formats.shown(text)} is the gateway's own to write here" if text.lower() in OURS else ""


def _content_type(text: str) -> str:
    if wrong := formats.header_value(text):
        return wrong
    kind = text.partition(";")[0].strip()
    if not re.fullmatch(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+", kind) or not text.isascii():
        return f"{formats.shown(text)} is not a media type; write it as in application/json"
    return "is gRPC's own: gRPC callers are told by grpc-status" if kind.lower().startswith("application/grpc") else ""


def _rule(answer: Any, path: FieldPath, faults: Faults) -> None:
    if answer.get("contentType") and answer.get("body") is None:
        faults.add((*path, "contentType"), "is about a body, and there is none")
    if answer.get("retryAfterJitter") and formats.seconds(answer["retryAfterJitter"]) > LONGEST_JITTER:
        faults.add((*path, "retryAfterJitter"), "is longer than an hour")
    if all(value is None for value in answer.values()):
        faults.add(path, "says nothing; leave it out")


RESPONSE: Final = Fields(
    {},
    {
        "status": Number(400, 599, "(a status of an error)"),
        "headers": Items(
            Fields({"name": Text(_header_name), "value": Text(_header_problem, least=1, most=1024)}),
            most=16,
            unique=lambda item: item["name"].lower(),
        ),
        "contentType": Text(_content_type, least=1, most=256),
        "body": Text(_template_problem, most=MOST_BODY),
        "retryAfterJitter": Duration(),
    },
    rule=_rule,
)


def answer_of(spec: Any) -> QuotaAnswer | None:
    """What a checked `response` says; None for None."""
    if spec is None:
        return None
    return QuotaAnswer(
        status=spec.get("status") or 429,
        headers=tuple((item["name"].lower().encode(), template(item["value"])) for item in spec.get("headers") or []),
        content_type=(spec.get("contentType") or "").encode(),
        body=template(spec["body"]) if spec.get("body") is not None else None,
        jitter=formats.seconds(spec["retryAfterJitter"]) if spec.get("retryAfterJitter") else 0.0,
    )

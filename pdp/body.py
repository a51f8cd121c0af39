"""`parsed_body` and `truncated_body`: a request's body as the OPA-Envoy plugin shows it to policies.

JSON, URL-encoded forms and multipart forms are parsed; gRPC needs descriptors and is not. A body that was cut is not parsed: it is
null and `truncated_body` is true. A body that is not what its content type says is an error, and then the question is one too.
Differs from the plugin in two ways: it also takes Envoy's word (`x-envoy-auth-partial-body`) that a body without a content length was
cut, and it refuses quoted-printable parts of multipart forms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

import msgspec

from pdp.target import parse_query

PARTIAL: Final = "x-envoy-auth-partial-body"
"""The header with which Envoy (and `pdp.input`) tells whether a body was cut."""

_LENGTH: Final = re.compile(r"[+-]?[0-9]{1,18}")
_BOUNDARY: Final = re.compile(r';[ \t]*boundary=(?:"([^"\\]{1,70})"|([^\s";,]{1,70}))[ \t]*(?:;|$)', re.IGNORECASE)
_NAME: Final = re.compile(r'form-data\b.*?;[ \t]*name=(?:"([^"\\]*)"|([^\s";,]+))', re.IGNORECASE | re.DOTALL)
_PARTS: Final = 1000
_exact = msgspec.json.Decoder(float_hook=Decimal)


class BodyError(ValueError):
    """A body that is not what its content type says."""


def parse_body(headers: Mapping[str, str], body: bytes) -> tuple[Any, bool]:
    """The parsed body (None for none) and whether it was cut. Numbers keep their spelling. Raises `BodyError`, `TargetError`."""
    kind = headers.get("content-type", "")
    parse: Callable[[bytes, str], Any]
    if "application/json" in kind:
        parse = _json
    elif "application/grpc" in kind:
        return None, False
    elif "application/x-www-form-urlencoded" in kind:
        parse = _form
    elif "multipart/form-data" in kind:
        parse = _multipart
    else:
        return None, False
    if not body:
        return None, False
    length = headers.get("content-length")
    if length is not None:
        if not _LENGTH.fullmatch(length):
            raise BodyError("content-length is not a number")
        if int(length) > len(body):
            return None, True
    if headers.get(PARTIAL) == "true":
        return None, True
    return parse(body, kind), False


def _json(body: bytes, _kind: str) -> Any:
    text = body.decode("utf-8", "replace")
    try:
        value = _exact.decode(text)
        json.loads(text, object_pairs_hook=_once)
    except (msgspec.DecodeError, RecursionError, ValueError) as problem:
        raise BodyError(f"the body is not JSON: {problem}") from problem
    return value


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuses a name that is there twice: the policy would read the one value, and the service perhaps the other (RFC 8259 section 4)."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a name is twice in one object")


def _form(body: bytes, _kind: str) -> Any:
    return parse_query(body.decode("utf-8", "replace"), strict=True)


def _multipart(body: bytes, kind: str) -> Any:
    """Parts by their names (RFC 7578): JSON parts parsed, all others as text; a part without a name is left out."""
    match = _BOUNDARY.search(kind)
    if match is None:
        return None
    boundary = b"\r\n--" + (match[1] or match[2]).encode()
    first, *parts = (b"\r\n" + body).split(boundary)
    if not parts or not parts[-1].startswith(b"--") or len(parts) > _PARTS:
        raise BodyError("the multipart body is not whole")
    del first  # a preamble, for people
    found: dict[str, list[Any]] = {}
    for part in parts[:-1]:
        start, _, rest = part.partition(b"\r\n")
        if start.strip(b" \t"):
            raise BodyError("a part of the multipart body does not begin on a line of its own")
        head, end, content = (b"\r\n" + rest).partition(b"\r\n\r\n")
        if not end:
            raise BodyError("a part of the multipart body has no end of its head")
        fields = _fields(head)
        name = _NAME.match(fields.get("content-disposition", ""))
        if name is None or not (name[1] or name[2]):
            continue
        if fields.get("content-transfer-encoding", "").lower() == "quoted-printable":
            raise BodyError("a part of the multipart body is quoted-printable, which is not read here")
        value = _json(content, "") if "application/json" in fields.get("content-type", "") else content.decode("utf-8", "replace")
        found.setdefault(name[1] or name[2], []).append(value)
    return found


def _fields(head: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    return fields

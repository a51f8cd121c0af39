"""Values as the logs show them: short, and on one line whatever a client sent."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from mesh.http import RequestHead

LONGEST = 2048
"""Characters of one value; a head may be 60 KiB."""

_ENCODER = msgspec.json.Encoder()


def shown(value: bytes | None) -> str | None:
    """A header's value as text, cut; None stays None. UTF-8 where it is, otherwise byte by byte."""
    if value is None:
        return None
    value = value[:LONGEST]
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def path_of(head: RequestHead, *, query: bool) -> str | None:
    """The normalised path (as sent if it was never normalised); with the query only when told, for it may hold secrets."""
    if head.path:
        return shown(head.path if not query or head.query is None else head.path + b"?" + head.query)
    return shown(head.target if query else head.target.partition(b"?")[0])


def moment(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds; `seconds` since the epoch."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{_second(whole)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def json_line(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON with its newline. Everything beyond ASCII is escaped: a terminal takes some of it for commands."""
    line = _ENCODER.encode(fields)
    if not line.isascii() or b"\x7f" in line:
        line = json.dumps(fields, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f").encode()
    return line + b"\n"

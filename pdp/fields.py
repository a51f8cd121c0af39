"""Header fields that a policy's answer may carry: which can be used at all. Pure."""

from __future__ import annotations

import re
from typing import Final

from mesh.questions import Decision

MOST_FIELDS: Final = 100
"""Fields that one answer may set, add or remove."""
MOST_BYTES: Final = 60 * 1024
"""Of all names and values together."""
MOST_BODY: Final = 1 << 20
"""Bytes of a denial's body."""
MOST_METADATA: Final = 64 * 1024
"""Bytes of an answer's dynamic metadata."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
FRAMING: Final = frozenset(
    (b"connection", b"content-length", b"host", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
"""Fields that belong to a connection or to the message's framing: no policy's business."""


def name_problem(name: bytes) -> str:
    """Why a policy can't name a field so (`name` is in lower case); empty when it can."""
    if not _NAME.fullmatch(name):
        return f"{name!r} is not a header's name"
    if name in FRAMING:
        return f"the header {name.decode()} is not a policy's to change"
    return ""


def field_problem(name: bytes, value: bytes) -> str:
    """Why a policy can't set a field so; empty when it can."""
    problem = name_problem(name)
    if problem:
        return problem
    return "" if _VALUE.fullmatch(value) else f"the value of the header {name.decode()} has characters that no header may have"


def size_problem(decision: Decision) -> str:
    """Why an answer changes too much; empty when it does not."""
    changes = decision.changes + decision.response_changes
    headers = decision.headers + decision.response_headers
    removed, query_set, query_remove = decision.headers_to_remove, decision.query_set, decision.query_remove
    count = len(headers) + len(changes) + len(removed) + len(query_set) + len(query_remove)
    if count > MOST_FIELDS:
        return f"it has {count} headers and parameters, at most {MOST_FIELDS} are allowed"
    size = 0
    for name, value in headers:
        size += len(name) + len(value)
    for change in changes:
        size += len(change.name) + len(change.value)
    for field in removed:
        size += len(field)
    for parameter, text in query_set:
        size += len(parameter) + len(text)
    for parameter in query_remove:
        size += len(parameter)
    return f"its headers and parameters have {size} bytes, at most {MOST_BYTES} are allowed" if size > MOST_BYTES else ""

"""From the `matches` of a rule to the ways into it."""

from __future__ import annotations

import re
from typing import Any, Literal

from mesh.model import HeaderMatch, Match, QueryMatch, Rule


def http_match(body: Any, rule: Rule) -> Match:
    """A match of an HTTPRoute."""
    path = body.get("path") or {}
    kind, value = path.get("type") or "PathPrefix", path.get("value") or "/"
    path_kind: Literal["exact", "prefix", "regex"]
    if kind == "RegularExpression":
        path_kind, raw, template = "regex", value.encode(), value
    elif kind == "Exact":
        path_kind, raw = "exact", normal_path(value)
        template = raw.decode()
    else:
        path_kind, raw = "prefix", normal_path(value).rstrip(b"/")
        template = raw.decode() + "/**"
    return Match(
        rule=rule,
        path_kind=path_kind,
        path=raw,
        template=template,
        method=(body.get("method") or "").encode(),
        headers=tuple(_header_match(item) for item in body.get("headers") or []),
        queries=tuple(_query_match(item) for item in body.get("queryParams") or []),
    )


def _header_match(item: Any) -> HeaderMatch:
    name = item["name"].lower().encode()
    if item.get("type") == "RegularExpression":
        return HeaderMatch(name, b"", item["value"])
    return HeaderMatch(name, item["value"].encode())


def _query_match(item: Any) -> QueryMatch:
    if item.get("type") == "RegularExpression":
        return QueryMatch(item["name"], "", item["value"])
    return QueryMatch(item["name"], item["value"])


_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")


def normal_path(path: str) -> bytes:
    """A configured path in the form that requests' paths have: escapes of unreserved characters decoded, others in upper case."""

    def respell(found: re.Match[str]) -> str:
        character = chr(int(found.group(1), 16))
        return character if _UNRESERVED.fullmatch(character) else found.group(0).upper()

    return (_ESCAPE.sub(respell, path) if "%" in path else path).encode("ascii")

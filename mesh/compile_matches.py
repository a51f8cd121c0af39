"""From the `matches` of a rule to the ways into it."""

from __future__ import annotations

import re
from typing import Any, Literal

from mesh.model import PATH, HeaderMatch, Match, QueryMatch, Rule


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


ANY_PART = "[^/]+"
"""Of a gRPC path: a service or a method, whatever it is called."""


def grpc_match(body: Any, rule: Rule) -> Match:
    """A match of a GRPCRoute: calls are POST requests to `/service/method` (gRPC over HTTP2, "Requests").

    One method of any service is a condition on the path below the empty prefix, so that one service of any method comes before it.
    """
    wanted = body.get("method") or {}
    service, method = wanted.get("service") or "", wanted.get("method") or ""
    conditions: tuple[HeaderMatch, ...] = ()
    path_kind: Literal["exact", "prefix", "regex"]
    if wanted.get("type") == "RegularExpression":
        expression = "/".join(f"(?:{part})" if part else ANY_PART for part in (service, method))
        path_kind, path, template = "regex", f"/{expression}", f"/{service or '*'}/{method or '*'}"
    elif service and method:
        path_kind, path = "exact", f"/{service}/{method}"
        template = path
    elif service:
        path_kind, path, template = "prefix", f"/{service}", f"/{service}/**"
    elif method:
        path_kind, path, template = "prefix", "", f"/*/{method}"
        conditions = (HeaderMatch(PATH, b"", f"/{ANY_PART}/{method}"),)
    else:
        path_kind, path, template = "prefix", "", "/**"
    return Match(
        rule=rule,
        path_kind=path_kind,
        path=path.encode(),
        template=template,
        method=b"POST",
        headers=conditions + tuple(_header_match(item) for item in body.get("headers") or []),
    )


def specificity(match: Match) -> tuple[int, int, int, int]:
    """Gateway API's order among matches with the same path; expressions come longest first."""
    length = -len(match.path) if match.path_kind == "regex" else 0
    headers = match.headers
    if headers and headers[0].name == PATH:
        length, headers = -len(headers[0].regex), headers[1:]
    return length, 0 if match.method else 1, -len(headers), -len(match.queries)


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

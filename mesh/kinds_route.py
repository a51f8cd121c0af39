"""The schema of Gateway API's `HTTPRoute`, with the limits and cross-field rules of its CRD."""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_filters import (
    FILTERS,
    INT32,
    RULE_ONLY,
    SESSION,
    backend,
    filters,
    header_matches,
    prefix_rule,
    redirect_rule,
    value_rule,
)
from mesh.kinds_gateway import PARENT_REFS, SCOPE, SECTION, check_parents
from mesh.schema import Choice, Duration, Faults, Fields, Items, Number, Text

NO_TRACE: Final = {"TRACE": "it is never passed on, since it would show clients what is added to their requests"}
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT")


def _path_rule(match: Any, path: FieldPath, faults: Faults) -> None:
    value = match.get("value") or "/"
    kind = match.get("type") or "PathPrefix"
    if not value.isascii():
        faults.add((*path, "value"), f"{formats.shown(value)} is not ASCII; a path in a request is, with anything else written as %XX")
        return
    wrong = formats.expression(value) if kind == "RegularExpression" else formats.path(value)
    if wrong:
        faults.add((*path, "value"), wrong)


def _method(noun: str) -> Choice:
    return Choice(noun, *METHODS, unsupported=NO_TRACE)


def _match_rule(match: Any, path: FieldPath, faults: Faults) -> None:
    """CONNECT names a host and a port, and nothing else of a URL."""
    if match.get("method") != "CONNECT":
        return
    where = match.get("path") or {}
    if (where.get("value") or "/") != "/" or where.get("type") == "RegularExpression":
        faults.add((*path, "path"), "does not go with method: CONNECT, which has no path")
    if match.get("queryParams"):
        faults.add((*path, "queryParams"), "does not go with method: CONNECT, which has no query")


_NOT_FOR_TUNNELS: Final = ("RequestRedirect", "URLRewrite", "RequestMirror", "CORS")


def _tunnel_rule(rule: Any, path: FieldPath, faults: Faults) -> None:
    """What a rule for CONNECT cannot do: what goes through a tunnel is not the gateway's to read or to answer."""
    if not any(match.get("method") == "CONNECT" for match in rule.get("matches") or []):
        return
    holders = [(rule, path), *((ref, (*path, "backendRefs", index)) for index, ref in enumerate(rule.get("backendRefs") or []))]
    for holder, place in holders:
        for index, item in enumerate(holder.get("filters") or []):
            if item.get("type") in _NOT_FOR_TUNNELS:
                faults.add((*place, "filters", index, "type"), f"{item['type']} does not go with method: CONNECT; make another rule of it")


_MATCH: Final = Fields(
    {},
    {
        "path": Fields(
            {},
            {"type": Choice("a path type", "PathPrefix", "Exact", "RegularExpression"), "value": Text(most=1024)},
            rule=_path_rule,
        ),
        "headers": header_matches(),
        "queryParams": Items(
            Fields(
                {"name": Text(formats.header_name), "value": Text(least=1, most=1024)},
                {"type": Choice("a type of query match", "Exact", "RegularExpression")},
                rule=value_rule,
            ),
            most=16,
            unique="name",
        ),
        "method": _method("a method"),
    },
    rule=_match_rule,
)

_BACKEND: Final = backend(filters("a filter of a backend", *(name for name in FILTERS if name not in RULE_ONLY), unsupported=RULE_ONLY))
_RETRY: Final = Fields(
    {},
    {
        "codes": Items(Number(400, 599), unique=lambda code: code),
        "attempts": Number(1, INT32),
        "backoff": Duration(),
    },
)


def _timeouts_rule(timeouts: Any, path: FieldPath, faults: Faults) -> None:
    whole = formats.seconds(timeouts.get("request") or "0s")
    one = formats.seconds(timeouts.get("backendRequest") or "0s")
    if whole and one > whole:
        faults.add((*path, "backendRequest"), f"{timeouts['backendRequest']} is longer than the whole request's {timeouts['request']}")


def _rule_rule(rule: Any, path: FieldPath, faults: Faults) -> None:
    if rule.get("backendRefs") and any(item["type"] == "RequestRedirect" for item in rule.get("filters") or []):
        faults.add((*path, "backendRefs"), "must not be there with a RequestRedirect: the gateway answers by itself")
    _tunnel_rule(rule, path, faults)
    matches = rule.get("matches") or [{}]
    places = [(rule, path)]
    places += [(ref, (*path, "backendRefs", index)) for index, ref in enumerate(rule.get("backendRefs") or [])]
    for holder, place in places:
        redirect_rule(holder, place, faults)
        prefix_rule(holder, matches, place, faults)


_RULE: Final = Fields(
    {},
    {
        "name": SECTION,
        "matches": Items(_MATCH, most=64),
        "filters": filters("a filter", *FILTERS, unsupported={}),
        "backendRefs": Items(_BACKEND, most=16),
        "timeouts": Fields({}, {"request": Duration(), "backendRequest": Duration()}, rule=_timeouts_rule),
        "retry": _RETRY,
        "sessionPersistence": SESSION,
    },
    rule=_rule_rule,
)


def route_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    """What holds for a route as a whole."""
    check_parents(spec, path, faults)
    total = sum(len(rule.get("matches") or []) for rule in spec.get("rules") or [])
    if total > 128:
        faults.add((*path, "rules"), f"has {total} matches in all; at most 128 are allowed: make several routes of it")


HOSTNAMES: Final = Items(Text(formats.hostname), most=16, unique=lambda host: host)

HTTP_ROUTE: Final = Fields(
    {},
    {
        "parentRefs": PARENT_REFS,
        "useDefaultGateways": SCOPE,
        "hostnames": HOSTNAMES,
        "rules": Items(_RULE, least=1, most=16, unique="name"),
    },
    rule=route_rule,
)

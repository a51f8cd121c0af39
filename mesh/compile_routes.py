"""From an HTTPRoute to rules and ways into them, at each listener that lets the route in.

The parts of a rule that don't depend on the listener are made once; what is asked at the levels above the route comes from the listener.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from mesh import formats
from mesh.compile_attach import Parent, attach
from mesh.compile_policies import NOTHING, Attached
from mesh.compile_world import Look, Trouble, age
from mesh.documents import Document, FieldPath, Problem
from mesh.http import Header
from mesh.model import Backend, HeaderChange, HeaderMatch, Match, QueryMatch, Redirect, Rewrite, Rule

DEFAULT_TIMEOUT = 15.0
"""Seconds; Envoy's default for a route."""


class Ranked(msgspec.Struct, frozen=True):
    """A match with its place among those that the same path leads to: the lowest comes first."""

    rank: tuple[Any, ...]
    match: Match


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """A route at one listener."""

    gateway: str
    section: str
    hostnames: tuple[str, ...]
    matches: tuple[Ranked, ...]


class RoutePart(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a route."""

    bindings: tuple[Binding, ...] = ()
    parents: tuple[Parent, ...] = ()
    """What became of each `parentRef` that names a Gateway of ours, or nothing that is there."""
    problems: tuple[Problem, ...] = ()


def compile_route(document: Document, look: Look) -> RoutePart:
    """A route at every listener of ours that it names and that lets it in."""
    trouble = Trouble(document)
    places, parents = attach(document, look, trouble)
    if not parents:
        return RoutePart(problems=tuple(trouble.found))
    key, spec = document.key, document.body["spec"]
    at_route = look("attached", "HTTPRoute", key.namespace, key.name, "")
    rules = []
    # Gateway API: a route without rules has one that matches everything, as the CRD's default says.
    for index, body in enumerate(spec.get("rules") or [{}]):
        at_rule = look("attached", "HTTPRoute", key.namespace, key.name, body["name"]) if body.get("name") else NOTHING
        rule = _rule(document, index, body, at_route + at_rule, look, trouble)
        rules.append((rule, [_match(match, rule) for match in body.get("matches") or [{}]]))
    created = age(document)
    bindings = []
    for place in places:
        matches = []
        for index, (rule, templates) in enumerate(rules):
            own = _with_above(rule, place.part.attached)
            for number, match in enumerate(templates):
                bound = msgspec.structs.replace(match, rule=own) if own is not rule else match
                matches.append(Ranked((*_specificity(match), created, index, number), bound))
        bindings.append(Binding(gateway=place.gateway, section=place.part.listener.name, hostnames=place.hostnames, matches=tuple(matches)))
    return RoutePart(bindings=tuple(bindings), parents=parents, problems=tuple(trouble.found))


def _with_above(rule: Rule, above: Attached) -> Rule:
    if not (above.decisions or above.limits):
        return rule
    return msgspec.structs.replace(rule, decisions=above.decisions + rule.decisions, limits=above.limits + rule.limits)


def _specificity(match: Match) -> tuple[int, int, int, int]:
    """Gateway API's order among matches with the same path; expressions come longest first."""
    length = -len(match.path) if match.path_kind == "regex" else 0
    return length, 0 if match.method else 1, -len(match.headers), -len(match.queries)


# A rule


def _rule(document: Document, index: int, body: Any, attached: Attached, look: Look, trouble: Trouble) -> Rule:
    key = document.key
    path: FieldPath = ("spec", "rules", index)
    filters = {item["type"]: item for item in body.get("filters") or []}
    redirect = _redirect(filters["RequestRedirect"]["requestRedirect"]) if "RequestRedirect" in filters else None
    refs = body.get("backendRefs") or []
    backends = [_backend(document, ref, (*path, "backendRefs", number), look, trouble) for number, ref in enumerate(refs)]
    if not refs and redirect is None:
        trouble.warn((*path, "backendRefs"), "the rule has no backend: what it matches is answered with 500", "BackendNotFound")
        backends.append(Backend(weight=1))
    timeouts = body.get("timeouts") or {}
    whole = formats.seconds(timeouts["request"]) if timeouts.get("request") else DEFAULT_TIMEOUT
    one = formats.seconds(timeouts["backendRequest"]) if timeouts.get("backendRequest") else 0.0
    if not timeouts.get("request") and one > whole:
        whole = one
    return Rule(
        name=f"{key.namespace}/{key.name}#{body.get('name') or index}",
        route=str(key),
        namespace=key.namespace,
        backends=tuple(backends),
        request_headers=_header_change(filters.get("RequestHeaderModifier", {}).get("requestHeaderModifier")),
        response_headers=_header_change(filters.get("ResponseHeaderModifier", {}).get("responseHeaderModifier")),
        rewrite=_rewrite(filters["URLRewrite"]["urlRewrite"]) if "URLRewrite" in filters else None,
        redirect=redirect,
        timeout=whole or None,
        backend_timeout=one or None,
        decisions=attached.decisions,
        limits=attached.limits,
        origin=document.origin.at(path),
    )


def _backend(document: Document, ref: Any, path: FieldPath, look: Look, trouble: Trouble) -> Backend:
    weight = ref["weight"] if ref.get("weight") is not None else 1
    filters = {item["type"]: item for item in ref.get("filters") or []}
    namespace = ref.get("namespace") or document.key.namespace
    service = f"{namespace}/{ref['name']}"
    cluster, gateway, attached = "", False, NOTHING
    if (ref.get("kind") or "Service") != "Service" or ref.get("group"):
        trouble.add(
            (*path, "kind"),
            f"{ref.get('group') or 'core'}/{ref.get('kind') or 'Service'} can't be a backend here; use a Service",
            "InvalidKind",
        )
    elif not ref.get("port"):
        trouble.add((*path, "port"), "is missing; a Service is referred to with a port", "BackendNotFound")
    elif not look("granted", "HTTPRoute", document.key.namespace, "", "Service", namespace, ref["name"]):
        message = f"Service {service} is in another namespace, which has not granted it; apply a ReferenceGrant in {namespace}"
        trouble.add(path, f"{message} from HTTPRoute in {document.key.namespace}", "RefNotPermitted")
    else:
        facts = look("service", namespace, ref["name"])
        if isinstance(facts, str):
            trouble.add((*path, "name"), facts, "BackendNotFound")
        elif ref["port"] not in facts.ports:
            ports = ", ".join(str(port) for port in sorted(facts.ports)) or "none"
            trouble.add((*path, "port"), f"Service {service} has no TCP port {ref['port']}; it has {ports}", "BackendNotFound")
        elif facts.ports[ref["port"]].broken:
            port = facts.ports[ref["port"]]
            trouble.add(path, f"nothing is sent to Service {service} port {ref['port']}: {port.broken}", port.reason)
        else:
            cluster, gateway = facts.ports[ref["port"]].cluster, facts.gateway
            attached = NOTHING if gateway else look("attached", "Service", namespace, ref["name"], "")
    return Backend(
        weight=weight,
        cluster=cluster,
        service=service,
        request_headers=_header_change(filters.get("RequestHeaderModifier", {}).get("requestHeaderModifier")),
        response_headers=_header_change(filters.get("ResponseHeaderModifier", {}).get("responseHeaderModifier")),
        decisions=attached.decisions,
        limits=attached.limits,
    )


# Filters and matches


def _pairs(items: Any) -> tuple[Header, ...]:
    return tuple((item["name"].lower().encode(), item["value"].encode("latin-1")) for item in items or [])


def _header_change(body: Any) -> HeaderChange | None:
    if not body:
        return None
    removed = tuple(name.lower().encode() for name in body.get("remove") or [])
    return HeaderChange(set=_pairs(body.get("set")), add=_pairs(body.get("add")), remove=removed)


def _path_change(body: Any) -> tuple[Literal["", "full", "prefix"], bytes]:
    modifier = body.get("path")
    if not modifier:
        return "", b""
    if modifier["type"] == "ReplaceFullPath":
        return "full", normal_path(modifier["replaceFullPath"])
    return "prefix", normal_path(modifier["replacePrefixMatch"]).rstrip(b"/")


def _rewrite(body: Any) -> Rewrite:
    mode, path = _path_change(body)
    return Rewrite(hostname=(body.get("hostname") or "").encode(), path_mode=mode, path=path)


def _redirect(body: Any) -> Redirect:
    mode, path = _path_change(body)
    return Redirect(
        scheme=(body.get("scheme") or "").encode(),
        hostname=(body.get("hostname") or "").encode(),
        port=body.get("port") or 0,
        path_mode=mode,
        path=path,
        status=body.get("statusCode") or 302,
    )


def _match(body: Any, rule: Rule) -> Match:
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

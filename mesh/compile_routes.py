"""From an HTTPRoute to rules and ways into them, at each listener that lets the route in.

The parts of a rule that don't depend on the listener are made once; what is asked at the levels above the route comes from the listener.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from mesh import formats
from mesh.compile_listeners import GatewayPart, ListenerPart
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
    problems: tuple[Problem, ...] = ()


def compile_route(document: Document, look: Look) -> RoutePart:
    """A route at every listener of ours that it names and that lets it in."""
    trouble = Trouble(document)
    places = _places(document, look, trouble)
    if not places:
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
    for gateway, part, hostnames in places:
        matches = []
        for index, (rule, templates) in enumerate(rules):
            own = _with_above(rule, part.attached)
            for number, match in enumerate(templates):
                bound = msgspec.structs.replace(match, rule=own) if own is not rule else match
                matches.append(Ranked((*_specificity(match), created, index, number), bound))
        bindings.append(Binding(gateway=gateway, section=part.listener.name, hostnames=hostnames, matches=tuple(matches)))
    return RoutePart(bindings=tuple(bindings), problems=tuple(trouble.found))


def _with_above(rule: Rule, above: Attached) -> Rule:
    if not (above.decisions or above.limits):
        return rule
    return msgspec.structs.replace(rule, decisions=above.decisions + rule.decisions, limits=above.limits + rule.limits)


def _specificity(match: Match) -> tuple[int, int, int, int]:
    """Gateway API's order among matches with the same path; expressions come longest first."""
    length = -len(match.path) if match.path_kind == "regex" else 0
    return length, 0 if match.method else 1, -len(match.headers), -len(match.queries)


# Where a route attaches


def _places(document: Document, look: Look, trouble: Trouble) -> list[tuple[str, ListenerPart, tuple[str, ...]]]:
    spec = document.body["spec"]
    wanted = tuple(spec.get("hostnames") or ())
    places: dict[tuple[str, str], tuple[str, ListenerPart, tuple[str, ...]]] = {}
    refs = spec.get("parentRefs") or []
    if not refs:
        trouble.warn(("spec", "parentRefs"), "the route names no Gateway and is in force nowhere; add a parentRef", "NoMatchingParent")
    for index, ref in enumerate(refs):
        path: FieldPath = ("spec", "parentRefs", index)
        namespace = ref.get("namespace") or document.key.namespace
        gateway: GatewayPart | str = look("gateway", namespace, ref["name"])
        if isinstance(gateway, str):
            if gateway:
                trouble.add((*path, "name"), gateway, "NoMatchingParent")
            continue
        found, refused = False, ("NoMatchingParent", "")
        for part in gateway.listeners:
            listener = part.listener
            if ref.get("sectionName") not in (None, listener.name) or ref.get("port") not in (None, listener.port):
                continue
            hostnames, why = _admitted(document, wanted, gateway, part, look)
            if hostnames:
                found = True
                name = f"{gateway.namespace}/{gateway.name}"
                places.setdefault((name, listener.name), (name, part, hostnames))
            elif not refused[1]:
                refused = why
        if not found:
            trouble.add(path, refused[1] or _no_section(ref, gateway), refused[0])
    return [place for place in places.values() if not place[1].broken]


def _no_section(ref: Any, gateway: GatewayPart) -> str:
    names = ", ".join(f"{part.listener.name} (port {part.listener.port})" for part in gateway.listeners)
    wanted = " and ".join(f"{field} {ref[field]}" for field in ("sectionName", "port") if ref.get(field))
    return f"Gateway {gateway.namespace}/{gateway.name} has no listener with {wanted}; it has {names}"


def _admitted(
    document: Document, wanted: tuple[str, ...], gateway: GatewayPart, part: ListenerPart, look: Look
) -> tuple[tuple[str, ...], tuple[str, str]]:
    """The hostnames under which a listener lets the route in; none, and then why."""
    name = f"{part.listener.name} of Gateway {gateway.namespace}/{gateway.name}"
    namespace = document.key.namespace
    allowed = {"All": True, "None": False, "Same": namespace == gateway.namespace}.get(part.namespaces)
    if allowed is None:
        allowed = selects(part.selector, look("labels", namespace))
    if not allowed:
        choice = f"from: {part.namespaces}"
        remedy = f"the listener {name} lets in no routes of the namespace {namespace} (allowedRoutes.namespaces {choice})"
        return (), ("NotAllowedByListeners", remedy + "; change that, or move the route")
    if not part.http_routes:
        return (), ("NotAllowedByListeners", f"the listener {name} lets in no HTTPRoute (allowedRoutes.kinds)")
    hostnames = intersect(wanted, part.listener.hostname)
    message = f"none of the route's hostnames ({', '.join(wanted)}) is one of the listener {name} ({part.listener.hostname})"
    return hostnames, ("NoMatchingListenerHostname", message)


def intersect(wanted: tuple[str, ...], listener: str) -> tuple[str, ...]:
    """The hostnames of a route at a listener (Gateway API, "HTTPRoute.spec.hostnames"): each the more specific of two that overlap."""
    if not wanted:
        return (listener,)
    found: dict[str, None] = {}
    for host in wanted:
        if covers(listener, host):
            found[host] = None
        elif covers(host, listener):
            found[listener] = None
    return tuple(found)


def covers(pattern: str, host: str) -> bool:
    """Whether every name that `host` stands for (itself a pattern, perhaps) is one of `pattern`."""
    if pattern in ("*", host):
        return True
    return pattern.startswith("*.") and host.removeprefix("*").endswith(pattern[1:])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes fits."""
    for name, value in (selector.get("matchLabels") or {}).items():
        if labels.get(name) != value:
            return False
    for item in selector.get("matchExpressions") or []:
        name, values, operator = item["key"], item.get("values") or [], item["operator"]
        fits = {
            "In": name in labels and labels[name] in values,
            "NotIn": name not in labels or labels[name] not in values,
            "Exists": name in labels,
            "DoesNotExist": name not in labels,
        }[operator]
        if not fits:
            return False
    return True


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

"""Where a route attaches: at which listeners of the parents that it names, under which hostnames, and why not at the others.

The rules are Gateway API's for every kind of route ("ParentReference", "AllowedRoutes", "HTTPRoute.spec.hostnames"); a kind without
hostnames attaches under the listener's own.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.compile_listeners import GatewayPart, ListenerPart
from mesh.compile_world import Look, Trouble, parent_key, selects
from mesh.documents import Document, FieldPath, Key


class Place(msgspec.Struct, frozen=True):
    """A listener that lets a route in."""

    gateway: str
    """`namespace/name`."""
    part: ListenerPart
    hostnames: tuple[str, ...]
    """Those of the route that the listener has, the more specific of two that overlap."""


BY_DEFAULT = -1


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one `parentRef` of a route."""

    index: int
    """In `spec.parentRefs`; `BY_DEFAULT` for a Gateway that the route does not name."""
    owner: Key
    """The Gateway or ListenerSet that it names."""
    gateway: str = ""
    """`namespace/name` of the Gateway; empty when the parent is not there."""
    sections: tuple[str, ...] = ()
    """Names of the listeners of `owner` that the route is attached to, whether they are served or not."""
    reason: str = ""
    """Why it is attached nowhere, as a condition says it; empty when it is."""
    message: str = ""


def attach(document: Document, look: Look, trouble: Trouble) -> tuple[tuple[Place, ...], tuple[Parent, ...]]:
    """The listeners that a route is attached to, and what became of each parent that is ours. Reports parents that don't take it."""
    spec = document.body["spec"]
    wanted = tuple(spec.get("hostnames") or ())
    places: dict[tuple[str, str], Place] = {}
    parents: list[Parent] = []
    left: list[tuple[FieldPath, str, str]] = []
    refs = list(enumerate(spec.get("parentRefs") or []))
    if spec.get("useDefaultGateways") == "All":
        named = {parent_key(document, ref) for _, ref in refs}
        refs += [(BY_DEFAULT, ref) for ref in look("default_gateways") if parent_key(document, ref) not in named]
    if not refs:
        remedy = "set defaultScope: All on a Gateway" if spec.get("useDefaultGateways") == "All" else "add a parentRef"
        trouble.warn(("spec", "parentRefs"), f"the route names no Gateway and is in force nowhere; {remedy}", "NoMatchingParent")
    for index, ref in refs:
        path = parent_path(index)
        owner = parent_key(document, ref)
        gateway: GatewayPart | str = look("parent", owner.kind, owner.namespace, owner.name)
        if isinstance(gateway, str):
            if gateway:
                trouble.add((*path, "name"), gateway, "NoMatchingParent")
                parents.append(Parent(index=index, owner=owner, reason="NoMatchingParent", message=gateway))
            continue
        name = f"{gateway.namespace}/{gateway.name}"
        sections: list[str] = []
        refused = ("NoMatchingParent", "")
        for part in gateway.listeners:
            if part.owner != owner:
                continue
            if ref.get("sectionName") not in (None, part.section) or ref.get("port") not in (None, part.listener.port):
                continue
            hostnames, why = _admitted(document, wanted, part, look)
            if hostnames:
                sections.append(part.section)
                places.setdefault((name, part.listener.name), Place(name, part, hostnames))
            elif not refused[1]:
                refused = why
        reason = message = ""
        if not sections:
            reason, message = refused[0], refused[1] or _no_section(ref, owner, gateway)
        if not sections and index == BY_DEFAULT:
            left.append((path, message, reason))  # a default Gateway need not take every route
            continue
        if not sections:
            trouble.add(path, message, reason)
        parents.append(Parent(index=index, owner=owner, gateway=name, sections=tuple(sections), reason=reason, message=message))
    if left and not places:
        trouble.add(*left[0])
    return tuple(place for place in places.values() if not place.part.broken), tuple(parents)


def parent_path(index: int) -> FieldPath:
    """The field of a route that makes `index` its parent."""
    return ("spec", "useDefaultGateways") if index == BY_DEFAULT else ("spec", "parentRefs", index)


def _no_section(ref: Any, owner: Key, gateway: GatewayPart) -> str:
    names = ", ".join(f"{part.section} (port {part.listener.port})" for part in gateway.listeners if part.owner == owner) or "none"
    wanted = " and ".join(f"{field} {ref[field]}" for field in ("sectionName", "port") if ref.get(field))
    return f"{owner} has no listener with {wanted}; it has {names}"


def _admitted(document: Document, wanted: tuple[str, ...], part: ListenerPart, look: Look) -> tuple[tuple[str, ...], tuple[str, str]]:
    """The hostnames under which a listener lets the route in; none, and then why."""
    name = f"{part.section} of {part.owner}"
    namespace = document.key.namespace
    allowed = {"All": True, "None": False, "Same": namespace == part.owner.namespace}.get(part.namespaces)
    if allowed is None:
        allowed = selects(part.selector, look("labels", namespace))
    if not allowed:
        choice = f"from: {part.namespaces}"
        remedy = f"the listener {name} lets in no routes of the namespace {namespace} (allowedRoutes.namespaces {choice})"
        return (), ("NotAllowedByListeners", remedy + "; change that, or move the route")
    if document.key.kind not in part.kinds:
        kinds = ", ".join(part.kinds) or "no routes at all"
        message = f"the listener {name} lets in no {document.key.kind}; by its protocol and allowedRoutes.kinds it takes {kinds}"
        return (), ("NotAllowedByListeners", message)
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

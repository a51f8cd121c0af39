"""From TCPRoutes, TLSRoutes and UDPRoutes to the rules of the listeners that let them in; and which policies mean less there than they say.

Of several routes that want the same connections the oldest gets them (Gateway API, "Conflicts"): a connection has nothing else to be told
apart by than the listener and the name that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from mesh.compile_attach import Parent, attach
from mesh.compile_exemptions import without
from mesh.compile_filters import reference
from mesh.compile_listeners import GatewayPart
from mesh.compile_policies import Attached
from mesh.compile_world import Look, Trouble, World, age
from mesh.documents import Document, FieldPath, Key, Problem
from mesh.kinds_l4 import L4_KINDS, L4_PROTOCOLS
from mesh.model import Backend, Exemption, Listener, Rule
from mesh.quota_cost import is_after
from mesh.schema import listed
from mesh.sharing import share

_OF_REQUESTS: Final = ("method", "template", "header", "cookie", "claim")
"""Descriptors of quotas that only requests have."""


class L4Binding(msgspec.Struct, frozen=True, kw_only=True):
    """A route at one listener."""

    gateway: str
    section: str
    hostnames: tuple[str, ...]
    rule: Rule
    rank: tuple[Any, ...]
    """The oldest first."""
    key: Key
    where: str


class L4RoutePart(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a route."""

    bindings: tuple[L4Binding, ...] = ()
    parents: tuple[Parent, ...] = ()
    """What became of each `parentRef` that names a Gateway of ours, or nothing that is there."""
    problems: tuple[Problem, ...] = ()


def compile_l4_route(document: Document, look: Look) -> L4RoutePart:
    """A route at every listener of ours that it names and that lets it in."""
    trouble = Trouble(document)
    places, parents = attach(document, look, trouble)
    if not parents:
        return L4RoutePart(problems=tuple(trouble.found))
    key = document.key
    body = document.body["spec"]["rules"][0]
    attached: Attached = look("attached", key.kind, key.namespace, key.name, "")
    if body.get("name"):
        attached += look("attached", key.kind, key.namespace, key.name, body["name"])
    exempt: tuple[Exemption, ...] = look("exempt", key.kind, key.namespace, key.name, "")
    if body.get("name"):
        exempt += look("exempt", key.kind, key.namespace, key.name, body["name"])
    default = look("default_policy")
    path: FieldPath = ("spec", "rules", 0)
    refs = body["backendRefs"]
    backends = tuple(_backend(document, ref, (*path, "backendRefs", number), look, trouble) for number, ref in enumerate(refs))
    if any(place.part.listener.encrypted and not place.part.listener.passthrough for place in places):
        _check_tls(document, refs, backends, look, trouble)
    rule = Rule(
        name=f"{key.namespace}/{key.name}#{body.get('name') or 0}",
        route=str(key),
        namespace=key.namespace,
        backends=backends,
        timeout=None,
        decisions=attached.decisions,
        limits=attached.limits,
        origin=document.origin.at(path),
    )
    bindings = []
    for place in places:
        above, used = without(place.part.attached, exempt, default)
        own = rule
        if above.decisions or above.limits or used:
            decisions, limits = above.decisions + rule.decisions, above.limits + rule.limits
            own = msgspec.structs.replace(rule, decisions=decisions, limits=limits, exempt=used)
        bindings.append(
            L4Binding(
                gateway=place.gateway,
                section=place.part.listener.name,
                hostnames=place.hostnames,
                rule=own,
                rank=age(document),
                key=key,
                where=document.origin.at(("spec", "parentRefs")),
            )
        )
    return L4RoutePart(bindings=tuple(bindings), parents=parents, problems=tuple(trouble.found))


def _backend(document: Document, ref: Any, path: FieldPath, look: Look, trouble: Trouble) -> Backend:
    found = reference(document, ref, path, look, trouble)
    return Backend(
        weight=ref["weight"] if ref.get("weight") is not None else 1,
        cluster=found.cluster,
        service=found.service,
        decisions=found.attached.decisions,
        limits=found.attached.limits,
    )


def _check_tls(document: Document, refs: Any, backends: tuple[Backend, ...], look: Look, trouble: Trouble) -> None:
    """Reports backends that get nothing of what a listener has taken out of TLS, because their ports are for TLS (`Cluster.within_tls`)."""
    for number, (ref, backend) in enumerate(zip(refs, backends, strict=True)):
        namespace = ref.get("namespace") or document.key.namespace
        if backend.cluster and look("service", namespace, ref["name"]).ports[ref["port"]].within_tls:
            message = f"Service {backend.service} port {ref['port']} is for TLS (kubernetes.io/wss), which ends at a listener of this route"
            path: FieldPath = ("spec", "rules", 0, "backendRefs", number, "port")
            trouble.add(path, f"{message}; give the service a BackendTLSPolicy or a ServiceIdentity", "UnsupportedProtocol")


def l4_listener(before: Listener | None, base: Listener, bindings: Iterable[L4Binding]) -> Listener:
    """A listener with the rules of the routes at it; as much of `before` as is equal."""
    rules: dict[str, Rule] = {}
    for binding in sorted(bindings, key=lambda each: each.rank):
        for hostname in binding.hostnames:
            rules.setdefault(hostname, binding.rule)
    made = msgspec.structs.replace(base, rules={hostname: rules[hostname] for hostname in sorted(rules)})
    return share(before, made) if before is not None else made


def overshadowed(bindings: Iterable[L4Binding]) -> list[Problem]:
    """Routes that get nothing of a listener (or of one of its names), because an older one has it. They are accepted all the same."""
    owners: dict[tuple[str, str, str], L4Binding] = {}
    found: list[Problem] = []
    for binding in sorted(bindings, key=lambda each: each.rank):
        lost: dict[Key, list[str]] = {}
        for hostname in binding.hostnames:
            owner = owners.setdefault((binding.gateway, binding.section, hostname), binding)
            if owner.key != binding.key:
                lost.setdefault(owner.key, []).append(hostname)
        for key, hostnames in lost.items():
            what = "" if hostnames == ["*"] else f" for {listed(hostnames, 'and')}"
            message = f"{key} is older and has the listener {binding.section} of Gateway {binding.gateway}{what}"
            found.append(
                Problem(
                    key=binding.key,
                    path=("spec", "parentRefs"),
                    message=message + "; this one gets no connections there",
                    where=binding.where,
                    reason="Overshadowed",
                    severity="warning",
                )
            )
    return found


def check_l4_policies(world: World, gateways: Iterable[GatewayPart]) -> list[Problem]:
    """Policies at places without HTTP that ask for something that only requests have."""
    listeners: dict[tuple[str, str, str, str], bool] = {}
    for gateway in gateways:
        for part in gateway.listeners:
            below = part.listener.protocol in L4_PROTOCOLS
            owner = part.owner
            for section in (part.section, ""):
                place = owner.kind, owner.namespace, owner.name, section
                listeners[place] = listeners.get(place, False) or below
            place = "Gateway", gateway.namespace, gateway.name, ""
            listeners[place] = listeners.get(place, False) or below
    found: list[Problem] = []
    for kind in ("AccessPolicy", "QuotaPolicy"):
        for _, document in sorted(world.of(kind).items()):
            namespace, spec = document.key.namespace, document.body["spec"]
            wants = list(_needs(spec))
            if not wants:
                continue
            for ref in spec.get("targetRefs") or []:
                section = ref.get("sectionName") or ""
                if ref["kind"] in L4_KINDS or listeners.get((ref["kind"], namespace, ref["name"], section)):
                    trouble = Trouble(document)
                    where = f"at {ref['kind']} {namespace}/{ref['name']}, where connections are not HTTP"
                    for path, message in wants:
                        trouble.warn(path, f"{message} {where}", "NoHttp")
                    found += trouble.found
                    break
    return found


def _needs(spec: Any) -> Iterable[tuple[FieldPath, str]]:
    if spec.get("withBody"):
        yield ("spec", "withBody"), "there is no body to show"
    for index, limit in enumerate(spec.get("limits") or []):
        for number, item in enumerate(limit.get("per") or []):
            name = next(iter(item)) if isinstance(item, dict) else item
            if name in _OF_REQUESTS:
                path: FieldPath = ("spec", "limits", index, "per", number)
                yield path, f"there is no {name}, and all connections share one bucket in its place,"
        if is_after(limit.get("costFrom")):
            yield ("spec", "limits", index, "costFrom"), "what a connection comes to is not charged after it, which takes `cost`,"
        elif limit.get("costFrom"):
            yield ("spec", "limits", index, "costFrom"), "there is no header to say what a connection takes, which is `cost`,"

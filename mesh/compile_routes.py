"""From an HTTPRoute or a GRPCRoute to rules and ways into them, at each listener that lets the route in.

The parts of a rule that don't depend on the listener are made once; what is asked at the levels above the route comes from the listener.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.compile_attach import Parent, attach
from mesh.compile_exemptions import without
from mesh.compile_matches import grpc_match, http_match, specificity
from mesh.compile_policies import NOTHING, Attached
from mesh.compile_rules import compile_rule
from mesh.compile_world import Look, Trouble, age
from mesh.documents import Document, Key, Problem
from mesh.model import Exemption, Match, Rule


class Ranked(msgspec.Struct, frozen=True):
    """A match with its place among those that the same path leads to: the lowest comes first."""

    rank: tuple[Any, ...]
    match: Match


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """A route at one listener."""

    gateway: str
    section: str
    owner: Key
    """Of the listener: a Gateway or a ListenerSet, where it is called `own_section`."""
    own_section: str
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
    at_route = look("attached", key.kind, key.namespace, key.name, "")
    at_route_exempt: tuple[Exemption, ...] = look("exempt", key.kind, key.namespace, key.name, "")
    at_rules_exempt: list[tuple[Exemption, ...]] = []
    default = look("default_policy")
    rules = []
    # Gateway API: an HTTPRoute without rules has one that matches everything, as the CRD's default says.
    http = key.kind == "HTTPRoute"
    made = http_match if http else grpc_match
    for index, body in enumerate(spec.get("rules") or ([{}] if http else [])):
        at_rule = look("attached", key.kind, key.namespace, key.name, body["name"]) if body.get("name") else NOTHING
        at_rules_exempt.append(look("exempt", key.kind, key.namespace, key.name, body["name"]) if body.get("name") else ())
        rule = compile_rule(document, index, body, at_route + at_rule, look, trouble)
        rules.append((rule, [made(match, rule) for match in body.get("matches") or [{}]]))
    created = age(document)
    bindings = []
    for place in places:
        matches = []
        for index, (rule, templates) in enumerate(rules):
            above, exempt = without(place.part.attached, at_route_exempt + at_rules_exempt[index], default)
            own = _with_above(rule, above, exempt)
            for number, match in enumerate(templates):
                bound = msgspec.structs.replace(match, rule=own) if own is not rule else match
                matches.append(Ranked((*specificity(match), created, index, number), bound))
        part = place.part
        bindings.append(
            Binding(
                gateway=place.gateway,
                section=part.listener.name,
                owner=part.owner,
                own_section=part.section,
                hostnames=place.hostnames,
                matches=tuple(matches),
            )
        )
    return RoutePart(bindings=tuple(bindings), parents=parents, problems=tuple(trouble.found))


def _with_above(rule: Rule, above: Attached, exempt: tuple[Exemption, ...]) -> Rule:
    if not (above.decisions or above.limits or exempt):
        return rule
    decisions, limits = above.decisions + rule.decisions, above.limits + rule.limits
    return msgspec.structs.replace(rule, decisions=decisions, limits=limits, exempt=exempt)

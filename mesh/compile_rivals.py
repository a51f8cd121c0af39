"""HTTPRoutes and GRPCRoutes that want the same hosts of one listener: it takes those of the older route (`GRPCRouteSpec.hostnames`)."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.compile_attach import Parent, covers, parent_path
from mesh.compile_routes import Binding, RoutePart
from mesh.compile_world import Trouble, age
from mesh.documents import Document

REASON = "NotAllowedByListeners"


class _Taken:
    """The hosts of a listener that routes of one kind have."""

    def __init__(self) -> None:
        self.hosts: dict[str, Document] = {}
        self.wild = False

    def add(self, hosts: Iterable[str], document: Document) -> None:
        for host in hosts:
            self.hosts.setdefault(host, document)
            self.wild = self.wild or host.startswith("*")

    def overlapping(self, hosts: Iterable[str]) -> tuple[str, Document] | None:
        """The first host that one of `hosts` is, or is a part of, or has as a part; and whose it is."""
        for host in hosts:
            if host in self.hosts:
                return host, self.hosts[host]
            if self.wild or host.startswith("*"):
                for other, document in self.hosts.items():
                    if covers(host, other) or covers(other, host):
                        return other, document
        return None


def separate(routes: list[tuple[Document, RoutePart]]) -> list[tuple[Document, RoutePart]]:
    """`routes` of both kinds without the bindings that a route of the other kind, an older one, is in the way of. Each says so."""
    if len({document.key.kind for document, _ in routes}) < 2:
        return routes
    taken: dict[tuple[str, str], dict[str, _Taken]] = {}
    lost: dict[int, list[tuple[Binding, str]]] = {}
    for document, part in sorted(routes, key=lambda route: (age(route[0]), route[0].key.kind)):
        kind = document.key.kind
        for binding in part.bindings:
            here = taken.setdefault((binding.gateway, binding.section), {"HTTPRoute": _Taken(), "GRPCRoute": _Taken()})
            rival = here["GRPCRoute" if kind == "HTTPRoute" else "HTTPRoute"].overlapping(binding.hostnames)
            if rival is None:
                here[kind].add(binding.hostnames, document)
                continue
            host, other = rival
            message = (
                f"{other.key} comes first and has the host {host} of the listener {binding.own_section} of {binding.owner}; "
                "an HTTPRoute and a GRPCRoute can't share a host there: give one of them another"
            )
            lost.setdefault(id(part), []).append((binding, message))
    return [(document, _without(document, part, lost[id(part)]) if id(part) in lost else part) for document, part in routes]


def _without(document: Document, part: RoutePart, lost: list[tuple[Binding, str]]) -> RoutePart:
    trouble = Trouble(document)
    gone = {id(binding) for binding, _ in lost}
    parents = part.parents
    for binding, message in lost:
        index = next(parent.index for parent in parents if _has(parent, binding))
        trouble.add(parent_path(index), message, REASON)
        parents = tuple(_left(parent, binding, message) if _has(parent, binding) else parent for parent in parents)
    return msgspec.structs.replace(
        part,
        bindings=tuple(binding for binding in part.bindings if id(binding) not in gone),
        parents=parents,
        problems=part.problems + tuple(trouble.found),
    )


def _has(parent: Parent, binding: Binding) -> bool:
    return parent.owner == binding.owner and binding.own_section in parent.sections


def _left(parent: Parent, binding: Binding, message: str) -> Parent:
    sections = tuple(section for section in parent.sections if section != binding.own_section)
    if sections:
        return msgspec.structs.replace(parent, sections=sections)
    return msgspec.structs.replace(parent, sections=(), reason=REASON, message=message)

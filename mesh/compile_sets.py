"""Which ListenerSets add listeners to which Gateway, in the order in which they win; and which listeners are in each other's way.

Gateway API, "ListenerSet" (GEP-1713) and "Gateway.spec.listeners": a Gateway lets in no set unless `allowedListeners` says so; its own
listeners come first, then the sets by age and name. Of listeners that can't be told apart, those of an earlier resource win; within one
resource nobody does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mesh.compile_tls import Fault
from mesh.compile_world import Name, Trouble, World, age, parent_key, selects
from mesh.documents import Document, FieldPath, Problem
from mesh.kinds_gateway import ROUTE_KINDS

Labels = Any
"""A function: the labels of a namespace."""


def sets_by_gateway(world: World, ours: Mapping[Name, Document], labels: Labels) -> tuple[dict[Name, tuple[Document, ...]], list[Problem]]:
    """The ListenerSets that each Gateway of ours lets in, the ones that win first; and what is wrong with the others."""
    found: dict[Name, list[Document]] = {}
    problems: list[Problem] = []
    for document in sorted(world.of("ListenerSet").values(), key=age):
        ref = document.body["spec"]["parentRef"]
        key = parent_key(document, ref)
        name = key.namespace, key.name
        gateway = ours.get(name)
        trouble = Trouble(document)
        path: FieldPath = ("spec", "parentRef")
        if gateway is None:
            if world.get("Gateway", *name) is None:
                trouble.add((*path, "name"), f"there is no Gateway {key.namespace}/{key.name} in force", "ParentNotAccepted")
        elif _allowed(gateway, document, labels):
            found.setdefault(name, []).append(document)
        else:
            namespaces = (gateway.body["spec"].get("allowedListeners") or {}).get("namespaces") or {}
            choice = namespaces.get("from") or "None"
            message = f"{gateway.key} lets in no ListenerSets of the namespace {document.key.namespace}"
            trouble.add(path, f"{message} (allowedListeners.namespaces from: {choice}); change that, or move the set", "NotAllowed")
        problems += trouble.found
    return {name: tuple(sets) for name, sets in found.items()}, problems


def _allowed(gateway: Document, document: Document, labels: Labels) -> bool:
    namespaces = (gateway.body["spec"].get("allowedListeners") or {}).get("namespaces") or {}
    choice = namespaces.get("from") or "None"
    if choice == "Selector":
        return selects(namespaces.get("selector") or {}, labels(document.key.namespace))
    return choice == "All" or (choice == "Same" and document.key.namespace == gateway.key.namespace)


def transport(protocol: str) -> str:
    """What kind of port a listener binds."""
    return "udp" if protocol == "UDP" else "tcp"


def _family(protocol: str) -> str:
    """Listeners of one family can share a port: they are told apart by the server name (HTTPS, TLS) or the host (HTTP)."""
    return "TLS" if protocol in ("HTTPS", "TLS") else protocol


def conflicts(groups: Sequence[Sequence[Any]]) -> list[list[Fault | None]]:
    """What is in the way of each listener: `groups` holds the listeners (as in `spec.listeners`) of each resource, those that win first."""
    taken: dict[tuple[str, int], tuple[str, set[str]]] = {}
    found: list[list[Fault | None]] = []
    for group in groups:
        lost = [_against(taken, listener) for listener in group]
        left = [
            (index, listener)
            for index, listener in enumerate(group)
            if lost[index] is None and listener["protocol"] in ROUTE_KINDS  # others are not served, and in nobody's way
        ]
        for index, listener in left:
            others = [other for number, other in left if number != index]
            lost[index] = next((fault for other in others if (fault := _between(listener, other)) is not None), None)
        for index, listener in left:
            if lost[index] is None:
                place = transport(listener["protocol"]), listener["port"]
                taken.setdefault(place, (_family(listener["protocol"]), set()))[1].add(_host(listener))
        found.append(lost)
    return found


def _host(listener: Any) -> str:
    return listener.get("hostname") or "*"


def _against(taken: Mapping[tuple[str, int], tuple[str, set[str]]], listener: Any) -> Fault | None:
    protocol, port = listener["protocol"], listener["port"]
    there = taken.get((transport(protocol), port))
    if there is None:
        return None
    # What others have at the port is not said: it may be somebody else's namespace.
    if there[0] != _family(protocol):
        return Fault("Conflicted", "ProtocolConflict", f"port {port} already speaks another protocol than {protocol} on this Gateway")
    if protocol in ("TCP", "UDP") or _host(listener) in there[1]:
        return Fault("Conflicted", "HostnameConflict", f"port {port} and hostname {_host(listener)} are already taken on this Gateway")
    return None


def _between(listener: Any, other: Any) -> Fault | None:
    protocol, port = listener["protocol"], listener["port"]
    if (transport(other["protocol"]), other["port"]) != (transport(protocol), port):
        return None
    if _family(other["protocol"]) != _family(protocol):
        message = f"port {port} is to speak {protocol} here and {other['protocol']} for the listener {other['name']}; use another port"
        return Fault("Conflicted", "ProtocolConflict", message)
    if protocol in ("TCP", "UDP") or _host(listener) == _host(other):
        message = f"the listener {other['name']} has port {port} and hostname {_host(other)} too; change one of them"
        return Fault("Conflicted", "HostnameConflict", message)
    return None

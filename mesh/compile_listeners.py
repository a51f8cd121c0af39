"""From a Gateway and its ListenerSets to listeners: where they listen, and which routes they let in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from mesh.compile_policies import Attached
from mesh.compile_sets import conflicts, transport
from mesh.compile_tls import Fault, Report, certificate_of, is_insecure, listener_tls
from mesh.compile_world import Look, Name, Trouble, World, age
from mesh.documents import Document, FieldPath, Key, Problem
from mesh.kinds_gateway import CONTROLLER, GATEWAY_GROUP, ROUTE_KINDS
from mesh.kinds_l4 import L4_PROTOCOLS
from mesh.material import Unusable
from mesh.model import Listener
from mesh.proxy_protocol import ANNOTATION, ports_of
from mesh.schema import listed, nearest
from mesh.tokens import NOT_AUTHENTICATED, Authentication

_ANY_ADDRESS = ("0.0.0.0", "::")


class ListenerPart(msgspec.Struct, frozen=True, kw_only=True):
    """A listener without its routes."""

    listener: Listener
    """`hosts` is empty."""
    owner: Key
    """The Gateway or the ListenerSet that it is written in."""
    section: str
    """Its name there."""
    namespaces: Literal["Same", "All", "Selector", "None"] = "Same"
    selector: dict[str, Any] = {}
    kinds: tuple[str, ...] = ()
    """The kinds of routes that may attach: those of its protocol, and of `allowedRoutes.kinds`."""
    attached: Attached
    """Of the levels mesh, gateway and listener."""
    broken: bool = False
    """It is not served: what it needs is not there, or another has its place."""
    faults: tuple[Fault, ...] = ()


class GatewayPart(msgspec.Struct, frozen=True, kw_only=True):
    """A Gateway of ours without its routes."""

    namespace: str
    name: str
    addresses: tuple[str, ...] = ()
    proxy_ports: tuple[int, ...] = ()
    authentication: Authentication = NOT_AUTHENTICATED
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    client_certificate: tuple[bytes, bytes] | None = None
    no_client_certificate: str = ""
    """Why there is none, although it names one."""
    listeners: tuple[ListenerPart, ...] = ()
    """Its own, then those of its ListenerSets."""
    sets: tuple[Key, ...] = ()
    """The ListenerSets that it has let in."""
    faults: tuple[Fault, ...] = ()
    """Of the Gateway as a whole."""
    default: bool = False
    """Whether it takes routes that ask for a default Gateway."""
    insecure: bool = False
    """Clients are let in whose certificates nobody could verify."""
    problems: tuple[Problem, ...] = ()


def our_gateways(world: World) -> tuple[dict[Name, Document], tuple[Problem, ...]]:
    """The Gateways whose class is ours; and what is wrong with classes of ours, and with Gateways whose class nobody knows."""
    ours: dict[Name, Document] = {}
    problems: list[Problem] = []
    classes: dict[str, str] = {}
    refused: set[str] = set()
    for (_, label), document in sorted(world.of("GatewayClass").items()):
        classes[label] = document.body["spec"]["controllerName"]
        if classes[label] == CONTROLLER and document.body["spec"].get("parametersRef"):
            trouble = Trouble(document)
            trouble.add(
                ("spec", "parametersRef"), "is not supported here; the mesh's settings are in the Mesh resource", "InvalidParameters"
            )
            problems += trouble.found
            refused.add(label)
    for name, document in sorted(world.of("Gateway").items()):
        wanted = document.body["spec"]["gatewayClassName"]
        controller = classes.get(wanted)
        message = ""
        if wanted in refused:
            message = f"GatewayClass {wanted} is not accepted: see its own problems"
        elif controller == CONTROLLER:
            ours[name] = document
        elif controller is None:
            near = nearest(wanted, classes)
            hint = f"did you mean {near}?" if near else f"apply one with controllerName: {CONTROLLER}"
            message = f'there is no GatewayClass "{wanted}"; {hint}'
        if message:
            trouble = Trouble(document)
            trouble.add(("spec", "gatewayClassName"), message, "InvalidParameters")
            problems += trouble.found
    return ours, tuple(problems)


def port_owners(ours: Mapping[Name, Document], sets: Mapping[Name, Iterable[Document]]) -> dict[tuple[str, str, int], Document]:
    """Which Gateway (the oldest) has each address, transport and port. Without an address, each process binds where it is told to."""
    owners: dict[tuple[str, str, int], Document] = {}
    for name, document in sorted(ours.items(), key=lambda item: age(item[1])):
        for address in _own_addresses(document):
            for each in (document, *sets.get(name, ())):
                for listener in each.body["spec"]["listeners"]:
                    owners.setdefault((address, transport(listener["protocol"]), listener["port"]), document)
    return owners


def _addresses(document: Document) -> tuple[str, ...]:
    """The IP addresses that a Gateway names. One without a value is for us to choose: the process binds where it is told to."""
    addresses = document.body["spec"].get("addresses") or []
    return tuple(each["value"] for each in addresses if (each.get("type") or "IPAddress") == "IPAddress" and each.get("value"))


def _own_addresses(document: Document) -> tuple[str, ...]:
    return tuple(address for address in _addresses(document) if address not in _ANY_ADDRESS)


def _gateway_faults(document: Document, trouble: Trouble) -> tuple[Fault, ...]:
    """Why a Gateway as a whole is not taken."""
    spec = document.body["spec"]
    report = Report(trouble)
    for index, address in enumerate(spec.get("addresses") or []):
        if (kind := address.get("type") or "IPAddress") != "IPAddress":
            message = f"an address of type {kind} can't be listened at; use IPAddress"
            report.add("Accepted", ("spec", "addresses", index, "type"), message, "UnsupportedAddress")
    infrastructure = spec.get("infrastructure") or {}
    if infrastructure.get("parametersRef"):
        message = "is not supported here; how a gateway is run is up to its unit or job file, and the Mesh has the settings"
        report.add("Accepted", ("spec", "infrastructure", "parametersRef"), message, "InvalidParameters")
    return tuple(report.faults)


def compile_gateway(document: Document, look: Look) -> GatewayPart:
    """A Gateway's listeners and those of its ListenerSets. One that lacks what it needs is left out; the others are served."""
    spec = document.body["spec"]
    namespace, name = document.key.namespace, document.key.name
    sets: tuple[Document, ...] = look("listener_sets", namespace, name)
    above, own = look("default"), look("attached", "Gateway", namespace, name, "")
    parts: list[ListenerPart] = []
    whole = Trouble(document)
    certificate, faults = _backend_certificate(document, look, whole)
    refused = _gateway_faults(document, whole)
    problems = whole.found
    owners = (document, *sets)
    for owner, lost in zip(owners, conflicts([each.body["spec"]["listeners"] for each in owners]), strict=True):
        trouble = Trouble(owner)
        key = owner.key
        beside = own if owner is document else own + look("attached", key.kind, key.namespace, key.name, "")
        for index, body in enumerate(owner.body["spec"]["listeners"]):
            authorized = look("authorized_gateway", namespace, name, body["protocol"] in L4_PROTOCOLS)
            attached = above + authorized + beside + look("attached", key.kind, key.namespace, key.name, body["name"])
            part = _listener(document, owner, index, lost[index], attached, look, trouble)
            # Of a Gateway that is not accepted nothing is served.
            parts.append(msgspec.structs.replace(part, broken=True) if refused else part)
        problems += trouble.found
    infrastructure = spec.get("infrastructure") or {}
    return GatewayPart(
        namespace=namespace,
        name=name,
        addresses=_addresses(document),
        authentication=look("authentication", namespace, name),
        proxy_ports=_proxy_ports(document, parts, look, problems),
        labels=infrastructure.get("labels") or {},
        annotations=infrastructure.get("annotations") or {},
        client_certificate=certificate,
        no_client_certificate=faults[0].message if faults else "",
        listeners=tuple(parts),
        faults=refused + faults,
        sets=tuple(each.key for each in sets),
        default=spec.get("defaultScope") == "All",
        insecure=is_insecure(document),
        problems=tuple(problems),
    )


def _backend_certificate(document: Document, look: Look, trouble: Trouble) -> tuple[tuple[bytes, bytes] | None, tuple[Fault, ...]]:
    """What the Gateway shows to upstreams with a BackendTLSPolicy."""
    ref = ((document.body["spec"].get("tls") or {}).get("backend") or {}).get("clientCertificateRef")
    if not ref:
        return None, ()
    found = certificate_of(document, ref, look, "InvalidClientCertificateRef")
    if not isinstance(found, Unusable):
        return found, ()
    report = Report(trouble)
    report.add("ResolvedRefs", ("spec", "tls", "backend", "clientCertificateRef"), found.message, found.reason)
    return None, tuple(report.faults)


def _proxy_ports(document: Document, parts: list[ListenerPart], look: Look, problems: list[Problem]) -> tuple[int, ...]:
    """Where the PROXY protocol is read."""
    wanted = ports_of(document.body)
    if wanted == ():
        return ()
    there = sorted({part.listener.port for part in parts if transport(part.listener.protocol) == "tcp"})
    trouble = Trouble(document)
    path: FieldPath = ("metadata", "annotations", ANNOTATION)
    missing = [str(port) for port in wanted or () if port not in there]
    if missing:
        trouble.add(path, f"no listener over TCP has the port {listed(missing)}; they have {listed(map(str, there), 'and') or 'none'}")
    if not look("proxies"):
        trouble.warn(path, "nobody is believed: the Mesh names no trustedProxies, whose headers would be read")
    problems += trouble.found
    return tuple(there if wanted is None else (port for port in there if port in wanted))


def _listener(
    gateway: Document, owner: Document, index: int, conflict: Fault | None, attached: Attached, look: Look, trouble: Trouble
) -> ListenerPart:
    body = owner.body["spec"]["listeners"][index]
    path: FieldPath = ("spec", "listeners", index)
    protocol, port = body["protocol"], body["port"]
    report = Report(trouble)
    broken = False
    if protocol not in ROUTE_KINDS:
        message = f"{protocol} is not a protocol that is spoken here; use {listed(ROUTE_KINDS)}"
        report.add("Accepted", (*path, "protocol"), message, "UnsupportedProtocol")
        broken = True
    elif conflict is not None:
        field = "protocol" if conflict.reason == "ProtocolConflict" else "hostname"
        report.add("Conflicted", (*path, field), conflict.message, conflict.reason)
        broken = True
    for address in _own_addresses(gateway):
        port_owner = look("port_owner", address, transport(protocol), port)
        if port_owner is None or port_owner == gateway.key:
            continue
        message = f"{port_owner} already listens at {address} port {port}; use another port or address"
        report.add("Accepted", (*path, "port"), message, "PortUnavailable")
        broken = True
    tls = None
    if protocol in ROUTE_KINDS and body.get("tls") and body["tls"].get("mode") != "Passthrough":
        tls, usable = listener_tls(gateway, owner, body, path, look, report)
        broken = broken or not usable
        if tls is not None and protocol == "TLS":
            tls = msgspec.structs.replace(tls, alpn=())  # which protocol is spoken inside is between client and backend
    allowed = body.get("allowedRoutes") or {}
    namespaces = allowed.get("namespaces") or {}
    key = owner.key
    return ListenerPart(
        listener=Listener(
            name=body["name"] if owner is gateway else f"{key.namespace}/{key.name}/{body['name']}",
            port=port,
            protocol=protocol,
            hostname=body.get("hostname") or "*",
            tls=tls,
        ),
        owner=key,
        section=body["name"],
        namespaces=namespaces.get("from") or "Same",
        selector=namespaces.get("selector") or {},
        kinds=_kinds(protocol, allowed.get("kinds") or [], path, report),
        attached=attached,
        broken=broken,
        faults=tuple(report.faults),
    )


def _kinds(protocol: str, wanted: list[Any], path: FieldPath, report: Report) -> tuple[str, ...]:
    """The kinds of routes that a listener takes."""
    able = ROUTE_KINDS.get(protocol, ())
    found = []
    for number, kind in enumerate(wanted):
        group = kind["group"] if kind.get("group") is not None else GATEWAY_GROUP
        if group == GATEWAY_GROUP and kind["kind"] in able:
            found.append(kind["kind"])
        else:
            where = (*path, "allowedRoutes", "kinds", number, "kind")
            what = kind["kind"] if group == GATEWAY_GROUP else f"{group}/{kind['kind']}"
            hint = f"use {listed(able)}" if able else "its protocol takes no routes"
            report.add("ResolvedRefs", where, f"a listener of protocol {protocol} takes no {what}; {hint}", "InvalidRouteKinds")
    return tuple(dict.fromkeys(found)) if wanted else able

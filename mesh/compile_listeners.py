"""From a Gateway to its listeners: where they listen, what they show and demand, and which routes they let in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mesh import material
from mesh.compile_policies import Attached
from mesh.compile_world import Look, Name, Trouble, World, age
from mesh.documents import Document, FieldPath, Problem
from mesh.kinds_gateway import (
    CONTROLLER,
    OPTION_CERTIFICATE,
    OPTION_MIN_VERSION,
    OPTION_VALIDATION,
    OPTION_VALIDATION_MODE,
)
from mesh.model import ClientValidation, Listener, ListenerTls
from mesh.schema import nearest

_ANY_ADDRESS = ("0.0.0.0", "::")
GATEWAY_GROUP = "gateway.networking.k8s.io"


class ListenerPart(msgspec.Struct, frozen=True, kw_only=True):
    """A listener without its routes."""

    listener: Listener
    """`hosts` is empty."""
    namespaces: Literal["Same", "All", "Selector", "None"] = "Same"
    selector: dict[str, Any] = {}
    http_routes: bool = True
    """Whether routes of kind HTTPRoute may attach."""
    attached: Attached
    """Of the levels mesh, gateway and listener."""
    broken: bool = False
    """It is not served: what it needs is not there."""


class GatewayPart(msgspec.Struct, frozen=True, kw_only=True):
    """A Gateway of ours without its routes."""

    namespace: str
    name: str
    address: str = ""
    listeners: tuple[ListenerPart, ...] = ()
    problems: tuple[Problem, ...] = ()


def our_gateways(world: World) -> tuple[dict[Name, Document], tuple[Problem, ...]]:
    """The Gateways whose class is ours, and those whose class nobody knows."""
    ours: dict[Name, Document] = {}
    problems: list[Problem] = []
    classes = {name: document.body["spec"]["controllerName"] for (_, name), document in world.of("GatewayClass").items()}
    for name, document in sorted(world.of("Gateway").items()):
        wanted = document.body["spec"]["gatewayClassName"]
        controller = classes.get(wanted)
        if controller == CONTROLLER:
            ours[name] = document
        elif controller is None:
            near = nearest(wanted, classes)
            hint = f"did you mean {near}?" if near else f"apply one with controllerName: {CONTROLLER}"
            trouble = Trouble(document)
            trouble.add(("spec", "gatewayClassName"), f'there is no GatewayClass "{wanted}"; {hint}', "InvalidParameters")
            problems += trouble.found
    return ours, tuple(problems)


def port_owners(ours: Mapping[Name, Document]) -> dict[tuple[str, int], Document]:
    """Which Gateway (the oldest) has each address and port. Where no address is given, each process binds where it is told to."""
    owners: dict[tuple[str, int], Document] = {}
    for document in sorted(ours.values(), key=age):
        address = _address(document)
        if address:
            for listener in document.body["spec"]["listeners"]:
                owners.setdefault((address, listener["port"]), document)
    return owners


def _address(document: Document) -> str:
    addresses = document.body["spec"].get("addresses") or []
    address = str(addresses[0]["value"]) if addresses else ""
    return "" if address in _ANY_ADDRESS else address


def compile_gateway(document: Document, look: Look) -> GatewayPart:
    """A Gateway's listeners. A listener that lacks what it needs is left out; the others are served."""
    spec = document.body["spec"]
    trouble = Trouble(document)
    namespace, name = document.key.namespace, document.key.name
    above = look("default") + look("attached", "Gateway", namespace, name, "")
    address = _address(document)
    parts = []
    for index, body in enumerate(spec["listeners"]):
        path: FieldPath = ("spec", "listeners", index)
        broken = False
        owner = look("port_owner", address, body["port"]) if address else None
        if owner is not None and owner != document.key:
            message = f"{owner} already listens at {address} port {body['port']}; use another port or address"
            trouble.add((*path, "port"), message, "PortUnavailable")
            broken = True
        tls = None
        if body["protocol"] == "HTTPS":
            tls = _tls(document, body, path, look, trouble)
            broken = broken or tls is None
        allowed = body.get("allowedRoutes") or {}
        namespaces = allowed.get("namespaces") or {}
        kinds = allowed.get("kinds") or []
        for number, kind in enumerate(kinds):
            if not _is_http_route(kind):
                where = (*path, "allowedRoutes", "kinds", number, "kind")
                trouble.add(where, f"{kind['kind']} is not supported here; use HTTPRoute", "InvalidRouteKinds")
        parts.append(
            ListenerPart(
                listener=Listener(
                    name=body["name"],
                    port=body["port"],
                    protocol=body["protocol"],
                    hostname=body.get("hostname") or "*",
                    tls=tls,
                ),
                namespaces=namespaces.get("from") or "Same",
                selector=namespaces.get("selector") or {},
                http_routes=not kinds or any(_is_http_route(kind) for kind in kinds),
                attached=above + look("attached", "Gateway", namespace, name, body["name"]),
                broken=broken,
            )
        )
    addresses = spec.get("addresses") or []
    return GatewayPart(
        namespace=namespace,
        name=name,
        address=addresses[0]["value"] if addresses else "",
        listeners=tuple(parts),
        problems=tuple(trouble.found),
    )


def _is_http_route(kind: Any) -> bool:
    return kind["kind"] == "HTTPRoute" and (kind.get("group") or GATEWAY_GROUP) == GATEWAY_GROUP


def _tls(document: Document, body: Any, path: FieldPath, look: Look, trouble: Trouble) -> ListenerTls | None:
    """None when something that it needs is not there: a listener that can't check its clients is not served at all."""
    tls = body["tls"]
    options = tls.get("options") or {}
    path = (*path, "tls")
    certificates: list[tuple[bytes, bytes]] = []
    for index, ref in enumerate(tls.get("certificateRefs") or []):
        found = _certificate(document, ref, look)
        if isinstance(found, material.Unusable):
            trouble.add((*path, "certificateRefs", index), found.message, found.reason)
        else:
            certificates.append(found)
    svid = options.get(OPTION_CERTIFICATE) == "SVID"
    client, usable = _client_validation(document, body, path, look, trouble)
    if not usable or not (svid or certificates):
        return None
    version: Literal["1.2", "1.3"] = "1.3" if options.get(OPTION_MIN_VERSION) == "1.3" else "1.2"
    return ListenerTls(svid=svid, certificates=tuple(certificates), client=client, min_version=version)


def _certificate(document: Document, ref: Any, look: Look) -> tuple[bytes, bytes] | material.Unusable:
    if (ref.get("kind") or "Secret") != "Secret" or ref.get("group"):
        return material.Unusable(f"{ref.get('kind')} {ref['name']} can't hold a certificate here; use a Secret", "InvalidCertificateRef")
    namespace = ref.get("namespace") or document.key.namespace
    if not look("granted", "Gateway", document.key.namespace, "", "Secret", namespace, ref["name"]):
        return _not_granted(document, "Secret", namespace, ref["name"])
    return material.certificate(look("document", "Secret", namespace, ref["name"]), f"{namespace}/{ref['name']}")


def _not_granted(document: Document, kind: str, namespace: str, name: str) -> material.Unusable:
    return material.Unusable(
        f"{kind} {namespace}/{name} is in another namespace, which has not granted it; "
        f"apply a ReferenceGrant in {namespace} from {document.key.kind} in {document.key.namespace}",
        "RefNotPermitted",
    )


def _client_validation(
    document: Document, body: Any, path: FieldPath, look: Look, trouble: Trouble
) -> tuple[ClientValidation | None, bool]:
    """What is demanded of clients, and whether it can be."""
    tls = body["tls"]
    options = tls.get("options") or {}
    if options.get(OPTION_VALIDATION) == "TrustBundle":
        optional = options.get(OPTION_VALIDATION_MODE) == "Optional"
        return ClientValidation(mode="optional" if optional else "require", source="trust_bundle"), True
    validation: Any = tls.get("frontendValidation")
    where: FieldPath = (*path, "frontendValidation")
    if validation is None:
        frontend = (document.body["spec"].get("tls") or {}).get("frontend") or {}
        where = ("spec", "tls", "frontend", "default", "validation")
        validation = (frontend.get("default") or {}).get("validation")
        for index, item in enumerate(frontend.get("perPort") or []):
            if item["port"] == body["port"]:
                where = ("spec", "tls", "frontend", "perPort", index, "tls", "validation")
                validation = item["tls"].get("validation")
    if validation is None:
        return None, True
    roots = b""
    for index, ref in enumerate(validation["caCertificateRefs"]):
        kind = ref.get("kind") or "ConfigMap"
        namespace = ref.get("namespace") or document.key.namespace
        found: bytes | material.Unusable
        if not look("granted", "Gateway", document.key.namespace, "", kind, namespace, ref["name"]):
            found = _not_granted(document, kind, namespace, ref["name"])
        else:
            found = material.authorities(look("document", kind, namespace, ref["name"]), ref)
        if isinstance(found, bytes):
            roots += found
        else:
            trouble.add((*where, "caCertificateRefs", index), found.message, found.reason)
    mode: Literal["require", "insecure_fallback"] = "insecure_fallback" if validation.get("mode") == "AllowInsecureFallback" else "require"
    return ClientValidation(mode=mode, source="roots", roots=roots), bool(roots)

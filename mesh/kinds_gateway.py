"""Schemas of Gateway API's `GatewayClass`, `Gateway`, `ListenerSet`, `ReferenceGrant` and `BackendTLSPolicy`, and of `parentRefs`.

Limits and rules are those of the CRDs (gateway-api.sigs.k8s.io, "API specification"); what the CRDs allow and this implementation does not
do is refused by name.
"""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_core import PORT
from mesh.schema import Choice, Faults, Fields, Items, Table, Text, listed

GATEWAY_GROUP: Final = "gateway.networking.k8s.io"
CONTROLLER: Final = "tollhouse.dev/gateway-controller"
ROUTE_KINDS: Final = {
    "HTTP": ("HTTPRoute", "GRPCRoute"),
    "HTTPS": ("HTTPRoute", "GRPCRoute"),
    "TLS": ("TLSRoute",),
    "TCP": ("TCPRoute",),
    "UDP": ("UDPRoute",),
}
"""The protocols that listeners speak here, and the kinds of routes that each of them takes."""
OPTION_CERTIFICATE: Final = "tollhouse.dev/certificate"
OPTION_VALIDATION: Final = "tollhouse.dev/client-validation"
OPTION_VALIDATION_MODE: Final = "tollhouse.dev/client-validation-mode"
OPTION_MIN_VERSION: Final = "tollhouse.dev/min-tls-version"
OPTION_CLIENT_CERTIFICATE: Final = "tollhouse.dev/client-certificate"

NAME: Final = Text(formats.subdomain)
NAMESPACE: Final = Text(formats.label)
SECTION: Final = Text(formats.subdomain)
GROUP: Final = Text(lambda value: formats.subdomain(value) if value else "", most=253)
SCOPE: Final = Choice("a scope of default Gateways", "All", "None")
"""Which routes a Gateway takes that don't name it, and which Gateways a route takes that it doesn't name (GEP-3793)."""
KIND: Final = Text(formats.kind, least=1, most=63)


GATEWAY_CLASS: Final = Fields(
    {"controllerName": Text(formats.controller_name, least=1, most=253)},
    {
        "description": Text(most=64),
        "parametersRef": Fields({"group": GROUP, "kind": KIND, "name": NAME}, {"namespace": NAMESPACE}),
    },
)

OPTIONS: Final = {
    OPTION_CERTIFICATE: ("SVID",),
    OPTION_VALIDATION: ("TrustBundle",),
    OPTION_VALIDATION_MODE: ("Require", "Optional"),
    OPTION_MIN_VERSION: ("1.2", "1.3"),
}


def check_options(options: Any, known: dict[str, tuple[str, ...]], path: FieldPath, faults: Faults) -> None:
    """Options are free in Gateway API; here each must be one that does something."""
    for name, value in options.items():
        if name not in known:
            faults.add((*path, name), f"is not supported here; the options are {listed(known, 'and')}")
        elif value not in known[name]:
            faults.add((*path, name), f"{formats.shown(value)} is not a value of this option; use {listed(known[name])}")


def _tls_rule(tls: Any, path: FieldPath, faults: Faults) -> None:
    options = tls.get("options") or {}
    check_options(options, OPTIONS, (*path, "options"), faults)
    if OPTION_VALIDATION_MODE in options and OPTION_VALIDATION not in options:
        faults.add((*path, "options", OPTION_VALIDATION_MODE), f"means nothing without {OPTION_VALIDATION}")
    if OPTION_VALIDATION in options and tls.get("frontendValidation"):
        faults.add((*path, "options", OPTION_VALIDATION), "and frontendValidation exclude each other")
    if tls.get("mode") == "Passthrough":
        # What certificateRefs say is not needed then, says Gateway API; of the others somebody might expect protection.
        for field in ("options", "frontendValidation"):
            if tls.get(field):
                faults.add((*path, field), "means nothing with mode: Passthrough, where TLS ends at the backend; use Terminate")
        return
    if not options.get(OPTION_CERTIFICATE) and not tls.get("certificateRefs"):
        faults.add((*path, "certificateRefs"), f"is missing; name a Secret, or set the option {OPTION_CERTIFICATE}: SVID")
    if options.get(OPTION_CERTIFICATE) and tls.get("certificateRefs"):
        faults.add((*path, "certificateRefs"), f"and the option {OPTION_CERTIFICATE} exclude each other")


def _listener_rule(listener: Any, path: FieldPath, faults: Faults) -> None:
    protocol, tls = listener["protocol"], listener.get("tls")
    if protocol == "HTTPS" and not tls:
        faults.add((*path, "tls"), "is missing; a listener of protocol HTTPS needs it")
    if protocol in ("HTTP", "TCP", "UDP") and tls is not None:
        use = {"HTTP": "HTTPS", "TCP": "TLS"}.get(protocol)
        faults.add((*path, "tls"), f"must not be there for protocol {protocol}" + (f"; use {use}" if use else ""))
    if protocol == "HTTPS" and (tls or {}).get("mode") not in (None, "Terminate"):
        faults.add((*path, "tls", "mode"), "must be Terminate for protocol HTTPS; use protocol TLS to pass TLS through")
    if protocol == "TLS" and not (tls or {}).get("mode"):
        faults.add((*path, "tls", "mode"), "is missing; protocol TLS needs Terminate or Passthrough")
    if protocol in ("TCP", "UDP") and listener.get("hostname"):
        faults.add((*path, "hostname"), f"must not be there for protocol {protocol}, which has no host names")


SECRET_REF: Final = Fields({"name": NAME}, {"group": GROUP, "kind": KIND, "namespace": NAMESPACE})
_LABEL_SELECTOR: Final = Fields(
    {},
    {
        "matchLabels": Table(Text()),
        "matchExpressions": Items(
            Fields(
                {"key": Text(least=1), "operator": Choice("an operator", "In", "NotIn", "Exists", "DoesNotExist")},
                {"values": Items(Text())},
            )
        ),
    },
)


def _namespaces_rule(namespaces: Any, path: FieldPath, faults: Faults) -> None:
    if namespaces.get("from") == "Selector" and namespaces.get("selector") is None:
        faults.add((*path, "selector"), "is missing; it is required with from: Selector")


_VALIDATION_MODE: Final = Choice("a mode of validation", "AllowValidOnly", "AllowInsecureFallback")
_OBJECT_REF: Final = Fields({"group": GROUP, "kind": KIND, "name": NAME}, {"namespace": NAMESPACE})
_FRONTEND: Final = Fields(
    {}, {"validation": Fields({"caCertificateRefs": Items(_OBJECT_REF, least=1, most=16)}, {"mode": _VALIDATION_MODE})}
)
_LISTENER_VALIDATION: Final = Fields({"caCertificateRefs": Items(SECRET_REF, least=1, most=8)}, {"mode": _VALIDATION_MODE})
"""Of earlier versions' experimental channel, for one listener; `spec.tls.frontend` has taken its place."""

LISTENER: Final = Fields(
    {
        "name": SECTION,
        "port": PORT,
        "protocol": Text(formats.listener_protocol, least=1, most=255),
    },
    {
        "hostname": Text(formats.hostname),
        "tls": Fields(
            {},
            {
                "mode": Choice("a TLS mode", "Terminate", "Passthrough"),
                "certificateRefs": Items(SECRET_REF, most=64),
                "options": Table(Text(), most=16),
                "frontendValidation": _LISTENER_VALIDATION,
            },
            rule=_tls_rule,
        ),
        "allowedRoutes": Fields(
            {},
            {
                "namespaces": Fields(
                    {},
                    {"from": Choice("a choice of namespaces", "Same", "All", "Selector"), "selector": _LABEL_SELECTOR},
                    rule=_namespaces_rule,
                ),
                "kinds": Items(Fields({"kind": KIND}, {"group": GROUP}), most=8),
            },
        ),
    },
    rule=_listener_rule,
)


def _place(listener: Any) -> tuple[Any, ...]:
    return listener["port"], listener["protocol"], listener.get("hostname") or ""


def _listeners_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    owners: dict[tuple[Any, ...], str] = {}
    for index, listener in enumerate(spec["listeners"]):
        place = _place(listener)
        owner = owners.setdefault(place, listener["name"])
        if owner != listener["name"]:
            where = " and ".join([f"port {place[0]}", f"protocol {place[1]}", *([f"hostname {place[2]}"] if place[2] else [])])
            faults.add((*path, "listeners", index), f"the listener {owner} already has {where}; change one of them")


_LISTENERS: Final = Items(LISTENER, least=1, most=64, unique="name")


def _address_rule(address: Any, path: FieldPath, faults: Faults) -> None:
    value = address.get("value")
    if not value:
        return
    kind = address.get("type") or "IPAddress"
    form = {"IPAddress": formats.ip_address, "Hostname": formats.hostname}.get(kind)
    if form is not None and (wrong := form(value)):
        faults.add((*path, "value"), wrong)


def _addresses_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    _listeners_rule(spec, path, faults)
    seen: set[tuple[str, str]] = set()
    for index, address in enumerate(spec.get("addresses") or []):
        if not address.get("value"):
            continue
        own = address.get("type") or "IPAddress", address["value"]
        if own in seen:
            faults.add((*path, "addresses", index, "value"), f"{formats.shown(own[1])} is there twice; each may be there once")
        seen.add(own)


GATEWAY: Final = Fields(
    {"gatewayClassName": Text(formats.subdomain), "listeners": _LISTENERS},
    {
        "addresses": Items(
            Fields({}, {"type": Text(formats.address_type, least=1, most=253), "value": Text(most=253)}, rule=_address_rule), most=16
        ),
        "infrastructure": Fields(
            {},
            {
                "labels": Table(Text(formats.label_value), name=formats.label_name, most=8),
                "annotations": Table(Text(), name=formats.label_name, most=16),
                "parametersRef": Fields({"group": GROUP, "kind": KIND, "name": NAME}),
            },
        ),
        "allowedListeners": Fields(
            {},
            {
                "namespaces": Fields(
                    {},
                    {"from": Choice("a choice of namespaces", "All", "Selector", "Same", "None"), "selector": _LABEL_SELECTOR},
                    rule=_namespaces_rule,
                )
            },
        ),
        "tls": Fields(
            {},
            {
                "backend": Fields({}, {"clientCertificateRef": SECRET_REF}),
                "frontend": Fields(
                    {"default": _FRONTEND},
                    {"perPort": Items(Fields({"port": PORT, "tls": _FRONTEND}), most=64, unique="port")},
                ),
            },
        ),
        "defaultScope": SCOPE,
    },
    rule=_addresses_rule,
)

LISTENER_SET: Final = Fields(
    {
        "parentRef": Fields(
            {"name": NAME},
            {
                "group": Choice("a group of parents here", GATEWAY_GROUP),
                "kind": Choice("a kind of parent of a ListenerSet", "Gateway"),
                "namespace": NAMESPACE,
            },
        ),
        "listeners": _LISTENERS,
    },
    rule=_listeners_rule,
)

NO_PARENTS: Final = {
    "Service": "no proxy stands beside a Service's callers that could route what they send",
    "XListenerSet": "it has become ListenerSet",
}
_PARENT_REF: Final = Fields(
    {"name": NAME},
    {
        "group": Choice("a group of parents here", GATEWAY_GROUP),
        "kind": Choice(
            "a kind of parent here",
            "Gateway",
            "ListenerSet",
            unsupported=NO_PARENTS,
        ),
        "namespace": NAMESPACE,
        "sectionName": SECTION,
        "port": PORT,
    },
)
PARENT_REFS: Final = Items(_PARENT_REF, most=32)
"""`spec.parentRefs` of every kind of route; `check_parents` has the rules across them."""


def check_parents(spec: Any, path: FieldPath, faults: Faults) -> None:
    """Several references to one parent must each name another part of it, in the same way; one to all of it leaves no room for others."""
    seen: dict[tuple[str, ...], list[tuple[Any, Any]]] = {}
    for index, ref in enumerate(spec.get("parentRefs") or []):
        parent = (ref.get("group") or GATEWAY_GROUP, ref.get("kind") or "Gateway", ref.get("namespace") or "", ref["name"])
        part = ref.get("sectionName") or None, ref.get("port")
        others = seen.setdefault(parent, [])
        here = (*path, "parentRefs", index)
        if part in others:
            faults.add(here, "names the same parent as another one; each may be there once")
        elif any([value is None for value in part] != [value is None for value in other] for other in others):
            faults.add(here, f"several references to {parent[1]} {ref['name']}: each needs a sectionName, or each a port (or each both)")
        others.append(part)


REFERENCE_GRANT: Final = Fields(
    {
        "from": Items(Fields({"group": GROUP, "kind": KIND, "namespace": NAMESPACE}), least=1, most=16),
        "to": Items(Fields({"group": GROUP, "kind": KIND}, {"name": NAME}), least=1, most=16),
    }
)


def _alt_name_rule(name: Any, path: FieldPath, faults: Faults) -> None:
    wanted, other = ("hostname", "uri") if name["type"] == "Hostname" else ("uri", "hostname")
    if not name.get(wanted):
        faults.add((*path, wanted), f"is missing; it is required with type: {name['type']}")
    if name.get(other):
        faults.add((*path, other), f"does not go with type: {name['type']}")


def _validation_rule(validation: Any, path: FieldPath, faults: Faults) -> None:
    refs, known = validation.get("caCertificateRefs"), validation.get("wellKnownCACertificates")
    if not refs and not known:
        faults.add((*path, "caCertificateRefs"), "is missing; name a ConfigMap, or set wellKnownCACertificates: System")
    if refs and known:
        faults.add((*path, "wellKnownCACertificates"), "and caCertificateRefs exclude each other")


def _tls_policy_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    seen: dict[tuple[str, str, str], list[str]] = {}
    for index, ref in enumerate(spec["targetRefs"]):
        section = ref.get("sectionName") or ""
        others = seen.setdefault((ref["group"], ref["kind"], ref["name"]), [])
        if section in others:
            faults.add((*path, "targetRefs", index), "names the same target as another one; each may be there once")
        elif others and "" in (section, *others):
            faults.add((*path, "targetRefs", index), f"several references to {ref['kind']} {ref['name']}: each needs a sectionName")
        others.append(section)
    check_options(spec.get("options") or {}, {OPTION_CLIENT_CERTIFICATE: ("SVID",)}, (*path, "options"), faults)


BACKEND_TLS_POLICY: Final = Fields(
    {
        "targetRefs": Items(
            Fields({"group": GROUP, "kind": Choice("a kind that can be a target here", "Service"), "name": NAME}, {"sectionName": SECTION}),
            least=1,
            most=16,
        ),
        "validation": Fields(
            {"hostname": Text(formats.exact_hostname)},
            {
                "caCertificateRefs": Items(Fields({"group": GROUP, "kind": KIND, "name": NAME}), most=8),
                "wellKnownCACertificates": Choice("a set of certificates", "System"),
                "subjectAltNames": Items(
                    Fields(
                        {"type": Choice("a type of name", "Hostname", "URI")},
                        {"hostname": Text(formats.hostname), "uri": Text(formats.absolute_uri, least=1, most=253)},
                        rule=_alt_name_rule,
                    ),
                    most=5,
                ),
            },
            rule=_validation_rule,
        ),
    },
    {"options": Table(Text(), most=16)},
    rule=_tls_policy_rule,
)

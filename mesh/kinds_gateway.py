"""Schemas of Gateway API's `GatewayClass`, `Gateway`, `ReferenceGrant` and `BackendTLSPolicy`.

Limits and rules are those of the CRDs (gateway-api.sigs.k8s.io, "API specification"); what the CRDs allow and this implementation does not
do is refused by name.
"""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_core import PORT
from mesh.schema import Choice, Faults, Fields, Free, Items, Table, Text, listed

CONTROLLER: Final = "tollhouse.dev/gateway-controller"
OPTION_CERTIFICATE: Final = "tollhouse.dev/certificate"
OPTION_VALIDATION: Final = "tollhouse.dev/client-validation"
OPTION_VALIDATION_MODE: Final = "tollhouse.dev/client-validation-mode"
OPTION_MIN_VERSION: Final = "tollhouse.dev/min-tls-version"
OPTION_CLIENT_CERTIFICATE: Final = "tollhouse.dev/client-certificate"

NAME: Final = Text(formats.subdomain)
NAMESPACE: Final = Text(formats.label)
SECTION: Final = Text(formats.subdomain)
GROUP: Final = Text(lambda value: formats.subdomain(value) if value else "")
KIND: Final = Text(least=1, most=63)


def _class_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    if spec["controllerName"] == CONTROLLER and spec.get("parametersRef") is not None:
        faults.add((*path, "parametersRef"), "is not supported here; the mesh's settings are in the Mesh resource")


GATEWAY_CLASS: Final = Fields(
    {"controllerName": Text(least=1, most=253)},
    {"description": Text(), "parametersRef": Free()},
    rule=_class_rule,
)

_OPTIONS: Final = {
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
    check_options(options, _OPTIONS, (*path, "options"), faults)
    if OPTION_VALIDATION_MODE in options and OPTION_VALIDATION not in options:
        faults.add((*path, "options", OPTION_VALIDATION_MODE), f"means nothing without {OPTION_VALIDATION}")
    if OPTION_VALIDATION in options and tls.get("frontendValidation"):
        faults.add((*path, "options", OPTION_VALIDATION), "and frontendValidation exclude each other")
    if not options.get(OPTION_CERTIFICATE) and not tls.get("certificateRefs"):
        faults.add((*path, "certificateRefs"), f"is missing; name a Secret, or set the option {OPTION_CERTIFICATE}: SVID")
    if options.get(OPTION_CERTIFICATE) and tls.get("certificateRefs"):
        faults.add((*path, "certificateRefs"), f"and the option {OPTION_CERTIFICATE} exclude each other")


def _listener_rule(listener: Any, path: FieldPath, faults: Faults) -> None:
    if listener["protocol"] == "HTTPS" and not listener.get("tls"):
        faults.add((*path, "tls"), "is missing; a listener of protocol HTTPS needs it")
    if listener["protocol"] == "HTTP" and listener.get("tls"):
        faults.add((*path, "tls"), "must not be there for protocol HTTP; use HTTPS")


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


_FRONTEND_VALIDATION: Final = Fields(
    {"caCertificateRefs": Items(SECRET_REF, least=1, most=8)},
    {"mode": Choice("a mode of validation", "AllowValidOnly", "AllowInsecureFallback")},
)
_FRONTEND: Final = Fields({}, {"validation": _FRONTEND_VALIDATION})

LISTENER: Final = Fields(
    {
        "name": SECTION,
        "port": PORT,
        "protocol": Choice("a protocol of a listener", "HTTP", "HTTPS", unsupported=("TLS", "TCP", "UDP")),
    },
    {
        "hostname": Text(formats.hostname),
        "tls": Fields(
            {},
            {
                "mode": Choice("a TLS mode", "Terminate", unsupported=("Passthrough",)),
                "certificateRefs": Items(SECRET_REF, most=64),
                "options": Table(Text(), most=16),
                "frontendValidation": _FRONTEND_VALIDATION,
            },
            rule=_tls_rule,
        ),
        "allowedRoutes": Fields(
            {},
            {
                "namespaces": Fields(
                    {},
                    {"from": Choice("a choice of namespaces", "Same", "All", "Selector", "None"), "selector": _LABEL_SELECTOR},
                    rule=_namespaces_rule,
                ),
                "kinds": Items(Fields({"kind": KIND}, {"group": GROUP}), most=8),
            },
        ),
    },
    rule=_listener_rule,
)


def _gateway_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    protocols: dict[int, tuple[str, str]] = {}
    hosts: dict[tuple[int, str], str] = {}
    for index, listener in enumerate(spec["listeners"]):
        here = (*path, "listeners", index)
        port, protocol, name = listener["port"], listener["protocol"], listener["name"]
        first, owner = protocols.setdefault(port, (protocol, name))
        if first != protocol:
            faults.add((*here, "protocol"), f"port {port} already speaks {first} for the listener {owner}; use another port")
        host = listener.get("hostname") or "*"
        if (port, host) in hosts:
            faults.add(
                (*here, "hostname"), f"the listener {hosts[port, host]} already has port {port} and hostname {host}; change one of them"
            )
        hosts.setdefault((port, host), name)


GATEWAY: Final = Fields(
    {
        "gatewayClassName": Text(formats.subdomain),
        "listeners": Items(LISTENER, least=1, most=64, unique="name"),
    },
    {
        "addresses": Items(
            Fields(
                {"value": Text(formats.ip_address)},
                {"type": Choice("a type of address", "IPAddress", unsupported=("Hostname", "NamedAddress"))},
            ),
            most=1,
        ),
        "tls": Fields(
            {},
            {
                "frontend": Fields(
                    {"default": _FRONTEND},
                    {"perPort": Items(Fields({"port": PORT, "tls": _FRONTEND}), most=64, unique="port")},
                )
            },
            unsupported={"backend": "gateways show their own SVID to upstreams of the mesh"},
        ),
    },
    unsupported={
        "infrastructure": "how a gateway is run is up to its unit or job file",
        "allowedListeners": "put the listeners into the Gateway itself",
        "defaultScope": "name the Gateway in parentRefs",
    },
    rule=_gateway_rule,
)

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
                        {"hostname": Text(formats.hostname), "uri": Text(least=1, most=253)},
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

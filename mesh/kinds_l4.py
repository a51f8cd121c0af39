"""Schemas of Gateway API's `TCPRoute`, `TLSRoute` and `UDPRoute`, with the limits and cross-field rules of their CRDs."""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_core import PORT
from mesh.kinds_gateway import GROUP, KIND, NAME, NAMESPACE, PARENT_REFS, SCOPE, SECTION, check_parents
from mesh.schema import Faults, Fields, Items, Number, Text

L4_KINDS: Final = ("TCPRoute", "TLSRoute", "UDPRoute")
L4_PROTOCOLS: Final = ("TLS", "TCP", "UDP")
"""Of listeners that those attach to."""


def _backend_rule(ref: Any, path: FieldPath, faults: Faults) -> None:
    if (ref.get("kind") or "Service") == "Service" and not ref.get("group") and ref.get("port") is None:
        faults.add((*path, "port"), "is missing; a Service is referred to with a port")


_BACKEND: Final = Fields(
    {"name": NAME},
    {"group": GROUP, "kind": KIND, "namespace": NAMESPACE, "port": PORT, "weight": Number(0, 1_000_000)},
    rule=_backend_rule,
)
_RULES: Final = Items(Fields({"backendRefs": Items(_BACKEND, least=1, most=16)}, {"name": SECTION}), least=1, most=1)

L4_ROUTE: Final = Fields({"rules": _RULES}, {"parentRefs": PARENT_REFS, "useDefaultGateways": SCOPE}, rule=check_parents)
"""`spec` of a TCPRoute and of a UDPRoute."""

TLS_ROUTE: Final = Fields(
    {"rules": _RULES},
    {"parentRefs": PARENT_REFS, "useDefaultGateways": SCOPE, "hostnames": Items(Text(formats.hostname), least=1, most=1024)},
    rule=check_parents,
)


def tls_route_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """`hostnames` may be left out (for every name) in the older versions only."""
    if body["apiVersion"].endswith("/v1") and body["spec"].get("hostnames") is None:
        faults.add((*path, "spec", "hostnames"), "is missing; name the hosts whose connections the route takes")

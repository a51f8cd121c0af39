"""The schema of Gateway API's `GRPCRoute`, with the limits and cross-field rules of its CRD."""

from __future__ import annotations

import re
from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_filters import SESSION, backend, filters, header_matches
from mesh.kinds_gateway import PARENT_REFS, SCOPE, SECTION
from mesh.kinds_route import HOSTNAMES, route_rule
from mesh.schema import Choice, Faults, Fields, Items, Text

_SERVICE: Final = re.compile(r"\.?[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*")
_METHOD: Final = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def _method_rule(match: Any, path: FieldPath, faults: Faults) -> None:
    service, method = match.get("service"), match.get("method")
    if not service and not method:
        faults.add(path, "names neither a service nor a method; leave it out to match every call")
    if match.get("type") == "RegularExpression":
        for field, value in (("service", service), ("method", method)):
            if value and (wrong := formats.expression(value)):
                faults.add((*path, field), wrong)
        return
    if service and not _SERVICE.fullmatch(service):
        faults.add((*path, "service"), f"{formats.shown(service)} is not the name of a gRPC service; write it as in shop.v1.Orders")
    elif service and service.startswith("."):
        faults.add((*path, "service"), f"{formats.shown(service)} can never match: no client calls a service with a dot in front")
    if method and not _METHOD.fullmatch(method):
        faults.add((*path, "method"), f"{formats.shown(method)} is not the name of a gRPC method; use letters, digits and '_'")


_MATCH: Final = Fields(
    {},
    {
        "method": Fields(
            {},
            {
                "type": Choice("a type of method match", "Exact", "RegularExpression"),
                "service": Text(most=1024),
                "method": Text(most=1024),
            },
            rule=_method_rule,
        ),
        "headers": header_matches(),
    },
)
_FILTERS: Final = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "ExtensionRef")
_RULE: Final = Fields(
    {},
    {
        "name": SECTION,
        "matches": Items(_MATCH, most=64),
        "filters": filters("a filter of a GRPCRoute", *_FILTERS, unsupported={}),
        "backendRefs": Items(backend(filters("a filter of a backend", *_FILTERS, unsupported={})), most=16),
        "sessionPersistence": SESSION,
    },
)
GRPC_ROUTE: Final = Fields(
    {},
    {"parentRefs": PARENT_REFS, "useDefaultGateways": SCOPE, "hostnames": HOSTNAMES, "rules": Items(_RULE, most=16, unique="name")},
    rule=route_rule,
)

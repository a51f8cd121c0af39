"""The page that says of every field of every kind whether it works here: written from the schemas that the fields are checked by.

`python -m mesh.compatibility > docs/compatibility.md` (`make docs`) writes it; a test holds the page to the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Final

from mesh.features import supported_features
from mesh.kinds import ISTIO_GROUP, KINDS, OWN_GROUP, UNSUPPORTED, Kind
from mesh.kinds_gateway import CONTROLLER, GATEWAY_GROUP, OPTION_CLIENT_CERTIFICATE, OPTIONS, ROUTE_KINDS
from mesh.schema import Base64, Choice, Duration, Fields, Flag, Free, Items, Node, Number, Table, Text

_LOST: Final = "`{}`; others are a condition (`ResolvedRefs: False`, `{}`)"
_CA_KINDS: Final = _LOST.format("ConfigMap`, `Secret", "InvalidCACertificateKind")
_NO_OPTION: Final = "{}; others are refused: an option that does nothing misleads"
_MEANINGLESS: Final = "accepted, without a meaning here"
NOTES: Final = {
    "GatewayClass.spec.controllerName": f"`{CONTROLLER}` is ours; Gateways of other classes are left alone",
    "GatewayClass.spec.parametersRef": "refused (`Accepted: False`, `InvalidParameters`): the settings are in the Mesh",
    "Gateway.spec.addresses[].type": "`IPAddress`; others are refused (`Accepted: False`, `UnsupportedAddress`): a process binds IPs",
    "Gateway.spec.addresses[].value": "may be left out: the process binds where it is told to",
    "Gateway.spec.infrastructure.labels": "kept as metadata, shown on the admin page",
    "Gateway.spec.infrastructure.annotations": "kept as metadata, shown on the admin page",
    "Gateway.spec.infrastructure.parametersRef": (
        "refused (`Accepted: False`, `InvalidParameters`): how a gateway runs is up to its unit or job file"
    ),
    "*.spec.listeners[].protocol": (
        ", ".join(f"`{name}`" for name in ROUTE_KINDS) + "; others are refused (`Accepted: False`, `UnsupportedProtocol`)"
    ),
    "*.spec.listeners[].allowedRoutes.kinds[].kind": "those of the protocol; others are a condition (`InvalidRouteKinds`)",
    "*.spec.listeners[].tls.certificateRefs[].kind": _LOST.format("Secret` of the type `kubernetes.io/tls", "InvalidCertificateRef"),
    "*.spec.listeners[].tls.options": _NO_OPTION.format(", ".join(f"`{name}`" for name in OPTIONS)),
    "*.spec.listeners[].tls.frontendValidation": "of the experimental channel before v1.5; `spec.tls.frontend` has taken its place",
    "Gateway.spec.tls.frontend.default.validation.caCertificateRefs[].kind": _CA_KINDS,
    "Gateway.spec.tls.frontend.perPort[].tls.validation.caCertificateRefs[].kind": _CA_KINDS,
    "*.spec.rules[].backendRefs[].kind": _LOST.format("Service", "InvalidKind"),
    "*.spec.targetRef.namespace": "refused: a policy belongs into the namespace of its target",
    "*.spec.targetRefs[].namespace": "refused: a policy belongs into the namespace of its target",
    "RequestAuthentication.spec.jwtRules[].jwks_uri": "another name of `jwksUri`",
    "BackendTLSPolicy.spec.validation.caCertificateRefs[].kind": _LOST.format("ConfigMap`, `Secret", "InvalidKind"),
    "BackendTLSPolicy.spec.options": _NO_OPTION.format(f"`{OPTION_CLIENT_CERTIFICATE}`"),
    "Service.spec.ports[].targetPort": "the EndpointSlices say which port it is, as Kubernetes resolves it",
    "EndpointSlice.endpoints[].targetRef": "its name is shown with the endpoint",
}
"""What a schema alone doesn't say."""


def page() -> str:
    """The whole page, Markdown."""
    parts = [_HEAD]
    groups = (GATEWAY_GROUP, "", "discovery.k8s.io", ISTIO_GROUP, OWN_GROUP)
    for group in groups:
        parts += [_kind(kind) for kind in sorted(KINDS.values(), key=lambda kind: kind.name) if kind.group == group]
    parts.append("## Kinds that are refused\n\nKnown, and an error that says what to write instead.\n\n| kind | why |\n| --- | --- |")
    parts += [f"| `{group}/{name}` | {why} |" for group, kinds in UNSUPPORTED.items() for name, why in sorted(kinds.items())]
    features = ", ".join(f"`{name}`" for name in supported_features())
    parts.append(f"\n## Features\n\nAs `GatewayClass.status.supportedFeatures` names them: {features}.")
    return "\n".join(parts) + "\n"


_HEAD: Final = """# Compatibility

Every field of every kind that is read, and whether it works here. This page is written from the code (`make docs`), by the same schemas
that resources are checked by: what is not listed is an error ("unknown field"), and so is what is listed as refused, unless a condition is
named. Limits are those of the CRDs of Gateway API v1.6. `metadata` (`name`, `namespace`, `labels`, `annotations`, and what Kubernetes
generates) and `status` are accepted for all kinds. What fields of `tollhouse.dev` mean is in [configuration.md](configuration.md).
"""


def _kind(kind: Kind) -> str:
    lines = [
        f"## {kind.name}\n",
        f"`apiVersion`: {', '.join(f'`{each}`' for each in kind.api_versions)}\n",
        "| field | | |",
        "| --- | --- | --- |",
    ]
    for name, node in kind.body.known.items():
        if name not in ("apiVersion", "kind", "metadata", "status"):
            lines += _rows(name, node, kind.name)
    return "\n".join(lines) + "\n"


def _rows(path: str, node: Node, kind: str) -> Iterator[str]:
    note = NOTES.get(f"{kind}.{path}") or NOTES.get(f"*.{path}") or ""
    if not isinstance(node, Fields) or note:
        refused = note.startswith("refused")
        yield f"| `{path}` | {'refused' if refused else 'supported'} | {note.removeprefix('refused ') if note else shape(node)} |"
        if refused:
            return
    if isinstance(node, Items):
        if isinstance(node.item, Fields):
            yield from _fields(path + "[]", node.item, kind)
        elif isinstance(node.item, Choice):
            yield from _words(path, node.item)
    elif isinstance(node, Fields):
        yield from _fields(path, node, kind)
    elif isinstance(node, Choice):
        yield from _words(path, node)


def _fields(path: str, node: Fields, kind: str) -> Iterator[str]:
    for name, inner in node.known.items():
        yield from _rows(f"{path}.{name}", inner, kind)
    for name, why in node.unsupported.items():
        yield f"| `{path}.{name}` | refused | {why} |"


def _words(path: str, node: Choice) -> Iterator[str]:
    for word, why in node.unsupported.items():
        yield f"| `{path}: {word}` | refused | {why} |"


def shape(node: Node) -> str:
    """What a field may hold, in a few words."""
    if isinstance(node, Choice):
        return ", ".join(f"`{word}`" for word in node.words)
    if isinstance(node, Items):
        number = f"{node.least} to {node.most}" if node.least else f"at most {node.most}"
        inner = "" if isinstance(node.item, Fields) else f", each {shape(node.item)}"
        return f"a list, {number}{inner}"
    if isinstance(node, Number):
        return f"{node.least} to {node.most}{node.unit}"
    if isinstance(node, Text):
        said = (node.form.__doc__ or "").partition("\n")[0].rstrip(".") if node.form is not None else ""
        return (said[:1].lower() + said[1:]).replace("|", "\\|") or "text"
    words: dict[type[Any], str] = {
        Flag: "`true` or `false`",
        Duration: "a duration",
        Base64: "base64",
        Free: _MEANINGLESS,
        Table: "a mapping",
    }
    return words.get(type(node), "")


if __name__ == "__main__":
    sys.stdout.write(page())

"""The schema of Istio's AuthorizationPolicy (security.istio.io; istio.io, "Authorization Policy" and "Authorization Policy Conditions").

What a field means is in `mesh.authorization`. What Istio would refuse is refused, and so is what could never match here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final

from mesh import formats
from mesh.attachment_istio import TARGETS, target_rule
from mesh.documents import FieldPath
from mesh.formats import shown
from mesh.schema import Choice, Faults, Fields, Items, Text

DRY_RUN: Final = "istio.io/dry-run"
"""The annotation of a policy that is evaluated and not enforced: `"true"`."""

ATTRIBUTES: Final = (
    "request.headers[NAME]",
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[NAME]",
    "destination.ip",
    "destination.port",
    "connection.sni",
)
"""Keys of conditions."""
NO_NETWORK_FILTERS: Final = "there are no such filters here whose metadata it could look at"
RENAMED: Final = {
    "source.user": "source.principal",
    "source.name": "source.principal",
    "source.labels": "source.namespace or source.principal",
    "destination.name": "the policy's targetRefs",
    "destination.namespace": "the policy's own namespace",
    "destination.user": "the policy's targetRefs",
    "destination.labels": "the policy's selector",
    "connection.mtls": 'source.principal with the value "*"',
}
"""Attributes of earlier policies, with what to write instead."""
METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
SINGLE: Final = "{*}"
REST: Final = "{**}"

_KEY: Final = re.compile(r"(request\.headers|request\.auth\.claims)((?:\[[^\[\]]+\])+)")
_NAMES: Final = re.compile(r"\[([^\[\]]+)\]")
_SPACE: Final = re.compile(r"[a-z0-9*](?:[a-z0-9*-]{0,61}[a-z0-9*])?")
_ACCOUNT: Final = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?/)?[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")


def _pattern(value: str) -> str:
    """Text; a `*` at one end stands for anything, and alone for anything that is not empty."""
    return "" if value else 'must not be empty; "*" stands for anything that is not empty'


def _name_pattern(value: str) -> str:
    wrong = _pattern(value)
    if not wrong and "*" in (value[1:] if value[0] == "*" else value[:-1]):
        return f"{shown(value)} can never match: '*' stands for anything at one end only, as in abc* or *abc"
    return wrong


def principal(value: str) -> str:
    """A SPIFFE ID without `spiffe://`; a `*` at one end stands for anything."""
    if value.startswith("spiffe:"):
        return f"{shown(value)} can never match: leave out spiffe://, as in cluster.local/ns/shop/sa/web"
    return _name_pattern(value)


def namespace(value: str) -> str:
    """The name of a namespace; each `*` in it stands for anything."""
    if _SPACE.fullmatch(value):
        return ""
    return f"{shown(value)} is not the name of a namespace; use lower-case letters, digits and '-', and '*' for anything"


def service_account(value: str) -> str:
    """`NAMESPACE/NAME` of a service account, or its name in the policy's namespace."""
    if _ACCOUNT.fullmatch(value):
        return ""
    return f"{shown(value)} is not a service account; write it as in shop/web, without '*'"


def ip_block(value: str) -> str:
    """An IP address, or a network in CIDR notation."""
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        return f"{shown(value)} is neither an IP address nor a network; write it as in 203.0.113.4 or 10.0.0.0/8"
    return ""


def port(value: str) -> str:
    """A port, in quotes."""
    if value.isascii() and value.isdigit() and 1 <= int(value) <= 65535:
        return ""
    return f'{shown(value)} is not a port; write it as in "8443"'


def host(value: str) -> str:
    """A host as the request has it, in any case; a `*` at one end stands for anything."""
    if "/" in value:
        return f"{shown(value)} can never match: a host has no '/'"
    return _name_pattern(value)


def method(value: str) -> str:
    """A method of HTTP; a `*` at one end stands for anything."""
    wrong = _name_pattern(value)
    if not wrong and value.upper() in METHODS and value not in METHODS:
        return f"{shown(value)} can never match: methods are in capitals, as in GET"
    return wrong


def path(value: str) -> str:
    """A path; a `*` at one end stands for anything, `{*}` for one segment and `{**}` for any number of them."""
    if SINGLE in value or REST in value:
        return _template(value)
    if wrong := _pattern(value):
        return wrong
    if value[0] not in "/*":
        return f"{shown(value)} can never match: begin it with '/' or '*'"
    if "?" in value:
        return f"{shown(value)} can never match: paths are compared without their query"
    core = value[1:] if value[0] == "*" else value[:-1] if value[-1] == "*" else value
    if not core.isascii() or (core == value and value.endswith(("/..", "/."))):
        return formats.path(value)
    return formats.part_of_path(core)


def _template(value: str) -> str:
    if not value.startswith("/"):
        return f"{shown(value)} can never match: begin it with '/'"
    segments = value[1:].split("/")
    for at, segment in enumerate(segments):
        if segment in (SINGLE, REST):
            if segment == REST and any(SINGLE in later or REST in later for later in segments[at + 1 :]):
                return f"{shown(value)}: {REST} must be the last of the operators"
        elif "{" in segment or "}" in segment or "*" in segment:
            return f"{shown(value)}: in a path with {SINGLE} or {REST}, these are whole segments and the only ones with '{{', '}}' or '*'"
    return formats.part_of_path(value.replace(REST, "x").replace(SINGLE, "x"))


def names_in(key: str) -> tuple[str, ...]:
    """`("a", "b")` for `request.auth.claims[a][b]`."""
    return tuple(_NAMES.findall(key))


def attribute(value: str) -> str:
    """The name of an attribute."""
    if value in ATTRIBUTES and "[" not in value:
        return ""
    found = _KEY.fullmatch(value)
    if found is not None:
        names = names_in(found[2])
        if found[1] == "request.auth.claims":
            return ""
        wrong = formats.header_name(names[0]) if names[0] not in (":authority", ":method", ":path", ":scheme") else ""
        return wrong or (f"{shown(value)} has more than one name" if len(names) > 1 else "")
    if value.startswith("experimental.envoy.filters."):
        return f"{shown(value)} is not supported here: {NO_NETWORK_FILTERS}"
    if value in RENAMED:
        return f"{shown(value)} is not an attribute any more; use {RENAMED[value]}"
    return f"{shown(value)} is not an attribute; they are {', '.join(ATTRIBUTES)}"


def form_of(key: str) -> formats.Format:
    """What the values of a condition on an attribute must look like."""
    if key in ("source.ip", "remote.ip", "destination.ip"):
        return ip_block
    return _FORMS.get(key, _pattern)


_FORMS: Final[dict[str, formats.Format]] = {
    "source.namespace": namespace,
    "source.principal": principal,
    "source.serviceAccount": service_account,
    "destination.port": port,
}


def _values(form: formats.Format, most: int = 512) -> Items:
    return Items(Text(form, most=2048), most=most)


SOURCES: Final = {
    "principals": ("source.principal", principal),
    "requestPrincipals": ("request.auth.principal", _pattern),
    "namespaces": ("source.namespace", namespace),
    "serviceAccounts": ("source.serviceAccount", service_account),
    "ipBlocks": ("source.ip", ip_block),
    "remoteIpBlocks": ("remote.ip", ip_block),
}
"""The fields of a source: the attribute, and the form of its values."""
OPERATIONS: Final = {
    "hosts": ("host", host),
    "ports": ("destination.port", port),
    "methods": ("method", method),
    "paths": ("path", path),
}
"""The fields of an operation."""


def negative(field: str) -> str:
    """`notPaths` for `paths`."""
    return f"not{field[0].upper()}{field[1:]}"


def _not_empty(fields: Any) -> Any:
    def rule(value: Any, where: FieldPath, faults: Faults) -> None:
        if not any(value.get(name) for name in fields):
            faults.add(where, f"says nothing; give it at least one of {', '.join(fields)}, or leave it out for any")
        for name in fields:
            if value.get(name) == []:
                faults.add((*where, name), "needs at least 1 item")

    return rule


def _source_rule(value: Any, where: FieldPath, faults: Faults) -> None:
    _not_empty(_fields_of(SOURCES))(value, where, faults)
    if value.get("serviceAccounts") or value.get("notServiceAccounts"):
        for other in ("principals", "notPrincipals", "namespaces", "notNamespaces"):
            if value.get(other):
                faults.add((*where, other), "does not go with service accounts: they say the namespace and the account")


def _fields_of(table: Any) -> dict[str, Items]:
    found = {}
    for name, (attribute_name, form) in table.items():
        most = 16 if attribute_name == "source.serviceAccount" else 512
        found[name] = _values(form, most)
        found[negative(name)] = _values(form, most)
    return found


def _condition_rule(value: Any, where: FieldPath, faults: Faults) -> None:
    if not value.get("values") and not value.get("notValues"):
        faults.add(where, "says nothing: give it at least one of values and notValues")
    form = form_of(value["key"])
    for name in ("values", "notValues"):
        for index, text in enumerate(value.get(name) or []):
            if wrong := form(text):
                faults.add((*where, name, index), wrong)


def _rule_rule(value: Any, where: FieldPath, faults: Faults) -> None:
    for name in ("from", "to"):
        if value.get(name) == []:
            faults.add((*where, name), "needs at least 1 item; leave it out for any")


def _policy_rule(spec: Any, where: FieldPath, faults: Faults) -> None:
    target_rule(spec, where, faults)
    action = spec.get("action") or "ALLOW"
    if action in ("DENY", "CUSTOM") and not spec.get("rules"):
        what = "deny everything" if action == "DENY" else "have the provider asked about everything"
        faults.add((*where, "rules"), f"a {action} policy without rules never matches; write rules: [{{}}] to {what}")
    if action == "CUSTOM" and not spec.get("provider"):
        faults.add((*where, "provider"), "is missing; a CUSTOM policy names one of the Mesh's extensionProviders")
    if action != "CUSTOM" and spec.get("provider"):
        faults.add((*where, "provider"), f"belongs to the action CUSTOM, and this one is {action}")


_RULE: Final = Fields(
    {},
    {
        "from": Items(Fields({"source": Fields({}, _fields_of(SOURCES), rule=_source_rule)}), most=512),
        "to": Items(Fields({"operation": Fields({}, _fields_of(OPERATIONS), rule=_not_empty(_fields_of(OPERATIONS)))}), most=512),
        "when": Items(
            Fields(
                {"key": Text(attribute)},
                {"values": Items(Text(least=1, most=2048), most=512), "notValues": Items(Text(least=1, most=2048), most=512)},
                rule=_condition_rule,
            ),
            most=512,
        ),
    },
    rule=_rule_rule,
)

_PLACES: dict[str, Any] = dict(TARGETS)

AUTHORIZATION_POLICY: Final = Fields(
    {},
    {
        **_PLACES,
        "action": Choice("an action", "ALLOW", "DENY", "AUDIT", "CUSTOM"),
        "provider": Fields({"name": Text(least=1, most=253)}),
        "rules": Items(_RULE, most=512),
    },
    rule=_policy_rule,
)


def document_rule(body: Any, where: FieldPath, faults: Faults) -> None:
    """What a policy says about itself as a whole."""
    spec = body.get("spec") or {}
    dry = (body["metadata"].get("annotations") or {}).get(DRY_RUN)
    if dry is None:
        return
    if dry not in ("true", "false"):
        faults.add((*where, "metadata", "annotations", DRY_RUN), f'{shown(dry)} is neither "true" nor "false"')
    elif dry == "true" and (spec.get("action") or "ALLOW") not in ("ALLOW", "DENY"):
        message = f"is for ALLOW and DENY only, and this policy's action is {spec['action']}"
        faults.add((*where, "metadata", "annotations", DRY_RUN), message)

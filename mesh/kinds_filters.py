"""Schemas of the filters of routes, and of what routes refer to, with the limits and cross-field rules of Gateway API's CRDs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_core import PORT
from mesh.kinds_gateway import GROUP, KIND, NAME, NAMESPACE
from mesh.schema import Choice, Duration, Faults, Fields, Flag, Items, Node, Number, Text

INT32: Final = 2**31 - 1

# What is referred to


def _reference_rule(ref: Any, path: FieldPath, faults: Faults) -> None:
    if (ref.get("kind") or "Service") == "Service" and not ref.get("group") and ref.get("port") is None:
        faults.add((*path, "port"), "is missing; a Service is referred to with a port")


REFERENCE: Final[Mapping[str, Node]] = {"group": GROUP, "kind": KIND, "namespace": NAMESPACE, "port": PORT}
"""The optional fields of a `BackendObjectReference`; `name` is required."""


def backend(filters: Items) -> Fields:
    """One of a rule's `backendRefs`, which may have `filters` of its own."""
    return Fields({"name": NAME}, {**REFERENCE, "weight": Number(0, 1_000_000), "filters": filters}, rule=_reference_rule)


# Header changes

PROTECTED: Final = frozenset(
    ("host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "keep-alive", "proxy-connection")
)
"""Fields that say how a message is framed and where it goes: a filter that changed them would break or smuggle messages."""


def lower_name(item: Any) -> str:
    """The `name` of an item, in lower case: names of headers differ in more than that."""
    return str(item["name"]).lower()


def _headers_rule(change: Any, path: FieldPath, faults: Faults) -> None:
    seen: dict[str, str] = {}
    for action in ("set", "add", "remove"):
        for index, item in enumerate(change.get(action) or []):
            name = item if action == "remove" else item["name"]
            here = (*path, action, index) if action == "remove" else (*path, action, index, "name")
            first = seen.setdefault(name.lower(), action)
            if first != action:
                faults.add(here, f"{formats.shown(name)} is already under {first}; one action for each header")
            if name.lower() in PROTECTED:
                use = "; use urlRewrite.hostname" if name.lower() == "host" else ""
                faults.add(here, f"{formats.shown(name)} is the gateway's own business and can't be changed{use}")


_HEADER: Final = Fields({"name": Text(formats.header_name), "value": Text(formats.header_value, least=1)})
_HEADERS: Final = Fields(
    {},
    {
        "set": Items(_HEADER, most=16, unique=lower_name),
        "add": Items(_HEADER, most=16, unique=lower_name),
        "remove": Items(Text(formats.header_name), most=16, unique=str.lower),
    },
    rule=_headers_rule,
)

# Matches of headers


def value_rule(match: Any, path: FieldPath, faults: Faults) -> None:
    """A value of the type `RegularExpression` must be one."""
    if match.get("type") == "RegularExpression" and (wrong := formats.expression(match["value"])):
        faults.add((*path, "value"), wrong)


def header_matches() -> Items:
    """The `headers` of a match."""
    return Items(
        Fields(
            {"name": Text(formats.header_name), "value": Text(formats.header_match_value, least=1)},
            {"type": Choice("a type of header match", "Exact", "RegularExpression")},
            rule=value_rule,
        ),
        most=16,
        unique=lower_name,
    )


# Redirect and rewrite


def _path_modifier_rule(modifier: Any, path: FieldPath, faults: Faults) -> None:
    full, prefix = modifier.get("replaceFullPath"), modifier.get("replacePrefixMatch")
    wanted, other = (
        ("replaceFullPath", "replacePrefixMatch") if modifier["type"] == "ReplaceFullPath" else ("replacePrefixMatch", "replaceFullPath")
    )
    if modifier.get(wanted) is None:
        faults.add((*path, wanted), f"is missing; it is required with type: {modifier['type']}")
    if modifier.get(other) is not None:
        faults.add((*path, other), f"does not go with type: {modifier['type']}")
    for name, value in (("replaceFullPath", full), ("replacePrefixMatch", prefix)):
        if value and (wrong := formats.new_path(value)):
            faults.add((*path, name), wrong)
    if full == "":
        faults.add((*path, "replaceFullPath"), "must not be empty; use '/'")


_PATH_MODIFIER: Final = Fields(
    {"type": Choice("a path modifier", "ReplaceFullPath", "ReplacePrefixMatch")},
    {"replaceFullPath": Text(most=1024), "replacePrefixMatch": Text(most=1024)},
    rule=_path_modifier_rule,
)


class _Status:
    """The status of a redirect."""

    codes: Final = (301, 302, 303, 307, 308)

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        if value not in self.codes or isinstance(value, bool):
            faults.add(path, f"{value} is not the status of a redirect; use 301, 302, 303, 307 or 308")


_REDIRECT: Final = Fields(
    {},
    {
        "scheme": Choice("a scheme", "http", "https"),
        "hostname": Text(formats.exact_hostname),
        "path": _PATH_MODIFIER,
        "port": PORT,
        "statusCode": _Status(),
    },
)
_REWRITE: Final = Fields({}, {"hostname": Text(formats.exact_hostname), "path": _PATH_MODIFIER})

# Mirrors


def _fraction_rule(fraction: Any, path: FieldPath, faults: Faults) -> None:
    denominator = fraction["denominator"] if fraction.get("denominator") is not None else 100
    if fraction["numerator"] > denominator:
        faults.add((*path, "numerator"), f"{fraction['numerator']} is more than the denominator, which is {denominator}")


def _mirror_rule(mirror: Any, path: FieldPath, faults: Faults) -> None:
    if mirror.get("percent") is not None and mirror.get("fraction") is not None:
        faults.add((*path, "fraction"), "does not go with percent; use one of them")


_MIRROR: Final = Fields(
    {"backendRef": Fields({"name": NAME}, REFERENCE, rule=_reference_rule)},
    {
        "percent": Number(0, 100),
        "fraction": Fields({"numerator": Number(0, INT32)}, {"denominator": Number(1, INT32)}, rule=_fraction_rule),
    },
    rule=_mirror_rule,
)

# CORS

_ORIGIN: Final = re.compile(r"\*|https?://(?:(?:\*\.)?(?:[a-zA-Z0-9-]+\.)*[a-zA-Z0-9-]+|\*)(?::[0-9]{1,5})?")
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")


def _origin(value: str) -> str:
    if not _ORIGIN.fullmatch(value):
        return f"{formats.shown(value)} is not an origin; write it as in https://shop.example, https://*.shop.example:8443 or *"
    port = value.rpartition(":")[2]
    return f"{formats.shown(value)}: there is no port {port}" if port.isdigit() and not 1 <= int(port) <= 65535 else ""


def _cors_rule(cors: Any, path: FieldPath, faults: Faults) -> None:
    for field, noun in (("allowOrigins", "origins"), ("allowMethods", "methods"), ("allowHeaders", "headers")):
        values = cors.get(field) or []
        if "*" in values and len(values) > 1:
            faults.add((*path, field), f"'*' does not go with other {noun}: it stands for all of them")


_CORS: Final = Fields(
    {},
    {
        "allowOrigins": Items(Text(_origin, most=253), most=64, unique=lambda origin: origin),
        "allowCredentials": Flag(),
        "allowMethods": Items(Choice("a method", *METHODS, "*"), most=9, unique=lambda method: method),
        "allowHeaders": Items(Text(formats.header_name), most=64, unique=str.lower),
        "exposeHeaders": Items(Text(formats.header_name), most=64, unique=str.lower),
        "maxAge": Number(1, INT32, "seconds"),
    },
    rule=_cors_rule,
)

_EXTENSION: Final = Fields({"group": GROUP, "kind": KIND, "name": NAME})

# External authorization

_NAMES: Final = Items(Text(formats.header_name), most=64, unique=str.lower)


def _auth_path(value: str) -> str:
    return formats.path(value) if value else ""


def _auth_rule(auth: Any, path: FieldPath, faults: Faults) -> None:
    own, other = ("grpc", "http") if auth["protocol"] == "GRPC" else ("http", "grpc")
    if auth.get(own) is None:
        faults.add((*path, own), f"is missing; it is required with protocol: {auth['protocol']} ({own}: {{}} will do)")
    if auth.get(other) is not None:
        faults.add((*path, other), f"does not go with protocol: {auth['protocol']}")


_AUTH: Final = Fields(
    {
        "protocol": Choice("a protocol of authorization services", "GRPC", "HTTP"),
        "backendRef": Fields({"name": NAME}, REFERENCE, rule=_reference_rule),
    },
    {
        "grpc": Fields({}, {"allowedHeaders": _NAMES}),
        "http": Fields({}, {"path": Text(_auth_path, most=1024), "allowedHeaders": _NAMES, "allowedResponseHeaders": _NAMES}),
        "forwardBody": Fields({}, {"maxSize": Number(0, 65535, "bytes")}),
    },
    rule=_auth_rule,
)

# The filters

FILTERS: Final[dict[str, tuple[str, Node]]] = {
    "RequestHeaderModifier": ("requestHeaderModifier", _HEADERS),
    "ResponseHeaderModifier": ("responseHeaderModifier", _HEADERS),
    "RequestRedirect": ("requestRedirect", _REDIRECT),
    "URLRewrite": ("urlRewrite", _REWRITE),
    "RequestMirror": ("requestMirror", _MIRROR),
    "CORS": ("cors", _CORS),
    "ExternalAuth": ("externalAuth", _AUTH),
    "ExtensionRef": ("extensionRef", _EXTENSION),
}
"""Type of a filter to its field and that field's schema."""

RULE_ONLY: Final = {"CORS": ("cors", "put it on the rule: a preflight is answered before there is a backend")}
"""Filters that mean nothing on a backend."""

REPEATED: Final = frozenset(("RequestMirror", "ExternalAuth", "ExtensionRef"))
"""Filters of which one rule may have several."""


def _filter_rule(item: Any, path: FieldPath, faults: Faults) -> None:
    field = FILTERS[item["type"]][0]
    if item.get(field) is None:
        faults.add((*path, field), f"is missing; it is required with type: {item['type']}")
    for other, _ in FILTERS.values():
        if other != field and item.get(other) is not None:
            faults.add((*path, other), f"does not go with type: {item['type']}")


def _once(item: Any) -> str | None:
    return None if item["type"] in REPEATED else str(item["type"])


def filters(noun: str, *types: str, unsupported: Mapping[str, tuple[str, str]]) -> Items:
    """The `filters` of a rule or a backend: those of `types` work, those of `unsupported` are known."""
    return Items(
        Fields(
            {"type": Choice(noun, *types, unsupported={name: why for name, (_, why) in unsupported.items()})},
            {FILTERS[name][0]: FILTERS[name][1] for name in types},
            unsupported=dict(unsupported.values()),
            rule=_filter_rule,
        ),
        most=16,
        unique=_once,
    )


def redirect_rule(holder: Any, path: FieldPath, faults: Faults) -> None:
    """What holds for the filters of a rule, and for those of a backend."""
    types = {item["type"]: index for index, item in enumerate(holder.get("filters") or [])}
    if "RequestRedirect" in types and "URLRewrite" in types:
        faults.add((*path, "filters", types["RequestRedirect"]), "RequestRedirect and URLRewrite exclude each other")


def prefix_rule(holder: Any, matches: Any, path: FieldPath, faults: Faults) -> None:
    """`ReplacePrefixMatch` among the filters of `holder` (a rule, or a backend of it) needs a prefix to replace."""
    kind = (matches[0].get("path") or {}).get("type") or "PathPrefix"
    for index, item in enumerate(holder.get("filters") or []):
        field = FILTERS[item["type"]][0]
        if item["type"] not in ("RequestRedirect", "URLRewrite"):
            continue
        modifier = item[field].get("path") or {}
        if modifier.get("type") == "ReplacePrefixMatch" and (len(matches) != 1 or kind != "PathPrefix"):
            here = (*path, "filters", index, field, "path", "type")
            faults.add(here, "ReplacePrefixMatch needs exactly one match in its rule, of path type PathPrefix")


# Session persistence


_TAKEN: Final = PROTECTED.union(
    ("cookie", "set-cookie", "authorization", "location", "vary", "date", "server", "expect", "forwarded", "traceparent", "tracestate")
)
_TAKEN_PREFIXES: Final = ("content-", "access-control-", "grpc-", "x-forwarded-", "x-envoy-", "x-tollhouse-", "x-request-id", "x-real-ip")
"""Headers that mean something to clients or in the mesh: a token in one of them would be misread, or taken off."""


def _session_rule(session: Any, path: FieldPath, faults: Faults) -> None:
    kind, cookie = session.get("type") or "Cookie", session.get("cookieConfig")
    lifetime = session.get("absoluteTimeout")
    if cookie is not None and kind != "Cookie":
        faults.add((*path, "cookieConfig"), "goes with type: Cookie only")
    elif cookie and cookie.get("lifetimeType") == "Permanent" and not lifetime:
        faults.add((*path, "absoluteTimeout"), "is missing; it is required with lifetimeType: Permanent")
    if lifetime and formats.seconds(lifetime) < 1:
        faults.add((*path, "absoluteTimeout"), f"{lifetime} is too short for a session; use 1s or more, or leave it out")
    name = session.get("sessionName")
    if not name:
        return
    if wrong := formats.header_name(name):
        what = "cookie" if kind == "Cookie" else "header"
        faults.add((*path, "sessionName"), f"{formats.shown(name)} can't be the name of a {what}" if kind == "Cookie" else wrong)
    elif kind == "Header" and (name.lower() in _TAKEN or name.lower().startswith(_TAKEN_PREFIXES)):
        faults.add((*path, "sessionName"), f"{formats.shown(name)} has a meaning of its own; use another header")


SESSION: Final = Fields(
    {},
    {
        "sessionName": Text(most=128),
        "absoluteTimeout": Duration(),
        "type": Choice("a type of session persistence", "Cookie", "Header"),
        "cookieConfig": Fields({}, {"lifetimeType": Choice("a lifetime of cookies", "Session", "Permanent")}),
    },
    rule=_session_rule,
)
"""A rule's `sessionPersistence`."""

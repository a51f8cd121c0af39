"""The schema of Gateway API's `HTTPRoute`, with the limits and cross-field rules of its CRD."""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_core import PORT
from mesh.kinds_gateway import GROUP, KIND, NAME, NAMESPACE, PARENT_REFS, SECTION, check_parents
from mesh.schema import Choice, Duration, Faults, Fields, Items, Node, Number, Text

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


def _lower_name(item: Any) -> str:
    return str(item["name"]).lower()


def _path_rule(match: Any, path: FieldPath, faults: Faults) -> None:
    value = match.get("value") or "/"
    kind = match.get("type") or "PathPrefix"
    if not value.isascii():
        faults.add((*path, "value"), f"{formats.shown(value)} is not ASCII; a path in a request is, with anything else written as %XX")
        return
    wrong = formats.expression(value) if kind == "RegularExpression" else formats.path(value)
    if wrong:
        faults.add((*path, "value"), wrong)


def _value_rule(match: Any, path: FieldPath, faults: Faults) -> None:
    if match.get("type") == "RegularExpression" and (wrong := formats.expression(match["value"])):
        faults.add((*path, "value"), wrong)


def _method(noun: str) -> Choice:
    return Choice(noun, *METHODS, unsupported=("CONNECT", "TRACE"))


_MATCH: Final = Fields(
    {},
    {
        "path": Fields(
            {},
            {"type": Choice("a path type", "PathPrefix", "Exact", "RegularExpression"), "value": Text(most=1024)},
            rule=_path_rule,
        ),
        "headers": Items(
            Fields(
                {"name": Text(formats.header_name), "value": Text(least=1)},
                {"type": Choice("a type of header match", "Exact", "RegularExpression")},
                rule=_value_rule,
            ),
            most=16,
            unique=_lower_name,
        ),
        "queryParams": Items(
            Fields(
                {"name": Text(formats.header_name), "value": Text(least=1, most=1024)},
                {"type": Choice("a type of query match", "Exact", "RegularExpression")},
                rule=_value_rule,
            ),
            most=16,
            unique="name",
        ),
        "method": _method("a method"),
    },
)

PROTECTED: Final = frozenset(
    ("host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "keep-alive", "proxy-connection")
)
"""Fields that say how a message is framed and where it goes: a filter that changed them would break or smuggle messages."""


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
        "set": Items(_HEADER, most=16, unique=_lower_name),
        "add": Items(_HEADER, most=16, unique=_lower_name),
        "remove": Items(Text(formats.header_name), most=16, unique=str.lower),
    },
    rule=_headers_rule,
)


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
        if value and (wrong := formats.path(value)):
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


FILTERS: Final[dict[str, tuple[str, Node]]] = {
    "RequestHeaderModifier": ("requestHeaderModifier", _HEADERS),
    "ResponseHeaderModifier": ("responseHeaderModifier", _HEADERS),
    "RequestRedirect": (
        "requestRedirect",
        Fields(
            {},
            {
                "scheme": Choice("a scheme", "http", "https"),
                "hostname": Text(formats.exact_hostname),
                "path": _PATH_MODIFIER,
                "port": PORT,
                "statusCode": _Status(),
            },
        ),
    ),
    "URLRewrite": ("urlRewrite", Fields({}, {"hostname": Text(formats.exact_hostname), "path": _PATH_MODIFIER})),
}
"""Type of a filter to its field and that field's schema."""

_UNSUPPORTED_FILTERS: Final = {
    "RequestMirror": "requestMirror",
    "CORS": "cors",
    "ExternalAuth": "externalAuth",
    "ExtensionRef": "extensionRef",
}


def _filter_rule(item: Any, path: FieldPath, faults: Faults) -> None:
    field = FILTERS[item["type"]][0]
    if item.get(field) is None:
        faults.add((*path, field), f"is missing; it is required with type: {item['type']}")
    for other, _ in FILTERS.values():
        if other != field and item.get(other) is not None:
            faults.add((*path, other), f"does not go with type: {item['type']}")


def _filters(noun: str, *types: str, unsupported: tuple[str, ...] = ()) -> Items:
    hint = {"externalAuth": "attach an AccessPolicy to the route", "extensionRef": "attach an AccessPolicy or QuotaPolicy to the route"}
    return Items(
        Fields(
            {"type": Choice(noun, *types, unsupported=(*_UNSUPPORTED_FILTERS, *unsupported))},
            {FILTERS[name][0]: FILTERS[name][1] for name in types},
            unsupported={
                **{field: hint.get(field, "") for field in _UNSUPPORTED_FILTERS.values()},
                **{FILTERS[name][0]: "put it on the rule" for name in unsupported},
            },
            rule=_filter_rule,
        ),
        most=16,
        unique="type",
    )


_BACKEND: Final = Fields(
    {"name": NAME},
    {
        "group": GROUP,
        "kind": KIND,
        "namespace": NAMESPACE,
        "port": PORT,
        "weight": Number(0, 1_000_000),
        "filters": _filters(
            "a filter of a backend",
            "RequestHeaderModifier",
            "ResponseHeaderModifier",
            unsupported=("URLRewrite", "RequestRedirect"),
        ),
    },
)


def _timeouts_rule(timeouts: Any, path: FieldPath, faults: Faults) -> None:
    whole = formats.seconds(timeouts.get("request") or "0s")
    one = formats.seconds(timeouts.get("backendRequest") or "0s")
    if whole and one > whole:
        faults.add((*path, "backendRequest"), f"{timeouts['backendRequest']} is longer than the whole request's {timeouts['request']}")


def _rule_rule(rule: Any, path: FieldPath, faults: Faults) -> None:
    types = {item["type"]: (index, item) for index, item in enumerate(rule.get("filters") or [])}
    if "RequestRedirect" in types:
        index = types["RequestRedirect"][0]
        if "URLRewrite" in types:
            faults.add((*path, "filters", index), "RequestRedirect and URLRewrite exclude each other")
        if rule.get("backendRefs"):
            faults.add((*path, "backendRefs"), "must not be there with a RequestRedirect: the gateway answers by itself")
    matches = rule.get("matches") or [{}]
    for name in ("RequestRedirect", "URLRewrite"):
        if name not in types:
            continue
        index, item = types[name]
        field = FILTERS[name][0]
        modifier = item[field].get("path") or {}
        kind = (matches[0].get("path") or {}).get("type") or "PathPrefix"
        if modifier.get("type") == "ReplacePrefixMatch" and (len(matches) != 1 or kind != "PathPrefix"):
            here = (*path, "filters", index, field, "path", "type")
            faults.add(here, "ReplacePrefixMatch needs exactly one match in its rule, of path type PathPrefix")


_RULE: Final = Fields(
    {},
    {
        "name": SECTION,
        "matches": Items(_MATCH, most=64),
        "filters": _filters("a filter", *FILTERS),
        "backendRefs": Items(_BACKEND, most=16),
        "timeouts": Fields({}, {"request": Duration(), "backendRequest": Duration()}, rule=_timeouts_rule),
    },
    unsupported={
        "retry": "failures to connect are tried again elsewhere without it",
        "sessionPersistence": "",
    },
    rule=_rule_rule,
)


def _route_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    check_parents(spec, path, faults)
    total = sum(len(rule.get("matches") or []) for rule in spec.get("rules") or [])
    if total > 128:
        faults.add((*path, "rules"), f"has {total} matches in all; at most 128 are allowed: make several routes of it")


HTTP_ROUTE: Final = Fields(
    {},
    {
        "parentRefs": PARENT_REFS,
        "hostnames": Items(Text(formats.hostname), most=16, unique=lambda host: host),
        "rules": Items(_RULE, least=1, most=16, unique="name"),
    },
    unsupported={"useDefaultGateways": "name the Gateway in parentRefs"},
    rule=_route_rule,
)

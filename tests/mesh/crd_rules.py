"""For each CEL rule of Gateway API's CRDs, by its message: specs that break it, as pairs of a kind and a spec."""

from __future__ import annotations

from typing import Any

Case = tuple[str, Any]
SERVICE = {"name": "s", "port": 80}
LISTENER = {"name": "a", "port": 80, "protocol": "HTTP"}
CA = {"group": "", "kind": "ConfigMap", "name": "ca"}
TARGET = {"group": "", "kind": "Service", "name": "s"}
CERTIFICATE = {"certificateRefs": [{"name": "c"}]}
PARENTS = [{"name": "g"}]
RULE: dict[str, Any] = {"backendRefs": [SERVICE]}

SAMPLES: dict[str, Any] = {
    "BackendTLSPolicy": {"targetRefs": [TARGET], "validation": {"hostname": "a.b", "caCertificateRefs": [CA]}},
    "GRPCRoute": {"parentRefs": PARENTS, "rules": [{"backendRefs": [SERVICE]}]},
    "Gateway": {"gatewayClassName": "c", "listeners": [LISTENER]},
    "GatewayClass": {"controllerName": "a.b/c"},
    "HTTPRoute": {"parentRefs": PARENTS, "rules": [{"backendRefs": [SERVICE]}]},
    "ListenerSet": {"parentRef": {"name": "g"}, "listeners": [LISTENER]},
    "ReferenceGrant": {"from": [{"group": "", "kind": "A", "namespace": "b"}], "to": [{"group": "", "kind": "C"}]},
    "TCPRoute": {"parentRefs": PARENTS, "rules": [{"backendRefs": [SERVICE]}]},
    "TLSRoute": {"parentRefs": PARENTS, "hostnames": ["a.b"], "rules": [{"backendRefs": [SERVICE]}]},
    "UDPRoute": {"parentRefs": PARENTS, "rules": [{"backendRefs": [SERVICE]}]},
}
"""A right spec of each kind."""


def policy(**changes: Any) -> list[Case]:
    return [("BackendTLSPolicy", {**SAMPLES["BackendTLSPolicy"], **changes})]


def names(**name: Any) -> list[Case]:
    return policy(validation={"hostname": "a.b", "caCertificateRefs": [CA], "subjectAltNames": [name]})


def gateway(**changes: Any) -> list[Case]:
    return [("Gateway", {**SAMPLES["Gateway"], **changes})]


def listeners(*found: Any) -> list[Case]:
    made = [{**LISTENER, **each} for each in found]
    return [("Gateway", {**SAMPLES["Gateway"], "listeners": made}), ("ListenerSet", {**SAMPLES["ListenerSet"], "listeners": made})]


def parents(*refs: Any) -> list[Case]:
    return [(kind, {**SAMPLES[kind], "parentRefs": list(refs)}) for kind in ("GRPCRoute", "HTTPRoute", "TCPRoute", "TLSRoute", "UDPRoute")]


def rules(*found: Any, kinds: tuple[str, ...] = ("HTTPRoute",)) -> list[Case]:
    return [(kind, {**SAMPLES[kind], "rules": list(found)}) for kind in kinds]


BOTH = ("HTTPRoute", "GRPCRoute")


def filters(*found: Any, kinds: tuple[str, ...] = BOTH) -> list[Case]:
    """On the rule, and on its backend."""
    on_rule = rules({"filters": list(found)}, kinds=kinds)
    return on_rule + rules({"backendRefs": [{**SERVICE, "filters": list(found)}]}, kinds=kinds)


def match(**path: Any) -> list[Case]:
    return rules({**RULE, "matches": [{"path": path}]})


HEADERS = {"set": [{"name": "a", "value": "b"}]}
FIELDS: dict[str, Any] = {
    "RequestHeaderModifier": HEADERS,
    "ResponseHeaderModifier": HEADERS,
    "RequestMirror": {"backendRef": SERVICE},
    "RequestRedirect": {"statusCode": 301},
    "URLRewrite": {"hostname": "a.b"},
    "CORS": {"allowOrigins": ["https://a.b"]},
    "ExternalAuth": {"protocol": "GRPC", "backendRef": SERVICE, "grpc": {}},
    "ExtensionRef": {"group": "a.b", "kind": "C", "name": "d"},
}


def field(name: str) -> str:
    return "cors" if name == "CORS" else "urlRewrite" if name == "URLRewrite" else name[0].lower() + name[1:]


def one(name: str) -> dict[str, Any]:
    return {"type": name, field(name): FIELDS[name]}


def modifier(**path: Any) -> list[Case]:
    redirect = {"type": "RequestRedirect", "requestRedirect": {"path": path}}
    rewrite = {"type": "URLRewrite", "urlRewrite": {"path": path}}
    return [*filters(redirect, kinds=("HTTPRoute",)), *filters(rewrite, kinds=("HTTPRoute",))]


def cors(**changes: Any) -> list[Case]:
    return filters({"type": "CORS", "cors": changes}, kinds=("HTTPRoute",))


def auth(**changes: Any) -> list[Case]:
    return filters({"type": "ExternalAuth", "externalAuth": {"backendRef": SERVICE, **changes}}, kinds=("HTTPRoute",))


def session(**changes: Any) -> list[Case]:
    return rules({**RULE, "sessionPersistence": changes}, kinds=BOTH)


PREFIX = {"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"}}
EXACT = {"matches": [{"path": {"type": "Exact", "value": "/a"}}]}
REDIRECT_PREFIX = {"filters": [{"type": "RequestRedirect", "requestRedirect": PREFIX}]}
REWRITE_PREFIX = {"filters": [{"type": "URLRewrite", "urlRewrite": PREFIX}]}
IN_BACKEND = "Within backendRefs, "
PREFIX_RULE = "using {} filter with path.replacePrefixMatch, exactly one PathPrefix match must be specified"
LONG_PREFIX = "a" * 250 + ".example/b"
MANY = [{"matches": [{"method": "GET"} for _ in range(64)], **RULE} for _ in range(3)]
MANY_METHODS = [{"matches": [{"method": {"method": "a"}} for _ in range(64)], **RULE} for _ in range(3)]
BAD_PATHS = {
    "value must be an absolute path and start with '/' when type one of ['Exact', 'PathPrefix']": "a",
    "must not contain '//' when type one of ['Exact', 'PathPrefix']": "/a//b",
    "must not contain '/./' when type one of ['Exact', 'PathPrefix']": "/a/./b",
    "must not contain '/../' when type one of ['Exact', 'PathPrefix']": "/a/../b",
    "must not contain '%2f' when type one of ['Exact', 'PathPrefix']": "/a%2fb",
    "must not contain '%2F' when type one of ['Exact', 'PathPrefix']": "/a%2Fb",
    "must not contain '#' when type one of ['Exact', 'PathPrefix']": "/a#b",
    "must not end with '/..' when type one of ['Exact', 'PathPrefix']": "/a/..",
    "must not end with '/.' when type one of ['Exact', 'PathPrefix']": "/a/.",
    "must only contain valid characters (matching ^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$) "
    "for types ['Exact', 'PathPrefix']": "/a b",
}

RULES: dict[str, list[Case]] = {
    # BackendTLSPolicy
    "sectionName must be specified when targetRefs includes 2 or more references to the same target": policy(
        targetRefs=[TARGET, {**TARGET, "sectionName": "a"}]
    ),
    "sectionName must be unique when targetRefs includes 2 or more references to the same target": policy(
        targetRefs=[{**TARGET, "sectionName": "a"}, {**TARGET, "sectionName": "a"}]
    ),
    "must not contain both CACertificateRefs and WellKnownCACertificates": policy(
        validation={"hostname": "a.b", "caCertificateRefs": [CA], "wellKnownCACertificates": "System"}
    ),
    "must specify either CACertificateRefs or WellKnownCACertificates": policy(validation={"hostname": "a.b"}),
    "SubjectAltName element must contain Hostname, if Type is set to Hostname": names(type="Hostname"),
    "SubjectAltName element must not contain Hostname, if Type is not set to Hostname": names(type="URI", uri="a://b", hostname="a.b"),
    "SubjectAltName element must contain URI, if Type is set to URI": names(type="URI"),
    "SubjectAltName element must not contain URI, if Type is not set to URI": names(type="Hostname", uri="a://b", hostname="a.b"),
    # Gateway and ListenerSet
    "IPAddress values must be unique": gateway(addresses=[{"value": "127.0.0.1"}, {"type": "IPAddress", "value": "127.0.0.1"}]),
    "Hostname values must be unique": gateway(addresses=[{"type": "Hostname", "value": "a.b"}, {"type": "Hostname", "value": "a.b"}]),
    "Hostname value must be empty or contain only valid characters (matching "
    r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$)": gateway(addresses=[{"type": "Hostname", "value": "A_b"}]),
    "Annotation keys must be in the form of an optional DNS subdomain prefix followed by a required name segment of up to 63 characters.": (
        gateway(infrastructure={"annotations": {"a/b/c": "d"}})
    ),
    "If specified, the annotation key's prefix must be a DNS subdomain not longer than 253 characters in total.": gateway(
        infrastructure={"annotations": {LONG_PREFIX: "d"}}
    ),
    "Label keys must be in the form of an optional DNS subdomain prefix followed by a required name segment of up to 63 characters.": (
        gateway(infrastructure={"labels": {"a" * 64: "d"}})
    ),
    "If specified, the label key's prefix must be a DNS subdomain not longer than 253 characters in total.": gateway(
        infrastructure={"labels": {LONG_PREFIX: "d"}}
    ),
    "tls must not be specified for protocols ['HTTP', 'TCP', 'UDP']": [
        case for protocol in ("HTTP", "TCP", "UDP") for case in listeners({"protocol": protocol, "tls": CERTIFICATE})
    ],
    "tls mode must be Terminate for protocol HTTPS": listeners({"protocol": "HTTPS", "tls": {**CERTIFICATE, "mode": "Passthrough"}}),
    "tls mode must be set for protocol TLS": listeners({"protocol": "TLS", "tls": CERTIFICATE}),
    "hostname must not be specified for protocols ['TCP', 'UDP']": [
        case for protocol in ("TCP", "UDP") for case in listeners({"protocol": protocol, "hostname": "a.b"})
    ],
    "Listener name must be unique within the Gateway": listeners({}, {"port": 81}),
    "Combination of port, protocol and hostname must be unique for each listener": [
        *listeners({}, {"name": "b"}),
        *listeners({"hostname": "a.b"}, {"name": "b", "hostname": "a.b"}),
    ],
    "certificateRefs or options must be specified when mode is Terminate": listeners({"protocol": "HTTPS", "tls": {"mode": "Terminate"}}),
    "Port for TLS configuration must be unique within the Gateway": gateway(
        tls={"frontend": {"default": {}, "perPort": [{"port": 1, "tls": {}}, {"port": 1, "tls": {}}]}}
    ),
    # Routes
    "sectionName or port must be specified when parentRefs includes 2 or more references to the same parent": [
        *parents({"name": "g"}, {"name": "g", "sectionName": "a"}),
        *parents({"name": "g", "port": 80}, {"name": "g", "kind": "Gateway"}),
    ],
    "sectionName or port must be unique when parentRefs includes 2 or more references to the same parent": [
        *parents({"name": "g", "sectionName": "a"}, {"name": "g", "sectionName": "a"}),
        *parents({"name": "g", "port": 80}, {"name": "g", "port": 80}),
    ],
    "While 16 rules and 64 matches per rule are allowed, the total number of matches across all rules in a route must be less than 128": [
        *rules(*MANY),
        *rules(*MANY_METHODS, kinds=("GRPCRoute",)),
    ],
    "Rule name must be unique within the route": rules({**RULE, "name": "a"}, {**RULE, "name": "a"}, kinds=BOTH),
    "Must have port for Service reference": [
        *rules({"backendRefs": [{"name": "s"}]}, kinds=("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute", "UDPRoute")),
        *filters({"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "s"}}}),
    ],
    "Only one of percent or fraction may be specified in HTTPRequestMirrorFilter": filters(
        {"type": "RequestMirror", "requestMirror": {"backendRef": SERVICE, "percent": 1, "fraction": {"numerator": 1}}}
    ),
    "numerator must be less than or equal to denominator": filters(
        {"type": "RequestMirror", "requestMirror": {"backendRef": SERVICE, "fraction": {"numerator": 3, "denominator": 2}}}
    ),
    "One or both of 'service' or 'method' must be specified": rules({**RULE, "matches": [{"method": {}}]}, kinds=("GRPCRoute",)),
    r"service must only contain valid characters (matching ^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$)": rules(
        {**RULE, "matches": [{"method": {"service": "a-b"}}]}, kinds=("GRPCRoute",)
    ),
    "method must only contain valid characters (matching ^[A-Za-z_][A-Za-z_0-9]*$)": rules(
        {**RULE, "matches": [{"method": {"method": "a.b"}}]}, kinds=("GRPCRoute",)
    ),
    "AbsoluteTimeout must be specified when cookie lifetimeType is Permanent": session(
        type="Cookie", cookieConfig={"lifetimeType": "Permanent"}
    ),
    "cookieConfig can only be set with type Cookie": session(type="Header", cookieConfig={"lifetimeType": "Session"}),
    "RequestRedirect filter must not be used together with backendRefs": rules({**RULE, "filters": [one("RequestRedirect")]}),
    "When " + PREFIX_RULE.format("RequestRedirect"): rules({**EXACT, **REDIRECT_PREFIX}),
    "When " + PREFIX_RULE.format("URLRewrite"): rules({**EXACT, **REWRITE_PREFIX, **RULE}),
    IN_BACKEND + "when " + PREFIX_RULE.format("RequestRedirect"): rules({**EXACT, "backendRefs": [{**SERVICE, **REDIRECT_PREFIX}]}),
    IN_BACKEND + "When " + PREFIX_RULE.format("URLRewrite"): rules({**EXACT, "backendRefs": [{**SERVICE, **REWRITE_PREFIX}]}),
    "May specify either httpRouteFilterRequestRedirect or httpRouteFilterRequestRewrite, but not both": filters(
        one("RequestRedirect"), one("URLRewrite"), kinds=("HTTPRoute",)
    ),
    "AllowHeaders cannot contain '*' alongside other methods": cors(allowHeaders=["*", "a"]),
    "AllowMethods cannot contain '*' alongside other methods": cors(allowMethods=["*", "GET"]),
    "AllowOrigins cannot contain '*' alongside other origins": cors(allowOrigins=["*", "https://a.b"]),
    "grpc must be specified when protocol is set to 'GRPC'": auth(protocol="GRPC"),
    "protocol must be 'GRPC' when grpc is set": auth(protocol="HTTP", http={}, grpc={}),
    "http must be specified when protocol is set to 'HTTP'": auth(protocol="HTTP"),
    "protocol must be 'HTTP' when http is set": auth(protocol="GRPC", http={}, grpc={}),
    "replaceFullPath must be specified when type is set to 'ReplaceFullPath'": modifier(type="ReplaceFullPath"),
    "type must be 'ReplaceFullPath' when replaceFullPath is set": modifier(
        type="ReplacePrefixMatch", replacePrefixMatch="/", replaceFullPath="/"
    ),
    "replacePrefixMatch must be specified when type is set to 'ReplacePrefixMatch'": modifier(type="ReplacePrefixMatch"),
    "type must be 'ReplacePrefixMatch' when replacePrefixMatch is set": modifier(
        type="ReplaceFullPath", replacePrefixMatch="/", replaceFullPath="/"
    ),
    **{message: [*match(type="Exact", value=value), *match(type="PathPrefix", value=value)] for message, value in BAD_PATHS.items()},
    "type must be one of ['Exact', 'PathPrefix', 'RegularExpression']": match(type="Regex", value="/a"),
    "backendRequest timeout cannot be longer than request timeout": rules(
        {**RULE, "timeouts": {"request": "1s", "backendRequest": "1500ms"}}
    ),
    "Hostnames cannot contain an IP": [("TLSRoute", {**SAMPLES["TLSRoute"], "hostnames": ["127.0.0.1"]})],
    "Hostnames must be valid based on RFC-1123": [("TLSRoute", {**SAMPLES["TLSRoute"], "hostnames": ["a..b"]})],
    "Wildcards on hostnames must be the first label, and the rest of hostname must be valid based on RFC-1123": [
        ("TLSRoute", {**SAMPLES["TLSRoute"], "hostnames": ["a.*.b"]})
    ],
}
for name, value in FIELDS.items():
    RULES[f"{name} filter cannot be repeated"] = filters(one(name), one(name))
    other = "ResponseHeaderModifier" if name == "RequestHeaderModifier" else "RequestHeaderModifier"
    RULES[f"filter.{field(name)} must be nil if the filter.type is not {name}"] = filters({**one(other), field(name): value})
    RULES[f"filter.{field(name)} must be specified for {name} filter.type"] = filters({"type": name})

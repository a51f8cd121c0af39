"""From AuthorizationPolicies to Envoy's RBAC filters, written from Istio's words and Envoy's API, and from nothing of ours.

istio.io: "Authorization Policy", its conditions, and "Authorization for TCP traffic". Scopes with spaces, which Istio's token filter takes
apart, are not among them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Any

Body = dict[str, Any]
JWT = "envoy.filters.http.jwt_authn"
ANY = {"any": True}
TRUST = ("shop.example", "old.example")
"""The mesh's trust domain, and its alias."""


class HttpOnly(Exception):
    """An attribute that a connection doesn't have."""


def text(value: str, *, fold: bool = False) -> Body:
    """A StringMatcher."""
    if value == "*":
        return {"safe_regex": {"regex": ".+"}}
    if value.startswith("*"):
        return {"suffix": value[1:], "ignore_case": fold}
    if value.endswith("*"):
        return {"prefix": value[:-1], "ignore_case": fold}
    return {"exact": value, "ignore_case": fold}


def header(name: str, value: str, *, fold: bool = False) -> Body:
    if value == "*":
        return {"name": name, "present_match": True}
    return {"name": name, "string_match": text(value, fold=fold)}


def cidr(value: str) -> Body:
    network = ipaddress.ip_network(value, strict=False)
    return {"address_prefix": str(network.network_address), "prefix_len": network.prefixlen}


def either(kind: str, parts: Sequence[Body]) -> Body:
    return parts[0] if len(parts) == 1 else {f"or_{kind}": {"rules" if kind == "rules" else "ids": list(parts)}}


def authenticated(matcher: Body) -> Body:
    return {"authenticated": {"principal_name": matcher}}


def principals(value: str) -> list[Body]:
    """One for each name of the trust domain."""
    domain, _, rest = value.partition("/")
    ours = value.count("/") == 4 and (domain == "cluster.local" or any(fits(domain, each) for each in TRUST))
    names = (
        dict.fromkeys(value if domain.startswith("*") and fits(domain, each) else f"{each}/{rest}" for each in TRUST) if ours else [value]
    )
    found = []
    for name in names:
        if name == "*":
            matcher = text("*")
        elif name.startswith("*"):
            matcher = {"safe_regex": {"regex": "spiffe://.*" + re.escape(name[1:])}}
        else:
            matcher = text("spiffe://" + name)
        found.append(authenticated(matcher))
    return found


def fits(pattern: str, domain: str) -> bool:
    return domain.endswith(pattern[1:]) if pattern.startswith("*") else pattern == domain


def namespace(value: str) -> list[Body]:
    return [authenticated({"safe_regex": {"regex": f".*/ns/{value.replace('*', '.*')}/.*"}})]


def account(value: str) -> list[Body]:
    space, _, name = value.partition("/") if "/" in value else ("edge", "", value)
    return [authenticated({"safe_regex": {"regex": f"spiffe://.+/ns/{space}/(.+/|)sa/{name}(/.+)?"}})]


def claim(names: Sequence[str], matcher: Body) -> Body:
    """A claim that is text or a list of texts."""
    value = {"or_match": {"value_matchers": [{"list_match": {"one_of": {"string_match": matcher}}}, {"string_match": matcher}]}}
    return {"metadata": {"filter": JWT, "path": [{"key": "payload"}, *({"key": name} for name in names)], "value": value}}


def one_claim(name: str, matcher: Body) -> Body:
    return {"metadata": {"filter": JWT, "path": [{"key": "payload"}, {"key": name}], "value": {"string_match": matcher}}}


def request_principal(value: str) -> list[Body]:
    issuer, slash, subject = value.rpartition("/")
    every = text("*")
    if value == "*":
        pair = every, every
    elif not slash:
        pair = (
            (every, text(value)) if value.startswith("*") else (text(value), every) if value.endswith("*") else (text(value), {"exact": ""})
        )
    elif value.startswith("*"):
        pair = text(issuer), {"exact": subject}
    else:
        pair = {"exact": issuer}, text(subject)
    return [{"and_ids": {"ids": [one_claim("iss", pair[0]), one_claim("sub", pair[1])]}}]


PRINCIPALS: dict[str, tuple[bool, Callable[[str], list[Body]]]] = {
    "source.principal": (False, principals),
    "source.namespace": (False, namespace),
    "source.serviceAccount": (False, account),
    "source.ip": (False, lambda value: [{"direct_remote_ip": cidr(value)}]),
    "remote.ip": (False, lambda value: [{"remote_ip": cidr(value)}]),
    "request.auth.principal": (True, request_principal),
    "request.auth.audiences": (True, lambda value: [claim(["aud"], text(value))]),
    "request.auth.presenter": (True, lambda value: [claim(["azp"], text(value))]),
}
"""By attribute: whether it is HTTP's only, and the principals of a value."""
SOURCES = {
    "principals": "source.principal",
    "namespaces": "source.namespace",
    "serviceAccounts": "source.serviceAccount",
    "ipBlocks": "source.ip",
    "remoteIpBlocks": "remote.ip",
    "requestPrincipals": "request.auth.principal",
}


def path(value: str) -> list[Body]:
    if "{*}" not in value and "{**}" not in value:
        return [{"url_path": {"path": text(value)}}]
    template = value.replace("{*}", "*").replace("{**}", "**")
    kind = "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig"
    return [{"uri_template": {"name": "uri-template", "typed_config": {"@type": kind, "path_template": template}}}]


class Translator:
    """The filters of one listener. `port`: what the policies call 8080."""

    def __init__(self, port: int, *, tcp: bool = False) -> None:
        self.port = port
        self.tcp = tcp

    def permissions(self, key: str, value: str) -> list[Body]:
        http = key in ("host", "method", "path")
        if http and self.tcp:
            raise HttpOnly
        if key == "host":
            return [{"header": header(":authority", value, fold=True)}]
        if key == "method":
            return [{"header": header(":method", value)}]
        if key == "path":
            return path(value)
        if key == "destination.port":
            return [{"destination_port": self.port if value == "8080" else int(value)}]
        if key == "destination.ip":
            return [{"destination_ip": cidr(value)}]
        assert key == "connection.sni"
        return [{"requested_server_name": text(value)}]

    def principals(self, key: str, value: str) -> list[Body]:
        if key.startswith("request.headers["):
            if self.tcp:
                raise HttpOnly
            return [{"header": header(key[16:-1], value)}]
        if key.startswith("request.auth.claims["):
            if self.tcp:
                raise HttpOnly
            return [claim(re.findall(r"\[([^\]]+)\]", key), text(value))]
        http, made = PRINCIPALS[key]
        if http and self.tcp:
            raise HttpOnly
        return made(value)

    def group(self, kind: str, items: Sequence[tuple[str, Sequence[str], Sequence[str]]], *, allow: bool) -> Body:
        """What is taken together: (attribute, values, values that must not be)."""
        negative = "not_rule" if kind == "rules" else "not_id"
        made = self.permissions if kind == "rules" else self.principals
        parts: list[Body] = []
        for key, values, others in items:
            for wanted, chosen in ((True, values), (False, others)):
                try:
                    found = [each for value in chosen for each in made(key, value)]
                except HttpOnly:
                    if allow:
                        raise
                    continue
                if found:
                    parts.append(either(kind, found) if wanted else {negative: either(kind, found)})
        if not parts:
            return ANY
        return {f"and_{kind}": {"rules" if kind == "rules" else "ids": parts}}

    def rule(self, rule: Body, *, allow: bool) -> Body | None:
        try:
            return self._rule(rule, allow=allow)
        except HttpOnly:
            return None

    def _rule(self, rule: Body, *, allow: bool) -> Body:
        said = [(item["key"], item.get("values") or (), item.get("notValues") or ()) for item in rule.get("when") or ()]
        of_target = [item for item in said if item[0].startswith(("destination.", "connection."))]
        of_source = [item for item in said if item not in of_target]
        sources = [
            [(key, item["source"].get(name) or (), item["source"].get(negated(name)) or ()) for name, key in SOURCES.items()]
            for item in rule.get("from") or [{"source": {}}]
        ]
        fields = {"hosts": "host", "ports": "destination.port", "methods": "method", "paths": "path"}
        operations = [
            [(key, item["operation"].get(name) or (), item["operation"].get(negated(name)) or ()) for name, key in fields.items()]
            for item in rule.get("to") or [{"operation": {}}]
        ]
        return {
            "permissions": [self.group("rules", [*items, *of_target], allow=allow) for items in operations],
            "principals": [self.group("ids", [*items, *of_source], allow=allow) for items in sources],
        }

    def filters(self, policies: Sequence[Body]) -> dict[str, Body]:
        """The rules of the filters, by `DENY` and `ALLOW`; those that are there."""
        found: dict[str, Body] = {}
        for policy in policies:
            action = policy["spec"].get("action", "ALLOW")
            rules = found.setdefault(action, {"action": action, "policies": {}})
            for index, rule in enumerate(policy["spec"].get("rules") or []):
                made = self.rule(rule, allow=action == "ALLOW")
                if made is not None:
                    rules["policies"][f"{policy['metadata']['name']}-{index}"] = made
        return found


def negated(name: str) -> str:
    return f"not{name[0].upper()}{name[1:]}"


RBAC_HTTP = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3"
RBAC_TCP = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC"


def tls(chain: str, key: str, roots: str) -> Body:
    return {
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "tls_certificates": [{"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}],
                "validation_context": {"trusted_ca": {"inline_string": roots}},
            },
        },
    }


def http_listener(port: int, sets: Sequence[Sequence[Body]], security: Body) -> Body:
    """One listener; which policies hold is said by the header `x-set`, and what a token says by `x-claims`."""
    routes = []
    for number, policies in enumerate(sets):
        filters = Translator(port).filters(policies)
        kind = f"{RBAC_HTTP}.RBACPerRoute"
        own = {action: {"@type": kind, "rbac": {"rules": rules}} for action, rules in filters.items()}
        match = {"prefix": "/", "headers": [{"name": "x-set", "string_match": {"exact": str(number)}}]}
        routes.append({"match": match, "direct_response": {"status": 200}, "typed_per_filter_config": own})
    metadata = {
        "header": "x-claims",
        "on_header_present": {"metadata_namespace": JWT, "key": "payload", "type": "PROTOBUF_VALUE", "encode": "BASE64"},
        "remove": True,
    }
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "use_remote_address": True,
        "xff_num_trusted_hops": 1,
        "http_filters": [
            {
                "name": "claims",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
                    "request_rules": [metadata],
                },
            },
            {"name": "DENY", "typed_config": {"@type": f"{RBAC_HTTP}.RBAC"}},
            {"name": "ALLOW", "typed_config": {"@type": f"{RBAC_HTTP}.RBAC"}},
            {"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}},
        ],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
    }
    return listener("http", port, [{"name": "http", "typed_config": manager}], security)


def tcp_listener(port: int, policies: Sequence[Body], security: Body) -> Body:
    """A listener that echoes what the policies let in."""
    chain = [
        {"name": action, "typed_config": {"@type": RBAC_TCP, "rules": rules, "stat_prefix": action}}
        for action, rules in sorted(Translator(port, tcp=True).filters(policies).items(), reverse=True)
    ]
    echo = {"name": "echo", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo"}}
    return listener(f"tcp-{port}", port, [*chain, echo], security)


def listener(name: str, port: int, filters: list[Body], security: Body) -> Body:
    inspector = "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"
    return {
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "listener_filters": [{"name": "inspector", "typed_config": {"@type": inspector}}],
        "filter_chains": [{"filters": filters, "transport_socket": security}],
    }


def bootstrap(listeners: Sequence[Body]) -> Body:
    return {"static_resources": {"listeners": list(listeners)}}

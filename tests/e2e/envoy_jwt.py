"""From rules of a RequestAuthentication to Envoy's jwt_authn filter as Istio configures it, written from Istio's and Envoy's words."""

from __future__ import annotations

import json
from typing import Any

Body = dict[str, Any]


def provider(rule: Body) -> Body:
    """A `JwtProvider`."""
    found: Body = {
        "issuer": rule.get("issuer", ""),
        "audiences": rule.get("audiences") or [],
        "local_jwks": {"inline_string": rule["jwks"]},
        "forward": bool(rule.get("forwardOriginalToken")),
        "from_headers": [{"name": each["name"], "value_prefix": each.get("prefix", "")} for each in rule.get("fromHeaders") or []],
        "from_params": rule.get("fromParams") or [],
        "from_cookies": rule.get("fromCookies") or [],
        "payload_in_metadata": "payload",
        "claim_to_headers": [
            {"header_name": each["header"], "claim_name": each["claim"]} for each in rule.get("outputClaimToHeaders") or []
        ],
    }
    if rule.get("outputPayloadToHeader"):
        found["forward_payload_header"] = rule["outputPayloadToHeader"]
    return found


def jwt_authn(rules: list[Body]) -> Body:
    """The filter: any of the providers, or every one of them or nothing for it (istio.io, "RequestAuthentication": a request with several
    rules passes by one; what is there must be valid)."""
    names = [f"origins-{index}" for index in range(len(rules))]
    each: list[Body] = [{"requires_any": {"requirements": [{"provider_name": name}, {"allow_missing": {}}]}} for name in names]
    requires = each[0]
    if len(names) > 1:
        any_of = [*({"provider_name": name} for name in names), {"requires_all": {"requirements": each}}]
        requires = {"requires_any": {"requirements": any_of}}
    return {
        "name": "envoy.filters.http.jwt_authn",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": {name: provider(rule) for name, rule in zip(names, rules, strict=True)},
            "rules": [{"match": {"prefix": "/"}, "requires": requires}],
            "bypass_cors_preflight": True,
        },
    }


def bootstrap(rules: list[Body], port: int, upstream: int) -> str:
    """A static configuration that listens at `port` and sends everything to `upstream`."""
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "normalize_path": True,
        "http_filters": [
            jwt_authn(rules),
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            },
        ],
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}]}]
        },
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    to = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": upstream}}}}
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    endpoints = {"cluster_name": "up", "endpoints": [{"lb_endpoints": [to]}]}
    cluster = {"name": "up", "type": "STATIC", "connect_timeout": "2s", "load_assignment": endpoints}
    return json.dumps({"static_resources": {"listeners": [{"address": address, "filter_chains": [chain]}], "clusters": [cluster]}})

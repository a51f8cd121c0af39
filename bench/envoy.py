"""Envoy's side: one static bootstrap in three strengths.

`alone` terminates mTLS and passes on over mTLS. `own` adds Envoy's own RBAC and local rate limit. `asking` asks an ext_authz server
that embeds OPA and envoyproxy/ratelimit over Redis about every request: the same job that an enforcing Tollhouse does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

STRENGTHS = ("alone", "own", "asking")


def bootstrap(
    strength: str,
    port: int,
    upstream: int,
    identity: Path,
    authz: int = 0,
    ratelimit: int = 0,
    *,
    http2: bool = False,
    streams: bool = False,
) -> str:
    """The configuration as YAML text. Ports are on 127.0.0.1; `identity` holds cert.pem, key.pem and ca.pem. `http2`: what the upstream is
    spoken to by. `streams`: there are requests that go on for long, and WebSockets."""
    filters: list[dict[str, Any]] = []
    if strength == "own":
        filters += [rbac(), local_rate_limit()]
    if strength == "asking":
        filters += [ext_authz(), rate_limit()]
    filters.append(filter_("router", "extensions.filters.http.router.v3.Router", {"suppress_envoy_headers": True}))
    route: dict[str, Any] = {"cluster": "upstream", "timeout": "0s" if streams else "15s"}
    if strength == "asking":
        route["rate_limits"] = [
            {
                "actions": [
                    {"request_headers": {"header_name": "x-forwarded-client-cert", "descriptor_key": "caller", "skip_if_absent": False}}
                ]
            }
        ]
    manager: dict[str, Any] = {
        "stat_prefix": "in",
        "codec_type": "AUTO",
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "use_remote_address": True,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}]},
        "http_filters": filters,
    }
    if streams:
        manager["upgrade_configs"] = [{"upgrade_type": "websocket"}]
    clusters = [cluster("upstream", upstream, tls=client_tls(identity, http2), http2=http2)]
    if strength == "asking":
        clusters += [cluster("authz", authz, http2=True), cluster("ratelimit", ratelimit, http2=True)]
    listener = {
        "name": "in",
        "address": address(port),
        "filter_chains": [
            {
                "transport_socket": server_tls(identity),
                "filters": [
                    filter_(
                        "http",
                        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        manager,
                        name="http_connection_manager",
                    )
                ],
            }
        ],
    }
    return yaml.safe_dump({"static_resources": {"listeners": [listener], "clusters": clusters}}, sort_keys=False)


def typed(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """A protobuf Any."""
    return {"@type": f"type.googleapis.com/envoy.{kind}", **body}


def filter_(_: str, kind: str, body: dict[str, Any], name: str = "") -> dict[str, Any]:
    """One filter of a chain."""
    return {"name": f"envoy.filters.{name or kind.rsplit('.', 1)[-1].lower()}", "typed_config": typed(kind, body)}


def address(port: int) -> dict[str, Any]:
    """A loopback address."""
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def common_tls(identity: Path) -> dict[str, Any]:
    """Certificate, trust and ALPN."""
    return {
        "tls_certificates": [
            {"certificate_chain": {"filename": str(identity / "cert.pem")}, "private_key": {"filename": str(identity / "key.pem")}}
        ],
        "validation_context": {"trusted_ca": {"filename": str(identity / "ca.pem")}},
    }


def server_tls(identity: Path) -> dict[str, Any]:
    """TLS that wants a client certificate."""
    body = {"require_client_certificate": True, "common_tls_context": {**common_tls(identity), "alpn_protocols": ["h2", "http/1.1"]}}
    return {"name": "tls", "typed_config": typed("extensions.transport_sockets.tls.v3.DownstreamTlsContext", body)}


def client_tls(identity: Path, http2: bool) -> dict[str, Any]:
    """TLS with our certificate."""
    context = {**common_tls(identity), **({"alpn_protocols": ["h2"]} if http2 else {})}
    return {
        "name": "tls",
        "typed_config": typed("extensions.transport_sockets.tls.v3.UpstreamTlsContext", {"common_tls_context": context}),
    }


def cluster(name: str, port: int, *, tls: dict[str, Any] | None = None, http2: bool = False) -> dict[str, Any]:
    """A cluster with one loopback endpoint."""
    made: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]}]},
    }
    if tls:
        made["transport_socket"] = tls
    if http2:
        options = {"explicit_http_config": {"http2_protocol_options": {}}}
        made["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": typed("extensions.upstreams.http.v3.HttpProtocolOptions", options)
        }
    return made


def rbac() -> dict[str, Any]:
    """Envoy's own authorization: by the certificate's URI and the method."""
    principal = {"authenticated": {"principal_name": {"prefix": "spiffe://bench.example/ns/callers/"}}}
    permissions = [
        {
            "and_rules": {
                "rules": [{"header": {"name": ":method", "string_match": {"exact": method}}}, {"url_path": {"path": {"prefix": path}}}]
            }
        }
        for method, path in (("GET", "/catalog/"), ("POST", "/bench.Echo/"))
    ]
    rules = {"action": "ALLOW", "policies": {"callers": {"permissions": permissions, "principals": [principal]}}}
    return filter_("rbac", "extensions.filters.http.rbac.v3.RBAC", {"rules": rules})


def local_rate_limit() -> dict[str, Any]:
    """Envoy's own token bucket (one for all callers: it has none for each)."""
    full = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    body = {
        "stat_prefix": "local",
        "token_bucket": {"max_tokens": 100000000, "tokens_per_fill": 100000000, "fill_interval": "1s"},
        "filter_enabled": full,
        "filter_enforced": full,
    }
    return filter_("local", "extensions.filters.http.local_ratelimit.v3.LocalRateLimit", body)


def ext_authz() -> dict[str, Any]:
    """A call to the authorization server for each request."""
    body = {"transport_api_version": "V3", "grpc_service": {"envoy_grpc": {"cluster_name": "authz"}, "timeout": "1s"}}
    return filter_("authz", "extensions.filters.http.ext_authz.v3.ExtAuthz", body)


def rate_limit() -> dict[str, Any]:
    """A call to the rate-limit server for each request."""
    service = {"transport_api_version": "V3", "grpc_service": {"envoy_grpc": {"cluster_name": "ratelimit"}, "timeout": "1s"}}
    body = {"domain": "bench", "failure_mode_deny": True, "rate_limit_service": service, "timeout": "1s"}
    return filter_("ratelimit", "extensions.filters.http.ratelimit.v3.RateLimit", body)


RATELIMIT = """domain: bench
descriptors:
- key: caller
  rate_limit:
    unit: second
    requests_per_unit: 1000000
"""
"""What envoyproxy/ratelimit is told: each caller has more than it needs."""

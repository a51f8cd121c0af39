"""From HTTPRoutes to a static configuration of Envoy, written from Gateway API's words and Envoy's, and from nothing of ours."""

from __future__ import annotations

import json
import re
from typing import Any

Body = dict[str, Any]
CODES = {301: "MOVED_PERMANENTLY", 302: "FOUND", 303: "SEE_OTHER", 307: "TEMPORARY_REDIRECT", 308: "PERMANENT_REDIRECT"}
KINDS = ("Exact", "RegularExpression", "PathPrefix")
"""Gateway API leaves the place of expressions to the implementation: before prefixes here."""


def rank(route: Body, index: int, match: Body, number: int) -> tuple[Any, ...]:
    """HTTPRoute, "matches": which of two matches goes first."""
    path = match.get("path") or {}
    kind, value = path.get("type", "PathPrefix"), path.get("value", "/")
    length = len(value.rstrip("/") if kind == "PathPrefix" else value)
    counts = (0 if match.get("method") else 1, -len(match.get("headers") or []), -len(match.get("queryParams") or []))
    return KINDS.index(kind), -length, *counts, route["metadata"]["name"], index, number


def text_match(item: Body) -> Body:
    """A header or a query parameter."""
    if item.get("type") == "RegularExpression":
        return {"name": item["name"], "string_match": {"safe_regex": {"regex": item["value"]}}}
    return {"name": item["name"], "string_match": {"exact": item["value"]}}


def envoy_match(match: Body) -> Body:
    """A `RouteMatch`."""
    path = match.get("path") or {}
    kind, value = path.get("type", "PathPrefix"), path.get("value", "/")
    found: Body = {}
    if kind == "Exact":
        found["path"] = value
    elif kind == "RegularExpression":
        found["safe_regex"] = {"regex": value}
    elif value.rstrip("/"):
        found["path_separated_prefix"] = value.rstrip("/")
    else:
        found["prefix"] = "/"
    headers = [text_match(item) for item in match.get("headers") or []]
    if match.get("method"):
        headers.append({"name": ":method", "string_match": {"exact": match["method"]}})
    if headers:
        found["headers"] = headers
    if match.get("queryParams"):
        found["query_parameters"] = [text_match(item) for item in match["queryParams"]]
    return found


def header_changes(change: Body | None, side: str) -> Body:
    """A header modifier, for `request` or `response`."""
    if not change:
        return {}
    adds = [
        {"header": {"key": item["name"], "value": item["value"]}, "append_action": action}
        for field, action in (("set", "OVERWRITE_IF_EXISTS_OR_ADD"), ("add", "APPEND_IF_EXISTS_OR_ADD"))
        for item in change.get(field) or []
    ]
    found: Body = {}
    if adds:
        found[f"{side}_headers_to_add"] = adds
    if change.get("remove"):
        found[f"{side}_headers_to_remove"] = change["remove"]
    return found


def path_changes(modifier: Body | None, match: Body) -> list[tuple[Body, Body]]:
    """What to match in place of `match` and how the path is changed: one pair, or two where an empty rest needs a slash."""
    plain = envoy_match(match)
    if not modifier:
        return [(plain, {})]
    if modifier["type"] == "ReplaceFullPath":
        return [(plain, {"regex_rewrite": {"pattern": {"regex": "^.*$"}, "substitution": modifier["replaceFullPath"]}})]
    prefix = ((match.get("path") or {}).get("value") or "/").rstrip("/")
    new = modifier["replacePrefixMatch"].rstrip("/")
    rest = {"regex_rewrite": {"pattern": {"regex": f"^{re.escape(prefix)}(/.*)?$"}, "substitution": new + r"\1"}}
    if new or not prefix:
        return [(plain, rest)]
    bare = {name: value for name, value in plain.items() if name != "path_separated_prefix"} | {"path": prefix}
    return [(bare, {"regex_rewrite": {"pattern": {"regex": "^.*$"}, "substitution": "/"}}), (plain, rest)]


def routes_of(rule: Body, match: Body, port: int, known: set[str]) -> list[Body]:
    """The Envoy routes of one match of a rule."""
    filters = {item["type"]: item for item in rule.get("filters") or []}
    common = header_changes(filters.get("RequestHeaderModifier", {}).get("requestHeaderModifier"), "request")
    common |= header_changes(filters.get("ResponseHeaderModifier", {}).get("responseHeaderModifier"), "response")
    if "CORS" in filters:
        common |= cors_policy(filters["CORS"]["cors"])
        # HTTPCORSFilter: the route has the word about it, whatever the upstream says.
        common["response_headers_to_remove"] = [*common.get("response_headers_to_remove", ()), "access-control-allow-origin"]
    if "RequestRedirect" in filters:
        wanted = filters["RequestRedirect"]["requestRedirect"]
        action: Body = {"response_code": CODES[wanted.get("statusCode", 302)]}
        scheme = wanted.get("scheme")
        action["port_redirect"] = wanted.get("port") or ({"http": 80, "https": 443}[scheme] if scheme else port)
        if scheme:
            action["scheme_redirect"] = scheme
        if wanted.get("hostname"):
            action["host_redirect"] = wanted["hostname"]
        return [{"match": way, "redirect": action | change, **common} for way, change in path_changes(wanted.get("path"), match)]
    backends = [item for item in rule.get("backendRefs") or [] if item.get("weight", 1)]
    if not backends:
        return [{"match": envoy_match(match), "direct_response": {"status": 500}, **common}]
    clusters = []
    for item in backends:
        own = {each["type"]: each for each in item.get("filters") or []}
        changes = header_changes(own.get("RequestHeaderModifier", {}).get("requestHeaderModifier"), "request")
        changes |= header_changes(own.get("ResponseHeaderModifier", {}).get("responseHeaderModifier"), "response")
        clusters.append({"name": item["name"], "weight": item.get("weight", 1), **changes})
    rewrite = filters.get("URLRewrite", {}).get("urlRewrite") or {}
    # HTTPBackendRef: a backend that is not there is answered with 500, which is 503 with Envoy if nothing else is said.
    target: Body = {"weighted_clusters": {"clusters": clusters}, "cluster_not_found_response_code": "INTERNAL_SERVER_ERROR"}
    if rewrite.get("hostname"):
        target["host_rewrite_literal"] = rewrite["hostname"]
    mirrors = [item["requestMirror"] for item in rule.get("filters") or [] if item["type"] == "RequestMirror"]
    if mirrors:
        target["request_mirror_policies"] = [mirror_policy(item) for item in mirrors if item["backendRef"]["name"] in known]
    ways = path_changes(rewrite.get("path"), match)
    return [{"match": way, "route": target | change | tries, **common} for way, change in ways for way, tries in ways_to_try(rule, way)]


def cors_policy(cors: Body) -> Body:
    """HTTPCORSFilter, as the configuration of Envoy's filter at a route."""
    origins = []
    for origin in cors["allowOrigins"]:
        if origin == "*":
            origins.append({"safe_regex": {"regex": ".*"}})
        else:
            scheme, _, rest = origin.partition("://")
            # HTTPCORSFilter, "allowOrigins": without a port it is the scheme's own, which both sides may name as well.
            own = {"https": ":443", "http": ":80"}[scheme]
            rest = rest.removesuffix(own)
            port = "" if ":" in rest else f"({own})?"
            origins.append({"safe_regex": {"regex": f"{scheme}://{re.escape(rest).replace(re.escape('*'), '.+')}{port}"}})
    found: Body = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": origins,
        "max_age": str(cors.get("maxAge", 5)),
        "allow_credentials": bool(cors.get("allowCredentials")),
        # GEP-1767: whoever asks from elsewhere is told nothing; the upstream is not asked in the gateway's place.
        "forward_not_matching_preflights": False,
    }
    for field, name in (("allowMethods", "allow_methods"), ("allowHeaders", "allow_headers"), ("exposeHeaders", "expose_headers")):
        if cors.get(field):
            found[name] = ",".join(cors[field])
    return {"typed_per_filter_config": {"cors": found}}


def mirror_policy(mirror: Body) -> Body:
    """HTTPRequestMirrorFilter. Envoy's own name for the host of a copy, with `-shadow`, is not Gateway API's."""
    part = mirror.get("fraction") or {"numerator": mirror.get("percent", 100)}
    # Envoy knows three denominators; the tests ask for those alone.
    denominator = {100: "HUNDRED", 10_000: "TEN_THOUSAND", 1_000_000: "MILLION"}[part.get("denominator", 100)]
    return {
        "cluster": mirror["backendRef"]["name"],
        "runtime_fraction": {"default_value": {"numerator": part["numerator"], "denominator": denominator}},
        "disable_shadow_host_suffix_append": True,
    }


def seconds(duration: str) -> str:
    """A duration of Gateway API's, of one unit, in Envoy's form."""
    number, unit = re.fullmatch(r"(\d+)(ms|s)", duration).groups()  # type: ignore[union-attr]
    return f"{int(number) / (1000 if unit == 'ms' else 1):.3f}s"


def ways_to_try(rule: Body, way: Body) -> list[tuple[Body, Body]]:
    """Timeouts and retries of a rule: what to match in place of `way`, and what its action says about them."""
    times, retry = rule.get("timeouts") or {}, rule.get("retry")
    found: Body = {"timeout": seconds(times["request"])} if times.get("request") else {}
    policy: Body = {"num_retries": 0}
    if times.get("backendRequest"):
        policy["per_try_timeout"] = seconds(times["backendRequest"])
    if retry is None:
        return [(way, found | {"retry_policy": policy} if times else found)]
    codes = retry.get("codes") or []
    policy |= {
        "num_retries": retry.get("attempts", 2),
        "retriable_status_codes": codes,
        "retry_back_off": {"base_interval": seconds(retry.get("backoff", "25ms"))},
    }
    always = "connect-failure,refused-stream,retriable-status-codes"
    # GEP-1731 has connections that broke tried again; RFC 9110, section 9.2.2, forbids a proxy to do so with a POST that its upstream may
    # have acted on. Codes allow it: Envoy has one switch, "reset", for the gateway's own 502 and 504.
    anyhow = always + (",reset" if {502, 504} <= set(codes) else "")
    idempotent = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD|OPTIONS|PUT|DELETE"}}}
    return [
        (way | {"headers": [*way.get("headers", ()), idempotent]}, found | {"retry_policy": policy | {"retry_on": always + ",reset"}}),
        (way, found | {"retry_policy": policy | {"retry_on": anyhow}}),
    ]


def bootstrap(routes: list[Body], port: int, services: dict[str, int]) -> str:
    """Envoy's whole configuration: a listener at `port`, the routes, and the services by name and loopback port."""
    hosts: dict[str, list[tuple[Any, list[Body]]]] = {}
    for route in routes:
        for host in route["spec"].get("hostnames") or ["*"]:
            for index, rule in enumerate(route["spec"]["rules"]):
                for number, match in enumerate(rule.get("matches") or [{}]):
                    hosts.setdefault(host, []).append((rank(route, index, match, number), routes_of(rule, match, port, set(services))))
    virtual = []
    for host, ways in hosts.items():
        ordered = [each for _, found in sorted(ways, key=lambda way: way[0]) for each in found]
        virtual.append({"name": host, "domains": [host], "routes": ordered})
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "route_config": {"virtual_hosts": virtual, "validate_clusters": False},
        "http_filters": [
            {"name": "cors", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors"}},
            {"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}},
        ],
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    listener = {"name": "http", "address": address, "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}
    clusters = [
        {
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "circuit_breakers": {"thresholds": [{"max_retries": 1024}]},
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [
                    {"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": at}}}}]}
                ],
            },
        }
        for name, at in services.items()
    ]
    return json.dumps({"static_resources": {"listeners": [listener], "clusters": clusters}})

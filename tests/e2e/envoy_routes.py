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
    if not backends or any(item["name"] not in known for item in backends):
        assert len(backends) < 2, "which of several is missing is a matter of chance"
        return [{"match": envoy_match(match), "direct_response": {"status": 500}, **common}]
    clusters = []
    for item in backends:
        own = {each["type"]: each for each in item.get("filters") or []}
        changes = header_changes(own.get("RequestHeaderModifier", {}).get("requestHeaderModifier"), "request")
        clusters.append({"name": item["name"], "weight": item.get("weight", 1), **changes})
    rewrite = filters.get("URLRewrite", {}).get("urlRewrite") or {}
    target: Body = {"weighted_clusters": {"clusters": clusters}}
    if rewrite.get("hostname"):
        target["host_rewrite_literal"] = rewrite["hostname"]
    return [{"match": way, "route": target | change, **common} for way, change in path_changes(rewrite.get("path"), match)]


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
        "route_config": {"virtual_hosts": virtual},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}
        ],
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    listener = {"name": "http", "address": address, "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}
    clusters = [
        {
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
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

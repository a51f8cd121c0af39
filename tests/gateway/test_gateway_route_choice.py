"""Which rule a request falls under, through schema, compiler and router, against a slow matcher written from the specification."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from gateway_world import INGRESS, a_head, a_peer
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.place import Place
from gateway.plan import Pending
from gateway.route import route
from mesh.kinds import check_document
from mesh.reading import document_of
from mesh.workspace import Workspace

GROUP = "gateway.networking.k8s.io/v1"
BASE: list[dict[str, Any]] = [
    {
        "apiVersion": GROUP,
        "kind": "GatewayClass",
        "metadata": {"name": "tollhouse"},
        "spec": {"controllerName": "tollhouse.dev/gateway-controller"},
    },
    {
        "apiVersion": GROUP,
        "kind": "Gateway",
        "metadata": {"namespace": "edge", "name": "gw"},
        "spec": {"gatewayClassName": "tollhouse", "listeners": [{"name": "http", "port": 80, "protocol": "HTTP"}]},
    },
]
HOSTS = ["a.example", "b.a.example", "*.a.example", "*.example"]
PATHS = ["/", "/a", "/a/", "/a/b", "/a/b/", "/ab", "/a/b/c"]
EXPRESSIONS = ["/a.*", "/a/b", "/.*c", ".*"]
NAMES, VALUES = ["x-a", "x-b"], ["1", "2", "1,2"]


def typed(name: str, value: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from([{"name": name, "value": value}, {"name": name, "value": "[12]", "type": "RegularExpression"}])


def conditions() -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES[:2])).flatmap(lambda pair: typed(*pair))
    return st.lists(one, max_size=2, unique_by=lambda item: item["name"])


def http_matches() -> st.SearchStrategy[dict[str, Any]]:
    paths = st.one_of(
        st.builds(lambda value, kind: {"value": value, "type": kind}, st.sampled_from(PATHS), st.sampled_from(["Exact", "PathPrefix"])),
        st.builds(lambda value: {"value": value, "type": "RegularExpression"}, st.sampled_from(EXPRESSIONS)),
        st.none(),
    )
    return st.builds(
        lambda path, method, headers, queries: {
            key: value
            for key, value in (("path", path), ("method", method), ("headers", headers), ("queryParams", queries))
            if value is not None
        },
        paths,
        st.sampled_from([None, None, "GET", "POST"]),
        conditions(),
        conditions(),
    )


def grpc_matches() -> st.SearchStrategy[dict[str, Any]]:
    exact = st.builds(
        lambda service, method: {key: value for key, value in (("service", service), ("method", method)) if value},
        st.sampled_from(["", "a", "a.B"]),
        st.sampled_from(["", "Get", "GetMore"]),
    )
    return st.builds(lambda method, headers: {"headers": headers, **({"method": method} if method else {})}, exact, conditions())


def routes(kind: str, matches: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    one = st.fixed_dictionaries(
        {
            "hostnames": st.lists(st.sampled_from(HOSTS), max_size=2, unique=True),
            "rules": st.lists(st.lists(matches, max_size=3), min_size=1, max_size=3),
            "created": st.sampled_from(["", "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"]),
            "name": st.sampled_from(["r1", "r2", "r3"]),
        }
    )

    def document(made: dict[str, Any]) -> dict[str, Any]:
        rules = [{"matches": matches} if matches else {} for matches in made["rules"]]
        metadata = {"namespace": "edge", "name": made["name"]} | ({"creationTimestamp": made["created"]} if made["created"] else {})
        spec = {"parentRefs": [{"name": "gw"}], "hostnames": made["hostnames"], "rules": rules}
        return {"apiVersion": GROUP, "kind": kind, "metadata": metadata, "spec": spec}

    return st.lists(one.map(document), min_size=1, max_size=3, unique_by=lambda made: made["metadata"]["name"])


REQUESTS = st.fixed_dictionaries(
    {
        "host": st.sampled_from(["a.example", "b.a.example", "c.b.a.example", "example", "other"]),
        "path": st.sampled_from([*PATHS, "/a/c", "/abc", "/a/Get", "/a.B/Get", "/a.B/GetMore", "/a.B/Get/x", "/c/Get"]),
        "method": st.sampled_from(["GET", "POST", "PUT"]),
        "headers": st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=3),
        "query": st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES[:2])), max_size=3),
    }
)


# The specification, read slowly


def holds(pattern: str, host: str) -> bool:
    return host == pattern or pattern == "*" or (pattern[:2] == "*." and host.endswith(pattern[1:]))


def values(found: list[tuple[str, str]], name: str, joined: bool) -> str | None:
    """Several headers of a name are one with a list; of query parameters the first counts."""
    own = [value for key, value in found if key == name]
    return None if not own else ",".join(own) if joined else own[0]


def all_hold(wanted: list[dict[str, Any]], found: list[tuple[str, str]], joined: bool) -> bool:
    for item in wanted:
        value = values(found, item["name"], joined)
        if value is None:
            return False
        if not (re.fullmatch(item["value"], value) if item.get("type") else value == item["value"]):
            return False
    return True


Ranked = tuple[Any, ...] | None


def http_rank(match: dict[str, Any], request: dict[str, Any]) -> Ranked:
    """Where an HTTPRoute's match stands among those that fit; None when it does not."""
    path = match.get("path") or {"type": "PathPrefix", "value": "/"}
    kind, value = path["type"], path["value"]
    if kind == "Exact":
        fits, order = request["path"] == value, (0, 0)
    elif kind == "RegularExpression":
        fits, order = re.fullmatch(value, request["path"]) is not None, (1, -len(value))
    else:
        prefix = value.rstrip("/")
        fits, order = request["path"] == prefix or request["path"].startswith(prefix + "/"), (2, -len(prefix))
    if not fits or match.get("method") not in (None, request["method"]):
        return None
    headers, queries = match.get("headers") or [], match.get("queryParams") or []
    if not all_hold(headers, request["headers"], True) or not all_hold(queries, request["query"], False):
        return None
    return (*order, 0 if match.get("method") else 1, -len(headers), -len(queries))


def grpc_rank(match: dict[str, Any], request: dict[str, Any]) -> Ranked:
    """The same for a GRPCRoute: characters of the service, of the method, then the number of headers."""
    wanted, headers = match.get("method") or {}, match.get("headers") or []
    service, method = wanted.get("service"), wanted.get("method")
    parts = request["path"].split("/")
    if request["method"] != "POST" or not all_hold(headers, request["headers"], True):
        return None
    if service and parts[1] != service:
        return None
    if method and (len(parts) != 3 or not parts[1] or parts[2] != method):
        return None
    return -len(service or ""), -len(method or ""), -len(headers)


def expected(made: list[dict[str, Any]], request: dict[str, Any], rank: Callable[[dict[str, Any], dict[str, Any]], Ranked]) -> str | None:
    """The name of the rule; None when there is none."""
    hosts = {host for each in made for host in each["spec"]["hostnames"] or ["*"] if holds(host, request["host"])}
    if not hosts:
        return None
    best = max(hosts, key=lambda host: (host[:1] != "*", len(host)))
    found = []
    for each in made:
        if best not in (each["spec"]["hostnames"] or ["*"]):
            continue
        created, name = each["metadata"].get("creationTimestamp") or "", each["metadata"]["name"]
        for index, rule in enumerate(each["spec"]["rules"]):
            for number, match in enumerate(rule.get("matches") or [{}]):
                place = rank(match, request)
                if place is not None:
                    found.append(((*place, not created, created, name, index, number), f"edge/{name}#{index}"))
    return min(found)[1] if found else None


def chosen(made: list[dict[str, Any]], request: dict[str, Any]) -> str | None:
    documents = [document_of(body, "made") for body in [*BASE, *made]]
    assert [problem for document in documents for problem in check_document(document)] == []
    workspace = Workspace()
    snapshot = workspace.update(upserts=documents, replace=True)
    gateway = snapshot.gateways["edge/gw"]
    place = Place(snapshot, gateway, gateway.listeners[0], gateway.listeners, INGRESS)
    query = "&".join(f"{name}={value}" for name, value in request["query"])
    assert parse_qsl(query) == request["query"]
    target = request["path"] + (f"?{query}" if query else "")
    headers = [(name.encode(), value.encode()) for name, value in request["headers"]]
    routed = route(
        a_head(target.encode(), request["method"].encode(), headers, request["host"].encode()),
        a_peer(""),
        place,
        0.0,
        random.Random(1),
    )
    return routed.rule.name if isinstance(routed, Pending) else None


@settings(max_examples=400, deadline=None)
@given(routes("HTTPRoute", http_matches()), st.lists(REQUESTS, min_size=1, max_size=4))
def test_an_http_route_is_chosen_as_the_specification_says(made: list[dict[str, Any]], requests: list[dict[str, Any]]) -> None:
    for request in requests:
        assert chosen(made, request) == expected(made, request, http_rank), request


@settings(max_examples=400, deadline=None)
@given(routes("GRPCRoute", grpc_matches()), st.lists(REQUESTS, min_size=1, max_size=4))
def test_a_grpc_route_is_chosen_as_the_specification_says(made: list[dict[str, Any]], requests: list[dict[str, Any]]) -> None:
    for request in requests:
        assert chosen(made, request) == expected(made, request, grpc_rank), request

"""Gateway API's rules about hostnames and precedence, against slow and plain versions of themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_world import BASE, read

from mesh.compile_attach import covers, intersect, selects
from mesh.compile_matches import normal_path
from mesh.documents import Document, Origin
from mesh.model import Match, VirtualHost
from mesh.reading import document_of
from mesh.workspace import Workspace

LABELS = ("a", "b")
NAMES = [".".join(parts) for length in (1, 2, 3) for parts in itertools.product(LABELS, repeat=length)]
PATTERNS = [*NAMES, *("*." + name for name in NAMES), "*"]


def holds(pattern: str, name: str) -> bool:
    """Whether a name is one of a pattern's: a wildcard stands for one label or more."""
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return name.endswith("." + pattern[2:]) and name != "." + pattern[2:]
    return name == pattern


DEEP = [".".join(parts) for length in (1, 2, 3, 4, 5) for parts in itertools.product(LABELS, repeat=length)]


@given(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS))
def test_a_pattern_covers_another_when_it_holds_each_name_of_it(pattern: str, other: str) -> None:
    assert covers(pattern, other) == all(holds(pattern, name) for name in DEEP if holds(other, name)) or other == "*"


@given(st.lists(st.sampled_from(PATTERNS[:-1]), max_size=3, unique=True), st.sampled_from(PATTERNS))
def test_a_route_serves_the_names_that_both_it_and_the_listener_hold(wanted: list[str], listener: str) -> None:
    found = intersect(tuple(wanted), listener)
    for name in DEEP:
        both = holds(listener, name) and (not wanted or any(holds(pattern, name) for pattern in wanted))
        assert any(holds(pattern, name) for pattern in found) == both


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchLabels": {"b": "1"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "b", "operator": "In", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, False),
    ],
)
def test_label_selectors(selector: dict[str, Any], fits: bool) -> None:
    assert selects(selector, {"a": "1"}) is fits


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a", b"/a"),
        ("/%61%7e", b"/a~"),
        ("/caf%c3%a9", b"/caf%C3%A9"),
        ("/a%20b", b"/a%20b"),
        ("/%2561", b"/%2561"),
        ("/a;b=1", b"/a;b=1"),
    ],
)
def test_configured_paths_have_the_form_of_requests(path: str, expected: bytes) -> None:
    assert normal_path(path) == expected


PATHS = ["/", "/a", "/a/b", "/a/b/c", "/ab", "/b"]
MATCHES = st.fixed_dictionaries(
    {},
    optional={
        "path": st.fixed_dictionaries({"type": st.sampled_from(["Exact", "PathPrefix"]), "value": st.sampled_from(PATHS)}),
        "method": st.sampled_from(["GET", "POST"]),
        "headers": st.lists(st.sampled_from(["h", "i"]), max_size=2, unique=True).map(
            lambda names: [{"name": name, "value": "1"} for name in names]
        ),
        "queryParams": st.lists(st.sampled_from(["p", "q"]), max_size=2, unique=True).map(
            lambda names: [{"name": name, "value": "1"} for name in names]
        ),
    },
)
ROUTES = st.lists(
    st.tuples(
        st.sampled_from(["", "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"]),
        st.lists(st.lists(MATCHES, max_size=3), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=4,
)
REQUESTS = st.tuples(
    st.sampled_from(["/", "/a", "/a/", "/a/b", "/a/b/c/d", "/abc", "/b", "/c"]),
    st.sampled_from(["GET", "POST", "PUT"]),
    st.sets(st.sampled_from(["h", "i"])),
    st.sets(st.sampled_from(["p", "q"])),
)
Request = tuple[str, str, set[str], set[str]]


def document(number: int, created: str, rules: list[list[Any]]) -> Document:
    metadata = {"namespace": "shop", "name": f"r{number}"} | ({"creationTimestamp": created} if created else {})
    spec = {
        "parentRefs": [{"namespace": "edge", "name": "gw"}],
        "rules": [{"matches": matches, "backendRefs": [{"name": "web", "port": 80}]} for matches in rules],
    }
    return document_of({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": metadata, "spec": spec}, "x")


def best(routes: list[tuple[str, list[list[Any]]]], request: Request) -> str | None:
    """The rule that Gateway API's text gives the request to, by looking at all of them."""
    path, method, headers, queries = request
    found = []
    for number, (created, rules) in enumerate(routes):
        for index, matches in enumerate(rules):
            for place, match in enumerate(matches or [{}]):
                wanted = match.get("path") or {"type": "PathPrefix", "value": "/"}
                value = wanted["value"]
                exact = wanted["type"] == "Exact"
                prefix = value.rstrip("/")
                if not (path == value if exact else path == prefix or path.startswith(prefix + "/")):
                    continue
                names = [item["name"] for item in match.get("headers") or []]
                parameters = [item["name"] for item in match.get("queryParams") or []]
                if match.get("method", method) != method or not headers.issuperset(names) or not queries.issuperset(parameters):
                    continue
                age = (not created, created)
                order = (not exact, -len(prefix), "method" not in match, -len(names), -len(parameters), age, f"r{number}", index, place)
                found.append((order, f"shop/r{number}#{index}"))
    return min(found)[1] if found else None


def looked_up(host: VirtualHost, request: Request) -> str | None:
    """What a reader of the index finds: exact, then the longest prefix; the first match that fits."""
    path, method, headers, queries = request

    def first(matches: tuple[Match, ...]) -> str | None:
        for match in matches:
            names = {item.name.decode() for item in match.headers}
            parameters = {item.name for item in match.queries}
            if match.method in (b"", method.encode()) and names <= headers and parameters <= queries:
                return match.rule.name
        return None

    parts = path.split("/")
    prefixes = ["/".join(parts[:length]).encode() for length in range(len(parts), 0, -1)]
    ways = [host.exact.get(path.encode(), ()), *(host.prefix.get(prefix, ()) for prefix in prefixes)]
    return next((found for matches in ways if (found := first(matches)) is not None), None)


@settings(max_examples=200, deadline=None)
@given(ROUTES, st.lists(REQUESTS, min_size=1, max_size=8))
def test_the_index_gives_each_request_to_the_rule_that_the_specification_says(
    routes: list[tuple[str, list[list[Any]]]], requests: list[Request]
) -> None:
    documents = [document(number, created, rules) for number, (created, rules) in enumerate(routes)]
    snapshot = Workspace().update(upserts=[*read(BASE), *documents], replace=True)
    assert snapshot.problems == ()
    host = snapshot.gateways["edge/gw"].listeners[0].hosts["*"]
    for request in requests:
        assert looked_up(host, request) == best(routes, request)


def test_origins_lead_to_the_rule() -> None:
    text = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {namespace: shop, name: r}\nspec:\n"
    text += "  parentRefs: [{namespace: edge, name: gw}]\n  rules:\n  - backendRefs:\n    - {name: web, port: 80}\n"
    (route,) = read(text, "routes.yaml")
    snapshot = Workspace().update(upserts=[*read(BASE), route], replace=True)
    assert snapshot.gateways["edge/gw"].listeners[0].hosts["*"].prefix[b""][0].rule.origin == "routes.yaml:7"
    assert Origin("etcd /a at revision 5").at(("spec",)) == "etcd /a at revision 5"

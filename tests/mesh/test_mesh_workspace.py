"""What stays in force when something goes wrong, and what the example mesh makes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_world import BASE, activated, describe, problems_of, read, render, revision, shop_documents, workspace

from mesh.compile_policies import UNANSWERABLE
from mesh.documents import Document, Instance, Key, Problem
from mesh.model import EMPTY, Snapshot
from mesh.policies import active_policy_body, revision_body, revision_name, spec_body, trial_of, trial_spec
from mesh.policy import Share
from mesh.reading import document_of
from mesh.sharing import changed
from mesh.workspace import Workspace

GATEWAY = "gateway.networking.k8s.io"
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: r}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  rules: [{matches: [{path: {value: /one}}], backendRefs: [{name: web, port: 80}]}]
"""
KEY = Key(GATEWAY, "HTTPRoute", "shop", "r")


def prefixes(snapshot: Snapshot) -> list[bytes]:
    (listener,) = snapshot.gateways["edge/gw"].listeners
    return [path for host in listener.hosts.values() for path in host.prefix]


def asked(snapshot: Snapshot) -> list[str]:
    (listener,) = snapshot.gateways["edge/gw"].listeners
    return [policy.decision for policy in next(iter(listener.hosts["*"].prefix.values()))[0].rule.decisions]


def test_nothing_makes_the_empty_snapshot() -> None:
    made = Workspace()
    assert made.snapshot is EMPTY
    assert msgspec.structs.replace(made.update(replace=True), version="") == EMPTY


def test_the_example_mesh_compiles_without_a_problem() -> None:
    made = Workspace()
    snapshot = made.update(upserts=[*shop_documents(), *activated("shop.authz.decision")], replace=True)
    assert problems_of(snapshot) == []
    mesh = "ask mesh:mesh(shop.authz.decision)"
    tls = "tls svid >=1.2 clients require by trust_bundle"
    ns = "spiffe://shop.example/ns"
    assert render(snapshot) == (
        "gateway edge/eastwest 127.0.0.1\n"
        f"  listener mesh HTTPS 8444 *.shop.example {tls}\n"
        "    host payments.shop.example\n"
        f"      prefix /payments /payments/** => shop/payments-eastwest#0 {mesh} -> 1*shop/payments:443\n"
        "gateway edge/egress 127.0.0.1\n"
        f"  listener out HTTPS 8445 bank.example {tls}\n"
        "    host bank.example\n"
        f"      prefix (root) /** => shop/bank#0 {mesh} -> 1*shop/bank:443\n"
        "gateway edge/ingress 127.0.0.1\n"
        f"  listener https HTTPS 8443 shop.example {tls}\n"
        "    host shop.example\n"
        f"      prefix /catalog /catalog/** => shop/catalog#0 {mesh} -> 90*shop/catalog-v1:443 -> 10*shop/catalog-v2:443\n"
        f"      prefix /orders /orders/** => shop/orders#0 {mesh} take route:shop/orders/per-caller per identity; -> 1*shop/orders:443\n"
        f"      prefix /payments /payments/** => shop/payments#0 {mesh} rewrite host=payments.shop.example = -> 1*edge/eastwest:8444\n"
        f"cluster edge/eastwest:8444 gateway tls=mesh 127.0.0.1:8444<{ns}/edge/sa/eastwest>\n"
        "cluster shop/bank:443 external tls=validate(bank.example) 127.0.0.1:9105\n"
        f"cluster shop/catalog-v1:443 tls=mesh 127.0.0.1:9101<{ns}/shop/sa/catalog>\n"
        f"cluster shop/catalog-v2:443 tls=mesh 127.0.0.1:9102<{ns}/shop/sa/catalog>\n"
        f"cluster shop/orders:443 tls=mesh 127.0.0.1:9103<{ns}/shop/sa/orders>\n"
        f"cluster shop/payments:443 tls=mesh 127.0.0.1:9104<{ns}/shop/sa/payments>\n"
    )
    (limit,) = snapshot.gateways["edge/ingress"].listeners[0].hosts["shop.example"].prefix[b"/orders"][0].rule.limits
    assert (limit.tokens, limit.interval, limit.burst, limit.failure_mode, [part.kind for part in limit.per]) == (
        10,
        1.0,
        20,
        "Local",
        ["identity"],
    )
    assert snapshot.mesh.upstream == "Strict"
    assert snapshot.policies["edge/default"].timeout == 0.5


def test_without_an_active_revision_there_is_a_warning() -> None:
    snapshot = Workspace().update(upserts=shop_documents(), replace=True)
    assert [describe(problem).split(" (")[0] for problem in snapshot.problems] == [
        "warning NoRevision: AccessPolicy edge/default: spec.decision: shop.authz.decision can't be asked yet: "
        "no policy revision is active; publish one and activate it"
    ]


def test_a_bad_version_leaves_the_last_good_one_in_force() -> None:
    made = workspace(BASE, ROUTE)
    before = made.snapshot
    after = made.update(upserts=read(ROUTE.replace("rules", "rulez").replace("/one", "/two"), "new.yaml"))
    assert prefixes(after) == [b"/one"]
    assert after.gateways["edge/gw"] is before.gateways["edge/gw"]
    assert problems_of(after) == ["error Invalid, kept: HTTPRoute shop/r: spec.rulez: unknown field; did you mean rules? (new.yaml:7)"]
    assert made.problems_of(KEY) == after.problems
    assert made.documents[KEY].body["spec"].get("rulez")
    assert not made.in_force[KEY].body["spec"].get("rulez")
    mended = made.update(upserts=read(ROUTE.replace("/one", "/two")))
    assert (prefixes(mended), mended.problems) == ([b"/two"], ())


def test_a_resource_that_was_never_good_is_not_in_force_and_takes_nothing_down() -> None:
    made = workspace(BASE, ROUTE, ROUTE.replace("name: r", "name: bad").replace("/one", "two"))
    assert prefixes(made.snapshot) == [b"/one"]
    assert [problem.kept for problem in made.snapshot.problems] == [False]


def test_a_deleted_resource_is_gone_with_its_problems() -> None:
    made = workspace(BASE, ROUTE)
    made.update(upserts=read(ROUTE.replace("rules", "rulez")))
    after = made.update(deletes=[KEY])
    assert (prefixes(after), after.problems, KEY in made.documents) == ([], (), False)


def test_replacing_forgets_what_is_not_there_but_not_what_could_not_be_read() -> None:
    made = workspace(BASE, ROUTE)
    unread = Problem(key=KEY, message="not valid JSON", where="etcd")
    kept = made.update(upserts=read(BASE), replace=True, problems=[unread])
    assert prefixes(kept) == [b"/one"]
    assert problems_of(kept) == ["error Invalid, kept: HTTPRoute shop/r: not valid JSON (etcd)"]
    assert prefixes(made.update(upserts=read(BASE), replace=True)) == []


def test_one_name_in_two_places_is_in_force_in_neither_and_both_are_named() -> None:
    made = Workspace()
    made.update(upserts=[*read(BASE), *read(ROUTE, "a.yaml"), *read(ROUTE.replace("/one", "/two"), "b.yaml")], replace=True)
    assert prefixes(made.snapshot) == []
    assert problems_of(made.snapshot) == [
        "error Conflicted: HTTPRoute shop/r: it is there 2 times, in a.yaml:2 and in b.yaml:2; keep one (b.yaml:2)"
    ]
    made.update(upserts=read(ROUTE, "a.yaml"))
    assert prefixes(made.snapshot) == [b"/one"]


def test_the_same_again_changes_nothing() -> None:
    made = workspace(BASE, ROUTE)
    before = made.snapshot
    assert made.update() is before
    assert made.update(upserts=[*read(BASE), *read(ROUTE)], replace=True) is before
    assert not changed(before, made.snapshot)


INSTANCE = Instance(namespace="shop", service="web", instance="i", address="127.0.0.7", ports={"": 7000})


def test_instances_come_and_go_and_no_route_notices() -> None:
    made = workspace(BASE, ROUTE)
    before = made.snapshot
    after = made.update(instances=[INSTANCE])
    assert [(end.address, end.port, end.name) for end in after.clusters["shop/web:80"].endpoints] == [
        ("127.0.0.1", 9000, ""),
        ("127.0.0.7", 7000, "i"),
    ]
    assert after.gateways["edge/gw"] is before.gateways["edge/gw"]
    assert after.clusters["shop/web:80"].endpoints[0] is before.clusters["shop/web:80"].endpoints[0]
    assert changed(before, after).clusters == {"shop/web:80"}
    assert not changed(before, after).gateways
    gone = made.update(gone_instances=[("shop", "web", "i")])
    assert gone.version == before.version
    assert made.update(instances=[INSTANCE], replace=True, upserts=read(BASE)).clusters["shop/web:80"].endpoints[1].name == "i"
    assert len(made.update(replace=True, upserts=read(BASE)).clusters["shop/web:80"].endpoints) == 1


@pytest.mark.parametrize(
    ("change", "port"),
    [({}, 7000), ({"ports": {"http": 7001}}, 7001), ({"ready": False}, None), ({"weight": 0}, None), ({"ports": {"a": 1, "b": 2}}, None)],
)
def test_which_port_of_an_instance_is_used(change: dict[str, Any], port: int | None) -> None:
    made = workspace(BASE, instances=[msgspec.structs.replace(INSTANCE, **change)])
    ports = [end.port for end in made.snapshot.clusters["shop/web:80"].endpoints if end.address == "127.0.0.7"]
    assert ports == ([port] if port else [])


def test_instances_of_a_service_that_nobody_described_are_reported() -> None:
    made = workspace(BASE, instances=[msgspec.structs.replace(INSTANCE, service="nope")])
    assert problems_of(made.snapshot) == [
        "warning BackendNotFound: Service shop/nope: 1 registered, but there is no Service shop/nope: "
        "they get no requests; apply one (the registry)"
    ]


POLICY = """
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {namespace: shop, name: p}
spec:
  decision: shop.authz.decision
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r}]
"""


def test_an_access_policy_that_is_wrong_guards_its_targets_all_the_same() -> None:
    made = workspace(BASE, ROUTE, POLICY.replace("decision:", "desicion:"))
    assert asked(made.snapshot) == [UNANSWERABLE]
    made.update(upserts=read(POLICY))
    assert asked(made.snapshot) == ["shop.authz.decision"]
    made.update(upserts=read(POLICY.replace("decision:", "desicion:")))
    assert asked(made.snapshot) == ["shop.authz.decision"]


@pytest.mark.parametrize(
    "targets",
    [
        "3",
        "[3]",
        "[{}]",
        "[{kind: HTTPRoute}]",
        "[{kind: Nope, name: r}]",
        "[{kind: [], name: r}]",
    ],
)
def test_targets_that_cannot_be_read_guard_nothing_and_break_nothing(targets: str) -> None:
    text = POLICY.replace("[{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r}]", targets)
    assert asked(workspace(BASE, ROUTE, text).snapshot) == []


def test_a_section_that_cannot_be_read_guards_the_whole_target() -> None:
    assert asked(workspace(BASE, ROUTE, POLICY.replace("name: r}", "name: r, sectionName: 3}")).snapshot) == [UNANSWERABLE]


def test_a_mesh_that_is_wrong_lets_nothing_pass() -> None:
    made = workspace(BASE, ROUTE, "apiVersion: tollhouse.dev/v1\nkind: Mesh\nmetadata: {name: m}\nspec: {}\n")
    assert asked(made.snapshot) == [UNANSWERABLE]


def test_a_deleted_default_policy_lets_nothing_pass() -> None:
    made = Workspace()
    made.update(upserts=shop_documents(), replace=True)
    after = made.update(deletes=[Key("tollhouse.dev", "AccessPolicy", "edge", "default")])
    rules = [
        match.rule for host in after.gateways["edge/ingress"].listeners[0].hosts.values() for ways in host.prefix.values() for match in ways
    ]
    assert rules
    assert all([policy.decision for policy in rule.decisions] == [UNANSWERABLE] for rule in rules)


def test_the_active_revision_stays_when_its_successor_is_missing() -> None:
    made = Workspace()
    first, second = revision("shop.authz.decision"), revision("shop.authz.other", module="package other\n")
    made.update(upserts=[document_of(revision_body(first), "x"), document_of(active_policy_body(first.digest), "x")])
    assert made.snapshot.policy == first
    made.update(upserts=[document_of(active_policy_body(second.digest, first.digest), "y")])
    assert (made.snapshot.policy, made.snapshot.shadow) == (first, first)
    assert problems_of(made.snapshot) == [
        f"error RevisionNotFound, kept: ActivePolicy active: spec.revision: there is no PolicyRevision {revision_name(second.digest)}; "
        f"publish it first; {first.digest[:19]} stays in force (y)"
    ]
    before = made.snapshot
    made.update(upserts=[document_of(revision_body(second), "x")])
    assert (made.snapshot.policy, made.snapshot.shadow, made.snapshot.problems) == (second, first, ())
    assert changed(before, made.snapshot).policy
    assert not changed(before, made.snapshot).shadow
    made.update(deletes=[Key("tollhouse.dev", "ActivePolicy", "", "active")])
    assert made.snapshot.policy is None


def test_what_is_tried_and_on_whom() -> None:
    made = Workspace()
    first, second = revision("shop.authz.decision"), revision("shop.authz.other", module="package other\n")
    documents = [document_of(revision_body(each), "x") for each in (first, second)]
    spec: dict[str, Any] = {"revision": revision_name(first.digest)}
    made.update(upserts=[*documents, document_of(spec_body(spec), "x")])
    assert (made.snapshot.shadow, made.snapshot.canary) == (None, None)
    for field in ("shadow", "canary"):
        before = made.snapshot
        tried = {field: trial_spec(second.digest, 5, ["spiffe://a/ns/b/sa/c"])}
        made.update(upserts=[document_of(spec_body({**spec, **tried}), "x")])
        after = made.snapshot
        assert getattr(after, field) == second
        assert getattr(after, f"{field}_share") == Share(percent=5, identities=("spiffe://a/ns/b/sa/c",))
        assert changed(before, after).shadow
        assert not changed(before, after).policy
        assert after.version != before.version
        made.update(upserts=[document_of(spec_body({**spec, field: trial_spec(second.digest, 6, ["spiffe://a/ns/b/sa/c"])}), "x")])
        assert made.snapshot.version != after.version
        assert changed(after, made.snapshot).shadow


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, ("", Share())),
        ("sha256-1", ("sha256-1", Share())),
        ({"revision": "sha256-1"}, ("sha256-1", Share(percent=100))),
        ({"revision": "sha256-1", "percent": 5, "by": "Identity"}, ("sha256-1", Share(percent=5, by_identity=True))),
        ({"revision": "sha256-1", "percent": 0}, ("sha256-1", Share(percent=0))),
        ({"revision": "sha256-1", "identities": ["a"]}, ("sha256-1", Share(percent=0, identities=("a",)))),
        ({"revision": "sha256-1", "identities": ["a"], "percent": 7}, ("sha256-1", Share(percent=7, identities=("a",)))),
    ],
)
def test_a_trial_is_read(said: Any, expected: tuple[str, Share]) -> None:
    assert trial_of(said) == expected


def test_a_changed_revision_is_refused() -> None:
    body = revision_body(revision("shop.authz.decision"))
    body["spec"]["modules"]["authz.rego"] += "decision := true\n"
    made = Workspace()
    made.update(upserts=[document_of(body, "x")])
    assert "this revision was changed after it was made" in problems_of(made.snapshot)[0]


def test_a_decision_that_the_active_revision_does_not_have() -> None:
    made = workspace(BASE, ROUTE, POLICY)
    after = made.update(upserts=activated("shop.authz.decisions", "other.decision"))
    digest = revision("shop.authz.decisions", "other.decision").digest[:19]
    assert problems_of(after) == [
        f"error NoEntryPoint: AccessPolicy shop/p: spec.decision: the active revision {digest} has no decision shop.authz.decision; "
        "did you mean shop.authz.decisions? (test.yaml:6)"
    ]


OTHERS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: other}
spec: {controllerName: example.org/other}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: theirs}
spec: {gatewayClassName: other, listeners: [{name: a, port: 1, protocol: TCP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: theirs}
spec: {parentRefs: [{namespace: edge, name: theirs}], rules: [{retry: {}}]}
"""


def test_what_belongs_to_other_implementations_is_left_alone() -> None:
    assert problems_of(workspace(BASE, OTHERS).snapshot) == []
    ours_too = OTHERS.replace("[{namespace: edge, name: theirs}]", "[{namespace: edge, name: theirs}, {namespace: edge, name: gw}]")
    assert len(problems_of(workspace(BASE, ours_too).snapshot)) == 1


JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-2, 100_000)
    | st.text(max_size=5)
    | st.just([])
    | st.just({})
    | st.just([{}])
    | st.just({"name": "x"})
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for name, item in inner for found in places(item, (*path, name)))]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_document_can_make_the_compiler_raise_or_take_others_down(data: st.DataObject) -> None:
    documents = [*shop_documents(), *read(OTHERS), *activated("shop.authz.decision")]
    made = Workspace()
    made.update(upserts=documents, replace=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 4))):
        document = data.draw(st.sampled_from(documents))
        body = json.loads(json.dumps(document.body))
        path = data.draw(
            st.sampled_from(
                [path for path in places(body) if path and path[0] not in ("apiVersion", "kind") and path[:2] != ("metadata", "name")]
            )
        )
        inner = body
        for part in path[:-1]:
            inner = inner[part]
        if data.draw(st.booleans()) and isinstance(inner, dict):
            del inner[path[-1]]
        else:
            inner[path[-1]] = data.draw(JUNK)
        fresh = Workspace()
        changed_document = Document(document.key, body, document.origin, str(data.draw(st.integers(0, 1_000_000))))
        made.update(upserts=[changed_document])
        fresh.update(upserts=[*(known for known in documents if known.key != document.key), changed_document], replace=True)
        assert set(made.snapshot.gateways) >= {"edge/egress", "edge/eastwest", "edge/ingress"} or "Gateway" in document.key.kind
        for each in (made, fresh):
            statuses = each.statuses("2026-01-01T00:00:00Z")
            json.dumps([statuses.of(key) for key in each.documents])


def test_kinds_of_others_are_passed_over_and_mistaken_kinds_of_ours_are_not() -> None:
    others = "".join(
        f"---\napiVersion: {version}\nkind: {kind}\nmetadata: {{name: a}}\n"
        for version, kind in (("apps/v1", "Deployment"), ("v1", "Pod"), ("networking.k8s.io/v1", "Ingress"), ("example.org/v1", "Thing"))
    )
    made = workspace(BASE, others + "---\napiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n")
    assert problems_of(made.snapshot) == []
    assert {key.kind for key in made.documents} == {"GatewayClass", "Gateway", "Service", "EndpointSlice"}
    mistaken = (("apps/v1", "HTTPRoute"), ("v1", "Servise"), (f"{GATEWAY}/v1", "HTTPRout"), ("tollhouse.dev/v1", "A"))
    for version, kind in mistaken:
        wrong = workspace(f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: a}}\n")
        assert len(wrong.snapshot.problems) == 1


def test_without_a_mesh_a_gateway_is_on_its_own() -> None:
    mesh = "apiVersion: tollhouse.dev/v1\nkind: Mesh\nmetadata: {name: m}\nspec: {trustDomain: a.b}\n"
    assert workspace(BASE).snapshot.mesh.standalone
    assert not workspace(BASE, mesh).snapshot.mesh.standalone
    assert not workspace(BASE, mesh.replace("a.b", "A B")).snapshot.mesh.standalone


@pytest.mark.parametrize("junk", ["[]", "{}", "1", "[{}]", "null"])
@pytest.mark.parametrize("field", ["group", "kind", "namespace", "name", "sectionName"])
def test_a_wrong_parent_is_a_problem_of_its_route(field: str, junk: str) -> None:
    ref = {"name": "gw", "namespace": "edge"} | {field: f"({junk})"}
    text = json.dumps({"apiVersion": f"{GATEWAY}/v1", "kind": "ListenerSet", "metadata": {"name": "a"}, "spec": {"parentRef": ref}})
    made = workspace(BASE, text.replace(f'"({junk})"', junk))
    assert {problem.key.name for problem in made.snapshot.problems if problem.key is not None} == {"a"}
    assert made.statuses("2026-01-01T00:00:00Z").of(Key(GATEWAY, "ListenerSet", "default", "a")) is not None


def test_a_share_of_callers_is_the_same_for_all_requests_and_grows() -> None:
    callers = [f"spiffe://a/ns/b/sa/c{number}" for number in range(2000)]
    before: set[str] = set()
    for percent in (0, 5, 30, 100):
        share = Share(percent=percent, by_identity=True)
        chosen = {each for each in callers if share.has(each, 0.0)}
        assert chosen == {each for each in callers if share.has(each, 0.999)}
        assert chosen >= before
        assert abs(len(chosen) - 20 * percent) < 150
        before = chosen
    assert [Share(percent=50, by_identity=True).has("", draw) for draw in (0.1, 0.9)] == [True, False]
    assert Share(percent=0, by_identity=True, identities=(callers[0],)).has(callers[0], 0.9)

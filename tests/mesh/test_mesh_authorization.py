"""AuthorizationPolicies as documents: whatever somebody writes is in force or refused, and what is refused guards all the same."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_world import BASE, read, snapshot

from mesh.kinds_istio import ATTRIBUTES, OPERATIONS, SOURCES, negative
from mesh.reading import document_of
from mesh.workspace import Workspace

TEXTS = '"" * a /a /a* *a /{*} /{**} /{*}x 10.0.0.0/8 1.1.1.1 80 GET get a/b spiffe://a shop é web gw Gateway Service GatewayClass'
MORE = "ALLOW DENY AUDIT CUSTOM true gateway.networking.k8s.io request.headers[x-a] request.auth.claims[a][b]"
WORDS = st.sampled_from([*(text.strip('"') for text in TEXTS.split()), *MORE.split(), *ATTRIBUTES])
FIELDS = (
    "selector matchLabels targetRef targetRefs kind group name namespace action provider rules from to when source operation key values"
)
TABLES = (*SOURCES, *OPERATIONS)
NAMES = st.sampled_from([*FIELDS.split(), "notValues", *TABLES, *map(negative, TABLES)])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 90) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
STRINGS = st.lists(WORDS, max_size=2)
SOURCE = st.dictionaries(st.sampled_from([*SOURCES, *map(negative, SOURCES)]), STRINGS | ANYTHING, max_size=2)
OPERATION = st.dictionaries(st.sampled_from([*OPERATIONS, *map(negative, OPERATIONS)]), STRINGS | ANYTHING, max_size=2)
CONDITION = st.fixed_dictionaries({"key": WORDS}, optional={"values": STRINGS, "notValues": STRINGS})
RULE = st.fixed_dictionaries(
    {},
    optional={
        "from": st.lists(st.fixed_dictionaries({"source": SOURCE}), max_size=2) | ANYTHING,
        "to": st.lists(st.fixed_dictionaries({"operation": OPERATION}), max_size=2) | ANYTHING,
        "when": st.lists(CONDITION, max_size=2) | ANYTHING,
    },
)
SPEC = (
    st.fixed_dictionaries(
        {},
        optional={
            "action": st.sampled_from(["ALLOW", "DENY", "AUDIT", "CUSTOM", "LOG"]),
            "provider": st.just({"name": "x"}) | ANYTHING,
            "rules": st.lists(RULE, max_size=2) | ANYTHING,
            "selector": st.fixed_dictionaries({"matchLabels": st.dictionaries(WORDS, WORDS, max_size=1)}) | ANYTHING,
            "targetRefs": st.lists(st.fixed_dictionaries({"kind": WORDS, "name": WORDS}), max_size=2) | ANYTHING,
        },
    )
    | ANYTHING
)
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: r}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""


def policy(spec: Any, namespace: str, annotations: Any = None) -> Any:
    metadata = {"namespace": namespace, "name": "p", "annotations": annotations}
    return {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec}


@settings(max_examples=400, deadline=None)
@given(
    SPEC,
    st.sampled_from(["edge", "shop", "istio-system", "other"]),
    st.sampled_from([None, {"istio.io/dry-run": "true"}, {"istio.io/dry-run": "x"}]),
)
def test_whatever_is_written_is_in_force_or_refused_and_guards_all_the_same(spec: Any, namespace: str, annotations: Any) -> None:
    workspace = Workspace()
    document = document_of(policy(spec, namespace, annotations), "test", "1")
    found = workspace.update(upserts=[*read(BASE), *read(ROUTE), document], replace=True)
    wrong = [problem for problem in found.problems if problem.key == document.key and problem.severity == "error"]
    rule = found.gateways["edge/gw"].listeners[0].hosts["*"].prefix[b""][0].rule
    asked = (*rule.decisions, *rule.backends[0].decisions)
    assert workspace.statuses("2026-01-01T00:00:00Z").of(document.key) is not None
    in_force = document.key in workspace.in_force
    assert in_force or wrong
    if not in_force:
        # Fails closed: with what can't be read, whatever it may hold for is refused.
        refs = spec.get("targetRefs") or spec.get("targetRef") if isinstance(spec, dict) else None
        selector = spec.get("selector") if isinstance(spec, dict) else None
        if namespace != "other" and not refs and not selector:
            assert [each.decision for each in asked if not each.authorization] != []
    for each in asked:
        if each.authorization:
            assert found.program is not None
            assert each.decision in found.program.decisions


def test_a_change_of_a_policy_makes_another_snapshot_and_one_of_white_space_does_not() -> None:
    def made(path: str) -> Any:
        text = f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{namespace: edge, name: p}}
spec: {{rules: [{{to: [{{operation: {{paths: [{path}]}}}}]}}]}}
"""
        return snapshot(BASE, ROUTE, text)

    assert made("/a").version == made("/a ").version
    assert made("/a").version != made("/b").version

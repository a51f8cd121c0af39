"""Tables of overrides: what changes when one does, and that no route is compiled again for it."""

from __future__ import annotations

from mesh_world import BASE, read, workspace

from mesh.model import Snapshot

ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: r}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
---
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {namespace: shop, name: q}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r}]
  limits: [{name: a, tokens: 10, per: [{header: x-tenant}], overridesFrom: {name: tenants}}]
"""


def table(*rows: str) -> str:
    return f"""
apiVersion: tollhouse.dev/v1
kind: QuotaOverrides
metadata: {{namespace: shop, name: tenants}}
spec: {{rows: [{", ".join(rows)}]}}
"""


def rows(snapshot: Snapshot) -> dict[tuple[str, ...], int]:
    return {row.values: row.tokens for row in snapshot.quota_tables["shop/tenants"].rows}


def test_a_table_changes_without_a_route_being_compiled() -> None:
    made = workspace(BASE, ROUTE, table("{values: [blue], tokens: 5}"))
    before = made.snapshot
    assert before.problems == () and rows(before) == {("blue",): 5}
    compiled: list[object] = []
    made._compiler._route = lambda *arguments: compiled.append(arguments)  # type: ignore[method-assign]
    after = made.update(upserts=read(table("{values: [blue], tokens: 6}", "{values: [red], tokens: 7}")))
    assert rows(after) == {("blue",): 6, ("red",): 7}
    assert compiled == [] and after.gateways is before.gateways
    assert after.version != before.version


def test_a_table_that_is_wrong_leaves_the_last_good_one_in_force_and_one_that_is_gone_is_told_of() -> None:
    made = workspace(BASE, ROUTE, table("{values: [blue], tokens: 5}"))
    wrong = made.update(upserts=read(table("{values: [blue], tokens: -1}")))
    assert rows(wrong) == {("blue",): 5}
    assert [problem.kept for problem in wrong.problems] == [True]
    gone = made.update(deletes=[read(table("{values: [a], tokens: 1}"))[0].key])
    assert gone.quota_tables == {}
    assert [problem.reason for problem in gone.problems] == ["TargetNotFound"]

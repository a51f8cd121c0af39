"""Nobody is let out of a policy but by two who both say so."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_world import BASE, read, workspace

from mesh.documents import Key
from mesh.model import Rule
from mesh.workspace import Workspace

MESH = "tollhouse.dev/v1"
POLICIES = ("all", "gw", "listener")
"""At the levels mesh, gateway and listener, in the namespace edge."""
ROUTES = ("a", "b")


def own(kind: str, namespace: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": MESH, "kind": kind, "metadata": {"namespace": namespace, "name": name}, "spec": spec}


def a_policy(name: str, exemptions: list[dict[str, str]]) -> dict[str, Any]:
    gateway = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gw"}
    refs = {"all": [], "gw": [gateway], "listener": [gateway | {"sectionName": "http"}]}[name]
    return own("AccessPolicy", "edge", name, provider="authz.test:1", exemptions=exemptions, **({"targetRefs": refs} if refs else {}))


def a_route(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {
            "parentRefs": [{"namespace": "edge", "name": "gw"}],
            "rules": [
                {"name": rule, "matches": [{"path": {"value": f"/{name}/{rule}"}}], "backendRefs": [{"name": "web", "port": 80}]}
                for rule in ("one", "two")
            ],
        },
    }


def world(*resources: dict[str, Any]) -> Workspace:
    mesh = {
        "apiVersion": MESH,
        "kind": "Mesh",
        "metadata": {"name": "m"},
        "spec": {"trustDomain": "a", "defaultAccessPolicy": {"namespace": "edge", "name": "all"}},
    }
    return workspace(BASE, yaml.safe_dump_all([mesh, *map(a_route, ROUTES), *resources]))


def rules(made: Workspace) -> Iterator[Rule]:
    for listener in made.snapshot.gateways["edge/gw"].listeners:
        for host in listener.hosts.values():
            for matches in host.prefix.values():
                yield from (match.rule for match in matches)


def asked(made: Workspace) -> dict[str, set[str]]:
    """The policies that each rule is under, by their own names."""
    return {rule.name: {"all" if each.name == "mesh" else each.name.split("/")[1] for each in rule.decisions} for rule in rules(made)}


GRANTS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["HTTPRoute", "HTTPRoute", "GRPCRoute"]), "namespace": st.sampled_from(["shop", "shop", "edge"])},
    optional={"name": st.sampled_from(ROUTES), "sectionName": st.sampled_from(["one", "two"])},
)
TARGETS = st.fixed_dictionaries(
    {"kind": st.just("HTTPRoute"), "name": st.sampled_from(ROUTES)}, optional={"sectionName": st.sampled_from(["one", "two"])}
)


def unique(items: list[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(sorted(item.items())): item for item in items}.values())


@settings(max_examples=60)
@given(
    st.fixed_dictionaries({name: st.lists(GRANTS, max_size=3).map(unique) for name in POLICIES}),
    st.lists(st.tuples(st.lists(TARGETS, min_size=1, max_size=2).map(unique), st.sets(st.sampled_from(POLICIES), min_size=1)), max_size=3),
)
def test_a_rule_is_under_every_policy_that_both_sides_have_not_taken_off(
    grants: dict[str, list[dict[str, str]]], wanted: list[Any]
) -> None:
    policies = [a_policy(name, grants[name]) for name in POLICIES]
    exemptions = [
        own("PolicyExemption", "shop", f"x{number}", targetRefs=targets, policies=[{"namespace": "edge", "name": name} for name in names])
        for number, (targets, names) in enumerate(wanted)
    ]

    def free(policy: str, route: str, rule: str) -> bool:
        for targets, names in wanted:
            for target in targets:
                section = target.get("sectionName")
                if policy not in names or target["name"] != route or section not in (None, rule):
                    continue
                for grant in grants[policy]:
                    allowed = (grant["kind"], grant["namespace"]) == ("HTTPRoute", "shop") and grant.get("name") in (None, route)
                    if allowed and grant.get("sectionName") in (None, section):
                        return True
        return False

    expected = {
        f"shop/{route}#{rule}": {policy for policy in POLICIES if not free(policy, route, rule)}
        for route, rule in product(ROUTES, ("one", "two"))
    }
    made = world(*policies, *exemptions)
    assert asked(made) == expected
    for rule in rules(made):
        under = {"edge/all" if each.name == "mesh" else each.name for each in rule.decisions}
        assert not under & {each.policy for each in rule.exempt}
        assert under | {each.policy for each in rule.exempt} == {f"edge/{name}" for name in POLICIES}


GRANT = {"kind": "HTTPRoute", "namespace": "shop", "name": "a"}
ROUTE_A = [{"kind": "HTTPRoute", "name": "a"}]
EXEMPTION = own("PolicyExemption", "shop", "x", targetRefs=ROUTE_A, policies=[{"namespace": "edge", "name": "gw"}])
KEY = Key("tollhouse.dev", "PolicyExemption", "shop", "x")


def update(made: Workspace, *resources: dict[str, Any], deletes: tuple[Key, ...] = ()) -> set[str]:
    made.update(upserts=[document for resource in resources for document in read(yaml.safe_dump(resource))], deletes=deletes)
    return asked(made)["shop/a#one"]


def accepted(made: Workspace) -> dict[str, Any]:
    status = made.statuses("2030-01-01T00:00:00Z").of(KEY)
    assert status is not None
    condition: dict[str, Any] = status["conditions"][0]
    return condition


def test_either_side_can_take_it_back() -> None:
    made = world(a_policy("all", []), a_policy("gw", [GRANT]), a_policy("listener", []), EXEMPTION)
    assert asked(made)["shop/a#one"] == {"all", "listener"}
    assert accepted(made)["reason"] == "Accepted"
    assert update(made, a_policy("gw", [])) == {"all", "gw", "listener"}
    assert accepted(made)["reason"] == "RefNotPermitted"
    assert "its owner can, by exemptions: [{kind: HTTPRoute, namespace: shop}]" in accepted(made)["message"]
    assert update(made, a_policy("gw", [GRANT])) == {"all", "listener"}
    assert update(made, deletes=(KEY,)) == {"all", "gw", "listener"}


def test_what_is_wrong_lets_nobody_out() -> None:
    broken = EXEMPTION | {"spec": EXEMPTION["spec"] | {"nonsense": 1}}
    made = world(a_policy("all", []), a_policy("gw", [GRANT]), a_policy("listener", []), broken)
    assert asked(made)["shop/a#one"] == {"all", "gw", "listener"}
    assert accepted(made)["reason"] == "Invalid"
    wrong = own("AccessPolicy", "edge", "gw", provider="authz.test:1", exemptions=[GRANT, {"kind": "Gateway", "namespace": "shop"}])
    gateway = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gw"}
    wrong["spec"]["targetRefs"] = [gateway]
    made = world(a_policy("all", []), wrong, a_policy("listener", []), EXEMPTION)
    assert asked(made)["shop/a#one"] == {"all", "gw", "listener"}, "a policy that can't be understood guards its targets all the same"
    assert accepted(made)["reason"] == "TargetNotFound"


def test_without_its_mesh_policy_nobody_is_exempt_from_the_guard_in_its_place() -> None:
    exemption = own("PolicyExemption", "shop", "x", targetRefs=ROUTE_A, policies=[{"namespace": "edge", "name": "all"}])
    made = world(a_policy("gw", []), a_policy("listener", []), exemption)
    assert asked(made)["shop/a#one"] == {"all", "gw", "listener"}
    assert update(made, a_policy("all", [GRANT])) == {"gw", "listener"}

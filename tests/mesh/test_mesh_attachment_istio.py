"""Where policies of Istio hold, as a table: which of them hold at which Gateway or Service."""

from __future__ import annotations

import pytest
from mesh_world import read

from mesh.attachment_istio import TARGETS, at_gateway, at_service, check_places, target_rule
from mesh.compile_world import World
from mesh.documents import Document
from mesh.schema import Faults, Fields

SPEC = Fields({}, TARGETS, rule=target_rule)

GATEWAYS = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: gw, labels: {app: ingress}}
spec: {gatewayClassName: ours, infrastructure: {labels: {tier: front}}, listeners: [{name: a, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: shop, name: gw}
spec: {gatewayClassName: other, listeners: [{name: a, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: ours}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: web}
spec: {ports: [{port: 80}]}
"""


def policy(namespace: str, spec: str, name: str = "p") -> Document:
    (found,) = read(
        f"apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{namespace: {namespace}, name: {name}}}\nspec: {spec}\n"
    )
    return found


def world(*policies: Document) -> tuple[World, dict[tuple[str, str], Document]]:
    found = World()
    for document in (*read(GATEWAYS), *policies):
        found.documents.setdefault(document.key.kind, {})[document.key.namespace, document.key.name] = document
    ours = found.of("Gateway")
    return found, ours


@pytest.mark.parametrize(
    ("namespace", "spec", "held"),
    [
        ("edge", "{}", {"edge/gw"}),
        ("istio-system", "{}", {"edge/gw", "shop/gw"}),
        ("other", "{}", set()),
        ("edge", "{selector: {}}", {"edge/gw"}),
        ("edge", "{selector: {matchLabels: {app: ingress}}}", {"edge/gw"}),
        ("edge", "{selector: {matchLabels: {app: ingress, tier: front}}}", {"edge/gw"}),
        ("edge", "{selector: {matchLabels: {app: egress}}}", set()),
        ("edge", "{selector: {matchLabels: {app: ingress, tier: back}}}", set()),
        ("shop", "{selector: {matchLabels: {app: ingress}}}", set()),
        ("istio-system", "{selector: {matchLabels: {app: ingress}}}", {"edge/gw"}),
        ("edge", "{selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: gw}}}", {"edge/gw"}),
        ("istio-system", "{selector: {matchLabels: {gateway.networking.k8s.io/gateway-class-name: other}}}", {"shop/gw"}),
        ("edge", "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw}]}", {"edge/gw"}),
        ("edge", "{targetRef: {group: gateway.networking.k8s.io, kind: Gateway, name: gw}}", {"edge/gw"}),
        ("edge", "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gx}]}", set()),
        ("istio-system", "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw}]}", set()),
        ("istio-system", "{targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: ours}]}", {"edge/gw"}),
        ("edge", "{targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: ours}]}", set()),
        ("shop", "{targetRefs: [{kind: Service, name: web}]}", {"Service shop/web"}),
        ("edge", "{targetRefs: [{kind: Service, name: web}]}", set()),
        # What can't be read holds wherever it could.
        ("edge", "7", {"edge/gw"}),
        ("edge", "{selector: 7}", {"edge/gw"}),
        ("edge", "{selector: {matchLabels: 7}}", {"edge/gw"}),
        ("edge", "{targetRefs: 7}", {"edge/gw"}),
        ("edge", "{targetRefs: [7, {kind: Gateway, name: gw}]}", {"edge/gw"}),
        ("edge", "{targetRefs: [7]}", {"edge/gw"}),
        ("edge", "{targetRef: false}", {"edge/gw"}),
        ("edge", "{targetRefs: [{kind: [], name: gw}]}", {"edge/gw"}),
        ("edge", "{targetRefs: [{kind: Gatewey, name: gx}]}", {"edge/gw"}),
        ("edge", "{targetRefs: [{kind: ServiceEntry, name: out}]}", set()),
    ],
)
def test_where_a_policy_holds(namespace: str, spec: str, held: set[str]) -> None:
    one = policy(namespace, spec)
    found, _ = world(one)
    places = {f"{name[0]}/{name[1]}" for name, gateway in found.of("Gateway").items() if at_gateway([one], gateway, "istio-system")}
    places |= {f"Service {name[0]}/{name[1]}" for name in found.of("Service") if at_service([one], *name)}
    assert places == held


def test_the_root_namespace_comes_first_and_the_older_before_the_younger() -> None:
    policies = [policy("edge", "{}", "b"), policy("edge", "{}", "a"), policy("root", "{}", "z")]
    found, _ = world(*policies)
    held = at_gateway(policies, found.of("Gateway")["edge", "gw"], "root")
    assert [str(each.key) for each in held] == [f"RequestAuthentication {name}" for name in ("root/z", "edge/a", "edge/b")]


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("{selector: {}, targetRefs: []}", "spec.targetRefs: does not go with selector; keep one of the two"),
        (
            "{targetRefs: [{kind: Gateway, name: gw}]}",
            'spec.targetRefs.0.group: "" is not the group of Gateway; use "gateway.networking.k8s.io"',
        ),
        (
            "{targetRefs: [{kind: Service, name: web, namespace: shop}]}",
            "spec.targetRefs.0.namespace: can't be given: a policy belongs into the namespace of its target",
        ),
        (
            "{targetRefs: [{kind: ServiceEntry, name: web}]}",
            'spec.targetRefs.0.kind: "ServiceEntry" is not supported here: a service outside of the mesh is a Service of type '
            "ExternalName; use Gateway, GatewayClass or Service",
        ),
        ("{selector: {matchLabels: {app: 'a*'}}}", "spec.selector.matchLabels.app: a wildcard is not supported here in selectors"),
        ("{selector: {matchExpressions: []}}", "spec.selector.matchExpressions: unknown field; the fields here are matchLabels"),
    ],
)
def test_what_can_not_be_a_target(spec: str, fault: str) -> None:
    faults = Faults()
    SPEC.check(policy("edge", spec).body["spec"], ("spec",), faults)
    assert [f"{'.'.join(map(str, path))}: {message}" for path, message in faults.found] == [fault]


@pytest.mark.parametrize(
    ("namespace", "spec", "problem"),
    [
        ("edge", "{}", ""),
        ("other", "{}", "there is no Gateway in the namespace other: it holds nowhere"),
        ("edge", "{selector: {matchLabels: {app: x}}}", "spec.selector: there is no Gateway whose labels it selects: it holds nowhere"),
        (
            "edge",
            "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw2}]}",
            "spec.targetRefs[0].name: there is no Gateway edge/gw2; did you mean gw?",
        ),
        ("edge", "{targetRef: {kind: Service, name: web}}", "spec.targetRef.name: there is no Service edge/web"),
        (
            "edge",
            "{targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: ours}]}",
            "spec.targetRefs[0].kind: a GatewayClass can be a target in the root namespace only, which is istio-system",
        ),
    ],
)
def test_what_is_said_of_a_policy_that_holds_nowhere(namespace: str, spec: str, problem: str) -> None:
    one = policy(namespace, spec)
    found, ours = world(one)
    said = [str(each) for each in check_places(found, ours, one.key.kind, "istio-system")]
    assert len(said) == (1 if problem else 0)
    assert all(f"RequestAuthentication {namespace}/p: {problem} (test.yaml" in each for each in said)

"""Resources above, the status of each below, one file in `cases/status/` for each; what is told of versions and other controllers."""

from __future__ import annotations

from typing import Any

import pytest
from mesh_world import BASE, CASES, config_map, read, tls_secret, workspace

from identity.ca import Authority
from mesh.documents import Key
from mesh.status_gateways import with_unserved
from mesh.workspace import Workspace

FILES = sorted((CASES / "status").glob("*.txt"))
NOW = "2026-01-01T00:00:00Z"
GROUP = "gateway.networking.k8s.io"
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: r, generation: 7}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
KEY = Key(GROUP, "HTTPRoute", "shop", "r")


def render_status(made: Workspace) -> str:
    """Every status, a line for each list of conditions."""
    statuses = made.statuses(NOW)
    lines: list[str] = []
    for key in sorted(made.documents):
        status = statuses.of(key)
        if status is None:
            continue
        lines.append(f"{key}" + _said(status.get("conditions")))
        if "attachedListenerSets" in status:
            lines[-1] += f" sets={status['attachedListenerSets']}"
        lines += [f"  address {each['value']}" for each in status.get("addresses", ())]
        for each in status.get("listeners", ()):
            kinds = ",".join(kind["kind"] for kind in each["supportedKinds"])
            lines.append(f"  listener {each['name']} [{kinds}] routes={each['attachedRoutes']}{_said(each['conditions'])}")
        lines += [f"  parent {_ref(each['parentRef'])}{_said(each['conditions'])}" for each in status.get("parents", ())]
        lines += [f"  ancestor {_ref(each['ancestorRef'])}{_said(each['conditions'])}" for each in status.get("ancestors", ())]
    return "\n".join(lines) + "\n"


def _ref(ref: Any) -> str:
    section = f"#{ref['sectionName']}" if ref.get("sectionName") else ""
    return f"{ref['kind']} {ref.get('namespace') or ''}/{ref['name']}{section}"


def _said(conditions: Any) -> str:
    return "".join(f" {each['type']}={each['status']}:{each['reason']}" for each in conditions or ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_resources_have_this_status(path: Any) -> None:
    resources, _, expected = path.read_text().partition("=>\n")
    documents = list(read(resources, "case.yaml"))
    if "#BASE" in resources:
        documents += read(BASE, "base.yaml")
    if "#CERTIFICATES" in resources:
        documents += [config_map("shop", "ca"), config_map("edge", "ca"), tls_secret("edge", "cert"), tls_secret("other", "cert")]
    made = Workspace()
    made.update(upserts=documents, replace=True)
    assert render_status(made) == expected


def test_there_are_cases() -> None:
    assert len(FILES) > 4


def parent(made: Workspace) -> dict[str, Any]:
    status = made.statuses(NOW).of(KEY)
    assert status is not None
    (found,) = status["parents"]
    return {each["type"]: each for each in found["conditions"]}


def test_conditions_name_the_generation_that_they_are_about_and_the_time_of_the_asking() -> None:
    accepted = parent(workspace(BASE, ROUTE))["Accepted"]
    assert accepted["observedGeneration"] == 7
    assert accepted["lastTransitionTime"] == NOW


def test_a_resource_without_a_generation_has_conditions_without_one() -> None:
    assert "observedGeneration" not in parent(workspace(BASE, ROUTE.replace(", generation: 7", "")))["Accepted"]


def test_the_last_good_version_is_told_as_a_fall_back() -> None:
    made = workspace(BASE, ROUTE)
    made.update(upserts=read(ROUTE.replace("generation: 7", "generation: 8").replace("port: 80", "port: 0")))
    conditions = parent(made)
    assert conditions["Accepted"]["status"] == "True"
    assert conditions["Accepted"]["observedGeneration"] == 7
    assert conditions["PartiallyInvalid"]["reason"] == "UnsupportedValue"
    assert conditions["PartiallyInvalid"]["message"].startswith("Fall Back: spec.rules[0].backendRefs[0].port: is 0")


def test_what_other_controllers_wrote_stays_and_what_we_wrote_is_replaced() -> None:
    other = "{parentRef: {name: mesh}, controllerName: example.org/other, conditions: []}"
    old = "{parentRef: {name: gw}, controllerName: tollhouse.dev/gateway-controller, conditions: []}"
    made = workspace(BASE, ROUTE + f"status: {{parents: [{other}, {old}]}}\n")
    status = made.statuses(NOW).of(KEY)
    assert status is not None
    assert [each["controllerName"] for each in status["parents"]] == ["tollhouse.dev/gateway-controller", "example.org/other"]
    assert status["parents"][0]["conditions"]


def test_resources_of_others_and_kinds_without_a_status_have_none() -> None:
    foreign = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: other}
spec: {controllerName: example.org/other}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: theirs}
spec: {gatewayClassName: other, listeners: [{name: http, port: 80, protocol: HTTP}]}
"""
    statuses = workspace(BASE, foreign).statuses(NOW)
    assert statuses.of(Key(GROUP, "GatewayClass", "", "other")) is None
    assert statuses.of(Key(GROUP, "Gateway", "edge", "theirs")) is None
    assert statuses.of(Key("", "Service", "shop", "web")) is None


def test_a_port_that_cannot_be_bound_is_not_programmed() -> None:
    status = workspace(BASE).statuses(NOW).of(Key(GROUP, "Gateway", "edge", "gw"))
    assert status is not None
    found = with_unserved(status, {"http": "port 8080 cannot be bound: it is in use"})
    (listener,) = found["listeners"]
    assert {each["type"]: each["reason"] for each in listener["conditions"]}["Programmed"] == "Pending"
    assert {each["type"]: each["reason"] for each in found["conditions"]}["Programmed"] == "AddressNotUsable"
    assert with_unserved(status, {}) is status


def test_an_expired_certificate_is_told_and_nothing_is_programmed_with_it() -> None:
    text = BASE.replace("protocol: HTTP,", "protocol: HTTPS, tls: {certificateRefs: [{name: cert}]},")
    made = workspace(text)
    made.update(upserts=[tls_secret("edge", "cert")])
    key = Key(GROUP, "Gateway", "edge", "gw")
    for now, wanted in ((NOW, ("True", "True")), ("2226-01-01T00:00:00Z", ("False", "False"))):
        status = made.statuses(now).of(key)
        assert status is not None
        (listener,) = status["listeners"]
        for conditions in (listener["conditions"], status["conditions"]):
            found = {each["type"]: each["status"] for each in conditions}
            assert (found["Programmed"], found["ResolvedRefs"], found["Accepted"]) == (*wanted, "True")


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        (("a.example", ["a.example"]), ("b.example", ["b.example"]), None),
        (("a.example", ["a.example", "b.example"]), ("b.example", ["B.example"]), "OverlappingCertificates"),
        (("a.example", ["*.example"]), ("b.example", ["b.example"]), "OverlappingCertificates"),
        (("a.example", ["*.example"]), ("b.example", ["*.example"]), "OverlappingCertificates"),
        (("a.example", ["*.example"]), ("c.b.example", ["c.b.example"]), None),
        (("a.example", ["*.example"]), ("c.b.example", ["*.b.example"]), None),
        (("*.example", ["a.example"]), ("b.example", ["b.example"]), "OverlappingHostnames"),
        (("*.example", ["*.example"]), ("b.example", ["b.example"]), "OverlappingCertificates"),
    ],
)
def test_listeners_whose_tls_is_for_the_same_names(one: Any, other: Any, reason: str | None) -> None:
    authority = Authority.create("shop.example")
    listeners, secrets = [], []
    for name, (host, dns) in (("one", one), ("other", other)):
        made = authority.issue("spiffe://shop.example/ns/edge/sa/x", dns=dns)
        secrets.append(tls_secret("edge", name, stringData={"tls.crt": made.chain.decode(), "tls.key": made.key.decode()}))
        listeners.append(f"{{name: {name}, hostname: '{host}', port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: {name}}}]}}}}")
    made = workspace(
        BASE.replace("{name: http, port: 8080, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}", "\n  - ".join(listeners))
    )
    made.update(upserts=secrets)
    status = made.statuses(NOW).of(Key(GROUP, "Gateway", "edge", "gw"))
    assert status is not None
    for listener, beside in zip(status["listeners"], ("other", "one"), strict=True):
        (found,) = [each for each in listener["conditions"] if each["type"] == "OverlappingTLSConfig"] or [None]
        assert (found and found["reason"]) == reason
        assert found is None or f"of {beside}" in found["message"]

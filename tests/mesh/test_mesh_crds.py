"""The CRDs of Gateway API v1.6 against our schemas: every field known or refused with a reason, the same limits, and each CEL rule kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from crd_rules import RULES, SAMPLES

from mesh.kinds import KINDS, UNSUPPORTED, check_document
from mesh.kinds_gateway import GATEWAY_GROUP
from mesh.reading import document_of
from mesh.schema import Choice, Fields, Flag, Free, Items, Number, Table, Text
from tests.install import install

CRDS: dict[str, Any] = {}
for path in sorted((install("gateway-api") / "config" / "crd" / "experimental").glob(GATEWAY_GROUP + "_*.yaml")):
    for crd in yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if crd["kind"] == "CustomResourceDefinition":
            CRDS[crd["spec"]["names"]["kind"]] = crd["spec"]

OURS = sorted(kind for group, kind in KINDS if group == GATEWAY_GROUP)
NEVER = {"GatewayClass.spec.controllerName": "a document is looked at by itself: what it said before is not known"}
"""CEL rules that can't be looked at."""
EXTRA = {
    "HTTPRoute.spec.rules[].filters[].externalAuth.forwardBody.maxSize": "16 bits in Gateway API's types, which the CRD does not say",
    "HTTPRoute.spec.rules[].backendRefs[].filters[].externalAuth.forwardBody.maxSize": "the same",
    "Gateway.spec.listeners[].tls.frontendValidation": "of the experimental channel before v1.5",
    "ListenerSet.spec.listeners[].tls.frontendValidation": "of the experimental channel before v1.5",
    "TLSRoute.spec.hostnames": "required by a rule of our own in v1, and optional in older versions as it was",
}
"""Where our schema differs, and why."""
INT32 = 2**31 - 1


def schema(kind: str) -> Any:
    version = next(each for each in CRDS[kind]["versions"] if each["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]["properties"]["spec"]


def differences(crd: Any, node: Any, path: str) -> Iterator[str]:
    """What our schema lets in that the CRD doesn't, or doesn't know."""
    if isinstance(node, Free):
        yield f"{path}: anything is let in"
    elif "properties" in crd:
        assert isinstance(node, Fields), path
        for name, inner in crd["properties"].items():
            if name in node.known:
                yield from differences(inner, node.known[name], f"{path}.{name}")
            elif not node.unsupported.get(name):
                yield f"{path}.{name}: " + ("refused without a reason" if name in node.unsupported else "not known")
        yield from (f"{path}.{name}: not in the CRD" for name in node.known if name not in crd["properties"])
        yield from (f"{path}.{name}: required by the CRD" for name in set(crd.get("required", ())) - set(node.required))
    elif crd["type"] == "array":
        assert isinstance(node, Items), path
        if (crd.get("minItems", 0), crd.get("maxItems", 1024)) != (node.least, node.most):
            yield f"{path}: {node.least} to {node.most} items, the CRD has {crd.get('minItems', 0)} to {crd.get('maxItems')}"
        yield from differences(crd["items"], node.item, path + "[]")
    elif crd["type"] == "object":
        assert isinstance(node, Table), path
        if crd.get("maxProperties", 4096) != node.most:
            yield f"{path}: {node.most} entries, the CRD has {crd.get('maxProperties')}"
    else:
        yield from scalar_differences(crd, node, path)


def scalar_differences(crd: Any, node: Any, path: str) -> Iterator[str]:
    if isinstance(node, Choice):
        if crd.get("enum") and (more := set(node.words) - {str(word) for word in crd["enum"]}):
            yield f"{path}: {more} are not in the CRD"
        if crd.get("enum") and (less := {str(word) for word in crd["enum"]} - set(node.words) - set(node.unsupported)):
            yield f"{path}: {less} are not known"
    elif crd["type"] == "integer" and isinstance(node, Number):
        if (crd.get("minimum", 0), crd.get("maximum", INT32)) != (node.least, node.most):
            yield f"{path}: {node.least} to {node.most}, the CRD has {crd.get('minimum')} to {crd.get('maximum')}"
    elif crd["type"] == "boolean":
        assert isinstance(node, Flag), path
    elif isinstance(node, Text):
        wrong = node.form("x" * (crd["maxLength"] + 1)) if node.form and crd.get("maxLength") else ""
        if crd.get("maxLength", node.most) < node.most and not wrong:
            yield f"{path}: {node.most} characters, the CRD has {crd['maxLength']}"
        if crd.get("minLength", 0) > node.least and not (node.form and node.form("")):
            yield f"{path}: may be empty"
        if crd.get("pattern") and not node.form:
            yield f"{path}: has no form, the CRD has {crd['pattern']}"


def rules_of(crd: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each CEL rule: where, and what it says."""
    for rule in crd.get("x-kubernetes-validations", ()):
        yield path, " ".join((rule.get("message") or rule["rule"]).split())
    for name, inner in crd.get("properties", {}).items():
        yield from rules_of(inner, f"{path}.{name}")
    if "items" in crd:
        yield from rules_of(crd["items"], path + "[]")


def test_every_kind_of_the_crds_is_known() -> None:
    assert {kind for kind in CRDS if (GATEWAY_GROUP, kind) not in KINDS} <= set(UNSUPPORTED[GATEWAY_GROUP])
    assert set(OURS) <= set(CRDS)


@pytest.mark.parametrize("kind", OURS)
def test_schemas_are_as_strict_as_the_crds(kind: str) -> None:
    found = list(differences(schema(kind), KINDS[GATEWAY_GROUP, kind].body.known["spec"], f"{kind}.spec"))
    assert [line for line in found if line.partition(":")[0] not in EXTRA] == []


@pytest.mark.parametrize("kind", OURS)
def test_samples_are_right_by_themselves(kind: str) -> None:
    assert faults(kind, SAMPLES[kind]) == []


def faults(kind: str, spec: Any) -> list[str]:
    body = {"apiVersion": f"{GATEWAY_GROUP}/v1", "kind": kind, "metadata": {"name": "a", "namespace": "b"}, "spec": spec}
    if kind == "GatewayClass":
        del body["metadata"]["namespace"]
    found = check_document(document_of(json.loads(json.dumps(body)), "test"))
    return ["".join("[]" if isinstance(part, int) else f".{part}" for part in problem.path).lstrip(".") for problem in found]


def test_a_tls_route_needs_hostnames() -> None:
    assert faults("TLSRoute", {name: value for name, value in SAMPLES["TLSRoute"].items() if name != "hostnames"}) == ["spec.hostnames"]


@pytest.mark.parametrize("kind", OURS)
def test_every_cel_rule_is_kept(kind: str) -> None:
    missing, let_in = [], []
    for path, message in rules_of(schema(kind), f"{kind}.spec"):
        if path in NEVER:
            continue
        cases = [case for each, case in RULES.get(message, ()) if each == kind]
        if not cases:
            missing.append((path, message))
        let_in += [(path, message, case) for case in cases if not any(each.startswith("spec") for each in faults(kind, case))]
    assert missing == []
    assert let_in == []

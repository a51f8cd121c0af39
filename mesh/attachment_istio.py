"""Where policies of Istio hold: `selector`, `targetRef` and `targetRefs` of `RequestAuthentication` and `AuthorizationPolicy` alike.

What there is in place of Istio's workloads are Gateways (istio.io, "Security policy target"):

* without selector and targets a policy holds at every Gateway of its own namespace, and in the mesh's root namespace at every Gateway
* with `selector` at those of them whose labels it fits: `metadata.labels`, those of `spec.infrastructure`, and
  `gateway.networking.k8s.io/gateway-name` and `gateway-class-name`, by which Istio's users choose
* with `targetRefs` at the Gateway or the Service that is named, of its own namespace, or (in the root namespace) at every Gateway of a
  GatewayClass

For the schema: `TARGETS` are the three fields, `target_rule` their rule. For the compiler: `at_gateway` and `at_service` choose among
documents, also among those that have not passed their check: of one whose fields can't be read it is taken that it holds wherever it
could, so that whoever refuses for its sake refuses enough. `check_places` tells of policies that hold nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from mesh import formats
from mesh.compile_world import Name, Trouble, World, age
from mesh.documents import Document, FieldPath, Problem
from mesh.kinds_gateway import GATEWAY_GROUP, NAME
from mesh.schema import Choice, Faults, Fields, Items, Node, Table, Text, nearest

ROOT_NAMESPACE: Final = "istio-system"
"""Where policies hold for the whole mesh, unless `Mesh.rootNamespace` says otherwise."""
GATEWAY_NAME: Final = "gateway.networking.k8s.io/gateway-name"
GATEWAY_CLASS_NAME: Final = "gateway.networking.k8s.io/gateway-class-name"
GROUPS: Final = {"Gateway": GATEWAY_GROUP, "GatewayClass": GATEWAY_GROUP, "Service": ""}


def _target(ref: Any, path: FieldPath, faults: Faults) -> None:
    group = GROUPS[ref["kind"]]
    if (ref.get("group") or "") != group and not (ref["kind"] == "Service" and ref.get("group") == "core"):
        faults.add(
            (*path, "group"), f"{formats.shown(ref.get('group') or '')} is not the group of {ref['kind']}; use {formats.shown(group)}"
        )
    if ref.get("namespace"):
        faults.add((*path, "namespace"), "can't be given: a policy belongs into the namespace of its target")


_REF: Final = Fields(
    {
        "kind": Choice(
            "a kind that a policy can be attached to",
            *GROUPS,
            unsupported={"ServiceEntry": "a service outside of the mesh is a Service of type ExternalName"},
        ),
        "name": NAME,
    },
    {"group": Text(most=253), "namespace": Text(most=63)},
    rule=_target,
)


def _label(value: str) -> str:
    return "a wildcard is not supported here in selectors" if "*" in value else formats.label_value(value)


_LABEL: Final = Text(_label)
TARGETS: Final[dict[str, Node]] = {
    "selector": Fields({}, {"matchLabels": Table(_LABEL, name=formats.label_name)}),
    "targetRef": _REF,
    "targetRefs": Items(_REF, most=16, unique=lambda ref: (ref["kind"], ref["name"])),
}
"""The fields of a `spec` that say where it holds."""


def target_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    """At most one of the three is there."""
    there = [name for name in TARGETS if spec.get(name) is not None]
    if len(there) > 1:
        faults.add((*path, there[1]), f"does not go with {there[0]}; keep one of the two")


def labels_of(gateway: Document) -> dict[str, str]:
    """The labels that selectors look at."""
    spec = gateway.body["spec"]
    return {
        **(gateway.body["metadata"].get("labels") or {}),
        **((spec.get("infrastructure") or {}).get("labels") or {}),
        GATEWAY_NAME: gateway.key.name,
        GATEWAY_CLASS_NAME: spec["gatewayClassName"],
    }


def at_gateway(policies: Iterable[Document], gateway: Document, root: str) -> list[Document]:
    """Those of `policies` that hold at a Gateway: the root namespace's before the Gateway's own, the older first."""
    space = gateway.key.namespace
    labels = labels_of(gateway)
    found = [policy for policy in policies if policy.key.namespace in (root, space) and _holds(policy, gateway, labels, root)]
    return sorted(found, key=lambda policy: (policy.key.namespace != root, age(policy)))


def at_service(policies: Iterable[Document], namespace: str, name: str) -> list[Document]:
    """Those of `policies` that name a Service, the older first."""
    return sorted(
        (policy for policy in policies if policy.key.namespace == namespace and name in services_of(policy)),
        key=age,
    )


def before_service(policies: Iterable[Document], namespace: str, name: str, root: str) -> list[Document]:
    """Those of `policies` that hold for all that goes to a Service, where policies of namespaces do: those that name it, and those without
    selector and targets of its namespace and of the root namespace. The root namespace's come first, then the older."""
    found = [
        policy
        for policy in policies
        if at_service((policy,), namespace, name) or (policy.key.namespace in (root, namespace) and _is_wide(policy))
    ]
    return sorted(found, key=lambda policy: (policy.key.namespace != root, age(policy)))


def _is_wide(policy: Document) -> bool:
    """Whether it holds for all of its namespace, as far as it can be read."""
    spec = policy.body.get("spec")
    selector = spec.get("selector") if isinstance(spec, dict) else None
    wanted = selector.get("matchLabels") if isinstance(selector, dict) else None
    return _refs(policy) is None and not (isinstance(wanted, dict) and wanted)


def services_of(policy: Document) -> list[str]:
    """The names of the Services that a policy names."""
    return [ref["name"] for ref in _refs(policy) or () if ref.get("kind") == "Service" and isinstance(ref.get("name"), str)]


def _refs(policy: Document) -> list[Any] | None:
    """The targets; None where there are none, and where one of them can't be read."""
    spec = policy.body.get("spec")
    if not isinstance(spec, dict):
        return None
    refs = spec.get("targetRefs")
    if refs is None or refs == []:
        refs = [spec["targetRef"]] if spec.get("targetRef") is not None else None
    return refs if isinstance(refs, list) and all(_is_readable(ref) for ref in refs) else None


def _is_readable(ref: Any) -> bool:
    """Whether it says what it is about, be it supported or not."""
    return isinstance(ref, dict) and ref.get("kind") in (*GROUPS, "ServiceEntry") and isinstance(ref.get("name"), str)


def _holds(policy: Document, gateway: Document, labels: dict[str, str], root: str) -> bool:
    refs = _refs(policy)
    if refs is not None:
        for ref in refs:
            kind, name = ref.get("kind"), ref.get("name")
            if kind == "Gateway" and name == gateway.key.name and policy.key.namespace == gateway.key.namespace:
                return True
            if kind == "GatewayClass" and name == labels[GATEWAY_CLASS_NAME] and policy.key.namespace == root:
                return True
        return False
    spec = policy.body.get("spec")
    selector = spec.get("selector") if isinstance(spec, dict) else None
    wanted = selector.get("matchLabels") if isinstance(selector, dict) else None
    return not isinstance(wanted, dict) or all(labels.get(name) == value for name, value in wanted.items())


def check_places(world: World, ours: dict[Name, Document], kind: str, root: str, services: Iterable[Name] = ()) -> tuple[Problem, ...]:
    """Policies of a `kind` with a target that is not there, and those that hold at no Gateway of ours (and before none of `services`, where
    policies of namespaces hold there)."""
    spaces = {namespace for namespace, _ in services}
    problems: list[Problem] = []
    for _, policy in sorted(world.of(kind).items()):
        trouble = Trouble(policy)
        spec = policy.body["spec"] if policy.body.get("spec") is not None else {}
        refs = _refs(policy)
        one = not spec.get("targetRefs")
        for index, ref in enumerate(refs or ()):
            _check_target(world, ours, policy, ref, ("spec", "targetRef") if one else ("spec", "targetRefs", index), root, trouble)
        wide = bool(spaces) and _is_wide(policy) and (policy.key.namespace == root or policy.key.namespace in spaces)
        if refs is None and not wide and not any(at_gateway((policy,), gateway, root) for gateway in ours.values()):
            what = "Gateway or Service" if spaces and not spec.get("selector") else "Gateway"
            where = "whose labels it selects" if spec.get("selector") else f"in the namespace {policy.key.namespace}"
            path = ("spec", "selector") if spec.get("selector") else ()
            trouble.warn(path, f"there is no {what} {where}: it holds nowhere", "TargetNotFound")
        problems += trouble.found
    return tuple(problems)


def _check_target(
    world: World, ours: dict[Name, Document], policy: Document, ref: Any, path: FieldPath, root: str, trouble: Trouble
) -> None:
    kind, name = ref["kind"], ref["name"]
    namespace = "" if kind == "GatewayClass" else policy.key.namespace
    if kind == "GatewayClass" and policy.key.namespace != root:
        trouble.add((*path, "kind"), f"a GatewayClass can be a target in the root namespace only, which is {root}", "TargetNotFound")
    elif world.get(kind, namespace, name) is None:
        if any((key.kind, key.namespace, key.name) == (kind, namespace, name) for key in world.bad):
            return
        near = nearest(name, [other for space, other in world.of(kind) if space == namespace])
        own = f"{namespace}/{name}" if namespace else name
        trouble.add((*path, "name"), f"there is no {kind} {own}" + (f"; did you mean {near}?" if near else ""), "TargetNotFound")
    elif kind == "Gateway" and (namespace, name) not in ours:
        trouble.warn(
            (*path, "name"), f"{kind} {namespace}/{name} is of another GatewayClass: the policy means nothing there", "TargetNotFound"
        )

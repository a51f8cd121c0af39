"""Who is let out of a policy that is attached above a route: what a PolicyExemption asks for, where the policy's owner grants it.

It takes two, as a reference into another namespace does (Gateway API, "ReferenceGrant"): the route's owner writes a PolicyExemption beside
the route, and the policy's owner names the route's namespace in the AccessPolicy's `exemptions`. One without the other changes nothing, and
says so. Only what stands at the levels mesh, gateway and listener can be left out; what is attached to the route itself, to its rules or
to a service is asked all the same.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.compile_policies import Attached, Target
from mesh.compile_world import Trouble, World, age
from mesh.documents import Document, Problem
from mesh.model import Exemption
from mesh.schema import nearest

KIND = "PolicyExemption"


class Exemptions(msgspec.Struct, frozen=True, kw_only=True):
    """What routes are exempt from."""

    by_target: dict[Target, tuple[Exemption, ...]] = {}
    problems: tuple[Problem, ...] = ()


def compile_exemptions(world: World, default: str) -> Exemptions:
    """Every exemption that is asked for and granted, and what is wrong with the others. `default` is the mesh's AccessPolicy."""
    found: dict[Target, list[Exemption]] = {}
    problems: list[Problem] = []
    for document in sorted(world.of(KIND).values(), key=age):
        trouble = Trouble(document)
        spec, own = document.body["spec"], document.key.namespace
        by = f"{own}/{document.key.name}"
        targets = [target for index, ref in enumerate(spec["targetRefs"]) if (target := _target(world, own, ref, index, trouble))]
        for index, ref in enumerate(spec["policies"]):
            namespace, name = ref.get("namespace") or own, ref["name"]
            policy = world.get("AccessPolicy", namespace, name)
            if policy is None:
                _missing(world, namespace, name, index, trouble)
                continue
            refs = policy.body["spec"].get("targetRefs") or []
            if f"{namespace}/{name}" != default and not any(each["kind"] in ("Gateway", "ListenerSet") for each in refs):
                message = f"{policy.key} is attached nowhere above a route, so that there is nothing to be exempt from"
                trouble.warn(("spec", "policies", index), message, "TargetNotFound")
            for target in targets:
                if _granted(policy, target):
                    found.setdefault(target, []).append(Exemption(policy=f"{namespace}/{name}", by=by))
                else:
                    _refused(policy, target, index, trouble)
        problems += trouble.found
    return Exemptions(by_target={target: tuple(found[target]) for target in sorted(found)}, problems=tuple(problems))


def without(above: Attached, exempt: tuple[Exemption, ...], default: str) -> tuple[Attached, tuple[Exemption, ...]]:
    """What is left of what is attached above a rule, and the exemptions that took something away. `default` is the AccessPolicy that is the
    mesh's, which is asked under another name."""
    if not exempt:
        return above, ()
    by_name = {each.policy: each for each in reversed(exempt)}
    used: dict[Exemption, None] = {}
    left = []
    for policy in above.decisions:
        found = by_name.get(default if policy.level == "mesh" and policy.name == "mesh" else policy.name)
        if found is None:
            left.append(policy)
        else:
            used[found] = None
    return Attached(tuple(left), above.limits), tuple(used)


def _target(world: World, namespace: str, ref: Any, index: int, trouble: Trouble) -> Target | None:
    kind, name, section = ref["kind"], ref["name"], ref.get("sectionName") or ""
    route = world.get(kind, namespace, name)
    if route is None:
        near = nearest(name, [other for space, other in world.of(kind) if space == namespace])
        hint = f"; did you mean {near}?" if near else "; an exemption belongs into the namespace of its routes"
        trouble.add(("spec", "targetRefs", index, "name"), f"there is no {kind} {namespace}/{name}{hint}", "TargetNotFound")
        return None
    names = [rule["name"] for rule in route.body["spec"].get("rules") or [] if rule.get("name")]
    if section and section not in names:
        near = nearest(section, names)
        hint = f"; did you mean {near}?" if near else "; give the rule that name"
        trouble.add(("spec", "targetRefs", index, "sectionName"), f'{route.key} has no rule named "{section}"{hint}', "TargetNotFound")
        return None
    return kind, namespace, name, section


def _missing(world: World, namespace: str, name: str, index: int, trouble: Trouble) -> None:
    path = ("spec", "policies", index)
    if any((key.kind, key.namespace, key.name) == ("AccessPolicy", namespace, name) for key in world.bad):
        trouble.add(path, f"AccessPolicy {namespace}/{name} is not in force, and nobody is exempt from it until it is", "TargetNotFound")
        return
    near = nearest(name, [other for space, other in world.of("AccessPolicy") if space == namespace])
    trouble.add(path, f"there is no AccessPolicy {namespace}/{name}" + (f"; did you mean {near}?" if near else ""), "TargetNotFound")


def _granted(policy: Document, target: Target) -> bool:
    kind, namespace, name, section = target
    return any(
        (grant["kind"], grant["namespace"]) == (kind, namespace)
        and grant.get("name") in (None, name)
        and grant.get("sectionName") in (None, section)
        for grant in policy.body["spec"].get("exemptions") or []
    )


def _refused(policy: Document, target: Target, index: int, trouble: Trouble) -> None:
    kind, namespace, name, section = target
    what = f"{kind} {namespace}/{name}" + (f" (rule {section})" if section else "")
    grant = f"exemptions: [{{kind: {kind}, namespace: {namespace}}}]"
    message = f"{policy.key} does not let {what} out, which stays under it; its owner can, by {grant}"
    trouble.add(("spec", "policies", index), message, "RefNotPermitted")

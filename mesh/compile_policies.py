"""From AccessPolicy and QuotaPolicy to what is asked, and where: the table of attachments.

Fails closed: an AccessPolicy that can't be understood guards its targets all the same, with a question that has no answer; so does a
default policy that is not there, for every rule of the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mesh import formats
from mesh.compile_quota import changes_of, quota_limits
from mesh.compile_world import Name, Trouble, World, age
from mesh.documents import Document, Problem
from mesh.extension_providers import Provider, providers_of, rate_limit_services
from mesh.kinds_own import TARGETS
from mesh.model import DecisionPolicy, Level, MeshSettings, QuotaLimit
from mesh.policy import Revision
from mesh.quota_services import RateLimitService
from mesh.schema import nearest

UNANSWERABLE = "tollhouse.unanswerable"
"""The decision of a policy that is missing or wrong: no revision has it, so the answer is always an error, and an error is not an allow."""

Target = tuple[str, str, str, str]
"""Kind, namespace, name, section."""


class Attached(msgspec.Struct, frozen=True):
    """What is attached at one place, the oldest policy first."""

    decisions: tuple[DecisionPolicy, ...] = ()
    limits: tuple[QuotaLimit, ...] = ()

    def __add__(self, other: Attached) -> Attached:
        if not (other.decisions or other.limits):
            return self
        if not (self.decisions or self.limits):
            return other
        return Attached(self.decisions + other.decisions, self.limits + other.limits)

    def joined(self, other: Attached) -> Attached:
        """This, and what `other` has besides: nothing is asked twice at one level."""
        here = {(policy.level, policy.name) for policy in self.decisions} | {(limit.level, limit.name) for limit in self.limits}
        return self + Attached(
            tuple(policy for policy in other.decisions if (policy.level, policy.name) not in here),
            tuple(limit for limit in other.limits if (limit.level, limit.name) not in here),
        )


NOTHING = Attached()


class Attachments(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is attached anywhere."""

    default: Attached = NOTHING
    """At level mesh."""
    by_target: dict[Target, Attached] = {}
    policies: dict[str, DecisionPolicy] = {}
    """Every AccessPolicy by `namespace/name`, as it is at its first target."""
    problems: tuple[Problem, ...] = ()


def compile_attachments(world: World, settings: MeshSettings) -> Attachments:
    """The attachments of all policies. Whether their targets exist is `check_targets`' business."""
    decisions: dict[Target, list[DecisionPolicy]] = {}
    limits: dict[Target, list[QuotaLimit]] = {}
    policies: dict[str, DecisionPolicy] = {}
    providers, services = extension_providers(world), quota_services(world)
    for document in sorted(world.of("AccessPolicy").values(), key=age):
        spec, name = document.body["spec"], _name(document)
        targets = [_target(document, ref) for ref in spec.get("targetRefs") or []]
        for target in targets:
            decisions.setdefault(target, []).append(access_policy(name, spec, level_of(target), providers))
        policies[name] = access_policy(name, spec, level_of(targets[0]) if targets else "mesh", providers)
    for document in world.bad.values():
        if document.key.kind == "AccessPolicy":
            for target in _raw_targets(document):
                decisions.setdefault(target, []).append(unanswerable(_name(document), level_of(target)))
    for document in sorted(world.of("QuotaPolicy").values(), key=age):
        for ref in document.body["spec"].get("targetRefs") or []:
            target = _target(document, ref)
            made = quota_limits(_name(document), document.body["spec"], level_of(target), services, changes_of(world, document))
            limits.setdefault(target, []).extend(made)
    by_target = {
        target: Attached(tuple(decisions.get(target, ())), tuple(limits.get(target, ())))
        for target in sorted(decisions.keys() | limits.keys())
    }
    default, problems = _default(world, settings)
    quota, more = _default_quota(world, settings)
    default, problems = default + quota, problems + more
    return Attachments(default=default, by_target=by_target, policies=dict(sorted(policies.items())), problems=problems)


def extension(world: World, kind: str, namespace: str, name: str) -> Attached | str:
    """A policy as the `ExtensionRef` of a rule, or why there is none."""
    document = world.get(kind, namespace, name)
    own = f"{namespace}/{name}"
    if document is None:
        if any((key.kind, key.namespace, key.name) == (kind, namespace, name) for key in world.bad):
            return f"{kind} {own} is not in force: see its own problems"
        near = nearest(name, [other for space, other in world.of(kind) if space == namespace])
        return f"there is no {kind} {own}" + (f"; did you mean {near}?" if near else "")
    spec = document.body["spec"]
    if kind == "AccessPolicy":
        return Attached((access_policy(own, spec, "rule", extension_providers(world)),))
    return Attached((), quota_limits(own, spec, "rule", quota_services(world), changes_of(world, document)))


def _default(world: World, settings: MeshSettings) -> tuple[Attached, tuple[Problem, ...]]:
    if any(key.kind == "Mesh" for key in world.bad) and not world.of("Mesh"):
        return Attached((unanswerable("mesh", "mesh"),)), ()
    if not settings.default_policy:
        return NOTHING, ()
    namespace, _, name = settings.default_policy.partition("/")
    document = world.get("AccessPolicy", namespace, name)
    if document is not None:
        return Attached((access_policy("mesh", document.body["spec"], "mesh", extension_providers(world)),)), ()
    mesh = min(world.of("Mesh").values(), key=age)
    trouble = Trouble(mesh)
    trouble.add(
        ("spec", "defaultAccessPolicy", "name"),
        f"there is no AccessPolicy {settings.default_policy} in force; until there is, every request is refused",
        "TargetNotFound",
    )
    return Attached((unanswerable("mesh", "mesh"),)), tuple(trouble.found)


def _default_quota(world: World, settings: MeshSettings) -> tuple[Attached, tuple[Problem, ...]]:
    """The limits of the Mesh's default. One that is not there limits nothing, as a QuotaPolicy that is wrong does."""
    if not settings.default_quota:
        return NOTHING, ()
    namespace, _, name = settings.default_quota.partition("/")
    document = world.get("QuotaPolicy", namespace, name)
    if document is not None:
        made = quota_limits(settings.default_quota, document.body["spec"], "mesh", quota_services(world), changes_of(world, document))
        return Attached((), made), ()
    trouble = Trouble(min(world.of("Mesh").values(), key=age))
    near = nearest(name, [other for space, other in world.of("QuotaPolicy") if space == namespace])
    hint = f"; did you mean {near}?" if near else ""
    message = f"there is no QuotaPolicy {settings.default_quota} in force, and nothing is limited by it{hint}"
    trouble.add(("spec", "defaultQuotaPolicy", "name"), message, "TargetNotFound")
    return NOTHING, tuple(trouble.found)


def _name(document: Document) -> str:
    return f"{document.key.namespace}/{document.key.name}"


def _target(document: Document, ref: Any) -> Target:
    return ref["kind"], document.key.namespace, ref["name"], ref.get("sectionName") or ""


def _raw_targets(document: Document) -> list[Target]:
    """Targets of a policy that has not passed its check: those that can be read. With a section that can't, the whole is guarded."""
    spec = document.body.get("spec")
    refs = spec.get("targetRefs") if isinstance(spec, dict) else None
    found = []
    for ref in refs if isinstance(refs, list) else []:
        kind, name, section = (ref.get("kind"), ref.get("name"), ref.get("sectionName")) if isinstance(ref, dict) else (None, None, None)
        if isinstance(kind, str) and kind in TARGETS and isinstance(name, str):
            found.append((kind, document.key.namespace, name, section if isinstance(section, str) else ""))
    return found


def level_of(target: Target) -> Level:
    """The level of what is attached to a target."""
    kind, _, _, section = target
    if kind == "Gateway":
        return "listener" if section else "gateway"
    if kind == "ListenerSet":
        return "listener"
    if kind.endswith("Route"):
        return "rule" if section else "route"
    return "service"


def unanswerable(name: str, level: Level) -> DecisionPolicy:
    """A policy that lets nothing pass."""
    return DecisionPolicy(name=name, level=level, decision=UNANSWERABLE)


def extension_providers(world: World) -> dict[str, Provider]:
    """The authorization services that the Mesh describes, by name."""
    meshes = world.of("Mesh").values()
    return providers_of(min(meshes, key=age).body["spec"]) if meshes else {}


def quota_services(world: World) -> dict[str, RateLimitService]:
    """The rate-limit services that the Mesh describes, by name."""
    meshes = world.of("Mesh").values()
    return rate_limit_services(min(meshes, key=age).body["spec"]) if meshes else {}


def access_policy(name: str, spec: Any, level: Level, providers: Mapping[str, Provider]) -> DecisionPolicy:
    """A checked AccessPolicy at one level. One whose extension provider is not among `providers` lets nothing pass."""
    body = spec.get("withBody") or {}
    if spec.get("extensionProvider"):
        provider = providers.get(spec["extensionProvider"])
        if provider is None:
            return unanswerable(name, level)
        return DecisionPolicy(
            name=name,
            level=level,
            provider=provider.auth.cluster,
            auth=provider.auth,
            failure_mode=spec.get("failureMode") or ("Allow" if provider.fail_open else "Deny"),
            timeout=formats.seconds(spec["timeout"]) if spec.get("timeout") else provider.timeout,
            body_limit=body.get("maxBytes") or 0 if body else provider.body_limit,
            body_partial=bool(body.get("allowPartial")) if body else provider.body_partial,
            shadow=spec.get("mode") == "Shadow",
            show_reason=bool(spec.get("showReason")),
            error_status=provider.status,
        )
    return DecisionPolicy(
        name=name,
        level=level,
        decision=spec.get("decision") or "",
        provider=spec.get("provider") or "",
        place=spec.get("place") or "Central",
        failure_mode=spec.get("failureMode") or "Deny",
        timeout=formats.seconds(spec.get("timeout") or "500ms"),
        body_limit=body.get("maxBytes") or 0,
        body_partial=bool(body.get("allowPartial")),
        shadow=spec.get("mode") == "Shadow",
        show_reason=bool(spec.get("showReason")),
    )


def check_decisions(
    world: World, revision: Revision | None, mesh_default: str, extensions: set[str], which: str = "active"
) -> tuple[Problem, ...]:
    """AccessPolicies whose decision the active revision doesn't have: they refuse every request (or let it pass, as their author chose).
    `extensions`: policies that filters of routes name."""
    problems: list[Problem] = []
    known = revision.entry_points if revision is not None else {}
    providers, services = extension_providers(world), quota_services(world)
    for _, document in sorted(world.of("AccessPolicy").items()):
        spec = document.body["spec"]
        in_use = spec.get("targetRefs") or _name(document) == mesh_default or _name(document) in extensions
        wanted = spec.get("extensionProvider")
        if wanted and wanted not in providers:
            other = "the one of this name is a rate-limit service" if wanted in services else ""
            problems += _no_provider(document, wanted, "extension provider", providers, other, "everything is refused")
        decision = spec.get("decision") or ""
        if not decision or not in_use or decision in known:
            continue
        trouble = Trouble(document)
        if revision is None:
            trouble.warn(
                ("spec", "decision"),
                f"{decision} can't be asked yet: no policy revision is active; publish one and activate it",
                "NoRevision",
            )
        else:
            near = nearest(decision, known)
            hint = f"did you mean {near}?" if near else "declare it as an entry point and publish again"
            trouble.add(
                ("spec", "decision"), f"the {which} revision {revision.digest[:19]} has no decision {decision}; {hint}", "NoEntryPoint"
            )
        problems += trouble.found
    return tuple(problems)


def check_quotas(world: World) -> tuple[Problem, ...]:
    """QuotaPolicies whose rate-limit service the Mesh does not describe: their failure mode is the answer."""
    problems: list[Problem] = []
    providers, services = extension_providers(world), quota_services(world)
    for _, document in sorted(world.of("QuotaPolicy").items()):
        wanted = document.body["spec"].get("extensionProvider")
        if wanted and wanted not in services:
            other = "the one of this name is asked for decisions" if wanted in providers else ""
            problems += _no_provider(document, wanted, "rate-limit service", services, other, "the failure mode is the answer")
    return tuple(problems)


def _no_provider(document: Document, wanted: str, what: str, known: Iterable[str], other: str, until: str) -> list[Problem]:
    """`other`: what the provider of this name is, if there is one; `until`: what happens until it is mended."""
    near = nearest(wanted, known)
    hint = other or (f"did you mean {near}?" if near else "describe it under extensionProviders")
    trouble = Trouble(document)
    trouble.add(("spec", "extensionProvider"), f"the Mesh has no {what} {wanted}; {hint}; until then {until}", "TargetNotFound")
    return trouble.found


def check_targets(world: World, ours: set[Name]) -> tuple[Problem, ...]:
    """Policies whose targets are not there (those of other implementations' gateways are left alone)."""
    problems: list[Problem] = []
    for kind in ("AccessPolicy", "QuotaPolicy", "BackendTLSPolicy"):
        for _, document in sorted(world.of(kind).items()):
            trouble = Trouble(document)
            for index, ref in enumerate(document.body["spec"].get("targetRefs") or []):
                _check_target(world, ours, document.key.namespace, ref, index, trouble)
            problems += trouble.found
    for _, document in sorted(world.of("ServiceIdentity").items()):
        name = document.body["spec"]["service"]
        if world.get("Service", document.key.namespace, name) is None:
            trouble = Trouble(document)
            _missing(world, "Service", document.key.namespace, name, ("spec", "service"), trouble)
            problems += trouble.found
    return tuple(problems)


def _missing(world: World, kind: str, namespace: str, name: str, path: tuple[str | int, ...], trouble: Trouble) -> None:
    others = [other for space, other in world.of(kind) if space == namespace]
    near = nearest(name, others)
    elsewhere = [space for space, other in world.of(kind) if other == name]
    hint = f"; did you mean {near}?" if near else ""
    if not near and elsewhere:
        hint = f"; there is one in the namespace {elsewhere[0]}, and a policy belongs into the namespace of its target"
    trouble.add(path, f"there is no {kind} {namespace}/{name}{hint}", "TargetNotFound")


def _check_target(world: World, ours: set[Name], namespace: str, ref: Any, index: int, trouble: Trouble) -> None:
    kind, name, section = ref["kind"], ref["name"], ref.get("sectionName") or ""
    path: tuple[str | int, ...] = ("spec", "targetRefs", index)
    document = world.get(kind, namespace, name)
    if document is None:
        known_bad = any(key.kind == kind and (key.namespace, key.name) == (namespace, name) for key in world.bad)
        if not known_bad:
            _missing(world, kind, namespace, name, (*path, "name"), trouble)
        return
    if kind == "Gateway" and (namespace, name) not in ours:
        trouble.warn((*path, "name"), f"{document.key} is of another GatewayClass: the policy means nothing there", "TargetNotFound")
        return
    if not section or kind == "Service":
        return
    spec = document.body["spec"]
    parts = spec["listeners"] if "listeners" in spec else spec.get("rules") or []
    names = [part["name"] for part in parts if part.get("name")]
    if section not in names:
        what = "listener" if "listeners" in spec else "rule"
        near = nearest(section, names)
        hint = f"; did you mean {near}?" if near else f"; give the {what} that name" if kind.endswith("Route") else ""
        trouble.add((*path, "sectionName"), f'{document.key} has no {what} named "{section}"{hint}', "TargetNotFound")

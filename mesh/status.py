"""The `status` of every resource, as Gateway API defines it for a controller, computed from what was compiled.

Nothing is remembered: the same resources have the same status, and `lastTransitionTime` is the time of the asking. Conditions and their
reasons are those of the specification (gateway-api.sigs.k8s.io, "API specification", and GEP-1364); where it has none for what is wrong,
the reason is the problem's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mesh import status_gateways
from mesh.compile_attach import BY_DEFAULT, Parent
from mesh.compile_listeners import GatewayPart
from mesh.conditions import Conditions
from mesh.documents import Document, Key, Problem
from mesh.features import supported_features
from mesh.kinds_gateway import CONTROLLER, GATEWAY_GROUP
from mesh.schema import listed

OWN_GROUP = "tollhouse.dev"
ISTIO_GROUP = "security.istio.io"
MOST_ANCESTORS = 16
"""Gateways that a policy's status names at most (Gateway API, "PolicyStatus")."""


class Statuses:
    """Answers for one configuration. Made by `Workspace.statuses`; valid until its next update."""

    def __init__(
        self,
        *,
        now: str,
        documents: Mapping[Key, Document],
        in_force: Mapping[Key, Document],
        problems: Iterable[Problem],
        gateways: Iterable[GatewayPart],
        parents: Mapping[Key, tuple[Parent, ...]],
        foreign: frozenset[Key],
        places: Callable[[Document], tuple[str, ...]] = lambda _: (),
    ) -> None:
        """`now` in RFC 3339; `parents` by the key of each route; `foreign` are resources of other implementations;
        `places` tells where an AuthorizationPolicy holds."""
        self.now = now
        self.documents = documents
        self.in_force = in_force
        self.parents = parents
        self.foreign = foreign
        self.places = places
        self.problems: dict[Key, list[Problem]] = {}
        for problem in problems:
            if problem.key is not None and problem.severity == "error":
                self.problems.setdefault(problem.key, []).append(problem)
        self.gateways = {f"{part.namespace}/{part.name}": part for part in gateways}
        attached: dict[tuple[Key, str], int] = {}
        for route in parents.values():
            for owner, section in {(parent.owner, section) for parent in route for section in parent.sections}:
                attached[owner, section] = attached.get((owner, section), 0) + 1
        self.attached = attached
        """How many routes each listener of a Gateway or ListenerSet has."""

    def of(self, key: Key) -> dict[str, Any] | None:
        """The status of a resource; None where there is none: for a kind without one, and for somebody else's resource."""
        document = self.documents.get(key)
        if document is None or key in self.foreign:
            return None
        if key.group in (OWN_GROUP, ISTIO_GROUP):
            return self._own(document)
        if key.group != GATEWAY_GROUP:
            return None
        if key.kind == "GatewayClass":
            return self._class(document)
        if key.kind == "Gateway":
            return self._gateway(document)
        if key.kind == "ListenerSet":
            return self._listener_set(document)
        if key.kind == "BackendTLSPolicy":
            return self._policy(document)
        return self._route(document) if key.kind.endswith("Route") else None

    def in_sight(self) -> dict[Key, dict[str, Any]]:
        """The status of the Gateways in force, of their ListenerSets, and of whatever has something wrong, in the order of their keys."""
        keys = {Key(GATEWAY_GROUP, "Gateway", part.namespace, part.name) for part in self.gateways.values()}
        keys.update(*(part.sets for part in self.gateways.values()), self.problems)
        found = ((key, self.of(key)) for key in sorted(keys))
        return {key: status for key, status in found if status is not None}

    def conditions(self, document: Document) -> Conditions:
        """An empty list of conditions about the version of `document` that is in force (or about the newest, if none is)."""
        return Conditions(self.in_force.get(document.key, document), self.now)

    def _wrong(self, document: Document) -> Problem | None:
        """Why `document` as it is written can't be in force at all."""
        if self.in_force.get(document.key) is document:
            return None
        return next(iter(self.problems.get(document.key, ())), None)

    def _own(self, document: Document) -> dict[str, Any]:
        conditions = self.conditions(document)
        wrong = next(iter(self.problems.get(document.key, ())), None)
        fine = "It is in force."
        if document.key.kind == "AuthorizationPolicy" and wrong is None:
            places = self.places(document)
            if not places:
                conditions.add("Accepted", False, "TargetNotFound", "Nothing that it could hold for is there.")
                return {"conditions": conditions.found}
            fine = f"It is in force at {listed(places, 'and')}."
        conditions.add("Accepted", wrong is None, wrong.reason if wrong else "Accepted", said(wrong) if wrong else fine)
        return {"conditions": conditions.found}

    def _class(self, document: Document) -> dict[str, Any] | None:
        spec = document.body.get("spec")
        if not isinstance(spec, dict) or spec.get("controllerName") != CONTROLLER:
            return None
        conditions = self.conditions(document)
        wrong = next(iter(self.problems.get(document.key, ())), None)
        reason = "Accepted" if wrong is None else wrong.reason if wrong.reason == "InvalidParameters" else "Unsupported"
        conditions.add("Accepted", wrong is None, reason, said(wrong) if wrong else "Gateways of this class are served by Tollhouse.")
        return {"conditions": conditions.found, "supportedFeatures": [{"name": name} for name in supported_features()]}

    def _gateway(self, document: Document) -> dict[str, Any]:
        part = self.gateways.get(f"{document.key.namespace}/{document.key.name}")
        if part is None:
            wrong = next(iter(self.problems.get(document.key, ())), None)
            reason = wrong.reason if wrong is not None and wrong.reason == "InvalidParameters" else "Invalid"
            message = said(wrong) if wrong is not None else "It is not in force."
            conditions = self.conditions(document)
            conditions.add("Accepted", False, reason, message)
            conditions.add("Programmed", False, "Invalid", message)
            return {"conditions": conditions.found}
        return status_gateways.gateway_status(self.conditions(document), part, self.attached)

    def _listener_set(self, document: Document) -> dict[str, Any]:
        part = next((part for part in self.gateways.values() if document.key in part.sets), None)
        if part is not None:
            return status_gateways.set_status(self.conditions(document), document.key, part, self.attached)
        wrong = next(iter(self.problems.get(document.key, ())), None)
        reason = wrong.reason if wrong is not None and wrong.reason in ("NotAllowed", "ParentNotAccepted") else "Invalid"
        if wrong is None:
            reason = "ParentNotAccepted"
        conditions = self.conditions(document)
        for condition in ("Accepted", "Programmed"):
            conditions.add(condition, False, reason, said(wrong) if wrong else "Its Gateway is not in force.")
        return {"conditions": conditions.found}

    def _route(self, document: Document) -> dict[str, Any]:
        parents = self.parents.get(document.key)
        found: list[dict[str, Any]] = []
        wrong = self._wrong(document)
        if parents is None:
            found = [self._refused_parent(document, ref, wrong) for ref in _refs(document)]
        else:
            in_force = self.in_force[document.key]
            refs = in_force.body["spec"].get("parentRefs") or []
            unresolved = [problem for problem in self.problems.get(document.key, ()) if "rules" in problem.path] if wrong is None else []
            for parent in parents:
                conditions = self.conditions(document)
                message = f"Attached to {', '.join(parent.sections)}." if parent.sections else sentence(parent.message)
                conditions.add("Accepted", not parent.reason, parent.reason or "Accepted", message)
                _resolved(conditions, unresolved, "All references lead to something that can be used.")
                if wrong is not None and not parent.reason:
                    conditions.add("PartiallyInvalid", True, "UnsupportedValue", f"Fall Back: {said(wrong)}")
                owner = {"namespace": parent.owner.namespace, "name": parent.owner.name}
                found.append(_parent(owner if parent.index == BY_DEFAULT else refs[parent.index], conditions))
        return {"parents": [*found, *_others(document, "parents")]}

    def _refused_parent(self, document: Document, ref: Any, wrong: Problem | None) -> dict[str, Any]:
        conditions = self.conditions(document)
        message = said(wrong) if wrong is not None else "The route is not in force."
        conditions.add("Accepted", False, "UnsupportedValue", message)
        return _parent(ref, conditions)

    # BackendTLSPolicy

    def _policy(self, document: Document) -> dict[str, Any]:
        spec = document.body.get("spec")
        spec = spec if isinstance(spec, dict) else {}
        targets = spec.get("targetRefs")
        targets = [ref for ref in targets if isinstance(ref, dict)] if isinstance(targets, list) else []
        namespace = document.key.namespace
        ancestors: dict[Key, set[int]] = {}
        users = self._users
        for index, ref in enumerate(targets):
            service = namespace, str(ref.get("name"))
            for gateway in sorted(users.get(service, ())):
                ancestors.setdefault(gateway, set()).add(index)
            if service not in users:
                ancestors.setdefault(Key("", "Service", *service), set()).add(index)
        found = [self._ancestor(document, spec, key, indexes) for key, indexes in list(ancestors.items())[:MOST_ANCESTORS]]
        return {"ancestors": [*found, *_others(document, "ancestors")][:MOST_ANCESTORS]}

    def _ancestor(self, document: Document, spec: Any, key: Key, targets: set[int]) -> dict[str, Any]:
        problems = self.problems.get(document.key, [])
        validation = spec.get("validation")
        refs = validation.get("caCertificateRefs") if isinstance(validation, dict) else None
        refs = refs if isinstance(refs, list) else []
        unresolved = [problem for problem in problems if "caCertificateRefs" in problem.path]
        others = [
            problem
            for problem in problems
            if problem not in unresolved and not (problem.path[:2] == ("spec", "targetRefs") and not targets & set(problem.path[2:3]))
        ]
        conditions = self.conditions(document)
        if others:
            reason = others[0].reason if others[0].reason in ("Conflicted", "TargetNotFound") else "Invalid"
            conditions.add("Accepted", False, reason, said(others[0]))
        elif refs and len({problem.path for problem in unresolved}) >= len(refs):
            conditions.add("Accepted", False, "NoValidCACertificate", said(unresolved[0]))
        else:
            conditions.add("Accepted", True, "Accepted", "The service is spoken to as it says.")
        _resolved(conditions, unresolved, "All references lead to something that can be used.")
        ancestor: dict[str, Any] = {"group": key.group, "kind": key.kind, "namespace": key.namespace, "name": key.name}
        return {"ancestorRef": ancestor, "controllerName": CONTROLLER, "conditions": conditions.found}

    @functools.cached_property
    def _users(self) -> dict[tuple[str, str], set[Key]]:
        """The Gateways that have a route to each service."""
        found: dict[tuple[str, str], set[Key]] = {}
        for route, parents in self.parents.items():
            gateways = {Key(GATEWAY_GROUP, "Gateway", *parent.gateway.split("/")) for parent in parents if parent.sections}
            document = self.in_force.get(route)
            if gateways and document is not None:
                for service in _services(document):
                    found.setdefault(service, set()).update(gateways)
        return found


def said(problem: Problem) -> str:
    """A problem as the message of a condition: with the field, without the resource."""
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.path).lstrip(".")
    text = f"{field}: {problem.message}" if field else problem.message
    return text[:32767] if text.isprintable() else text.encode("unicode_escape").decode("ascii")[:32767]


def sentence(text: str) -> str:
    """`text` with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _parent(ref: Mapping[str, Any], conditions: Conditions) -> dict[str, Any]:
    reference = {"group": GATEWAY_GROUP, "kind": "Gateway"} | {name: value for name, value in ref.items() if value is not None}
    return {"parentRef": reference, "controllerName": CONTROLLER, "conditions": conditions.found}


def _resolved(conditions: Conditions, unresolved: list[Problem], fine: str) -> None:
    first = unresolved[0] if unresolved else None
    more = f" (and {len(unresolved) - 1} more)" if len(unresolved) > 1 else ""
    conditions.add("ResolvedRefs", first is None, first.reason if first else "ResolvedRefs", said(first) + more if first else fine)


def _refs(document: Document) -> list[Any]:
    spec = document.body.get("spec")
    refs = spec.get("parentRefs") if isinstance(spec, dict) else None
    return [ref for ref in refs if isinstance(ref, dict)] if isinstance(refs, list) else []


def _others(document: Document, field: str) -> list[Any]:
    """What other controllers have written into a status that came with the resource: it is theirs to change."""
    status = document.body.get("status")
    entries = status.get(field) if isinstance(status, dict) else None
    return [each for each in entries or [] if isinstance(each, dict) and each.get("controllerName") not in (None, CONTROLLER)]


def _services(document: Document) -> set[tuple[str, str]]:
    """The services that the rules of a route name, in backends and in filters."""
    found = set()
    waiting: list[Any] = [document.body["spec"].get("rules") or []]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [item for item in value.values() if isinstance(item, (dict, list))]
            refs = [*(value.get("backendRefs") or []), *([value["backendRef"]] if value.get("backendRef") else [])]
            for ref in refs:
                if (ref.get("kind") or "Service") == "Service" and not ref.get("group"):
                    found.add((ref.get("namespace") or document.key.namespace, ref["name"]))
    return found

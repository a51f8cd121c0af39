"""Which AuthorizationPolicies hold where, and the questions that they make: a table of rules and the facts that these look at.

Where a policy holds is `mesh.attachment_istio`'s to say. What holds at a Gateway is one question about everything that comes to it, and
what holds before a Service one about everything that its last gateway would send there, as with Istio each workload asks for itself.

Everything that is asked becomes one revision (`Program`), named by what is in it: whoever has the same policies has the same one. Fails
closed: a policy that can't be understood refuses whatever it may hold for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Final

from mesh import authorization
from mesh.attachment_istio import at_gateway, at_service, before_service, check_places
from mesh.authorization import Json
from mesh.compile_policies import unanswerable
from mesh.compile_world import Name, Trouble, World
from mesh.documents import Document, Key, Problem
from mesh.kinds_istio import DRY_RUN
from mesh.model import DecisionPolicy, Level, MeshSettings, Program

KIND: Final = "AuthorizationPolicy"
MOST_PLACES: Final = 8
PACKAGE: Final = "istio.authz.at"


class _Policy:
    """One AuthorizationPolicy with its rules. A `broken` one, which did not pass its check, has none."""

    __slots__ = ("action", "broken", "document", "dry", "name", "rules")

    def __init__(self, document: Document, trust: tuple[str, ...], *, broken: bool) -> None:
        body = document.body
        self.document = document
        self.broken = broken
        self.name = f"{document.key.namespace}/{document.key.name}"
        self.action = "" if broken else (body.get("spec") or {}).get("action") or "ALLOW"
        self.dry = not broken and (body["metadata"].get("annotations") or {}).get(DRY_RUN) == "true"
        self.rules: list[Json] = [] if broken else authorization.rules_of(document, trust)


class Authorization:
    """Answers what is asked at a gateway and before a service. Made for one set of policies."""

    def __init__(self, world: World, settings: MeshSettings) -> None:
        trust = (settings.trust_domain, *settings.aliases)
        good = list(world.of(KIND).values())
        bad = [document for key, document in world.bad.items() if key.kind == KIND]
        self._by_space: dict[str, list[Document]] = {}
        for document in (*good, *bad):
            self._by_space.setdefault(document.key.namespace, []).append(document)
        self.policies = {document.key: _Policy(document, trust, broken=False) for document in good}
        self.policies |= {document.key: _Policy(document, trust, broken=True) for document in bad}
        self.root = settings.root_namespace
        self._at_gateways: dict[tuple[Name, bool], tuple[Document, tuple[DecisionPolicy, ...]]] = {}
        self._at_services: dict[tuple[str, str, int, bool], tuple[DecisionPolicy, ...]] = {}
        self._made: dict[tuple[tuple[Key, ...], bool, int, Level], tuple[DecisionPolicy, ...]] = {}
        self.questions: dict[str, tuple[Json, str]] = {}
        """Every question that was made: its table and the module that asks it, by the decision's name."""

    def at_gateway(self, gateway: Document, *, below: bool) -> tuple[DecisionPolicy, ...]:
        """What is asked about everything that comes to a Gateway; `below` HTTP or not."""
        space, name = gateway.key.namespace, gateway.key.name
        known = self._at_gateways.get(((space, name), below))
        if known is None or known[0] is not gateway:
            known = gateway, self._asked(at_gateway(self._of(space), gateway, self.root), below, 0, "gateway")
            self._at_gateways[(space, name), below] = known
        return known[1]

    def at_service(self, namespace: str, name: str, port: int, *, below: bool) -> tuple[DecisionPolicy, ...]:
        """What is asked about everything that goes to a port of a Service."""
        key = namespace, name, port, below
        known = self._at_services.get(key)
        if known is None:
            known = self._asked(before_service(self._of(namespace), namespace, name, self.root), below, port, "service")
            self._at_services[key] = known
        return known

    def names_service(self, namespace: str, name: str) -> bool:
        """Whether a policy is attached to this Service by name."""
        return bool(at_service(self._by_space.get(namespace, ()), namespace, name))

    def _of(self, namespace: str) -> list[Document]:
        """The policies that may hold in a namespace."""
        own = self._by_space.get(namespace, [])
        return own if namespace == self.root else [*self._by_space.get(self.root, ()), *own]

    def places(self, document: Document, ours: dict[Name, Document], services: Iterable[Name]) -> tuple[str, ...]:
        """Where a policy holds, in words: `Gateway edge/public`, `Service shop/orders`, at most `MOST_PLACES` of them."""
        found = [str(gateway.key) for _, gateway in sorted(ours.items()) if at_gateway((document,), gateway, self.root)]
        found += [f"Service {name[0]}/{name[1]}" for name in sorted(services) if before_service((document,), *name, self.root)]
        more = len(found) - MOST_PLACES
        return (*found[:MOST_PLACES], f"{more} more") if more > 0 else tuple(found)

    def _asked(self, documents: list[Document], below: bool, port: int, level: Level) -> tuple[DecisionPolicy, ...]:
        key = (tuple(document.key for document in documents), below, port, level)
        made = self._made.get(key)
        if made is None:
            policies = [self.policies[document.key] for document in documents]
            made = self._made[key] = tuple(self._make(policies, below, port, level))
        return made

    def _make(self, policies: list[_Policy], below: bool, port: int, level: Level) -> Iterable[DecisionPolicy]:
        for policy in policies:
            if policy.broken:
                yield unanswerable(f"{KIND} {policy.name}", level)
        for dry in (False, True):
            chosen = [policy for policy in policies if policy.dry == dry and not policy.broken]
            if chosen:
                yield DecisionPolicy(
                    name=f"{KIND} (dry run)" if dry else KIND,
                    level=level,
                    decision=self._question(_table(chosen, below), port),
                    place="Local",
                    authorization=True,
                    shadow=dry,
                )

    def _question(self, table: Json, port: int) -> str:
        rules = [rule for action in ("deny", "allow", "audit") for rule in table[action]]
        facts = {fact: authorization.expression(fact, port) for fact in authorization.facts_of(rules)}
        digest = hashlib.sha256(json.dumps([table, facts], sort_keys=True).encode()).hexdigest()[:16]
        name = f"e{digest}"
        decision = f"{PACKAGE}.{name}.decision"
        if decision not in self.questions:
            picked = ",".join(f"\n\t{json.dumps(fact)}: {text}" for fact, text in facts.items())
            module = f"package {PACKAGE}.{name}\n\nimport data.istio.authz\n\n"
            module += f"decision := authz.decide(data.istio_authz.{name}, {{{picked}}})\n"
            self.questions[decision] = table, module
        return decision

    def program(self, used: Iterable[str]) -> Program | None:
        """Everything that evaluates the questions `used`, but the library; None when there are none."""
        names = sorted(set(used) & self.questions.keys())
        if not names:
            return None
        words = {decision: decision.split(".")[-2] for decision in names}
        return Program(
            modules={f"istio/authz/at/{words[decision]}.rego": self.questions[decision][1] for decision in names},
            data=json.dumps({"istio_authz": {words[decision]: self.questions[decision][0] for decision in names}}, sort_keys=True).encode(),
            decisions=tuple(names),
        )


def _table(policies: list[_Policy], below: bool) -> Json:
    table: Json = {"deny": [], "allow": [], "audit": []}
    for policy in policies:
        rules = authorization.below_http(policy.rules, allow=policy.action == "ALLOW") if below else policy.rules
        table[policy.action.lower()] += rules
    restricting = [policy.name for policy in policies if policy.action == "ALLOW"]
    return {**table, "restricted": bool(restricting), "restricting": restricting}


def check_authorization(world: World, made: Authorization, ours: dict[Name, Document], below: Iterable[str]) -> tuple[Problem, ...]:
    """Policies that hold nowhere, or for less than they say. `below`: gateways (`namespace/name`) with listeners below HTTP."""
    problems = list(check_places(world, ours, KIND, made.root, world.of("Service")))
    l4 = frozenset(below)
    for policy in made.policies.values():
        if policy.broken or not authorization.looks_at_requests(policy.document):
            continue
        gateways = [gateway for gateway in ours.values() if at_gateway((policy.document,), gateway, made.root)]
        if any(f"{each.key.namespace}/{each.key.name}" in l4 for each in gateways):
            trouble = Trouble(policy.document)
            meant = "allow no connection" if policy.action == "ALLOW" else "are left out, so that they hold for more"
            trouble.warn(("spec", "rules"), f"at listeners without HTTP, conditions on requests {meant}", "NoHttp")
            problems += trouble.found
    return tuple(problems)

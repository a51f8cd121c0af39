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
from mesh.authorization_table import table_of
from mesh.compile_policies import unanswerable
from mesh.compile_world import Name, Trouble, World, age
from mesh.documents import Document, Key, Problem
from mesh.extension_providers import provider_services, providers_of
from mesh.kinds_istio import DRY_RUN
from mesh.model import DecisionPolicy, Level, MeshSettings, Program
from mesh.schema import nearest

KIND: Final = "AuthorizationPolicy"
MOST_PLACES: Final = 8
PACKAGE: Final = "istio.authz.at"


class _Policy:
    """One AuthorizationPolicy with its rules. A `broken` one, which did not pass its check, has none."""

    __slots__ = ("action", "broken", "document", "dry", "name", "provider", "rules")

    def __init__(self, document: Document, trust: tuple[str, ...], *, broken: bool) -> None:
        body = document.body
        self.document = document
        self.broken = broken
        self.name = f"{document.key.namespace}/{document.key.name}"
        self.action = "" if broken else (body.get("spec") or {}).get("action") or "ALLOW"
        self.provider = ((body["spec"].get("provider") or {}).get("name") or "") if self.action == "CUSTOM" else ""
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
        meshes = sorted(world.of("Mesh").values(), key=age)
        self.providers = providers_of(meshes[0].body["spec"]) if meshes else {}
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
        good = [policy for policy in policies if not policy.broken]
        for name in sorted({policy.provider for policy in good if policy.action == "CUSTOM"}):
            custom = [policy for policy in good if policy.action == "CUSTOM" and policy.provider == name]
            yield self._custom(name, custom, below, port, level)
        for dry in (False, True):
            chosen = [policy for policy in good if policy.dry == dry and policy.action != "CUSTOM"]
            if chosen:
                question = self._question("decide", _table(chosen, below), port)
                yield _asked(f"{KIND} (dry run)" if dry else KIND, level, question, shadow=dry)

    def _custom(self, name: str, policies: list[_Policy], below: bool, port: int, level: Level) -> DecisionPolicy:
        """The question to a provider, behind one whether a rule wants it asked. What wants a provider that can't be asked is denied."""
        rules = [rule for policy in policies for rule in (authorization.below_http(policy.rules, allow=False) if below else policy.rules)]
        gate = _asked(f"{KIND} CUSTOM {name}", level, self._question("applies", {"custom": rules, "provider": name}, port))
        provider = self.providers.get(name)
        if provider is None or (below and provider.auth.protocol == "HTTP"):
            return gate
        return DecisionPolicy(
            name=gate.name,
            level=level,
            provider=provider.auth.cluster,
            auth=provider.auth,
            failure_mode="Allow" if provider.fail_open else "Deny",
            timeout=provider.timeout,
            body_limit=provider.body_limit,
            body_partial=provider.body_partial,
            gate=gate,
            error_status=provider.status,
        )

    def _question(self, function: str, table: Json, port: int) -> str:
        lists = {action: rules for action, rules in table.items() if action in ("custom", "deny", "allow", "audit")}
        found = authorization.facts_of(rule for rules in lists.values() for rule in rules)
        facts = {fact: authorization.expression(fact, port) for fact in found}
        table = {**table, **{action: table_of(rules) for action, rules in lists.items()}}
        digest = hashlib.sha256(json.dumps([function, table, facts], sort_keys=True).encode()).hexdigest()[:16]
        name = f"e{digest}"
        decision = f"{PACKAGE}.{name}.decision"
        if decision not in self.questions:
            picked = ",".join(f"\n\t{json.dumps(fact)}: {text}" for fact, text in facts.items())
            module = f"package {PACKAGE}.{name}\n\nimport data.istio.authz\n\n"
            module += f"decision := authz.{function}(data.istio_authz.{name}, {{{picked}}})\n"
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


def _asked(name: str, level: Level, decision: str, *, shadow: bool = False) -> DecisionPolicy:
    return DecisionPolicy(name=name, level=level, decision=decision, place="Local", authorization=True, shadow=shadow)


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
    problems += _check_providers(world, made)
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


def _check_providers(world: World, made: Authorization) -> list[Problem]:
    """CUSTOM policies whose provider is not there: what they match is denied; and providers whose Service is not there."""
    problems: list[Problem] = []
    for policy in made.policies.values():
        if policy.action == "CUSTOM" and policy.provider not in made.providers:
            trouble = Trouble(policy.document)
            near = nearest(policy.provider, made.providers)
            hint = f"did you mean {near}?" if near else "describe it under extensionProviders"
            message = f"the Mesh has no extension provider {policy.provider}; {hint}; until then what the rules match is denied"
            trouble.add(("spec", "provider", "name"), message, "TargetNotFound")
            problems += trouble.found
    mesh = min(world.of("Mesh").values(), key=age, default=None)
    if mesh is None:
        return problems
    for index, (name, namespace, wanted, port) in enumerate(provider_services(mesh.body["spec"])):
        trouble = Trouble(mesh)
        service = world.get("Service", namespace, wanted)
        own = f"Service {namespace}/{wanted}"
        ports = [each["port"] for each in service.body["spec"].get("ports") or []] if service is not None else []
        if port not in ports:
            missing = f"there is no {own}" if service is None else f"{own} has no port {port}"
            trouble.add(("spec", "extensionProviders", index), f"{missing}: the provider {name} can't be asked", "BackendNotFound")
            problems += trouble.found
    return problems

"""From documents and instances to the `Snapshot`: the stages in their order, and what each may skip.

    Mesh                                     -> settings
    Service, EndpointSlice, instances, ...   -> clusters, and what routes must know of services
    AccessPolicy, QuotaPolicy                -> attachments
    PolicyExemption, AccessPolicy            -> exemptions
    AuthorizationPolicy                      -> what is asked at gateways and before services
    Gateway, Secret, ...                     -> listeners
    HTTPRoute, GRPCRoute                     -> rules and matches at listeners
    TLSRoute, TCPRoute, UDPRoute             -> rules at listeners
                                             -> virtual hosts, gateways

A stage whose inputs have not changed is not run; one document of it whose inputs have not changed is not compiled; and a new part that
equals the old one *is* the old one. Nothing here raises for anything that a document says: what is wrong becomes a `Problem`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from mesh import compile_jwt, formats, quota_tables
from mesh.attachment_istio import ROOT_NAMESPACE, check_places
from mesh.compile_active import Known, compile_active, compile_data
from mesh.compile_attach import Parent
from mesh.compile_authorization import Authorization, check_authorization
from mesh.compile_clusters import ServiceResult, Services
from mesh.compile_exemptions import Exemptions, compile_exemptions
from mesh.compile_hosts import Hosts
from mesh.compile_l4 import L4Binding, L4RoutePart, check_l4_policies, compile_l4_route, overshadowed
from mesh.compile_listeners import GatewayPart, compile_gateway, our_gateways, port_owners
from mesh.compile_loops import redirect_loops
from mesh.compile_policies import (
    NOTHING,
    Attached,
    Attachments,
    check_decisions,
    check_quotas,
    check_targets,
    compile_attachments,
    extension,
)
from mesh.compile_quota import check_changes
from mesh.compile_rivals import separate
from mesh.compile_routes import RoutePart, compile_route
from mesh.compile_sets import sets_by_gateway
from mesh.compile_tables import check_tables, compile_tables
from mesh.compile_world import Memo, Name, ServiceFacts, Trouble, World, age, parent_key
from mesh.documents import Document, Key, Problem
from mesh.kinds_l4 import L4_KINDS, L4_PROTOCOLS
from mesh.model import EMPTY, DecisionPolicy, Exemption, MeshSettings, Program, Snapshot
from mesh.schema import nearest
from mesh.sharing import share
from mesh.tokens import NOT_AUTHENTICATED, Authentication

_ROUTE_INPUTS = frozenset(
    (
        "AccessPolicy",
        "AuthorizationPolicy",
        "ConfigMap",
        "GRPCRoute",
        "Gateway",
        "GatewayClass",
        "HTTPRoute",
        "ListenerSet",
        "Mesh",
        "Namespace",
        "PolicyExemption",
        "QuotaChange",
        "QuotaPolicy",
        "ReferenceGrant",
        "RequestAuthentication",
        "Secret",
        *L4_KINDS,
    )
)
"""Kinds on which listeners and routes depend directly; on services they depend by their facts."""
_POLICY_INPUTS = frozenset(("AccessPolicy", "Mesh", "QuotaChange", "QuotaPolicy"))
_EXEMPTION_INPUTS = frozenset(("AccessPolicy", "Mesh", "PolicyExemption", "HTTPRoute", "GRPCRoute", *L4_KINDS))


class Compiler:
    """Compiles one world again and again, and remembers what it made. Owned by a `Workspace`."""

    def __init__(self) -> None:
        self.services = Services()
        self.gateways: Memo[GatewayPart] = Memo(compile_gateway)
        self.routes: dict[str, Memo[RoutePart]] = {kind: Memo(compile_route) for kind in ("HTTPRoute", "GRPCRoute")}
        self.l4_routes: dict[str, Memo[L4RoutePart]] = {kind: Memo(compile_l4_route) for kind in L4_KINDS}
        self.hosts = Hosts()
        self.attachments = Attachments()
        self.tables: dict[str, quota_tables.Table] = {}
        self.exemptions = Exemptions()
        self.authorization = Authorization(World(), MeshSettings())
        self.program: Program | None = None
        self.revisions: Known = {}
        self.facts: dict[Name, ServiceFacts] = {}
        self.ours: dict[Name, Document] = {}
        """The Gateways of our class."""
        self.parts: tuple[GatewayPart, ...] = ()
        self.parents: dict[Key, tuple[Parent, ...]] = {}
        """What became of the `parentRefs` of each route."""
        self.route_problems: tuple[Problem, ...] = ()
        self.extensions: set[str] = set()
        """Policies that filters of routes name, `namespace/name`."""
        self.target_problems: tuple[Problem, ...] = ()
        self.service_authentications: tuple[Authentication, ...] = ()
        self.digests: dict[str, tuple[Any, bytes]] = {}
        self.snapshot = EMPTY

    def compile(self, world: World, problems: tuple[Problem, ...] = ()) -> Snapshot:
        """The snapshot of `world`. `problems` were found before (documents that could not be read): they become part of it."""
        first = self.snapshot is EMPTY
        found: list[Problem] = list(problems)
        settings = share(self.snapshot.mesh, _settings(world, found))
        services = self.services.compile(world, settings)
        for result in services.values():
            found += result.problems
        clusters = _clusters(self.snapshot, services)
        facts = {name: result.facts for name, result in services.items()}
        if first or world.dirty & _POLICY_INPUTS:
            self.attachments = share(self.attachments, compile_attachments(world, settings))
        found += self.attachments.problems
        if first or world.dirty & _EXEMPTION_INPUTS:
            self.exemptions = share(self.exemptions, compile_exemptions(world, settings.default_policy))
        found += self.exemptions.problems
        if first or quota_tables.KIND in world.dirty:
            self.tables = share(self.tables, compile_tables(world))
        if first or world.dirty & {"AuthorizationPolicy", "Mesh"}:
            self.authorization = Authorization(world, settings)
        if first or world.dirty & _ROUTE_INPUTS or facts != self.facts:
            self.facts = facts
            self._route(world, settings.root_namespace)
        found += self.route_problems
        if first or world.dirty - {"EndpointSlice", "Instance"}:
            ours, _ = our_gateways(world)
            below = [part for part in self.parts if any(each.listener.protocol in L4_PROTOCOLS for each in part.listeners)]
            l4 = [f"{part.namespace}/{part.name}" for part in below]
            self.target_problems = check_targets(world, set(ours)) + check_quotas(world)
            self.target_problems += check_authorization(world, self.authorization, ours, l4)
            above = [part for part in self.parts if any(each.listener.protocol not in L4_PROTOCOLS for each in part.listeners)]
            http = [f"{part.namespace}/{part.name}" for part in above]
            self.target_problems += check_places(world, ours, compile_jwt.KIND, settings.root_namespace)
            self.target_problems += check_changes(world)
            self.target_problems += compile_jwt.check_requests(world, ours, http, settings.root_namespace) + compile_jwt.check_keys(world)
            self.target_problems += check_tables(world, self.tables)
        found += self.target_problems
        tried, self.revisions = compile_active(world, self.snapshot, self.revisions, found)
        policy = tried.policy
        data = compile_data(world, self.snapshot, found)
        found += check_decisions(world, policy, settings.default_policy, self.extensions)
        if tried.canary is not None:
            found += check_decisions(world, tried.canary, settings.default_policy, self.extensions, "canary")
        found += _unknown_services(world)
        snapshot = Snapshot(
            version="",
            mesh=settings,
            gateways=self.hosts.gateways,
            clusters=clusters,
            policy=policy,
            data=self.snapshot.data if data == self.snapshot.data else data,
            shadow=tried.shadow,
            shadow_share=tried.shadow_share,
            canary=tried.canary,
            canary_share=tried.canary_share,
            program=self.program,
            problems=share(self.snapshot.problems, tuple(dict.fromkeys(found))),
            policies=self.attachments.policies,
            quota_tables=self.tables,
            service_authentications=self.service_authentications,
        )
        self.snapshot = msgspec.structs.replace(snapshot, version=self._version(snapshot))
        world.dirty.clear()
        world.dirty_services.clear()
        return self.snapshot

    def places(self, policy: Document) -> tuple[str, ...]:
        """Where an AuthorizationPolicy holds, as of the last compilation."""
        return self.authorization.places(policy, self.ours, [name for name, facts in self.facts.items() if not facts.gateway])

    def _route(self, world: World, root: str) -> None:
        found: list[Problem] = []
        ours, problems = our_gateways(world)
        found += problems
        self.ours = ours
        lookups = Lookups(world, self.attachments, self.exemptions, self.authorization, self.facts, ours, root)
        found += lookups.set_problems
        gateways = self.gateways.compile(ours, lookups)
        lookups.gateways = gateways
        routes = [
            (world.of(kind)[name], part)
            for kind, memo in self.routes.items()
            for name, part in memo.compile(world.of(kind), lookups).items()
        ]
        routes = separate(routes)
        for part in gateways.values():
            found += part.problems
        for _, route in routes:
            found += route.problems
        parents = {document.key: route.parents for document, route in routes}
        l4_bindings: list[L4Binding] = []
        for kind, l4_memo in self.l4_routes.items():
            for name, below in l4_memo.compile(world.of(kind), lookups).items():
                found += below.problems
                l4_bindings += below.bindings
                parents[world.of(kind)[name].key] = below.parents
        found += overshadowed(l4_bindings)
        found += check_l4_policies(world, gateways.values())
        self.parts = tuple(gateways.values())
        self.parents = parents
        bindings = [binding for _, route in routes for binding in route.bindings]
        self.hosts.compile(list(gateways.values()), bindings, l4_bindings)
        found += redirect_loops(routes, self.hosts.listeners)
        self.route_problems = tuple(found)
        self.extensions = lookups.extensions
        self.program = share(self.program, self.authorization.program(lookups.questions))
        self.service_authentications = tuple(each for _, each in sorted(lookups.service_authentications.items()))

    def _version(self, snapshot: Snapshot) -> str:
        """A digest of everything in force (not of the problems): equal for all gateways that serve the same."""
        parts: dict[str, Any] = {f"gateway {name}": value for name, value in snapshot.gateways.items()}
        parts |= {f"cluster {name}": value for name, value in snapshot.clusters.items()}
        parts |= {f"table {name}": value for name, value in snapshot.quota_tables.items()}
        digests: dict[str, tuple[Any, bytes]] = {}
        whole = hashlib.sha256()
        for name in sorted(parts):
            known = self.digests.get(name)
            if known is None or known[0] is not parts[name]:
                known = parts[name], hashlib.sha256(msgspec.msgpack.encode(parts[name])).digest()
            digests[name] = known
            whole.update(name.encode() + b"\0" + known[1])
        self.digests = digests
        mesh = snapshot.mesh
        revisions = [revision.digest if revision is not None else "" for revision in (snapshot.policy, snapshot.shadow, snapshot.canary)]
        revisions += [each.digest for each in snapshot.data]
        shares = snapshot.shadow_share, snapshot.canary_share
        settings = msgspec.structs.asdict(mesh) | {"trusted_gateways": sorted(mesh.trusted_gateways)}
        whole.update(msgspec.json.encode((settings, revisions, shares, snapshot.policies), order="deterministic"))
        return whole.hexdigest()[:32]


def _clusters(before: Snapshot, services: dict[Name, ServiceResult]) -> dict[str, Any]:
    return {name: cluster for key in sorted(services) for name, cluster in services[key].clusters.items()}


def _settings(world: World, found: list[Problem]) -> MeshSettings:
    meshes = sorted(world.of("Mesh").values(), key=age)
    if not meshes:
        return MeshSettings(standalone=not any(key.kind == "Mesh" for key in world.bad))
    for late in meshes[1:]:
        trouble = Trouble(late)
        trouble.add((), f"{meshes[0].key} is in force, and there can be one only; delete one of the two", "Conflicted")
        found += trouble.found
    spec = meshes[0].body["spec"]
    default, quota = spec.get("defaultAccessPolicy"), spec.get("defaultQuotaPolicy")
    staleness = (spec.get("policy") or {}).get("maxStaleness")
    return MeshSettings(
        trust_domain=spec["trustDomain"],
        aliases=tuple(spec.get("trustDomainAliases") or ()),
        trusted_gateways=frozenset(spec.get("trustedGateways") or ()),
        default_policy=f"{default['namespace']}/{default['name']}" if default else "",
        default_quota=f"{quota['namespace']}/{quota['name']}" if quota else "",
        outbound=spec.get("outboundPolicy") or "REGISTRY_ONLY",
        upstream=spec.get("upstream") or "Permissive",
        trusted_proxies=tuple(spec.get("trustedProxies") or ()),
        root_namespace=spec.get("rootNamespace") or ROOT_NAMESPACE,
        max_staleness=formats.seconds(staleness) if staleness else None,
    )


def _unknown_services(world: World) -> list[Problem]:
    """Instances of services that nobody has described: they get no traffic."""
    services = world.of("Service")
    found = []
    for name, instances in sorted(world.instances.items()):
        if instances and name not in services:
            service = f"{name[0]}/{name[1]}"
            message = f"{len(instances)} registered, but there is no Service {service}: they get no requests; apply one"
            key = Key("", "Service", *name)
            found.append(Problem(key=key, message=message, where="the registry", reason="BackendNotFound", severity="warning"))
    return found


class Lookups:
    """Answers the questions that gateways and routes ask while they are compiled."""

    def __init__(
        self,
        world: World,
        attachments: Attachments,
        exemptions: Exemptions,
        authorization: Authorization,
        facts: dict[Name, ServiceFacts],
        ours: dict[Name, Document],
        root: str,
    ) -> None:
        self.world = world
        self.ours = ours
        self.root = root
        self.service_authentications = compile_jwt.service_authentications(world)
        self.attachments = attachments
        self.exemptions = exemptions
        self.authorization = authorization
        self.questions: set[str] = set()
        """Decisions that AuthorizationPolicies lead to."""
        self.facts = facts
        self.gateways: dict[Name, GatewayPart] = {}
        self.extensions: set[str] = set()
        """Policies that were asked about as extensions."""
        self.defaults = tuple(
            {"namespace": namespace, "name": name}
            for (namespace, name), document in sorted(ours.items())
            if document.body["spec"].get("defaultScope") == "All"
        )
        self.sets, self.set_problems = sets_by_gateway(world, ours, self._labels)
        self.owners = port_owners(ours, self.sets)
        self.grants: dict[tuple[str, str, str, str], frozenset[str]] = {}
        grants: dict[tuple[str, str, str, str], set[str]] = {}
        for document in world.of("ReferenceGrant").values():
            spec = document.body["spec"]
            for source in spec["from"]:
                if source["group"] != "gateway.networking.k8s.io":
                    continue
                for target in spec["to"]:
                    if not target["group"]:
                        place = (source["kind"], source["namespace"], target["kind"], document.key.namespace)
                        grants.setdefault(place, set()).add(target.get("name") or "")
        self.grants = {place: frozenset(names) for place, names in grants.items()}

    def __call__(self, question: str, *about: Any) -> Any:
        """Answers one question."""
        return getattr(self, "_" + question)(*about)

    def _proxies(self) -> bool:
        meshes = sorted(self.world.of("Mesh").values(), key=age)
        return bool(meshes and meshes[0].body["spec"].get("trustedProxies"))

    def _default(self) -> Attached:
        return self.attachments.default

    def _default_gateways(self) -> tuple[dict[str, str], ...]:
        """As `parentRefs`."""
        return self.defaults

    def _extension(self, kind: str, namespace: str, name: str) -> Attached | str:
        self.extensions.add(f"{namespace}/{name}")
        return extension(self.world, kind, namespace, name)

    def _attached(self, kind: str, namespace: str, name: str, section: str) -> Attached:
        return self.attachments.by_target.get((kind, namespace, name, section), NOTHING)

    def _exempt(self, kind: str, namespace: str, name: str, section: str) -> tuple[Exemption, ...]:
        return self.exemptions.by_target.get((kind, namespace, name, section), ())

    def _default_policy(self) -> str:
        meshes = sorted(self.world.of("Mesh").values(), key=age)
        default = meshes[0].body["spec"].get("defaultAccessPolicy") if meshes else None
        return f"{default['namespace']}/{default['name']}" if default else ""

    def _authorized_gateway(self, namespace: str, name: str, below: bool) -> Attached:
        return self._authorized(self.authorization.at_gateway(self.ours[namespace, name], below=below))

    def _authorized_service(self, namespace: str, name: str, port: int, below: bool) -> Attached:
        return self._authorized(self.authorization.at_service(namespace, name, port, below=below))

    def _authorized(self, policies: tuple[DecisionPolicy, ...]) -> Attached:
        self.questions.update((policy.gate or policy).decision for policy in policies)
        return Attached(policies) if policies else NOTHING

    def _names_service(self, namespace: str, name: str) -> bool:
        return self.authorization.names_service(namespace, name)

    def _authentication(self, namespace: str, name: str) -> Authentication:
        return compile_jwt.gateway_authentication(self.world, self.ours[namespace, name], self.root)

    def _service_authentication(self, namespace: str, name: str) -> Authentication:
        return self.service_authentications.get((namespace, name), NOT_AUTHENTICATED)

    def _document(self, kind: str, namespace: str, name: str) -> Document | None:
        return self.world.get(kind, namespace, name) if kind in ("Secret", "ConfigMap") else None

    def _granted(self, kind: str, namespace: str, _: str, target: str, target_namespace: str, name: str) -> bool:
        if namespace == target_namespace:
            return True
        names = self.grants.get((kind, namespace, target, target_namespace), frozenset())
        return "" in names or name in names

    def _listener_sets(self, namespace: str, name: str) -> tuple[Document, ...]:
        return self.sets.get((namespace, name), ())

    def _port_owner(self, address: str, transport: str, port: int) -> Key | None:
        owner = self.owners.get((address, transport, port))
        return owner.key if owner is not None else None

    def _labels(self, namespace: str) -> dict[str, str]:
        document = self.world.get("Namespace", "", namespace)
        labels = (document.body["metadata"].get("labels") or {}) if document is not None else {}
        return {**labels, "kubernetes.io/metadata.name": namespace}

    def _parent(self, kind: str, namespace: str, name: str) -> GatewayPart | str:
        """The Gateway that a route's parent is or belongs to, or why there is none; an empty reason for another implementation's."""
        document = self.world.get(kind, namespace, name)
        if document is not None and kind == "ListenerSet":
            gateway = parent_key(document, document.body["spec"]["parentRef"])
            found = self.gateways.get((gateway.namespace, gateway.name))
            if found is not None:
                return found if document.key in found.sets else f"{document.key} is attached to no Gateway: see its own problems"
            foreign = self.world.get("Gateway", gateway.namespace, gateway.name) is not None
            return "" if foreign else f"{document.key} is attached to no Gateway: see its own problems"
        if document is not None:
            return self.gateways.get((namespace, name), "")
        if any(key.kind == kind and (key.namespace, key.name) == (namespace, name) for key in self.world.bad):
            return f"{kind} {namespace}/{name} is not in force: see its own problems"
        return f"there is no {kind} {namespace}/{name}{_hint(namespace, name, self.world.of(kind))}"

    def _service(self, namespace: str, name: str) -> ServiceFacts | str:
        found = self.facts.get((namespace, name))
        if found is not None:
            return found
        return f"there is no Service {namespace}/{name}{_hint(namespace, name, self.facts)}"


def _hint(namespace: str, name: str, known: Iterable[Name]) -> str:
    known = list(known)
    near = nearest(name, [other for space, other in known if space == namespace])
    elsewhere = [space for space, other in known if other == name]
    return f"; did you mean {near}?" if near else f"; there is one in the namespace {elsewhere[0]}" if elsewhere else ""

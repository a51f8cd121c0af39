"""For the tests of the gateway's core: a small mesh, requests to it, and stand-ins for the two that answer questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gateway.place import Place
from gateway.plan import Pending
from gateway.route import route
from mesh.http import HTTP11, Header, RequestHead
from mesh.model import (
    Backend,
    Cluster,
    DecisionPolicy,
    Descriptor,
    Endpoint,
    GatewayConfig,
    Listener,
    Match,
    MeshSettings,
    QuotaLimit,
    Rule,
    Snapshot,
    VirtualHost,
)
from mesh.outcome import Outcome
from mesh.peer import Peer
from mesh.policy import EntryPoint, ReadSet, Revision
from mesh.questions import Decision, DecisionQuestion, Grant, TokenQuestion, Verdict
from mesh.refusals import Refusal

WEB = "spiffe://shop.example/ns/shop/sa/web"
BATCH = "spiffe://shop.example/ns/shop/sa/batch"
INGRESS = "spiffe://shop.example/ns/edge/sa/ingress"
EASTWEST = "spiffe://shop.example/ns/edge/sa/eastwest"
XFCC = b"x-forwarded-client-cert"

MESH = MeshSettings(trust_domain="shop.example", trusted_gateways=frozenset((INGRESS, EASTWEST)), trusted_proxies=("10.0.0.0/8",))
REVISION = Revision(
    digest="sha256:1",
    entry_points={
        "shop.authz.decision": EntryPoint(
            path="shop.authz.decision",
            digest="d1",
            reads=ReadSet(values=(("attributes", "source", "principal"), ("attributes", "request", "http", "method"))),
        )
    },
)
POLICY = DecisionPolicy(name="edge/access", level="gateway", decision="shop.authz.decision")
LIMIT = QuotaLimit(name="shop/orders/caller", level="route", per=(Descriptor("identity"),), tokens=10, burst=20)

ALLOW = Decision(verdict=Verdict.ALLOW)
DENY = Decision(verdict=Verdict.DENY, reason="no")
ERROR = Decision(verdict=Verdict.ERROR, reason="timeout")
YES = Grant(admitted=True, remaining=5)
NO = Grant(admitted=False, retry_after=0.5)


def a_cluster(name: str = "shop/orders:80", **changes: Any) -> Cluster:
    service = name.partition("/")[2].partition(":")[0]
    return Cluster(name=name, namespace="shop", service=service, port=80, endpoints=(Endpoint(address="127.0.0.1", port=9001),), **changes)


def a_rule(name: str = "shop/orders#0", cluster: str = "shop/orders:80", **changes: Any) -> Rule:
    backends = (Backend(weight=1, cluster=cluster, service=cluster.partition(":")[0]),) if cluster else ()
    return Rule(**({"name": name, "route": "HTTPRoute shop/orders", "namespace": "shop", "backends": backends} | changes))


def a_match(rule: Rule, kind: Any = "prefix", path: bytes = b"", **changes: Any) -> Match:
    template = path.decode() + ("/**" if kind == "prefix" else "")
    return Match(rule=rule, path_kind=kind, path=path, template=template, **changes)


def a_host(*matches: Match, hostname: str = "shop.example") -> VirtualHost:
    """A virtual host with `matches` in this order."""
    exact: dict[bytes, tuple[Match, ...]] = {}
    prefix: dict[bytes, tuple[Match, ...]] = {}
    for match in matches:
        index = {"exact": exact, "prefix": prefix}.get(match.path_kind)
        if index is not None:
            index[match.path] = (*index.get(match.path, ()), match)
    return VirtualHost(hostname=hostname, exact=exact, prefix=prefix, regex=tuple(match for match in matches if match.path_kind == "regex"))


def a_listener(*hosts: VirtualHost, name: str = "https", hostname: str = "*", **changes: Any) -> Listener:
    settings: dict[str, Any] = {"name": name, "port": 8443, "protocol": "HTTPS", "hostname": hostname}
    return Listener(**(settings | {"hosts": {host.hostname: host for host in hosts}} | changes))


def a_place(
    *listeners: Listener,
    clusters: Sequence[Cluster] = (a_cluster(),),
    mesh: MeshSettings = MESH,
    shadow: Revision | None = None,
    tried: Mapping[str, Any] | None = None,
    at: int = 0,
) -> Place:
    """The place of the listener number `at`; all listeners share the port."""
    gateway = GatewayConfig(namespace="edge", name="ingress", listeners=listeners)
    snapshot = Snapshot(
        version="1",
        mesh=mesh,
        gateways={gateway.key: gateway},
        clusters={cluster.name: cluster for cluster in clusters},
        policy=REVISION,
        **({"shadow": shadow} | dict(tried or {})),
    )
    return Place(snapshot, gateway, listeners[at], listeners, INGRESS)


def place_of(rule: Rule, path: bytes = b"", **changes: Any) -> Place:
    """A place with the one rule `rule` at a prefix."""
    return a_place(a_listener(a_host(a_match(rule, "prefix", path), hostname="*")), **changes)


def a_head(
    target: bytes = b"/orders/1", method: bytes = b"GET", headers: Sequence[Header] = (), authority: bytes = b"shop.example"
) -> RequestHead:
    return RequestHead(method, b"https", authority, target, list(headers), HTTP11, 0)


def a_peer(principal: str = WEB, address: str = "192.0.2.7", **changes: Any) -> Peer:
    digest = "ab" * 32 if principal else ""
    return Peer(
        **({"principal": principal, "address": address, "port": 50000, "certificate_hash": digest, "tls_version": "TLSv1.3"} | changes)
    )


def routed(place: Place, head: RequestHead | None = None, peer: Peer | None = None, seed: int = 1) -> Refusal | Pending:
    return route(head or a_head(), peer or a_peer(), place, 1_700_000_000.0, random.Random(seed))


def pending_of(place: Place, head: RequestHead | None = None, peer: Peer | None = None, seed: int = 1) -> Pending:
    found = routed(place, head, peer, seed)
    assert isinstance(found, Pending), found
    return found


def an_outcome(pending: Pending) -> Outcome:
    asking = pending.asking
    return Outcome(asking.head, asking.peer, asking.gateway, asking.listener, 0.0)


class Deciding:
    """A decider whose answers are told by policy name: in hand, at once, or when `answer` is called."""

    def __init__(self, kept: Mapping[str, Decision] = {}, at_once: Mapping[str, Decision] = {}) -> None:
        self.kept = kept
        self.at_once = at_once
        self.asked: list[tuple[DecisionQuestion, Callable[[Decision], None]]] = []
        self.recalled: list[str] = []

    def renewed(self, question: DecisionQuestion) -> DecisionQuestion:
        return question

    def recall(self, question: DecisionQuestion, now: float) -> Decision | None:
        self.recalled.append(question.policy.name)
        return self.kept.get(question.policy.name)

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        if question.policy.name in self.at_once:
            done(self.at_once[question.policy.name])
        else:
            self.asked.append((question, done))

    def answer(self, name: str, decision: Decision) -> None:
        for entry in self.asked:
            if entry[0].policy.name == name:
                self.asked.remove(entry)
                entry[1](decision)
                return
        raise AssertionError(f"{name} was not asked")


class Lending:
    """A lessee like it, by limit name, which keeps count of what was given back."""

    def __init__(self, in_hand: Mapping[str, Grant] = {}, at_once: Mapping[str, Grant] = {}) -> None:
        self.in_hand = in_hand
        self.at_once = at_once
        self.asked: list[tuple[TokenQuestion, Callable[[Grant], None]]] = []
        self.taken: list[str] = []
        self.returned: list[str] = []
        self.peeked: list[str] = []

    def take(self, question: TokenQuestion, now: float) -> Grant | None:
        grant = self.in_hand.get(question.limit.name)
        if grant is not None:
            self.taken.append(question.limit.name)
        return grant

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        if question.limit.name in self.at_once:
            self.taken.append(question.limit.name)
            done(self.at_once[question.limit.name])
        else:
            self.asked.append((question, done))

    def answer(self, name: str, grant: Grant) -> None:
        for entry in self.asked:
            if entry[0].limit.name == name:
                self.asked.remove(entry)
                self.taken.append(name)
                entry[1](grant)
                return
        raise AssertionError(f"{name} was not asked")

    def give_back(self, question: TokenQuestion) -> None:
        self.returned.append(question.limit.name)

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        self.peeked.append(question.limit.name)
        done((self.in_hand | self.at_once)[question.limit.name])  # type: ignore[operator]

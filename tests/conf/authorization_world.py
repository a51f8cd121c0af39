"""For the tests of AuthorizationPolicy: policies as text, requests as lines, and real OPA workers that answer."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from mesh.documents import Document
from mesh.http import NO_HEAD, RequestHead
from mesh.model import DecisionPolicy, Snapshot
from mesh.peer import Caller, Peer
from mesh.policy import Revision
from mesh.questions import Asking, Decision, Verdict
from mesh.reading import read_documents
from mesh.tokens import Bearer, KeySource, TokenRule
from mesh.workspace import Workspace
from pdp.answer import decision_of
from pdp.build import worker_binary
from pdp.engines.engine import Evaluation
from pdp.engines.worker import WorkerPool
from pdp.input import document_tree
from pdp.publish import publish
from tollhouse.authorization import Authorizer

CASES = Path(__file__).parent / "cases"
MESH = """
apiVersion: tollhouse.dev/v1
kind: Mesh
metadata: {name: shop}
spec:
  trustDomain: shop.example
  trustDomainAliases: [old.example]
  rootNamespace: root
  extensionProviders:
  - {name: grpc, envoyExtAuthzGrpc: {service: orders.shop.svc.cluster.local, port: 80}}
  - {name: http, envoyExtAuthzHttp: {service: shop/orders, port: 81, pathPrefix: /check}}
"""
BASE = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: public, labels: {app: ingress}}
spec:
  gatewayClassName: tollhouse
  listeners:
  - {name: http, port: 8080, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}
  - {name: tcp, port: 5432, protocol: TCP, allowedRoutes: {namespaces: {from: All}}}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: orders}
spec: {ports: [{port: 80, name: http}, {port: 81, name: more}, {port: 5432, name: db}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: shop, name: orders-1, labels: {kubernetes.io/service-name: orders}}
addressType: IPv4
ports: [{port: 9000, name: http}, {port: 9001, name: more}, {port: 9002, name: db}]
endpoints: [{addresses: [127.0.0.1]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: orders}
spec:
  parentRefs: [{namespace: edge, name: public, sectionName: http}]
  rules:
  - matches: [{path: {value: /}}]
    backendRefs: [{name: orders, port: 80}]
  - matches: [{path: {value: /more}}]
    backendRefs: [{name: orders, port: 81}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {namespace: shop, name: db}
spec:
  parentRefs: [{namespace: edge, name: public, sectionName: tcp}]
  rules: [{backendRefs: [{name: orders, port: 5432}]}]
"""


def documents(*texts: str) -> list[Document]:
    found: list[Document] = []
    for number, text in enumerate(texts):
        read, problems = read_documents(text, f"{number}.yaml")
        assert not problems, [str(problem) for problem in problems]
        found += read
    return found


def compiled(*texts: str) -> Snapshot:
    return Workspace().update(upserts=documents(*texts), replace=True)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a table: `METHOD TARGET key=value...`; the method `tcp` is for a connection below HTTP."""

    method: str = "GET"
    target: str = "/"
    caller: str = ""
    host: str = "shop.example"
    ip: str = "10.0.0.9"
    client: str = ""
    port: int = 8080
    local: str = "10.0.0.1"
    sni: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    claims: Any = None

    @property
    def below(self) -> bool:
        return self.method == "tcp"

    def asking(self) -> Asking:
        path, mark, query = self.target.partition("?")
        fields = [(name.encode(), value.encode()) for name, value in self.headers]
        head = NO_HEAD
        if not self.below:
            sent = query.encode() if mark else None
            args = (self.method.encode(), b"https", self.host.encode(), self.target.encode(), fields, b"HTTP/1.1", 0, path.encode(), sent)
            head = RequestHead(*args)
            if self.claims is not None:
                # As gateways have it: scopes are lists by then.
                head.bearer = Bearer(rule=RULE, principal="", claims=self.claims, expires=math.inf)
        peer = Peer(principal=self.caller, address=self.ip, port=4000, local_address=self.local, local_port=self.port, sni=self.sni)
        asking = Asking(head, peer, Caller(self.caller), "edge/public", "http", "shop/orders#0", "/**", "shop/orders", 1_700_000_000.25)
        asking.client = self.client
        return asking

    def document(self) -> Any:
        return document_tree(self.asking(), ANY)


RULE = TokenRule(name="edge/users#0", issuer="", keys=KeySource(inline="{}"))
ANY = DecisionPolicy(name="any", level="mesh")


def request_of(words: Iterable[str]) -> Request:
    method, *rest = words
    said: dict[str, Any] = {"method": method}
    headers: list[tuple[str, str]] = []
    for word in rest:
        key, mark, value = word.partition("=")
        if word.startswith("/") or not mark:
            said["target"] = word
        elif key == "as":
            said["caller"] = value if value.startswith("spiffe:") else spiffe(value)
        elif key == "jwt":
            said["claims"] = msgspec.json.decode(value)
        elif key == "port":
            said["port"] = int(value)
        elif key.startswith("h:"):
            headers.append((key[2:], value))
        else:
            said[key] = value
    return Request(**said, headers=tuple(headers))


def spiffe(name: str) -> str:
    namespace, _, account = name.partition("/")
    return f"spiffe://shop.example/ns/{namespace}/sa/{account}"


class Judge:
    """Asks real workers what a snapshot's AuthorizationPolicies say."""

    def __init__(self) -> None:
        self.pool = WorkerPool(binary=worker_binary(), workers=1, threads=2)

    async def __aenter__(self) -> Judge:
        await self.pool.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()

    async def ready(self, snapshot: Snapshot) -> Snapshot:
        return await Authorizer(self._compile).fill(snapshot)

    async def _compile(self, modules: Any, data: bytes, decisions: Any) -> Revision:
        return await publish(self.pool, modules, data, decisions)

    async def ask(self, revision: Revision, policy: DecisionPolicy, tree: Any) -> Decision:
        import asyncio

        answered: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
        self.pool.evaluate(revision, policy.decision, msgspec.json.encode(tree), 20.0, answered.set_result)
        return decision_of(await answered, policy.decision, revision.digest)

    async def judge(self, snapshot: Snapshot, request: Request) -> tuple[str, str, str]:
        """The first refusal's rule (or the last rule that allowed), what a dry run would have refused it by, and what marks it."""
        verdict, dry, marks = "allow", "", ""
        asks = []
        tree = request.document()
        for policy in asked(snapshot, request):
            assert snapshot.authorization is not None
            decision = await self.ask(snapshot.authorization, policy.gate or policy, tree)
            assert decision.verdict is not Verdict.ERROR, decision
            if policy.gate is not None:
                asks += [policy.provider] if decision.verdict is Verdict.DENY else []
                continue
            if decision.metadata:
                marks = ",".join(msgspec.json.decode(decision.metadata)["audit"])
            if policy.shadow:
                dry = dry or (decision.rule if decision.verdict is Verdict.DENY else "")
            elif decision.verdict is Verdict.DENY:
                return f"deny by {decision.rule}", dry, marks
            elif decision.rule:
                verdict = f"allow by {decision.rule}"
        return verdict + "".join(f" asks {provider}" for provider in asks), dry, marks


def asked(snapshot: Snapshot, request: Request) -> list[DecisionPolicy]:
    """What a request is asked about, in the order of the questions."""
    listeners = {listener.name: listener for listener in snapshot.gateways["edge/public"].listeners}
    if request.below:
        rule = listeners["tcp"].rules["*"]
    else:
        matches = listeners["http"].hosts["*"].prefix
        rule = matches[b"/more" if request.target.startswith("/more") else b""][0].rule
    return [policy for policy in (*rule.decisions, *rule.backends[0].decisions) if policy.authorization or policy.gate is not None]


def lines(text: str) -> list[tuple[str, Request, str]]:
    """`verdict`, request and the line itself of each line of a table: `deny by "..." | GET / as=shop/web`."""
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            verdict, _, what = line.partition("|")
            found.append((verdict.strip(), request_of(shlex.split(what)), line))
    return found

"""Kept equals fresh: requests with the same key get the same answer, whatever the policies; and keys are no wider than the policies."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import yaml
from authorization_world import BASE, MESH, Judge, Request, asked, compiled

from pdp.kept import KeptDecisions

POLICIES = 24
REQUESTS = 120
CALLERS = ("", "spiffe://shop.example/ns/shop/sa/web", "spiffe://shop.example/ns/ops/sa/web", "spiffe://bank.example/ns/shop/sa/x")
PATHS = ("/", "/a", "/a/b", "/a/b/c", "/a?x=1", "/a/b?x=2", "/c.html")
CLAIMS: tuple[Any, ...] = (
    None,
    {"iss": "i", "sub": "s"},
    {"iss": "i", "sub": "s", "groups": ["a", "b"], "exp": 1},
    {"groups": "a"},
    {"scope": "a b"},
)
SOURCES = {
    "principals": ("*", "*/sa/web", "shop.example/ns/shop/*", "bank.example/ns/shop/sa/x"),
    "namespaces": ("shop", "o*"),
    "serviceAccounts": ("shop/web",),
    "ipBlocks": ("10.0.0.0/8",),
    "remoteIpBlocks": ("10.0.0.9", "203.0.113.0/24"),
    "requestPrincipals": ("*", "i/s", "*/t"),
}
OPERATIONS = {
    "paths": ("/a", "/a*", "*.html", "/a/{*}", "/a/{**}"),
    "methods": ("GET", "P*"),
    "hosts": ("shop.example", "*.example"),
    "ports": ("8080", "80"),
}
CONDITIONS = {
    "request.headers[x-a]": ("*", "1"),
    "request.headers[x-b]": ("2*",),
    "request.auth.claims[groups]": ("a", "*"),
    "request.auth.claims[scope]": ("b",),
    "source.ip": ("10.0.0.9",),
    "connection.sni": ("shop.example",),
    "destination.ip": ("10.0.0.1",),
}


def _picked(rng: random.Random, table: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    found = {}
    for field in rng.sample(sorted(table), rng.randint(1, 2)):
        name = field if rng.random() < 0.7 else f"not{field[0].upper()}{field[1:]}"
        found[name] = rng.sample(table[field], rng.randint(1, len(table[field])))
    return found


def _source(rng: random.Random) -> dict[str, list[str]]:
    found = _picked(rng, SOURCES)
    if any("erviceAccounts" in name for name in found):
        found = {name: value for name, value in found.items() if "rincipals" not in name and "amespaces" not in name}
    return found


def a_rule(rng: random.Random) -> Any:
    rule: dict[str, Any] = {}
    if rng.random() < 0.7:
        rule["from"] = [{"source": _source(rng)} for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.6:
        rule["to"] = [{"operation": _picked(rng, OPERATIONS)} for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.4:
        key = rng.choice(sorted(CONDITIONS))
        rule["when"] = [{"key": key, rng.choice(("values", "notValues")): list(CONDITIONS[key])}]
    return rule


def policies(rng: random.Random) -> str:
    found = []
    for number in range(rng.randint(1, 3)):
        spec: dict[str, Any] = {
            "action": rng.choice(("ALLOW", "ALLOW", "DENY", "AUDIT")),
            "rules": [a_rule(rng) for _ in range(rng.randint(1, 2))],
        }
        if rng.random() < 0.3:
            spec["targetRefs"] = [{"kind": "Service", "name": "orders"}]
        namespace = "shop" if "targetRefs" in spec or rng.random() < 0.3 else "edge"
        metadata = {"namespace": namespace, "name": f"p{number}"}
        found.append(
            yaml.safe_dump({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec})
        )
    return "---\n".join(found)


def a_request(rng: random.Random) -> Request:
    below = rng.random() < 0.15
    return Request(
        method="tcp" if below else rng.choice(("GET", "POST", "PUT")),
        target=rng.choice(PATHS),
        caller=rng.choice(CALLERS),
        host=rng.choice(("shop.example", "x.example:80", "other")),
        ip=rng.choice(("10.0.0.9", "11.0.0.1", "2001:db8::1")),
        client=rng.choice(("", "", "203.0.113.5")),
        port=rng.choice((8080, 80)),
        sni=rng.choice(("", "shop.example")),
        headers=() if below else tuple((name, rng.choice(("1", "22"))) for name in rng.sample(("x-a", "x-b", "x-c"), rng.randint(0, 3))),
        claims=None if below else rng.choice(CLAIMS),
    )


def test_what_is_kept_is_what_would_be_said_again() -> None:
    rng = random.Random(20)

    async def play() -> tuple[int, int]:
        collisions = questions = 0
        async with Judge() as judge:
            for _ in range(POLICIES):
                text = policies(rng)
                snapshot = await judge.ready(compiled(BASE, MESH, text))
                revision = snapshot.authorization
                if revision is None:
                    continue
                said: dict[Any, tuple[Any, Request]] = {}
                kept = KeptDecisions()
                for _ in range(REQUESTS):
                    request = a_request(rng)
                    for policy in asked(snapshot, request):
                        point = revision.entry_points[policy.decision]
                        assert point.keepable
                        assert not point.reads.widened
                        decision = await judge.ask(revision, policy, request.document())
                        answer = decision.verdict, decision.rule, decision.metadata
                        key = kept.key_for(request.asking(), policy, point)
                        assert key is not None
                        questions += 1
                        if key in said:
                            collisions += 1
                            assert said[key][0] == answer, (text, request, said[key][1])
                        said[key] = answer, request
        return collisions, questions

    collisions, questions = asyncio.run(play())
    assert questions > 1000
    assert collisions > 300


def test_an_answer_depends_on_what_the_policies_look_at_and_on_nothing_else() -> None:
    rules = {
        "{from: [{source: {principals: [a]}}]}": {("attributes", "source", "principal")},
        "{from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [GET]}}]}": {
            ("attributes", "source", "principal"),
            ("attributes", "request", "http", "method"),
        },
        '{when: [{key: "request.headers[x-a]", values: [a]}]}': {("attributes", "request", "http", "headers", "x-a")},
        '{when: [{key: "request.auth.claims[a][b c]", values: [a]}]}': {
            ("attributes", "metadataContext", "filterMetadata", "envoy.filters.http.jwt_authn", "payload", "a", "b c")
        },
        '{to: [{operation: {ports: ["80"]}}]}': {("attributes", "destination", "address", "socketAddress", "portValue")},
        "{}": set(),
    }

    async def play() -> None:
        async with Judge() as judge:
            for rule, wanted in rules.items():
                metadata = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: edge, name: p}\n"
                snapshot = await judge.ready(compiled(BASE, MESH, f"{metadata}spec: {{rules: [{rule}]}}\n"))
                assert snapshot.authorization is not None
                (policy,) = asked(snapshot, Request())
                reads = snapshot.authorization.entry_points[policy.decision].reads
                assert set(reads.values) == wanted
                assert not (reads.defined or reads.kinds or reads.lengths or reads.volatile)

    asyncio.run(play())


def test_a_change_elsewhere_keeps_what_is_kept() -> None:
    first = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {namespace: edge, name: p}\nspec: {rules: [{}]}\n"
    other = first.replace("namespace: edge", "namespace: shop")

    async def play() -> None:
        async with Judge() as judge:
            one = await judge.ready(compiled(BASE, MESH, first))
            two = await judge.ready(compiled(BASE, MESH, first, other))
            assert one.authorization is not None
            assert two.authorization is not None
            assert one.authorization.digest != two.authorization.digest
            (name,) = one.authorization.entry_points
            (kept, new) = (each.authorization.entry_points[name] for each in (one, two))
            assert (kept.digest, kept.reads) == (new.digest, new.reads)

    asyncio.run(play())

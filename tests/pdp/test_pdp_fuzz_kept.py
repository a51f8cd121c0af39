"""A kept decision equals a fresh one, with OPA itself as the judge.

Policies, tricky ones and generated ones, are asked about many inputs; inputs with equal keys must have equal answers.
`TOLLHOUSE_FUZZ=N` runs N times as many, `TOLLHOUSE_FUZZ_SEED=S` others.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import random
from collections.abc import Callable
from typing import Any

from kept_world import Worker, a_worker, asking, key_of, policy, rego, sets
from test_pdp_readset import POLICIES

from mesh.policy import EntryPoint, Path, ReadSet, Revision
from mesh.questions import Asking, Decision, Verdict
from pdp.engines.engine import PolicyError
from pdp.input import document
from pdp.kept import KeptDecisions
from pdp.publish import publish

MORE = int(os.environ.get("TOLLHOUSE_FUZZ", "1"))
SEED = int(os.environ.get("TOLLHOUSE_FUZZ_SEED", "20240229"))
DATA: dict[str, Any] = {
    "users": {"a": {"ok": True}, "b": {"ok": False, "b": 1}, "x": {"a": [1, "a"]}},
    "cfg": {"k": "a", "l": ["a", "b"], "n": 1},
    "z": {"p": {"ok": True}},
}
SCALARS: list[Any] = [True, False, None, 0, 1, 1, 1, 1, 2, 1.5, "a", "a", "b", "x", "", "p", "q", "a.b"]
KEYS = ["a", "b", "c", "k", "l", "x", "z", "sel", "u", "t", "m", "p"]


def plant(tree: Any, path: Path, one: Any) -> None:
    """Puts `one` at `path`, and what is needed to get there."""
    for part, following in zip(path, (*path[1:], None), strict=True):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(part, str):
            if not isinstance(tree, dict):
                return
            if following is None or not isinstance(tree.get(part), dict | list):
                tree[part] = one if following is None else empty
        else:
            if not isinstance(tree, list):
                return
            tree += [0] * (part + 1 - len(tree))
            if following is None or not isinstance(tree[part], dict | list):
                tree[part] = one if following is None else empty
        tree = tree[part]


def value(rng: random.Random, depth: int) -> Any:
    roll = rng.random()
    if depth <= 0 or roll < 0.35:
        return copy.deepcopy(rng.choice(SCALARS))
    if roll < 0.75:
        return {key: value(rng, depth - 1) for key in rng.sample(KEYS, rng.randrange(0, 5))}
    return [value(rng, depth - 1) for _ in range(rng.randrange(0, 4))]


def edited(rng: random.Random, document: Any) -> Any:
    """`document` with something changed somewhere, or put in or taken out."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = document
        while True:
            inside = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not inside or rng.random() < 0.25:
                if isinstance(at, dict):
                    at[rng.choice(KEYS)] = value(rng, 2)
                else:
                    at.insert(rng.randrange(len(at) + 1), value(rng, 1))
                break
            step = rng.choice(inside)
            if isinstance(at[step], dict | list) and rng.random() < 0.75:
                at = at[step]
                continue
            if rng.random() < 0.3:
                del at[step]
            else:
                at[step] = value(rng, 2)
            break
    return document


class Rego:
    """Writes modules that nearly always compile."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def path(self, root: str = "input", longest: int = 3) -> str:
        parts = []
        for _ in range(self.rng.randrange(1, longest + 1)):
            parts.append(self.rng.choice([f".{self.rng.choice(KEYS)}"] * 8 + ["[0]", "[1]", f'["{self.rng.choice(KEYS)}"]']))
        return root + "".join(parts)

    def constant(self) -> str:
        return json.dumps(self.rng.choice([*SCALARS, ["a"], {"a": 1}, []]))

    def term(self, local: list[str]) -> str:
        roll = self.rng.random()
        if roll < 0.2:
            return self.constant()
        if roll < 0.4 and local:
            return self.path(self.rng.choice(local), 2) if self.rng.random() < 0.6 else self.rng.choice(local)
        if roll < 0.5:
            return self.rng.choice(["r1", "r2", "f1(input.a)", "f1(input)", "f2(input.a, input.b)", "data.y.p.v", "s1", "o1", "t1.a.b"])
        if roll < 0.57:
            return self.rng.choice(
                ["data.cfg.k", "data.users[input.u]", "data.y[input.sel].v", "data.users", "data.z[input.sel].ok", "data.y"]
            )
        if roll < 0.64:
            keys = self.rng.choice([f'"{self.rng.choice(KEYS)}"', '["a", "b"]', '["l", 0]', "input.k", "data.cfg.k", "[]"])
            return f"object.get({self.path(longest=2)}, {keys}, {self.rng.choice([self.constant(), self.path()])})"
        if roll < 0.7:
            return f"[x | some x in {self.path()}]"
        if roll < 0.74:
            return f'{{"a": {self.path()}, "b": {self.path()}}}'
        if roll < 0.77:
            return f"{self.path(longest=2)}[{self.path(longest=1)}]"
        return self.path()

    def condition(self, local: list[str]) -> str:
        rng, term = self.rng, self.term
        roll = rng.random()
        if roll < 0.14:
            name = self.name()
            text = f"{name} := {rng.choice([self.path(longest=2), term(local)])}"
            local.append(name)
            return text
        if roll < 0.28:
            return f"{term(local)} {rng.choice(['==', '!=', '<', '>='])} {term(local)}"
        if roll < 0.38:
            return term(local)
        if roll < 0.5:
            return f"not {rng.choice([term(local), f'{term(local)} == {self.constant()}', 'r1', 'r3'])}"
        if roll < 0.56:
            return f"count({term(local)}) {rng.choice(['==', '>', '<'])} {rng.randrange(3)}"
        if roll < 0.63:
            kind = rng.choice(["string", "number", "array", "object", "boolean", "null"])
            return f"is_{kind}({term(local)})"
        if roll < 0.67:
            left, right = self.name(), self.name()
            local += [left, right]
            return f"[{left}, {right}] = {rng.choice([self.path(), term(local[:-2])])}"
        if roll < 0.7:
            name = self.name()
            text = f'{{"{rng.choice(KEYS)}": {name}}} = {self.path()}'
            local.append(name)
            return text
        if roll < 0.76:
            key, one = self.name(), self.name()
            text = f"some {key}, {one} in {term(local)}"
            local += [key, one]
            return text
        if roll < 0.8:
            one = self.name()
            return f"every {one} in {term(local)} {{ {one} != {self.constant()} }}"
        if roll < 0.84:
            return f"{term(local)} in {term(local)}"
        if roll < 0.92:
            change = rng.choice(
                [
                    f"input as {rng.choice([self.path(), '{}', chr(123) + chr(34) + 'a' + chr(34) + ': ' + self.path() + chr(125)])}",
                    f"input.{rng.choice(KEYS)} as {self.path()}",
                    f"input.{rng.choice(KEYS)}.{rng.choice(KEYS)} as {self.constant()}",
                    f"data.cfg.k as {self.path()}",
                    "data.x.r2 as input.k",
                    "data.x.f1 as mock",
                    "count as mock",
                ]
            )
            return f"{rng.choice(['r1', 'r3', 'r2 == ' + self.constant(), 'f1(input.a)', 'not r1', 'count(input.a) == 1'])} with {change}"
        return f"walk({self.path(longest=2)}, [_, {self.constant()}])"

    def body(self, local: list[str]) -> str:
        return "\n\t".join(self.condition(local) for _ in range(self.rng.randrange(1, 4)))

    def modules(self) -> dict[str, str]:
        rng = self.rng
        allow = []
        for _ in range(rng.randrange(1, 4)):
            local: list[str] = []
            body = self.body(local)
            result = rng.choice(["true", "true", "true", '{"allowed": true}', f"{{{self.constant()}: 1}}", *local])
            allow.append(f"allow := {result} if {{\n\t{body}\n}}" + (f" else := {self.term([])}" if rng.random() < 0.3 else ""))
        lines = ["package x", *allow]
        if rng.random() < 0.3:
            lines.append("default allow := false")
        for name in ("r1", "r2", "r3"):
            for _ in range(rng.choice((1, 1, 2))):
                local = []
                simple = Simple(rng)
                body = simple.body(local)
                head = rng.choice([f"{name} if", f"{name} := {simple.path()} if", f"{name} := {simple.path()} if"])
                lines.append(f"{head} {{\n\t{body}\n}}")
        for _ in range(rng.choice((1, 2))):
            lines.append(
                rng.choice(
                    ["f1(x) := x.a", "f1(x) if x.b == 1", "f1(x) := y if { y := x.k; not x.l }", "f1(x) := input.c if x", "f1([a, _]) := a"]
                )
            )
        lines += ["f2(a, b) := a.b if b", "f2(a, b) := b.a if not a", "mock(x) := x"]
        lines += [
            "s1 contains v if some v in input.l",
            "s1 contains input.x",
            "o1[k] := v if some k, v in input.m",
            "t1.a.b := input.t.a",
            "t1.a[k] := 1 if some k in input.l",
        ]
        others = [
            f"package y.p\n\nv := {Simple(rng).path()}\n\nw if {Simple(rng).path()}",
            f"package y.q\n\nv := {Simple(rng).path()} if {Simple(rng).path()}",
        ]
        return {f"m{index}.rego": text for index, text in enumerate(["\n\n".join(lines), *others])}


class Simple(Rego):
    """Without references to other rules, so that nothing is recursive."""

    def term(self, local: list[str]) -> str:
        return self.rng.choice([self.path(), self.constant(), *local, self.path(self.rng.choice(local), 2) if local else "input.a"])

    def condition(self, local: list[str]) -> str:
        for _ in range(20):
            made = super().condition(local)
            if " with " not in made and "r1" not in made and "r3" not in made:
                return made
        return self.path()


async def judge(worker: Worker, revision: Revision, name: str, documents: list[Any]) -> tuple[int, str]:
    """How many inputs shared a key with another one, and what was wrong, if anything was."""
    point = revision.entry_points[name]
    await worker.load(revision)
    answers = await worker.evaluate(revision, name, [json.dumps(one).encode() for one in documents])
    worker.child.forget(revision.digest)
    kept: dict[object, tuple[Any, Any]] = {}
    shared = 0
    for one, answer in zip(documents, answers, strict=True):
        if answer.kind == "error" and answer.reason not in ("conflict", "eval"):
            return shared, f"the worker failed: {answer}"
        key = key_of(point.reads, one)
        first, said = kept.setdefault(key, (one, sets(answer)))
        shared += first is not one
        if said != sets(answer):
            modules = "\n---\n".join(revision.modules.values())
            return shared, f"{modules}\n{point.reads}\n{json.dumps(first)} -> {said}\n{json.dumps(one)} -> {sets(answer)}"
    return shared, ""


def inputs(rng: random.Random, reads: ReadSet, count: int) -> list[Any]:
    """Inputs in families: each with one that has something at most of the paths, and others that differ from it in a few places."""
    paths = [*reads.values, *reads.lengths, *reads.kinds, *reads.defined]
    made: list[Any] = []
    while len(made) < count:
        base = {key: value(rng, 3) for key in rng.sample(KEYS, rng.randrange(3, len(KEYS)))}
        for path in paths:
            if path and rng.random() < 0.7:
                plant(base, path, value(rng, 2))
        made.append(base)
        for _ in range(11):
            other = edited(rng, base)
            if paths and rng.random() < 0.4:
                plant(other, rng.choice(paths) or ("a",), value(rng, 1))
            made.append(other)
    return made


def test_tricky_policies() -> None:
    rng = random.Random(SEED)

    async def run() -> int:
        total = 0
        async with a_worker() as worker:
            for text, expected in POLICIES.values():
                if expected.volatile:
                    continue
                revision = await publish(worker, rego("x.allow", f"package x\n{text}"), json.dumps(DATA).encode(), ["x.allow"])
                shared, wrong = await judge(worker, revision, "x.allow", inputs(rng, revision.entry_points["x.allow"].reads, 240 * MORE))
                assert not wrong, wrong
                total += shared
        return total

    assert asyncio.run(run()) > 2000


def test_generated_policies() -> None:
    rng = random.Random(SEED + 1)

    async def run() -> tuple[int, int, int]:
        total = compiled = narrow = 0
        async with a_worker() as worker:
            for _ in range(140 * MORE):
                modules = Rego(rng).modules()
                try:
                    revision = await publish(worker, modules, json.dumps(DATA).encode(), ["x.allow"])
                except PolicyError:
                    continue
                compiled += 1
                narrow += revision.entry_points["x.allow"].reads.values != ((),)
                shared, wrong = await judge(worker, revision, "x.allow", inputs(rng, revision.entry_points["x.allow"].reads, 144))
                assert not wrong, wrong
                total += shared
        return total, compiled, narrow

    total, compiled, narrow = asyncio.run(run())
    assert compiled > 50 * MORE, "most generated policies should compile"
    assert narrow > compiled // 2, "most read sets should be less than all of the input"
    assert total > 200 * MORE


async def answers_of(worker: Worker, revision: Revision, documents: list[Any]) -> list[Any]:
    await worker.load(revision)
    answers = await worker.evaluate(revision, "x.allow", [json.dumps(one).encode() for one in documents])
    worker.child.forget(revision.digest)
    return [sets(answer) for answer in answers]


def test_data_outside_of_a_digest_changes_no_answer() -> None:
    rng = random.Random(SEED + 3)

    async def run() -> tuple[int, int]:
        equal = other = 0
        async with a_worker() as worker:
            tricky = [
                rego("x.allow", f"package x\n{text}") for text, expected in POLICIES.values() if "data." in text and not expected.volatile
            ]
            for modules in [*tricky * 3, *(Rego(rng).modules() for _ in range(60 * MORE))]:
                try:
                    one = await publish(worker, modules, json.dumps(DATA).encode(), ["x.allow"])
                except PolicyError:
                    continue
                documents = inputs(rng, one.entry_points["x.allow"].reads, 48)
                said = await answers_of(worker, one, documents)
                for _ in range(4):
                    try:
                        two = await publish(worker, modules, json.dumps(edited(rng, DATA)).encode(), ["x.allow"])
                    except PolicyError:  # the data has something where the policy has a package
                        continue
                    if two.entry_points["x.allow"].digest != one.entry_points["x.allow"].digest:
                        other += 1
                        continue
                    equal += two.digest != one.digest
                    assert await answers_of(worker, two, documents) == said, (modules, two.data)
        return equal, other

    equal, other = asyncio.run(run())
    assert equal > 50
    assert other > 5


TOKEN = 'input.attributes.metadataContext.filterMetadata["envoy.filters.http.jwt_authn"].payload'
REQUESTS = {
    "shop": 'allow := {"allowed": input.attributes.request.http.method == "GET"} if input.parsed_path[0] == "orders"',
    "path": 'allow if startswith(input.attributes.request.http.path, "/orders")',
    "segments": "allow if count(input.parsed_path) > 1",
    "last segment": 'allow if input.parsed_path[count(input.parsed_path) - 1] == "1"',
    "query": 'allow if input.parsed_query.a[0] == "1"',
    "query has": 'allow if "1" in input.parsed_query.a',
    "queries": "allow if count(input.parsed_query) == 1",
    "header": 'allow if input.attributes.request.http.headers["x-tenant"] == "a"',
    "no header": 'allow if not input.attributes.request.http.headers["x-tenant"]',
    "headers": 'allow if { some k, v in input.attributes.request.http.headers; startswith(k, "x-"); v == "a" }',
    "caller": "allow if input.attributes.source.principal",
    "via": "allow := input.attributes.contextExtensions.via",
    "nobody": "allow if not input.attributes.source.principal",
    "service": 'allow := object.get(input.attributes.contextExtensions, "service", "none")',
    "time": 'allow if endswith(input.attributes.request.time, "00Z")',
    "body": "allow if input.parsed_body == null",
    "claim": f'allow if {TOKEN}.sub == "a"',
    "roles": f'allow if "a" in {TOKEN}.roles',
    "no token": "allow if not input.attributes.metadataContext.filterMetadata",
    "claims": f"allow := count({TOKEN})",
    "numbers": f"allow := {TOKEN}.n + 1",
    "truncated": "allow if input.truncated_body == false",
}


def a_request(rng: random.Random) -> Asking:
    headers = [
        (name, rng.choice((b"a", b"b", b"", b"\xff")))
        for name in rng.choices((b"x-tenant", b"x-other", b"cookie", b"accept"), k=rng.randrange(4))
    ]
    claims = {"sub": rng.choice("ab"), "roles": rng.choice((["a"], ["b", "a"], "a", 1)), "n": rng.choice((1, 1.5, True))}
    return asking(
        method=rng.choice((b"GET", b"POST")),
        path=rng.choice((b"/", b"/orders", b"/orders/1", b"/orders/1/2", b"/a%20b/1", b"/orders/")),
        query=rng.choice((None, b"", b"a=1", b"a=1&a=2", b"b=%41&a=2", b"a=%zz&c", b"a;b=1")),
        headers=headers,
        principal=rng.choice(("", "spiffe://s/ns/a/sa/b", "spiffe://s/ns/a/sa/c")),
        via=rng.choice(("", "spiffe://s/ns/a/sa/g")),
        service=rng.choice(("", "shop/orders")),
        received=rng.choice((1.5, 60.0, 3600.25)),
        port=rng.randrange(1, 9),
        body=rng.choice((None, b"{}")),
        claims=rng.choice((None, claims)),
    )


async def ask_all(ask: Callable[[Asking, EntryPoint], Any], worker: Worker, revision: Revision, requests: list[Asking]) -> None:
    point = revision.entry_points["x.allow"]
    await worker.load(revision)
    answers = await worker.evaluate(revision, "x.allow", [document(one, policy()) for one in requests])
    for one, answer in zip(requests, answers, strict=True):
        ask(one, point)(sets(answer))


def test_requests() -> None:
    """The whole way: from a request to its key, and what is kept under it."""
    rng = random.Random(SEED + 2)

    async def run() -> int:
        hits = 0
        async with a_worker() as worker:
            for name, text in REQUESTS.items():
                revision = await publish(worker, {"x.rego": f"package x\n{text}"}, b"{}", ["x.allow"])
                kept = KeptDecisions()
                mine = policy(decision="x.allow")

                def ask(one: Asking, point: EntryPoint, kept: KeptDecisions = kept, name: str = name, mine: Any = mine) -> Any:
                    def answered(fresh: Any) -> None:
                        key = kept.key_for(one, mine, point)
                        assert key is not None, name
                        found = kept.get(key, 1.0)
                        if found is None:
                            kept.put(key, Decision(verdict=Verdict.ALLOW, reason=repr(fresh)), 1.0, None)
                        else:
                            assert found.reason == repr(fresh), (name, key)

                    return answered

                await ask_all(ask, worker, revision, [a_request(rng) for _ in range(140 * MORE)])
                assert kept.hits > 0, name
                hits += kept.hits
        return hits

    assert asyncio.run(run()) > 1000 * MORE

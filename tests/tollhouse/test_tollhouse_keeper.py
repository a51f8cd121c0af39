"""From changes to snapshots: what is compiled, what stays in force when something is wrong, and who is told in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest

from discovery.source import Change, OnChange, PolicyFiles, SourceStatus
from mesh.documents import Document
from mesh.model import Snapshot
from mesh.policy import EntryPoint, ReadSet, Revision, digest_of
from mesh.reading import document_of, read_documents
from pdp.engines.engine import EngineUnavailable, PolicyError, PolicyProblem
from pdp.publish import NoDecision
from tollhouse import keeper as keeping
from tollhouse.authorization import LIBRARY, Authorizer
from tollhouse.keeper import Keeper


def policy(decision: str, name: str = "default") -> Document:
    body = {
        "apiVersion": "tollhouse.dev/v1",
        "kind": "AccessPolicy",
        "metadata": {"namespace": "edge", "name": name},
        "spec": {"decision": decision},
    }
    return document_of(body, "test")


class Scripted:
    """A source whose changes the test gives out."""

    def __init__(self, first: Change) -> None:
        self.first = first
        self.status = SourceStatus()
        self.tell: OnChange = lambda _: None

    async def start(self, on_change: OnChange) -> None:
        self.tell = on_change
        on_change(self.first)

    async def stop(self) -> None:
        self.tell = lambda _: None


class Compiler:
    """Compiles what does not say `wrong`."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, str], frozenset[str]]] = []

    async def __call__(self, modules: Mapping[str, str], data: bytes, decisions: Collection[str]) -> Revision:
        self.asked.append((dict(modules), frozenset(decisions)))
        for name, text in modules.items():
            if "wrong" in text:
                raise PolicyError((PolicyProblem(name, 3, 1, "rego_parse_error", "it is wrong"),))
        missing = {each: f"{each} leads to nothing" for each in decisions if "missing" in each}
        if missing:
            raise NoDecision(missing)
        points = {each: EntryPoint(path=each, digest="0" * 64, reads=ReadSet()) for each in decisions}
        return Revision(digest=digest_of(modules, data), modules=dict(modules), data=data, entry_points=points)


def files(text: str) -> PolicyFiles:
    return PolicyFiles(modules={"policy/a.rego": text})


def play(first: Change, *changes: Change) -> tuple[list[Snapshot], Compiler]:
    """The snapshots that are given out, one for each change."""
    taken: list[Snapshot] = []
    compiler = Compiler()

    async def story() -> None:
        source = Scripted(first)
        keeper = Keeper(source, compiler)
        keeper.add(taken.append)
        await keeper.start()
        for number, change in enumerate(changes, 2):
            source.tell(change)
            async with asyncio.timeout(5):
                while keeper.applied < number:  # noqa: ASYNC110 -- it has no event for that
                    await asyncio.sleep(0.001)
        await keeper.stop()

    asyncio.run(story())
    return taken, compiler


FIRST = Change(replace=True, upserts=(policy("shop.a"),), policy=files("package shop"))


def test_the_first_snapshot_has_the_policy_already() -> None:
    taken, compiler = play(FIRST)
    assert len(taken) == 1
    assert taken[0].policy is not None
    assert set(taken[0].policy.entry_points) == {"shop.a"}
    assert compiler.asked == [({"policy/a.rego": "package shop"}, frozenset({"shop.a"}))]


def test_a_policy_that_does_not_compile_leaves_the_last_good_one() -> None:
    taken, _ = play(FIRST, Change(policy=files("wrong")), Change(policy=files("package shop # mended")))
    good, kept, mended = taken
    assert good.policy is not None
    assert kept.policy == good.policy
    assert any("it is wrong" in str(problem) and problem.kept and problem.where == "policy/a.rego:3:1" for problem in kept.problems)
    assert mended.policy is not None
    assert mended.policy.digest != good.policy.digest
    assert not any("it is wrong" in str(problem) for problem in mended.problems)


def test_a_new_decision_is_compiled_for() -> None:
    taken, compiler = play(FIRST, Change(upserts=(policy("shop.b", "other"),)))
    assert compiler.asked[-1][1] == {"shop.a", "shop.b"}
    assert taken[-1].policy is not None
    assert set(taken[-1].policy.entry_points) == {"shop.a", "shop.b"}


def test_a_decision_that_is_not_there_keeps_no_other_out_of_force() -> None:
    mended = files("package shop # mended")
    taken, compiler = play(FIRST, Change(upserts=(policy("shop.missing", "other"),)), Change(policy=mended))
    for snapshot in taken[1:]:
        assert snapshot.policy is not None
        assert set(snapshot.policy.entry_points) == {"shop.a"}
    assert compiler.asked[-1] == (dict(mended.modules), {"shop.a"})


def test_a_change_of_something_else_compiles_nothing() -> None:
    namespace = document_of({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}, "test")
    _, compiler = play(FIRST, Change(upserts=(namespace,)))
    assert len(compiler.asked) == 1


def test_takers_are_told_in_order_and_waited_for() -> None:
    order: list[str] = []

    async def slow(snapshot: Snapshot) -> None:
        await asyncio.sleep(0.01)
        order.append(f"slow {snapshot.version[:0]}")

    async def story() -> None:
        keeper = Keeper(Scripted(FIRST), Compiler())
        keeper.add(slow)
        keeper.add(lambda _: order.append("quick"))
        await keeper.start()
        await keeper.stop()

    asyncio.run(story())
    assert order == ["slow ", "quick"]


def test_a_first_snapshot_that_cannot_be_taken_ends_the_start() -> None:
    def refuse(_: Snapshot) -> None:
        raise OSError(98, "Address already in use", "127.0.0.1:1")

    async def story() -> None:
        keeper = Keeper(Scripted(FIRST), Compiler())
        keeper.add(refuse)
        await keeper.start()

    with pytest.raises(OSError, match="in use"):
        asyncio.run(story())


def test_a_later_one_that_cannot_be_taken_disturbs_nobody() -> None:
    taken: list[Snapshot] = []
    calls = iter([False, True, False])

    def sometimes(_: Snapshot) -> None:
        if next(calls):
            raise OSError(98, "Address already in use")

    async def story() -> None:
        source = Scripted(FIRST)
        keeper = Keeper(source, Compiler())
        keeper.add(sometimes)
        keeper.add(taken.append)
        await keeper.start()
        for number, name in ((2, "b"), (3, "c")):
            source.tell(Change(upserts=(policy(f"shop.{name}", name),)))
            async with asyncio.timeout(5):
                while keeper.applied < number:  # noqa: ASYNC110 -- it has no event for that
                    await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        await keeper.stop()

    asyncio.run(story())
    assert len(taken) == 3


GUARDED = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: tollhouse}
spec: {controllerName: tollhouse.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {namespace: edge, name: public}
spec:
  gatewayClassName: tollhouse
  listeners: [{name: http, port: 8080, protocol: HTTP}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: edge, name: p}
spec: {rules: [{to: [{operation: {paths: [/PATH]}}]}]}
"""


def guarded(path: str) -> Change:
    documents, _ = read_documents(GUARDED.replace("PATH", path), "edge.yaml")
    return Change(upserts=documents, replace=True)


def test_authorization_policies_are_compiled_with_the_library_and_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "AGAIN", 0.01)
    compiler = Compiler()
    taken: list[Snapshot] = []
    down = False

    async def compile_policy(modules: Mapping[str, str], data: bytes, decisions: Collection[str]) -> Revision:
        if down:
            raise EngineUnavailable("no worker can be started")
        return await compiler(modules, data, decisions)

    async def until(number: int) -> None:
        async with asyncio.timeout(5):
            while len(taken) < number:  # noqa: ASYNC110 -- it has no event for that
                await asyncio.sleep(0.001)

    async def story() -> None:
        nonlocal down
        source = Scripted(guarded("a"))
        keeper = Keeper(source, compiler, authorizer=Authorizer(compile_policy))
        keeper.add(taken.append)
        await keeper.start()
        first = taken[0].authorization
        assert first is not None
        assert LIBRARY in first.modules
        assert set(first.entry_points) == set(taken[0].program.decisions)  # type: ignore[union-attr]
        source.tell(Change(upserts=(policy("a.b"),)))
        await until(2)
        assert taken[1].authorization is first
        assert len(compiler.asked) == 1
        down = True
        source.tell(guarded("b"))
        await until(3)
        # What was in force stays, and it is said why.
        assert taken[2].authorization is first
        assert taken[2].version == taken[1].version
        assert [problem.kept for problem in taken[2].problems if "AuthorizationPolicies can't be evaluated now" in problem.message] == [
            True
        ]
        down = False
        await until(4)
        async with asyncio.timeout(5):
            while taken[-1].authorization is first:  # noqa: ASYNC110 -- it has no event for that
                await asyncio.sleep(0.001)
        assert not [problem for problem in taken[-1].problems if "can't be evaluated" in problem.message]
        assert taken[-1].version != taken[1].version
        await keeper.stop()

    asyncio.run(story())


def test_authorization_policies_that_cannot_be_compiled_at_the_start_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "AGAIN", 0.01)
    compiler = Compiler()
    tries = 0

    async def compile_policy(modules: Mapping[str, str], data: bytes, decisions: Collection[str]) -> Revision:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise EngineUnavailable("no worker can be started")
        return await compiler(modules, data, decisions)

    async def story() -> None:
        taken: list[Snapshot] = []
        keeper = Keeper(Scripted(guarded("a")), compiler, authorizer=Authorizer(compile_policy))
        keeper.add(taken.append)
        await keeper.start()
        # Until then nothing passes: the question is there, and no revision to ask.
        assert taken[0].gateways
        assert taken[0].program is not None
        assert taken[0].authorization is None
        async with asyncio.timeout(5):
            while taken[-1].authorization is None:  # noqa: ASYNC110 -- it has no event for that
                await asyncio.sleep(0.001)
        await keeper.stop()

    asyncio.run(story())


def test_in_force_is_what_every_part_has_taken_and_where_the_source_was_then() -> None:
    seen: list[tuple[str, str]] = []
    gate = asyncio.Event()
    refusing = [False]

    async def slow(_: Snapshot) -> None:
        await gate.wait()
        if refusing[0]:
            raise OSError(98, "Address already in use")

    async def story() -> None:
        source = Scripted(FIRST)
        source.status = SourceStatus(delivered="1")
        keeper = Keeper(source, Compiler())
        keeper.add(slow)
        keeper.on_force(lambda: seen.append((keeper.in_force.version[:0], keeper.position)))
        gate.set()
        await keeper.start()
        assert (seen, keeper.position) == ([("", "1")], "1")
        source.status = SourceStatus(delivered="2")
        assert keeper.position == "2", "nothing was different"
        before = keeper.in_force
        for number, refused in ((3, True), (4, False)):
            gate.clear()
            refusing[0] = refused
            source.status = SourceStatus(delivered=str(number))
            source.tell(Change(upserts=(policy(f"shop.{number}", f"p{number}"),)))
            assert keeper.position == "1", "it waits"
            for _ in range(5):
                await asyncio.sleep(0)
            assert (keeper.position, keeper.in_force) == ("1", before)
            gate.set()
            for _ in range(20):
                await asyncio.sleep(0)
            assert (keeper.position, keeper.in_force is before) == (("1", True) if refused else ("4", False))
        assert seen[1:] == [("", "4")]
        await keeper.stop()

    asyncio.run(story())

"""The decider: what is kept, asked once, timed, and never mixed up. Over scripted askers where time and order matter, over workers else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from engine_world import pool
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc_world import answer, foreign, question, service, shop
from grpc_world import client as client_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.grpc_channel import GrpcChannels
from mesh.filters import ExternalAuth
from mesh.model import DecisionPolicy, Snapshot
from mesh.questions import Decision, DecisionQuestion, Verdict
from pdp.answer import error
from pdp.asker import EngineAsker
from pdp.client import Providers
from pdp.decider import MOST_SHADOWS, PolicyDecider
from pdp.kept import KeptDecisions
from telemetry.record import Telemetry

ALLOW, DENY, ERROR = Verdict.ALLOW, Verdict.DENY, Verdict.ERROR


class Script:
    """An asker that answers when the test says so."""

    def __init__(self) -> None:
        self.open: list[tuple[DecisionQuestion, Callable[[Decision], None]]] = []
        self.asked = 0

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        self.asked += 1
        self.open.append((question, done))

    def answer(self, decision: Decision) -> None:
        _, done = self.open.pop(0)
        done(decision)


def cache(telemetry: Telemetry) -> dict[str, float]:
    lines = [line for line in telemetry.page().decode().splitlines() if line.startswith("tollhouse_decision_cache_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def test_a_kept_decision_is_the_fresh_one_and_is_not_asked_again() -> None:
    async def run() -> None:
        async with pool() as engine:
            telemetry = Telemetry()
            decider = PolicyDecider(central=EngineAsker(engine), kept=KeptDecisions(), telemetry=telemetry)
            for principal in ("web", "nobody", "other"):
                what = question(principal=principal)
                assert decider.recall(what, time.monotonic()) is None
                fresh = await answer(decider, what)
                again = decider.recall(question(principal=principal), time.monotonic())
                assert again is not None
                assert again.kept
                assert not fresh.kept
                assert (again.verdict, again.headers, again.status, again.body) == (fresh.verdict, fresh.headers, fresh.status, fresh.body)
            assert cache(telemetry) == {"miss": 3, "hit": 3}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("decision", "principal", "counted"),
    [
        ("word", "web", "miss"),
        ("decision", "", "miss"),
        ("endless", "web", "miss"),
        ("timed", "web", "volatile"),
        ("unheard_of", "web", "unknown"),
    ],
)
def test_errors_and_what_is_volatile_are_never_kept(decision: str, principal: str, counted: str) -> None:
    async def run() -> None:
        async with pool() as engine:
            telemetry = Telemetry()
            decider = PolicyDecider(central=EngineAsker(engine), kept=KeptDecisions(), telemetry=telemetry)
            for _ in range(2):
                what = question(decision, principal, timeout=0.3)
                assert decider.recall(what, time.monotonic()) is None
                await answer(decider, what)
            assert cache(telemetry) == {counted: 2}

    asyncio.run(run())


def test_identical_questions_in_flight_are_asked_once() -> None:
    async def run() -> None:
        script, telemetry = Script(), Telemetry()
        decider = PolicyDecider(central=script, kept=KeptDecisions(), telemetry=telemetry)
        waiting = [answer(decider, question(principal=("web", "other")[n % 2])) for n in range(10)]
        assert script.asked == 2
        script.answer(Decision(verdict=ALLOW))
        assert [each.done() for each in waiting] == [True, False] * 5
        script.answer(Decision(verdict=DENY))
        assert [each.result().verdict for each in waiting] == [ALLOW, DENY] * 5
        assert cache(telemetry)["coalesced"] == 8
        timed = [answer(decider, question("timed")) for _ in range(3)]
        assert script.asked == 5
        for _ in timed:
            script.answer(Decision(verdict=ALLOW))
        assert all(each.done() for each in timed)

    asyncio.run(run())


def test_each_asker_has_its_own_time() -> None:
    async def run() -> None:
        script = Script()
        decider = PolicyDecider(central=script, kept=KeptDecisions())
        impatient, patient = answer(decider, question(timeout=0.05)), answer(decider, question(timeout=5.0))
        assert (await impatient).cause == "timeout"
        assert not patient.done()
        script.answer(error("timeout", "the first one's time is over"))
        assert not patient.done()
        assert script.asked == 2
        script.answer(Decision(verdict=ALLOW))
        assert (await patient).verdict is ALLOW
        first, second = answer(decider, question(principal="x")), answer(decider, question(principal="x"))
        script.answer(error("timeout", "late"))
        script.answer(error("timeout", "late again"))
        assert {(await first).cause, (await second).cause} == {"timeout"}
        assert script.asked == 4

    asyncio.run(run())


def test_an_asker_that_says_nothing_costs_its_time_only_once() -> None:
    async def run() -> None:
        script = Script()
        decider = PolicyDecider(central=script, kept=KeptDecisions())
        assert (await answer(decider, question(timeout=0.03))).cause == "timeout"
        second = answer(decider, question())
        assert script.asked == 2
        script.answer(Decision(verdict=DENY))  # the first, much too late: kept, since it is true all the same
        assert not second.done()
        script.answer(Decision(verdict=DENY))
        assert (await second).verdict is DENY
        kept = decider.recall(question(), time.monotonic())
        assert kept is not None

    asyncio.run(run())


class Broken:
    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        done(Decision(verdict=DENY))
        raise RuntimeError("after the answer")


class Raises:
    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        raise RuntimeError("before the answer")


def test_an_asker_that_breaks_is_an_error_and_answers_once() -> None:
    async def run() -> None:
        assert (await answer(PolicyDecider(central=Broken()), question())).verdict is DENY
        got = await answer(PolicyDecider(central=Raises()), question())
        assert (got.verdict, got.cause) == (ERROR, "internal")
        script = Script()
        decider = PolicyDecider(central=script)

        def fails(_: Decision) -> None:
            raise RuntimeError("the asker's own trouble")

        decider.ask(question(), fails)
        script.answer(Decision(verdict=ALLOW))

    asyncio.run(run())


def test_the_place_says_who_is_asked() -> None:
    async def run() -> None:
        central, local = Script(), Script()
        decider = PolicyDecider(central=central, local=local)
        answer(decider, question())
        answer(decider, question(place="Local"))
        assert (central.asked, local.asked) == (1, 1)
        alone = PolicyDecider(central=central)
        answer(alone, question(place="Local"))
        assert central.asked == 2
        await decider.close()
        await alone.close()

    asyncio.run(run())


def test_another_provider_is_asked_and_nothing_of_it_is_kept() -> None:
    async def check(request: CheckRequest, _: Any) -> CheckResponse:
        return CheckResponse()

    async def run() -> None:
        async with foreign(check) as target:
            telemetry = Telemetry()
            providers = Providers(GrpcChannels(asyncio.get_running_loop()))
            decider = PolicyDecider(central=Script(), kept=KeptDecisions(), providers=providers, telemetry=telemetry)
            for _ in range(2):
                what = question(provider=target)
                assert decider.recall(what, time.monotonic()) is None
                assert (await answer(decider, what)).verdict is ALLOW
            assert cache(telemetry) == {"provider": 2}
            policy = DecisionPolicy(name="shop/ext", level="mesh", provider=target)
            await decider.apply(Snapshot(version="1", policies={"shop/ext": policy}))
            assert (await answer(decider, question(provider=target))).verdict is ALLOW
            await decider.apply(Snapshot(version="2"))
            assert (await answer(decider, question(provider=target))).verdict is ALLOW  # a request of the snapshot before
            await decider.close()

    asyncio.run(run())


def test_a_change_of_query_parameters_is_kept_like_any_other() -> None:
    async def run() -> None:
        async with pool() as engine:
            decider = PolicyDecider(central=EngineAsker(engine), kept=KeptDecisions())
            got = await answer(decider, question("query"))
            assert (got.verdict, got.query_set) == (ALLOW, (("a", "1"),))
            kept = decider.recall(question("query"), time.monotonic())
            assert kept is not None
            assert kept.query_set == got.query_set

    asyncio.run(run())


def test_what_waits_is_bounded_and_closing_answers_it() -> None:
    async def run() -> None:
        script = Script()
        decider = PolicyDecider(central=script, max_waiting=2)
        waiting = [answer(decider, question(principal=str(n))) for n in range(3)]
        assert waiting[2].result().cause == "overloaded"
        await decider.close()
        assert [each.result().cause for each in waiting[:2]] == ["unavailable"] * 2
        script.answer(Decision(verdict=ALLOW))

    asyncio.run(run())


def test_a_new_revision_is_loaded_and_what_is_broken_is_said() -> None:
    async def run() -> None:
        async with pool() as engine:
            decider = PolicyDecider(central=EngineAsker(engine), kept=KeptDecisions(), engines=[engine])
            good, bad = shop(), shop("package a\n\nx := ", "sha256:bad")
            assert await decider.apply(Snapshot(version="1", policy=good)) == ()
            assert engine.state().revisions == (good.digest,)
            await answer(decider, question())
            problems = await decider.apply(Snapshot(version="2", policy=good, shadow=bad))
            assert len(problems) == 1
            assert problems[0].startswith("sha256:bad: shop.rego:3:")
            assert decider.recall(question(), time.monotonic()) is not None

    asyncio.run(run())


def test_kept_decisions_answer_while_the_decision_point_is_gone() -> None:
    async def run() -> None:
        async with service(shop()) as (_, target):
            client = client_of(target)
            decider = PolicyDecider(central=client, kept=KeptDecisions())
            assert (await answer(decider, question())).verdict is ALLOW
        kept = decider.recall(question(), time.monotonic())
        assert kept is not None
        assert kept.verdict is ALLOW
        assert (await answer(decider, question(principal="other", timeout=0.5))).verdict is ERROR
        await client.close()

    asyncio.run(run())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("answer"), st.integers(0, 5), st.sampled_from(["allow", "deny", "timeout", "eval"])),
        st.tuples(st.just("late"), st.integers(0, 20), st.booleans()),
        st.tuples(st.just("twice"), st.integers(0, 5), st.booleans()),
    ),
    max_size=40,
)


@given(STEPS)
@settings(deadline=None, max_examples=150)
def test_whatever_happens_every_asker_is_answered_exactly_once_and_with_an_answer_to_its_own_question(steps: list[Any]) -> None:
    """Of three callers, 0 is allowed, 1 denied, and 2 either; errors come at will."""

    async def run() -> None:
        script = Script()
        decider = PolicyDecider(central=script, kept=KeptDecisions())
        got: list[tuple[int, list[Decision]]] = []
        gone: list[Callable[[Decision], None]] = []

        def landed(what: DecisionQuestion, said: str) -> Decision:
            if said in {"timeout", "eval"}:
                return error(said, said)
            caller = int(what.asking.caller.principal)
            verdict = (ALLOW, DENY, ALLOW if said == "allow" else DENY)[caller]
            return Decision(verdict=verdict, reason=str(caller))

        for kind, number, how in steps:
            if kind == "ask":
                answers: list[Decision] = []
                got.append((number, answers))
                what = question(principal=str(number))
                recalled = decider.recall(what, time.monotonic()) if how else None
                if recalled is not None:
                    answers.append(recalled)
                else:
                    decider.ask(what, answers.append)
            elif kind == "answer" and script.open:
                what, done = script.open.pop(number % len(script.open))
                gone.append(done)
                done(landed(what, how))
            elif kind == "twice" and gone:
                gone[number % len(gone)](Decision(verdict=ALLOW, reason="a second answer"))
            elif kind == "late" and decider._open:
                waiters = sorted(decider._open, key=id)
                decider._late(waiters[number % len(waiters)])
        while script.open:
            what, done = script.open.pop()
            done(landed(what, "allow"))
        for caller, answers in got:
            assert len(answers) == 1
            assert answers[0].verdict is ERROR or answers[0].reason == str(caller)
        assert not decider._flights
        assert not decider._open

    asyncio.run(run())


def gated(provider: str = "shop/authz:80", **more: Any) -> DecisionQuestion:
    """A question to a provider behind one that says whether it is to be asked: not about `web`."""
    gate = DecisionPolicy(name="custom", level="gateway", decision="shop.authz.decision", authorization=True)
    policy = DecisionPolicy(name="custom", level="gateway", provider=provider, gate=gate, timeout=1.0, **more)
    return DecisionQuestion(policy, question().asking, shop())


@pytest.mark.parametrize(
    ("opened", "behind", "verdict", "asked"),
    [
        (Decision(verdict=ALLOW, rule="no CUSTOM policy matches"), None, ALLOW, 0),
        (Decision(verdict=DENY), Decision(verdict=ALLOW), ALLOW, 1),
        (Decision(verdict=DENY), Decision(verdict=DENY), DENY, 1),
        (Decision(verdict=DENY), error("provider", "it does not answer"), ERROR, 1),
        (error("timeout", "no worker answers"), None, ERROR, 0),
    ],
)
def test_a_provider_behind_a_gate_is_asked_only_if_that_says_so(
    opened: Decision, behind: Decision | None, verdict: Verdict, asked: int
) -> None:
    async def run() -> None:
        own, provider, kept = Script(), Script(), KeptDecisions()
        decider = PolicyDecider(central=Script(), own=own, kept=kept)
        decider.services["edge/in"] = provider
        for again in (False, True):
            what = gated(auth=ExternalAuth(cluster="shop/authz:80", protocol="GRPC"), error_status=429)
            known = decider.recall(what, time.monotonic())
            if again and opened.verdict is ALLOW:
                assert known is not None
                assert known.kept
                break
            assert known is None
            waiting = answer(decider, what)
            if own.open:
                assert not again or opened.verdict is ERROR, "what the gate says is kept"
                own.answer(opened)
            assert provider.asked == asked * (2 if again else 1)
            if behind is not None:
                provider.answer(behind)
            decision = await waiting
            assert decision.verdict is verdict
            assert decision.status == (429 if behind is not None and verdict is ERROR else 0)
        await decider.close()

    asyncio.run(run())


def test_an_error_has_the_status_that_the_policy_gives_it() -> None:
    async def run() -> None:
        script = Script()
        decider = PolicyDecider(central=script)
        for said, wanted in ((error("timeout", "x"), 502), (Decision(verdict=ERROR, status=500), 500), (Decision(verdict=DENY), 0)):
            waiting = answer(decider, question(error_status=502))
            script.answer(said)
            assert (await waiting).status == wanted
        await decider.close()

    asyncio.run(run())


def shadowed(what: DecisionQuestion) -> DecisionQuestion:
    return msgspec.structs.replace(what, policy=msgspec.structs.replace(what.policy, shadow=True))


def test_what_is_not_enforced_is_asked_aside_and_shares_no_flight() -> None:
    async def run() -> None:
        central, aside = Script(), Script()
        telemetry = Telemetry()
        decider = PolicyDecider(central=central, aside=aside, kept=KeptDecisions(), telemetry=telemetry)
        got: list[Decision] = []
        decider.ask(shadowed(question()), got.append)
        decider.ask(question(), got.append)
        assert (central.asked, aside.asked) == (1, 1)
        aside.answer(error("timeout", "slow"))
        assert [each.verdict for each in got] == [ERROR]
        central.answer(Decision(verdict=ALLOW))
        assert [each.verdict for each in got] == [ERROR, ALLOW]
        page = telemetry.page().decode()
        assert 'tollhouse_decision_errors_total{to="shadow",cause="timeout"} 1' in page
        assert 'to="central",cause' not in page
        await decider.close()

    asyncio.run(run())


def test_what_is_not_enforced_can_not_take_the_places_of_others() -> None:
    async def run() -> None:
        central, aside = Script(), Script()
        decider = PolicyDecider(central=central, aside=aside, max_waiting=1)
        got: list[Decision] = []
        for _ in range(MOST_SHADOWS + 5):
            decider.ask(shadowed(question()), got.append)
        assert [each.cause for each in got] == ["overloaded"] * 5
        decider.ask(question(), got.append)
        assert central.asked == 1
        await decider.close()
        assert len(got) == MOST_SHADOWS + 6

    asyncio.run(run())

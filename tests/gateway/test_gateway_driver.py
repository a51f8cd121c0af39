from __future__ import annotations

from typing import Any

import msgspec
import pytest
from gateway_world import (
    ALLOW,
    DENY,
    ERROR,
    LIMIT,
    NO,
    POLICY,
    WEB,
    YES,
    Deciding,
    Lending,
    a_rule,
    an_outcome,
    pending_of,
    place_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.driver import Driver, Waiting
from gateway.plan import Answers, Pending, Permit, Plan, Settled
from gateway.settle import UNANSWERED, objection, settle
from mesh.outcome import Outcome
from mesh.questions import Decision, Grant, Verdict
from mesh.refusals import BrokenBackend, Denied, OverQuota, PolicyError, PolicyStale, QuotaError, Refusal


def asked(*policies: str, limits: tuple[str, ...] = (), shadow: tuple[str, ...] = (), **changes: Any) -> Pending:
    decisions = tuple(msgspec.structs.replace(POLICY, name=name, shadow=name in shadow) for name in policies)
    made = tuple(msgspec.structs.replace(LIMIT, name=name, shadow=name in shadow) for name in limits)
    return pending_of(place_of(a_rule(decisions=decisions, limits=made, **changes)))


class Drive:
    """One request being driven."""

    def __init__(self, pending: Pending, decider: Deciding, lessee: Lending | None = None, stale: bool = False) -> None:
        self.decider = decider
        self.lessee = lessee or Lending()
        self.outcome: Outcome = an_outcome(pending)
        self.done: list[Settled] = []
        self.result = Driver(decider, self.lessee, lambda: 5.0, lambda: stale).drive(pending, self.outcome, self.done.append)

    @property
    def waiting(self) -> Waiting:
        assert isinstance(self.result, Waiting)
        return self.result

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        return [(question.policy.name, decision.verdict.value) for question, decision in self.outcome.decisions]

    @property
    def grants(self) -> list[tuple[str, bool]]:
        return [(question.limit.name, grant.admitted) for question, grant in self.outcome.grants]


def test_with_everything_in_hand_it_is_settled_in_the_same_call() -> None:
    pending = asked("p", limits=("l",))
    drive = Drive(pending, Deciding({"p": ALLOW}), Lending({"l": YES}))
    assert isinstance(drive.result, Permit)
    assert (drive.verdicts, drive.grants, drive.done) == ([("p", "allow")], [("l", True)], [])
    assert isinstance(pending.plan, Plan)
    outcome = drive.outcome
    assert outcome.caller is not None
    assert (outcome.caller.principal, outcome.route, outcome.template) == (WEB, "shop/orders#0", "/**")
    assert (outcome.service, outcome.listener) == ("shop/orders", "https")
    assert (outcome.request_id, outcome.trace) == (pending.plan.request_id, pending.plan.trace)


def test_a_denial_in_hand_takes_no_token_and_asks_nobody() -> None:
    drive = Drive(asked("p", "q", limits=("l",)), Deciding({"p": DENY}), Lending({"l": YES}))
    assert isinstance(drive.result, Denied)
    assert (drive.decider.asked, drive.lessee.taken) == ([], [])
    assert drive.verdicts == [("p", "deny")]


def test_what_is_missing_is_asked_all_at_once() -> None:
    drive = Drive(asked("p", "q", "r", limits=("l",)), Deciding({"q": ALLOW}), Lending({"l": YES}))
    assert drive.waiting
    assert [question.policy.name for question, _ in drive.decider.asked] == ["p", "r"]
    drive.decider.answer("r", ALLOW)
    assert (drive.done, drive.lessee.taken) == ([], [])
    drive.decider.answer("p", ALLOW)
    assert isinstance(drive.done[0], Permit)
    assert drive.lessee.taken == ["l"]
    assert sorted(drive.verdicts) == [("p", "allow"), ("q", "allow"), ("r", "allow")]


def test_the_order_of_the_questions_counts_and_not_that_of_the_answers() -> None:
    drive = Drive(asked("p", "q"), Deciding())
    drive.decider.answer("q", DENY)
    assert drive.done == []
    drive.decider.answer("p", ERROR)
    assert isinstance(drive.done[0], PolicyError)


def test_nobody_waits_for_answers_behind_the_one_that_decides() -> None:
    drive = Drive(asked("p", "q"), Deciding())
    drive.decider.answer("p", DENY)
    assert isinstance(drive.done[0], Denied)
    drive.decider.answer("q", ALLOW)
    assert len(drive.done) == 1
    assert drive.verdicts == [("p", "deny")]


def test_a_denial_in_hand_waits_for_a_missing_answer_before_it_and_asks_nothing_behind_it() -> None:
    drive = Drive(asked("p", "q", "r"), Deciding({"q": DENY}))
    assert [question.policy.name for question, _ in drive.decider.asked] == ["p"]
    assert drive.decider.recalled == ["p", "q"]
    drive.decider.answer("p", ALLOW)
    assert isinstance(drive.done[0], Denied)


def test_answers_that_come_while_asking_settle_in_the_same_call() -> None:
    drive = Drive(asked("p", "q", limits=("l",)), Deciding({}, {"p": ALLOW, "q": ALLOW}), Lending({}, {"l": YES}))
    assert isinstance(drive.result, Permit)
    assert drive.done == []
    drive = Drive(asked("p", limits=("l",)), Deciding({}, {"p": DENY}))
    assert isinstance(drive.result, Denied)
    drive = Drive(asked(limits=("l", "m")), Deciding(), Lending({"l": YES}, {"m": NO}))
    assert isinstance(drive.result, OverQuota)
    assert drive.lessee.returned == ["l"]


def test_tokens_that_are_asked_for() -> None:
    drive = Drive(asked("p", limits=("l", "m")), Deciding({"p": ALLOW}), Lending({"m": YES}))
    assert [question.limit.name for question, _ in drive.lessee.asked] == ["l"]
    drive.lessee.answer("l", YES)
    assert isinstance(drive.done[0], Permit)
    assert sorted(drive.grants) == [("l", True), ("m", True)]
    assert drive.lessee.returned == []


def test_tokens_go_back_when_a_later_limit_refuses() -> None:
    drive = Drive(asked(limits=("l", "m", "n")), Deciding(), Lending({"l": YES, "m": NO, "n": YES}))
    assert isinstance(drive.result, OverQuota)
    assert (drive.lessee.taken, drive.lessee.returned) == (["l", "m"], ["l"])
    assert drive.grants == [("l", True), ("m", False)]


def test_tokens_that_arrive_after_a_refusal_go_back_too() -> None:
    drive = Drive(asked(limits=("l", "m", "n")), Deciding())
    drive.lessee.answer("n", YES)
    drive.lessee.answer("m", NO)
    assert isinstance(drive.done[0], OverQuota)
    assert drive.lessee.returned == ["n"]
    drive.lessee.answer("l", YES)
    assert drive.lessee.returned == ["n", "l"]
    assert len(drive.done) == 1


def test_tokens_of_a_store_that_could_not_be_asked_were_never_taken() -> None:
    lent = Grant(admitted=True, error="gone")
    drive = Drive(asked(limits=("l", "m")), Deciding(), Lending({"l": lent, "m": NO}))
    assert isinstance(drive.result, OverQuota)
    assert drive.lessee.returned == []
    drive = Drive(asked(limits=("l",)), Deciding(), Lending({"l": Grant(admitted=False, error="gone")}))
    assert isinstance(drive.result, QuotaError)


def test_a_broken_backend_costs_no_token() -> None:
    drive = Drive(asked("p", limits=("l",), backends=()), Deciding({"p": ALLOW}), Lending({"l": YES}))
    assert isinstance(drive.result, BrokenBackend)
    assert drive.lessee.returned == ["l"]
    drive = Drive(asked("p", limits=("l",), backends=()), Deciding({"p": DENY}), Lending({"l": YES}))
    assert isinstance(drive.result, Denied)


def test_after_cancel_nothing_is_called_and_tokens_go_back() -> None:
    drive = Drive(asked("p", limits=("l", "m")), Deciding({"p": ALLOW}), Lending({"l": YES}))
    drive.waiting.cancel()
    assert drive.lessee.returned == ["l"]
    drive.lessee.answer("m", YES)
    assert drive.lessee.returned == ["l", "m"]
    drive.waiting.cancel()
    assert drive.lessee.returned == ["l", "m"]
    assert drive.done == []
    drive = Drive(asked("p", "s", shadow=("s",), limits=("l",)), Deciding())
    drive.waiting.cancel()
    drive.decider.answer("p", ALLOW)
    drive.decider.answer("s", ALLOW)
    assert (drive.done, drive.lessee.taken, drive.verdicts) == ([], [], [])


def test_cancel_comes_too_late_for_what_is_settled() -> None:
    drive = Drive(asked("p", limits=("l",)), Deciding(), Lending({"l": YES}))
    drive.decider.answer("p", ALLOW)
    drive.waiting.cancel()
    assert drive.lessee.returned == []


def test_stale_policy_is_not_asked_and_what_is_kept_does_not_count() -> None:
    drive = Drive(asked("p"), Deciding({"p": ALLOW}), stale=True)
    assert isinstance(drive.result, PolicyStale)
    assert drive.decider.recalled == []
    assert drive.verdicts == [("p", "error")]
    policy = msgspec.structs.replace(POLICY, name="p", failure_mode="Allow")
    pending = pending_of(place_of(a_rule(decisions=(policy,))))
    assert isinstance(Drive(pending, Deciding({"p": DENY}), stale=True).result, Permit)


def test_another_provider_does_not_grow_stale() -> None:
    policy = msgspec.structs.replace(POLICY, name="p", provider="authz.example:9000", decision="")
    pending = pending_of(place_of(a_rule(decisions=(policy,))))
    assert isinstance(Drive(pending, Deciding({"p": ALLOW}), stale=True).result, Permit)
    assert isinstance(Drive(pending, Deciding({"p": DENY}), stale=True).result, Denied)


def test_nobody_waits_for_a_shadow_question() -> None:
    drive = Drive(asked("s", "p", shadow=("s",), limits=("l",)), Deciding({"p": ALLOW}), Lending({"l": YES}))
    assert isinstance(drive.result, Permit)
    assert drive.verdicts == [("p", "allow")]
    drive.decider.answer("s", DENY)
    assert drive.verdicts == [("p", "allow"), ("s", "deny")]
    assert drive.done == []


def test_shadow_questions_are_asked_about_refused_requests_too() -> None:
    drive = Drive(asked("p", "s", "t", shadow=("s", "t")), Deciding({"p": DENY, "s": ALLOW}))
    assert isinstance(drive.result, Denied)
    assert drive.verdicts == [("p", "deny"), ("s", "allow")]
    drive.decider.answer("t", ALLOW)
    assert drive.verdicts[-1] == ("t", "allow")


def test_nobody_waits_for_a_shadow_limit() -> None:
    drive = Drive(asked(limits=("s", "l"), shadow=("s",)), Deciding(), Lending({"l": YES}))
    assert isinstance(drive.result, Permit)
    drive.lessee.answer("s", NO)
    assert drive.grants == [("l", True), ("s", False)]
    drive = Drive(asked(limits=("s", "l"), shadow=("s",)), Deciding(), Lending({"s": NO, "l": YES}))
    assert isinstance(drive.result, Permit)
    assert drive.grants == [("s", False), ("l", True)]


WAYS = st.sampled_from(["kept", "at once", "later"])
VERDICTS = st.sampled_from([ALLOW, ALLOW, ALLOW, DENY, ERROR])
GRANTS = st.sampled_from([YES, YES, NO, Grant(admitted=False, error="gone"), Grant(admitted=True, error="gone")])


@settings(max_examples=400)
@given(
    st.lists(st.tuples(WAYS, VERDICTS, st.booleans(), st.sampled_from(["Deny", "Allow"])), max_size=4),
    st.lists(st.tuples(WAYS, GRANTS, st.booleans()), max_size=4),
    st.randoms(use_true_random=False),
    st.booleans(),
    st.booleans(),
)
def test_whatever_the_order_of_the_answers(decided: Any, granted: Any, rng: Any, broken: bool, cancel: bool) -> None:
    """A permit only if all allow; the refusal is the one that the questions' order says; no token is lost or given back twice."""
    policies = tuple(
        msgspec.structs.replace(POLICY, name=f"p{at}", shadow=shadow, failure_mode=mode) for at, (_, _, shadow, mode) in enumerate(decided)
    )
    limits = tuple(msgspec.structs.replace(LIMIT, name=f"l{at}", shadow=shadow) for at, (_, _, shadow) in enumerate(granted))
    changes: dict[str, Any] = {"backends": ()} if broken else {}
    pending = pending_of(place_of(a_rule(decisions=policies, limits=limits, **changes)))
    decisions = {f"p{at}": (way, decision) for at, (way, decision, _, _) in enumerate(decided)}
    grants = {f"l{at}": (way, grant) for at, (way, grant, _) in enumerate(granted)}
    decider = Deciding(*({name: answer for name, (way, answer) in decisions.items() if way == wanted} for wanted in ("kept", "at once")))
    lessee = Lending(*({name: answer for name, (way, answer) in grants.items() if way == wanted} for wanted in ("kept", "at once")))
    drive = Drive(pending, decider, lessee)
    cancelled = False
    while decider.asked or lessee.asked:
        if cancel and not drive.done and isinstance(drive.result, Waiting) and rng.random() < 0.3:
            drive.result.cancel()
            cancelled = True
        if decider.asked and (not lessee.asked or rng.random() < 0.5):
            name = rng.choice(decider.asked)[0].policy.name
            decider.answer(name, decisions[name][1])
        else:
            name = rng.choice(lessee.asked)[0].limit.name
            lessee.answer(name, grants[name][1])
    settled = drive.done[0] if isinstance(drive.result, Waiting) and drive.done else drive.result
    assert len(drive.done) <= 1
    assert not (drive.done and not isinstance(drive.result, Waiting))

    first = next(
        (refusal for question in pending.decisions if (refusal := objection(question, decisions[question.policy.name][1])) is not None),
        None,
    )
    enforced = [grants[question.limit.name][1] for question in pending.tokens if not question.limit.shadow]
    if cancelled:
        assert not drive.done
    elif first is not None:
        assert settled == first
        assert lessee.taken == []
    elif not all(grant.admitted for grant in enforced):
        assert isinstance(settled, (OverQuota, QuotaError))
    elif broken:
        assert isinstance(settled, BrokenBackend)
    else:
        assert isinstance(settled, Permit)
    spent = sorted(name for name in lessee.taken if grants[name][1].admitted and not grants[name][1].error)
    if cancelled or isinstance(settled, Refusal):
        assert sorted(lessee.returned) == spent
    else:
        assert lessee.returned == []
    names = [question.policy.name for question, _ in drive.outcome.decisions]
    assert len(set(names)) == len(names)
    assert all(decision is decisions[question.policy.name][1] for question, decision in drive.outcome.decisions)
    assert len(drive.grants) == len(set(drive.grants))


def test_the_stand_in_for_a_late_shadow_answer_lets_nothing_through() -> None:
    pending = asked("p")
    assert isinstance(settle(pending, Answers(decisions=(UNANSWERED,))), PolicyError)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_is_recorded(verdict: Verdict) -> None:
    drive = Drive(asked("p"), Deciding())
    drive.decider.answer("p", Decision(verdict=verdict))
    assert drive.verdicts == [("p", verdict.value)]

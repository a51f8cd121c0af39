"""`PolicyDecider`: how a gateway gets its decisions. Kept ones first; what is not in hand is asked of whoever the policy says.

* Identical questions in flight are asked once. Each asker still gets its answer within its own policy's time.
* Allow, deny and error stay what they are: an error is never kept, and never turned into one of the others here (what it means for the
  request is the policy's failure mode, which the gateway applies).
* A decision is kept from when its question was *sent*.
* From `enact` on nothing is decided by a revision that is not in force: questions that were made before are answered by the one that is,
  and an answer of another that was on its way is thrown away, unless both have the same entry point. A gateway that has said that it
  applies a revision can be taken at its word.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol

import msgspec

from mesh.model import DecisionPolicy, Snapshot
from mesh.policy import EntryPoint, Revision
from mesh.questions import Decision, DecisionQuestion, Verdict
from pdp.answer import error
from pdp.asker import Asker
from pdp.client import Providers
from pdp.engines.engine import Engine, EngineUnavailable, PolicyError
from pdp.kept import KeptDecisions, why_not
from telemetry.record import Telemetry

_log = logging.getLogger(__name__)
_BOUNDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_HIT: Final = ("hit",)
_MISS: Final = ("miss",)
_COALESCED: Final = ("coalesced",)

MOST_SHADOWS: Final = 64
"""Questions in flight whose answers are not enforced; more are not asked, and counted as errors of theirs."""

Done = Callable[[Decision], None]


class _Counter(Protocol):
    def inc(self, labels: tuple[str, ...] = (), by: float = 1) -> None: ...


class _Silent:
    """Stands for a metric when there is no telemetry."""

    def inc(self, labels: tuple[str, ...] = (), by: float = 1) -> None:
        """Counts nothing."""

    def observe(self, value: float, labels: tuple[str, ...] = ()) -> None:
        """Counts nothing."""


class _Waiter:
    """One asker. `done` is None once it has been called."""

    __slots__ = ("again", "done", "key", "question", "timer")

    def __init__(self, question: DecisionQuestion, key: Hashable | None, done: Done) -> None:
        self.question = question
        self.key = key
        self.done: Done | None = done
        self.timer: asyncio.TimerHandle | None = None
        self.again = False
        """Whether it has waited for somebody else's question that took too long already."""


class _Flight:
    """One question on its way, and all who wait for its answer; the first of them is the one whose question it is."""

    __slots__ = ("key", "landed", "started", "waiters")

    def __init__(self, key: Hashable | None, waiters: list[_Waiter], started: float) -> None:
        self.key = key
        self.waiters = waiters
        self.started = started
        self.landed = False


class PolicyDecider:
    """A `mesh.questions.Decider`. Owned by one event loop."""

    def __init__(
        self,
        *,
        central: Asker,
        local: Asker | None = None,
        own: Asker | None = None,
        aside: Asker | None = None,
        kept: KeptDecisions | None = None,
        providers: Providers | None = None,
        engines: Sequence[Engine] = (),
        clock: Callable[[], float] = time.monotonic,
        max_waiting: int = 10_000,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`central` is asked for `place: Central`, `local` for `place: Local` (`central` when there is none), `own` for what
        AuthorizationPolicies ask (`local` when there is none): they have a revision of their own, beside the active one. `engines` are
        those that must hold the active revision. `aside` is asked in the place of `central` what is not enforced (`central` when there is
        none), so that it is nobody else's failure. Nothing is kept without `kept`. `clock` is the one whose time `recall` is given."""
        self._central = central
        self._local = local or central
        self._own = own or self._local
        self._aside = aside or central
        self._kept = kept
        self._providers = providers or Providers()
        self._engines = tuple(engines)
        self._clock = clock
        self._max_waiting = max_waiting
        self.services: dict[str, Asker] = {}
        """Who asks the services that filters of routes name (`DecisionPolicy.auth`), by the gateway that has the request."""
        self._revision: Revision | None = None
        """The one in force, once there was one."""
        self._canary = ""
        """Digest of the one that decides about some, if there is one."""
        self._enacted = False
        self._flights: dict[Hashable, _Flight] = {}
        self._open: set[_Waiter] = set()
        self._shadows: set[_Waiter] = set()
        """Those that wait for what is not enforced: they are bounded on their own, and share no flight with others."""
        self._last: tuple[DecisionQuestion | None, Hashable | None, str] = (None, None, "")
        self._cache: _Counter = _Silent()
        self._errors: _Counter = _Silent()
        self._observe: Callable[[float, tuple[str, ...]], None] = _Silent().observe
        if telemetry is not None:
            self._count(telemetry)

    def _count(self, telemetry: Telemetry) -> None:
        self._cache = telemetry.counter(
            "tollhouse_decision_cache_total",
            "Questions by what was kept: hit, miss, coalesced, or why nothing is.",
            ("result",),
        )
        self._errors = telemetry.counter("tollhouse_decision_errors_total", "Questions without an answer, by cause.", ("to", "cause"))
        seconds = telemetry.histogram("tollhouse_decision_seconds", "Time that a question took which had to be asked.", _BOUNDS, ("to",))
        self._observe = seconds.observe
        telemetry.gauge_function("tollhouse_decisions_waiting", "Requests that wait for a decision.", lambda: len(self._open))
        kept = self._kept
        if kept is not None:
            telemetry.gauge_function("tollhouse_decision_cache_entries", "Decisions that are kept.", lambda: len(kept))
            telemetry.gauge_function("tollhouse_decision_cache_bytes", "What they take, about.", lambda: kept.bytes)
            telemetry.counter_function(
                "tollhouse_decision_cache_evicted_total", "Decisions dropped for want of room.", lambda: kept.evicted
            )

    def recall(self, question: DecisionQuestion, now: float) -> Decision | None:
        """As `Decider.recall`."""
        gate = question.policy.gate
        if gate is not None:
            opened = self.recall(DecisionQuestion(gate, question.asking, question.revision), now)
            return opened if opened is not None and opened.verdict is Verdict.ALLOW else None
        if question.revision is not self._revision and self._enacted:
            question = self._current(question)
        key, why = self._key(question)
        if key is None or self._kept is None:
            self._cache.inc((why or "off",))
            return None
        decision = self._kept.get(key, now)
        self._cache.inc(_MISS if decision is None else _HIT)
        return decision

    def ask(self, question: DecisionQuestion, done: Done) -> None:
        """As `Decider.ask`."""
        if question.policy.gate is not None:
            self._ask_gate(question, question.policy.gate, done)
        else:
            self._ask(question, _with_status(question.policy, done) if question.policy.error_status else done)

    def _ask_gate(self, question: DecisionQuestion, gate: DecisionPolicy, done: Done) -> None:
        """Asks the provider of `question` if its gate says that it is to be asked. The gate's *deny* means that; its error is an error."""

        behind = _with_status(question.policy, done)

        def opened(decision: Decision) -> None:
            if decision.verdict is Verdict.DENY:
                self._ask(question, behind)
            else:
                done(decision)

        asked = DecisionQuestion(gate, question.asking, question.revision)
        known = self.recall(asked, self._clock())
        if known is not None:
            opened(known)
        else:
            self._ask(asked, opened)

    def _ask(self, question: DecisionQuestion, done: Done) -> None:
        shadow = question.policy.shadow
        waiting, most = (self._shadows, MOST_SHADOWS) if shadow else (self._open, self._max_waiting)
        if len(waiting) >= most:
            self._errors.inc((_to(question.policy), "overloaded"))
            done(error("overloaded", f"{len(waiting)} requests wait for a decision"))
            return
        if question.revision is not self._revision and self._enacted:
            question = self._current(question)
        key, _ = self._key(question)
        if key is not None and shadow:
            key = ("shadow", key)
        waiter = _Waiter(question, key, done)
        waiting.add(waiter)
        waiter.timer = asyncio.get_running_loop().call_later(question.policy.timeout, self._late, waiter)
        self._board(waiter)

    def enact(self, snapshot: Snapshot) -> None:
        """The policy of `snapshot` is in force from now on, and no other."""
        self._revision = snapshot.policy
        self._canary = snapshot.canary.digest if snapshot.canary is not None else ""
        self._enacted = True

    async def apply(self, snapshot: Snapshot) -> tuple[str, ...]:
        """Makes the engines hold the active revision and those that are tried; returns what went wrong, one sentence each. What is kept
        stays: keys name what a decision depends on. Clients of providers that no policy names any more are ended."""
        problems = []
        for revision in (snapshot.shadow, snapshot.canary, snapshot.policy):
            if revision is None:
                continue
            for engine in self._engines:
                try:
                    await engine.load(revision)
                except (PolicyError, EngineUnavailable) as problem:
                    problems.append(f"{revision.digest}: {problem}")
        await self._providers.keep(policy.provider for policy in snapshot.policies.values() if policy.provider)
        return tuple(problems)

    async def close(self) -> None:
        """Answers all who wait with an error, and ends the providers' clients. Askers and engines are the wiring's to close."""
        for waiter in [*self._open, *self._shadows]:
            self._tell(waiter, error("unavailable", "the gateway is ending"))
        self._flights.clear()
        await self._providers.close()

    def _key(self, question: DecisionQuestion) -> tuple[Hashable | None, str]:
        """The key of what is kept, or None and why there is none. `ask` usually follows `recall`: the last one is remembered."""
        last, key, why = self._last
        if last is not question:
            key, why = self._make_key(question)
            self._last = (question, key, why)
        return key, why

    def _make_key(self, question: DecisionQuestion) -> tuple[Hashable | None, str]:
        policy = question.policy
        if self._kept is None:
            return None, "off"
        if policy.provider:
            return None, "provider"
        point = _entry_point(question)
        if point is None:
            return None, "unknown"
        key = self._kept.key_for(question.asking, policy, point)
        return key, "" if key is not None else why_not(policy, point) or "document"

    def renewed(self, question: DecisionQuestion) -> DecisionQuestion:
        """As `Decider.renewed`."""
        if question.revision is self._revision or not self._enacted:
            return question
        current = self._current(question)
        return question if current is question or _same_entry_point(question, current) else current

    def _current(self, question: DecisionQuestion) -> DecisionQuestion:
        """The question to the revision in force, when it was made for one that no longer is."""
        asked, now, policy = question.revision, self._revision, question.policy
        if asked is None or asked is now or (now is not None and asked.digest == now.digest) or asked.digest == self._canary:
            return question
        if policy.shadow or policy.authorization or policy.gate is not None:  # not enforced, or not of this revision
            return question
        return msgspec.structs.replace(question, revision=now)

    def _board(self, waiter: _Waiter) -> None:
        """Asks, or waits for the same question on its way."""
        flight = self._flights.get(waiter.key) if waiter.key is not None else None
        if flight is not None:
            flight.waiters.append(waiter)
            self._cache.inc(_COALESCED)
        else:
            self._fly(waiter.key, [waiter])

    def _ask_anew(self, flight: _Flight) -> bool:
        """An answer has come: whether it is of a revision that is no longer in force and may not be used. Then all who wait ask again."""
        question = flight.waiters[0].question
        if self.renewed(question) is question:
            return False
        for waiter in flight.waiters:
            if waiter.done is not None:
                waiter.question = self._current(waiter.question)
                waiter.key, _ = self._key(waiter.question)
                kept = self._kept.get(waiter.key, self._clock()) if self._kept is not None and waiter.key is not None else None
                if kept is not None:
                    self._tell(waiter, kept)
                else:
                    self._board(waiter)
        return True

    def _fly(self, key: Hashable | None, waiters: list[_Waiter]) -> None:
        flight = _Flight(key, waiters, self._clock())
        if key is not None:
            self._flights[key] = flight
        question = waiters[0].question
        try:
            self._asker(question).ask(question, lambda decision: self._landed(flight, decision))
        except Exception as problem:
            _log.exception("a question could not be asked")
            self._landed(flight, error("internal", f"the question could not be asked: {problem}"))

    def _asker(self, question: DecisionQuestion) -> Asker:
        policy = question.policy
        if policy.auth is not None:
            return self.services[question.asking.gateway]
        if policy.provider:
            return self._providers.asker(policy.provider)
        if policy.authorization:
            return self._own
        if policy.place == "Local":
            return self._local
        return self._aside if policy.shadow else self._central

    def _landed(self, flight: _Flight, decision: Decision) -> None:
        if flight.landed:
            return
        flight.landed = True
        question = flight.waiters[0].question
        key = flight.key
        if key is not None and self._flights.get(key) is flight:
            del self._flights[key]
        if self._ask_anew(flight):
            return
        to = _to(question.policy)
        seconds = self._clock() - flight.started
        self._observe(seconds, (to,))
        if (
            decision.verdict is not Verdict.ERROR
            and key is not None
            and self._kept is not None
            and (point := _entry_point(question)) is not None
        ):
            self._kept.put(key[1] if question.policy.shadow else key, decision, flight.started, point.ttl)  # type: ignore[index]
        decision = msgspec.structs.replace(decision, seconds=seconds)
        again: list[_Waiter] = []
        for number, waiter in enumerate(flight.waiters):
            if number and decision.cause == "timeout" and waiter.done is not None and not waiter.again:
                waiter.again = True  # it came later than the one whose time is over, and has time left
                again.append(waiter)
            else:
                self._tell(waiter, decision)
        if again:
            self._fly(key, again)

    def _late(self, waiter: _Waiter) -> None:
        self._tell(waiter, error("timeout", f"no decision within {waiter.question.policy.timeout:g} s"))
        key = waiter.key
        flight = self._flights.get(key) if key is not None else None
        if flight is not None and all(other.done is None for other in flight.waiters):
            del self._flights[key]  # nobody waits for it any more, and the next who asks shall not either

    def _tell(self, waiter: _Waiter, decision: Decision) -> None:
        done = waiter.done
        if done is None:
            return
        waiter.done = None
        if decision.verdict is Verdict.ERROR:
            self._errors.inc((_to(waiter.question.policy), decision.cause))
        (self._shadows if waiter.question.policy.shadow else self._open).discard(waiter)
        if waiter.timer is not None:
            waiter.timer.cancel()
        try:
            done(decision)
        except Exception:
            _log.exception("what was to be done with a decision failed")


def _with_status(policy: DecisionPolicy, done: Done) -> Done:
    """`done` for an answer whose errors have the status that `policy` gives them, unless they have one of their own."""

    def told(decision: Decision) -> None:
        if decision.verdict is Verdict.ERROR and policy.error_status and not decision.status:
            decision = msgspec.structs.replace(decision, status=policy.error_status)
        done(decision)

    return told


def _entry_point(question: DecisionQuestion) -> EntryPoint | None:
    revision = question.revision
    return revision.entry_points.get(question.policy.decision) if revision is not None else None


def _same_entry_point(one: DecisionQuestion, other: DecisionQuestion) -> bool:
    before, after = _entry_point(one), _entry_point(other)
    return before is not None and after is not None and before.digest == after.digest


def _to(policy: DecisionPolicy) -> str:
    return "shadow" if policy.shadow else "provider" if policy.provider else policy.place.lower()

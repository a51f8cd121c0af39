"""Gets the questions of a request answered: from what is in hand when it can, in the same call, else by asking.

It is the only one that touches the decision cache and the leases; what the answers mean is `gateway.settle`'s to say. The order:

1. Every decision is recalled. A refusal in hand that no missing answer comes before settles the request.
2. What is missing is asked, all at once. The first answer, in the order of the questions, that is not *allow* decides; nobody waits for
   answers behind it.
3. Tokens are taken only once every enforced decision allows. What is in hand is taken first, in order; the rest is asked for at once.
4. A policy that comes in force while the request waits is heard: what the one before had answered is asked again before anything follows.
5. When the request is refused in the end, the tokens of every admitted question are given back, also those that arrive later.

Nobody waits for a question in shadow mode. When its answer is not in hand as the request goes on, it is recorded in the outcome as soon as
it comes, and on its own when the request is over by then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from gateway.plan import Answers, Pending, Plan, Settled
from gateway.settle import STALE, UNANSWERED, objection, refuses, settle
from mesh.outcome import Outcome
from mesh.questions import Decider, Decision, DecisionQuestion, Grant, Lessee, SlotGrant, TokenQuestion
from mesh.refusals import Refusal

_OPEN: Final = Grant(admitted=True, error="the answer had not come when the request went on")
"""Stands for the answer to a shadow question about tokens."""
_NO_ANSWERS: Final = Answers()


Late = Callable[[Outcome, DecisionQuestion, Decision], None]
"""Takes a decision in shadow mode that came when its request had been recorded."""


def nobody(outcome: Outcome, question: DecisionQuestion, decision: Decision) -> None:
    """Takes late answers where nobody wants them."""


def never() -> bool:
    """A policy that does not grow old."""
    return False


class Driver:
    """Drives requests from their questions to what is settled. One for a worker; it holds nothing about a request."""

    __slots__ = ("_clock", "_decider", "_late", "_lessee", "_stale")

    def __init__(
        self,
        decider: Decider,
        lessee: Lessee,
        clock: Callable[[], float],
        stale: Callable[[], bool] = never,
        late: Late = nobody,
    ) -> None:
        """`clock`: monotonic seconds. `late`: see `Late`.

        `stale`: whether the last contact with the configuration source is longer ago than
        `Mesh.policy.maxStaleness`; our own PDP is not asked then, and what is kept does not count."""
        self._decider = decider
        self._lessee = lessee
        self._clock = clock
        self._stale = stale
        self._late = late

    def drive(self, pending: Pending, outcome: Outcome, done: Callable[[Settled], None]) -> Settled | Waiting:
        """What is settled, when everything is in hand; else a `Waiting`, and `done` is called once, later. Never raises.

        Fills in the outcome's caller, listener, route, template, service, request id and trace, and each decision and grant that came.
        """
        _note(pending, outcome)
        if not pending.decisions and not pending.tokens:
            return settle(pending, _NO_ANSWERS)
        decider, now = self._decider, self._clock()
        stale = bool(pending.decisions) and self._stale()
        decisions: list[Decision | None] = []
        missing = waits = refused = False
        for question in pending.decisions:
            policy = question.policy
            if refused and not policy.shadow:
                decisions.append(UNANSWERED)
                continue
            decision = STALE if stale and (not policy.provider or policy.gate is not None) else decider.recall(question, now)
            decisions.append(decision)
            if decision is None:
                missing = True
                waits = waits or not policy.shadow
            else:
                outcome.decisions.append((question, decision))
                refused = refused or objection(question, decision) is not None
        if refused and not waits:
            return self._refused(pending, outcome, decisions)
        if missing:
            return Waiting(decider, self._lessee, self._clock, pending, outcome, done, decisions, None, self._late).start()
        grants: list[Grant] = []
        for asked in pending.tokens:
            grant = self._lessee.take(asked, now)
            if grant is None:
                return Waiting(decider, self._lessee, self._clock, pending, outcome, done, decisions, grants, self._late).start()
            grants.append(grant)
            outcome.grants.append((asked, grant))
            if refuses(asked, grant):
                break
        settled = settle(pending, Answers(decisions=tuple(decisions), grants=tuple(grants)))  # type: ignore[arg-type]
        if grants and isinstance(settled, Refusal):
            for asked, grant in zip(pending.tokens, grants, strict=False):
                return_tokens(self._lessee, asked, grant)
        return settled

    def _refused(self, pending: Pending, outcome: Outcome, decisions: list[Decision | None]) -> Settled:
        """Settles by a refusal in hand. Shadow questions are asked all the same: what they say about refused requests counts, too."""
        for question, decision in zip(pending.decisions, decisions, strict=True):
            if decision is None:
                self._decider.ask(question, partial(_record, self._late, outcome, question))
        return settle(pending, Answers(decisions=_stood_in(decisions)))


class Waiting:
    """A request some of whose answers are on their way. Made by the driver.

    States: ASKING (decisions) -> TAKING (tokens) -> OVER. In OVER, whether settled or cancelled, late tokens are given back unless the
    request went on, and late shadow answers are recorded unless it was cancelled.
    """

    __slots__ = (
        "_cancelled",
        "_clock",
        "_decider",
        "_decisions",
        "_done",
        "_grants",
        "_inside",
        "_late",
        "_lessee",
        "_outcome",
        "_pending",
        "_questions",
        "_settled",
        "_taking",
    )

    def __init__(
        self,
        decider: Decider,
        lessee: Lessee,
        clock: Callable[[], float],
        pending: Pending,
        outcome: Outcome,
        done: Callable[[Settled], None],
        decisions: list[Decision | None],
        grants: list[Grant] | None,
        late: Late,
    ) -> None:
        self._late = late
        self._decider = decider
        self._lessee = lessee
        self._clock = clock
        self._pending = pending
        self._questions = list(pending.decisions)
        self._outcome = outcome
        self._done = done
        self._decisions = decisions
        self._grants: list[Grant | None] = []
        self._taking = grants is not None
        if grants is not None:
            self._grants.extend(grants)
        self._settled: Settled | None = None
        self._cancelled = False
        self._inside = True

    def start(self) -> Settled | Waiting:
        """Asks for what is missing. What is settled already is returned, and `done` is not called then."""
        if self._taking:
            self._ask_tokens()
        else:
            for at, question in enumerate(self._pending.decisions):
                if self._decisions[at] is None:
                    self._decider.ask(question, partial(self._decided, at))
            self._look()
        self._inside = False
        return self._settled if self._settled is not None else self

    def cancel(self) -> None:
        """The client has gone: `done` is not called any more, and tokens are given back. Does nothing once it has been called."""
        if self._settled is None and not self._cancelled:
            self._cancelled = True
            self._return_all()

    @property
    def _over(self) -> bool:
        return self._settled is not None or self._cancelled

    def _decided(self, at: int, decision: Decision) -> None:
        question = self._questions[at]
        if self._over:
            if question.policy.shadow and not self._cancelled:
                _record(self._late, self._outcome, question, decision)
            return
        self._decisions[at] = decision
        self._outcome.decisions.append((question, decision))
        if not self._inside and not self._taking:
            self._look()

    def _look(self) -> None:
        """Goes on when no enforced answer is missing before the one that decides."""
        if self._over or self._taking:
            return
        self._hear()
        for question, decision in zip(self._pending.decisions, self._decisions, strict=True):
            if decision is None:
                if not question.policy.shadow:
                    return
            elif objection(question, decision) is not None:
                self._settle()
                return
        self._take_tokens()

    def _hear(self) -> bool:
        """Asks again what was answered by a policy that is not in force any more; whether there was any."""
        old = []
        for at, decision in enumerate(self._decisions):
            question = self._questions[at]
            if decision is None or question.policy.shadow:
                continue
            current = self._decider.renewed(question)
            if current is question:
                continue
            self._questions[at] = current
            if current.revision is None or decision.revision != current.revision.digest:
                self._decisions[at] = None
                self._outcome.decisions[:] = [each for each in self._outcome.decisions if each[1] is not decision]
                old.append(at)
        inside, self._inside = self._inside, True
        for at in old:
            self._decider.ask(self._questions[at], partial(self._decided, at))
        self._inside = inside
        return bool(old)

    def _take_tokens(self) -> None:
        self._taking = True
        if self._grants:  # they came before the decisions were asked for again
            self._count()
            return
        now = self._clock()
        for asked in self._pending.tokens:
            grant = self._lessee.take(asked, now)
            self._grants.append(grant)
            if grant is not None:
                self._outcome.grants.append((asked, grant))
                if refuses(asked, grant):
                    self._settle()
                    return
        self._ask_tokens()

    def _ask_tokens(self) -> None:
        """Asks for every grant that is not in hand; `self._grants` may be shorter than the questions."""
        tokens = self._pending.tokens
        now = self._clock()
        while len(self._grants) < len(tokens):
            asked = tokens[len(self._grants)]
            # The driver stopped at the first grant that was not in hand; those after it may be.
            grant = self._lessee.take(asked, now)
            self._grants.append(grant)
            if grant is not None:
                self._outcome.grants.append((asked, grant))
                if refuses(asked, grant):
                    self._settle()
                    return
        inside, self._inside = self._inside, True
        for at, asked in enumerate(tokens):
            if self._grants[at] is None and not self._over:
                self._lessee.ask(asked, partial(self._granted, at))
        self._inside = inside
        self._count()

    def _granted(self, at: int, grant: Grant) -> None:
        asked = self._pending.tokens[at]
        if self._over:
            if self._cancelled or isinstance(self._settled, Refusal):
                return_tokens(self._lessee, asked, grant)
            if not self._cancelled:
                self._outcome.grants.append((asked, grant))
            if type(grant) is SlotGrant and self._outcome.duration:  # it has ended, and has released what it held
                grant.slot.release()
            return
        self._grants[at] = grant
        self._outcome.grants.append((asked, grant))
        if not self._inside:
            self._count()

    def _count(self) -> None:
        if self._over or not self._taking:
            return
        complete = True
        for asked, grant in zip(self._pending.tokens, self._grants, strict=True):
            if grant is None:
                complete = complete and asked.limit.shadow
            elif refuses(asked, grant):
                # As if it were the first: which of several limits refuses is told by who answers first.
                self._settle()
                return
        if complete and self._hear():
            self._taking = False
            self._look()
        elif complete:
            self._settle()

    def _settle(self) -> None:
        settled = settle(self._pending, Answers(decisions=_stood_in(self._decisions), grants=tuple(self._known_grants())))
        self._settled = settled
        if isinstance(settled, Refusal):
            self._return_all()
        if not self._inside:
            self._done(settled)

    def _known_grants(self) -> list[Grant]:
        """The grants up to the one that refuses. One that is missing before it stands as open: the refusal decides."""
        found: list[Grant] = []
        for asked, grant in zip(self._pending.tokens, self._grants, strict=False):
            found.append(_OPEN if grant is None else grant)
            if grant is not None and refuses(asked, grant):
                break
        return found

    def _return_all(self) -> None:
        for asked, grant in zip(self._pending.tokens, self._grants, strict=False):
            if grant is not None:
                return_tokens(self._lessee, asked, grant)


def _stood_in(decisions: list[Decision | None]) -> tuple[Decision, ...]:
    return tuple([UNANSWERED if decision is None else decision for decision in decisions])


def _record(late: Late, outcome: Outcome, question: DecisionQuestion, decision: Decision) -> None:
    if outcome.duration:  # it has ended, and has been recorded
        late(outcome, question, decision)
    else:
        outcome.decisions.append((question, decision))


def return_tokens(lessee: Lessee, question: TokenQuestion, grant: Grant) -> None:
    """Gives back what a grant spent: nothing when it was refused, or admitted because the store could not be asked. Releases a slot."""
    if type(grant) is SlotGrant:
        grant.slot.release()
    elif grant.admitted and not grant.error:
        lessee.give_back(question)


def _note(pending: Pending, outcome: Outcome) -> None:
    asking = pending.asking
    outcome.caller = asking.caller
    outcome.listener = asking.listener
    outcome.route = asking.route
    outcome.template = asking.template
    outcome.service = asking.service
    plan = pending.plan
    if type(plan) is Plan:
        outcome.request_id = plan.request_id
        outcome.trace = plan.trace

"""One question to several replicas, from its first call to its answer: who is asked when, and whose answer counts.

Callbacks and one timer: in the steady state a question is one call, and its answer the only event. States: asking (`_asked` has calls),
pausing (all replicas had other revisions), over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.http import Header
from mesh.questions import Decision, Verdict
from pdp.answer import error
from pdp.rpc import Call, Result

if TYPE_CHECKING:
    from pdp.client import PdpClient, Replica

AGAIN: Final = 0.02
"""Seconds until replicas that hold other revisions are asked again: a new one reaches gateways and decision points not quite together."""
_SLOW: Final = 0.9
"""Of half of the question's time: whoever has said nothing for so long when somebody else answers has failed."""


class Elsewhere(msgspec.Struct, frozen=True):
    """A replica has no answer; another may."""

    why: str
    timeout: bool = False
    later: bool = False
    """It holds other revisions: it may have the right one in a moment."""


class Inquiry:
    """Owned by its client, which it tells when it is over."""

    __slots__ = (
        "_asked",
        "_candidates",
        "_client",
        "_deadline",
        "_digest",
        "_done",
        "_half",
        "_loop",
        "_message",
        "_metadata",
        "_problems",
        "_said",
        "_timer",
        "over",
    )

    def __init__(
        self,
        client: PdpClient,
        loop: asyncio.AbstractEventLoop,
        message: bytes,
        metadata: tuple[Header, ...],
        digest: str,
        seconds: float,
        done: Callable[[Decision], None],
    ) -> None:
        """`done` gets the answer within `seconds`."""
        self._client = client
        self._loop = loop
        self._message = message
        self._metadata = metadata
        self._digest = digest
        self._deadline = loop.time() + seconds
        self._half = 0.0
        self._done: Callable[[Decision], None] | None = done
        self._candidates: list[Replica] = []
        self._asked: dict[Replica, tuple[float, Call]] = {}
        """Since when, and by which call."""
        self._problems: list[Elsewhere] = []
        """What replicas have said in place of an answer, in this round."""
        self._said: list[Elsewhere] = []
        """In the round before."""
        self._timer: asyncio.TimerHandle | None = None
        self.over = False

    def begin(self) -> None:
        """Asks the replicas, one after the other or side by side."""
        now = self._loop.time()
        self._half = (self._deadline - now) / 2
        self._candidates = self._client.candidates(now)
        self._problems = []
        if self._candidates:
            self._ask(now)
        else:
            self._nobody(now)

    def _ask(self, now: float) -> None:
        """Asks the next one."""
        replica = self._candidates.pop(0)
        left = self._deadline - now
        replica.breaker.begin(now, left)
        call = self._client.call(replica, self._message, self._metadata, left, lambda result: self._answered(replica, result))
        self._asked[replica] = (now, call)
        self._wake(now + min(left, self._half) if self._candidates else self._deadline)

    def _wake(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._woken)

    def _woken(self) -> None:
        """Nobody has answered for a while."""
        self._timer = None
        now = self._loop.time()
        if not self._asked:
            self.begin()
        elif now < self._deadline and self._candidates:
            self._ask(now)
        elif self._done is not None and self._client.late:
            self._candidates = []
            self._tell(none_of(self._said, self._digest, late=True))
            self._wake(self._deadline + self._client.late)
        else:
            for replica in self._asked:
                self._problems.append(Elsewhere(f"{replica.target}: it said nothing in time", timeout=True))
            self._end(none_of(self._problems, self._digest, late=True), silent=True)

    def _answered(self, replica: Replica, result: Result) -> None:
        """A call has ended."""
        del self._asked[replica]
        now = self._loop.time()
        outcome = self._client.outcome(replica, result, self._digest, now)
        if isinstance(outcome, Decision):
            self._end(outcome)
            return
        self._problems.append(outcome)
        if now >= self._deadline:
            self._candidates = []
        if self._candidates:
            self._ask(now)
        elif not self._asked:
            self._nobody(now)

    def _nobody(self, now: float) -> None:
        """No replica has an answer."""
        self._said = problems = self._problems
        late = now >= self._deadline
        if late or not any(problem.later for problem in problems) or self._deadline - now <= AGAIN:
            self._end(none_of(problems, self._digest, late=late))
        else:
            self._wake(now + AGAIN)

    def _tell(self, decision: Decision) -> None:
        done, self._done = self._done, None
        if done is not None:
            self._client.pending -= 1
            done(decision)

    def _end(self, decision: Decision, *, silent: bool = False) -> None:
        """It is over, with `decision` unless there was an answer before. `silent`: nobody who was asked has said anything in time."""
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._asked:
            # An error of the policy's doing has taken its time: whoever is silent may be at it, too.
            spare = decision.verdict is Verdict.ERROR and not silent
            now = self._loop.time()
            asked, self._asked = self._asked, {}
            for replica, (since, call) in asked.items():
                call.cancel()
                if not spare and now - since >= self._half * _SLOW:
                    replica.breaker.failed(now)
        self._client.forget(self)
        self._tell(decision)

    def close(self) -> None:
        """Gives it up: nobody is asked any more."""
        for _, call in self._asked.values():
            call.cancel()
        self._asked = {}
        if not self.over:
            self._end(error("unavailable", "the decision points are not asked any more", self._digest))


def none_of(said: list[Elsewhere], digest: str, *, late: bool) -> Decision:
    """The answer when no replica gave one: they said `said` in its place; `late` if the time is over."""
    why = "; ".join([each.why for each in said])
    if any(each.timeout for each in said) or (late and not said):
        return error("timeout", f"no decision point answered in time ({why or 'none said anything'})", digest)
    return error("unavailable", f"no decision point can answer ({why or 'all have failed just now'})", digest)

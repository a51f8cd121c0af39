"""One lessee's part of one bucket: what is in hand, and how much to ask for next.

Pure: times are arguments, in seconds on the lessee's clock (CLOCK_BOOTTIME, which counts suspension). `quota.lessee` does the asking.

How much to lease follows the speed: enough for `LOOKAHEAD` seconds as it was spent lately, at most twice as much as the last time, and
nothing at all as long as less than two requests are expected. The store never lends more than half of the burst among all lessees.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from quota.bucket import Ask, Reply
from quota.debt import Charges, Told

LOOKAHEAD: Final = 4.0
"""Seconds of spending that a lease is to last."""
AHEAD: Final = 0.05
"""Seconds of spending that are still in hand when more is asked for."""
HOLD: Final = 0.02
"""Seconds that a refusal holds at least, unless the bucket is small: tokens gather in it, and a flood costs no more asks than that."""
HELD: Final = 0.5
"""The same at most, while a window of the calendar has no tokens."""
IDLE: Final = 3.0
"""Seconds after which unused tokens are given back."""
SHORTEST: Final = 3.0
LONGEST: Final = 10.0
"""Bounds of how long a lease lasts, in seconds: between them as long as an empty bucket takes to fill."""
FOREVER: Final = 86_400.0
"""`Grant.retry_after` when waiting does not help."""
_FIRST: Final = 8
_REMEMBERED: Final = 64


class Waiter:
    """A request that waits for an answer."""

    __slots__ = ("cost", "done", "over", "question", "timer")

    def __init__(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        self.question = question
        self.cost = question.cost
        self.done = done
        self.over = False
        """True once it has been answered."""
        self.timer: Any = None


class Known(msgspec.Struct, frozen=True):
    """What an answer told of its store's time."""

    era: int
    now: int
    """As in `quota.bucket.Reply`."""
    sent: float
    came: float
    """When the ask went out and the answer came, in seconds on the lessee's clock."""

    def since(self, now: float) -> tuple[int, int, int, int]:
        """The last four fields of an ask."""
        return self.era, self.now, max(0, int((now - self.came) * 1e6)), max(0, math.ceil((now - self.sent) * 1e6))


class Flight(msgspec.Struct, frozen=True):
    """An ask that is under way."""

    ask: Ask
    sent: float
    waiters: list[Waiter]
    told: Told | None
    """What it says of charges; None for a limit without any."""


class Lease:
    """What a lessee knows of one bucket. Its owner is the lessee."""

    __slots__ = (
        "acked",
        "ahead_at",
        "asked_at",
        "batch",
        "beyond",
        "charges",
        "counted",
        "ends",
        "era",
        "flight",
        "full_at",
        "generation",
        "grants",
        "hold",
        "key",
        "last",
        "limit",
        "local",
        "local_at",
        "local_ends",
        "low",
        "per_token",
        "refunds",
        "refused",
        "refused_at",
        "refused_cost",
        "refused_until",
        "returned",
        "sharers",
        "speed",
        "spent",
        "tokens",
        "total",
        "ttl",
        "until",
        "used",
        "waiting",
    )

    def __init__(self, key: str, limit: QuotaLimit, now: float, seq: int, charged: int = 0) -> None:
        """`seq`: the number of the lessee's latest ask. What it had of this bucket before, if anything, is over and done with.
        `charged`: the tokens that the lessee has charged to all buckets."""
        self.key = key
        """The bucket's name in the store."""
        self.tokens = 0
        """In hand; usable before `until` only."""
        self.until = 0.0
        self.acked = seq
        self.generation = self.spent = self.returned = 0
        """As in `quota.bucket.Ask`."""
        self.era = 0
        """`Reply.era` of the last answer."""
        self.last: TokenQuestion | None = None
        """What was admitted last from the tokens in hand, if the store has not been told yet: it can be taken back."""
        self.counted = 0
        """`spent` when the speed was measured last."""
        self.refunds: list[tuple[int, int]] = []
        self.grants: deque[tuple[TokenQuestion, int]] = deque(maxlen=_REMEMBERED)
        """The latest that were admitted as needs, with the ask's number: the store can undo them."""
        self.beyond = 0
        """Tokens known to be in the bucket, beyond those in hand; 0 when others may take them."""
        self.sharers = 1
        self.full_at = 0.0
        self.refused_until = 0.0
        self.refused_cost = 0
        self.speed = 0.0
        """Tokens per second, lately."""
        self.total = 0
        """Tokens that were spent in all, but for those of the lease since the speed was measured last."""
        self.refused = 0
        """Requests that were refused, in all."""
        self.refused_at = -math.inf
        """When one was refused last."""
        self.batch = 0
        """How much the last lease was to be."""
        self.low = 0
        """Ask ahead when no more than this is in hand."""
        self.ahead_at = 0.0
        """Not before."""
        self.asked_at = -math.inf
        self.used = now
        """When it was last spent from or asked about."""
        self.waiting: deque[Waiter] = deque()
        self.flight: Flight | None = None
        self.charges: Charges | None = None if limit.usage is None else Charges(charged)
        """What answers have cost and is not paid; None while no limit of this bucket charges after the answer."""
        self.local: float | None = None
        """Level of the local bucket of failure mode Local; None before its first use."""
        self.local_at = now
        self.local_ends = 0.0
        self.ends = 0.0
        """When the window of the calendar ends that the last answer was of; 0 for a limit that is refilled."""
        self.set_limit(limit)

    def set_limit(self, limit: QuotaLimit) -> bool:
        """Goes on with new numbers for the same bucket. What is in hand beyond what these let anybody hold is not spent any more, and goes
        back with the next ask; whether there was any."""
        self.limit = limit
        self.per_token = limit.interval / limit.tokens if limit.tokens > 0 else FOREVER
        self.ttl = min(LONGEST, max(SHORTEST, limit.burst * self.per_token))
        self.hold = min(HOLD, limit.burst * self.per_token / 2)
        """How long a refusal holds at least: what comes back meanwhile still has room in the bucket."""
        self.refused_until = 0.0
        return self._shed()

    def _shed(self) -> bool:
        """Gives back what is more than anybody may hold by the limit's present numbers; whether there was any."""
        surplus = self.tokens - self.limit.burst // 2
        if surplus > 0:
            self._return(surplus)
        return surplus > 0

    @property
    def owes(self) -> bool:
        """Whether there is something to charge that the store has not confirmed."""
        return self.charges is not None and self.charges.owed > 0

    def due(self, now: float) -> bool:
        """Whether it is time to tell the store what it owes."""
        return self.charges is not None and self.charges.owed > 0 and now >= self.charges.again_at

    @property
    def busy(self) -> bool:
        """Whether somebody waits for it, or an answer is due."""
        return self.flight is not None or bool(self.waiting)

    def granted(self, now: float, *, remaining: int) -> Grant:
        """The answer for an admitted request."""
        return Grant(True, remaining, max(0.0, self.ends - now if self.ends else (self.limit.burst - remaining) * self.per_token))

    def refusal(self, now: float) -> Grant:
        """The answer while it is known that there are no tokens."""
        self.refused += 1
        self.refused_at = now
        return Grant(False, 0, max(0.0, self.full_at - now), max(0.001, (self.ends or self.refused_until) - now))

    def next_ask(
        self,
        holder: str,
        seq: int,
        now: float,
        sharers: int,
        known: Known | None,
        *,
        windows: tuple[int, ...] = (),
        returning: bool = False,
        renewing: bool = False,
    ) -> Flight:
        """Makes the next ask, number `seq`, of what waits and what should be in hand, and notes it as under way.

        `known`: the last answer from the same store. `windows`: as in `quota.bucket.Ask`. `returning`: give all tokens back instead;
        `renewing`: the lease must go on, even if nothing more is needed.
        """
        waiters = [waiter for waiter in self.waiting if not waiter.over]
        self.waiting.clear()
        needs: list[tuple[int, int]] = []
        for waiter in waiters:
            if needs and needs[-1][0] == waiter.cost:
                needs[-1] = (waiter.cost, needs[-1][1] + 1)
            else:
                needs.append((waiter.cost, 1))
        self._measure(now, sum(cost * count for cost, count in needs))
        charges = self.charges
        told = charges.tell(now) if charges is not None else None
        extra = 0
        if returning:
            self._return(self.tokens)
        elif self.limit.burst >= 2 * max(self.sharers, sharers):
            surplus = self.tokens - 2 * self.batch
            if surplus > 0 and now < self.until:
                self._return(surplus)
            extra = max(int(renewing), self.batch - self.tokens)
        self.last = None
        refunds, self.refunds = tuple(self.refunds), []
        ask = Ask(
            holder,
            seq,
            self.acked,
            self.generation,
            self.spent,
            self.returned,
            refunds,
            tuple(needs),
            extra,
            sharers,
            int(self.ttl * 1e6),
            self.limit.rate,
            self.limit.burst,
            False,
            *(known.since(now) if known is not None else (0, 0, 0, 0)),
            windows,
            -1,
            *((told.charged, told.settled, self.limit.most_debt) if told is not None else ()),
        )
        self.flight = Flight(ask, now, waiters, told)
        return self.flight

    def _return(self, tokens: int) -> None:
        self.tokens -= tokens
        self.returned += tokens

    def _measure(self, now: float, needed: int) -> None:
        """How fast tokens go, and what batch that makes."""
        charges = self.charges
        if charges is not None:
            needed += charges.charged - charges.counted
            charges.counted = charges.charged
        if self.asked_at > -math.inf:
            gone = self.spent - self.counted + needed
            speed = gone / max(now - self.asked_at, AHEAD)
            self.speed = speed if speed > self.speed else (speed + self.speed) / 2
        self.asked_at = now
        self.total += self.spent - self.counted
        self.counted = self.spent
        expected = min(self.speed * LOOKAHEAD, float(self.limit.burst))
        self.batch = min(math.ceil(expected), max(_FIRST, 2 * self.batch)) if expected >= 2 else 0
        self.low = math.ceil(self.speed * AHEAD) if self.batch else 0

    def answered(self, reply: Reply, now: float) -> list[tuple[Waiter, Grant]]:
        """Takes in the answer to the ask under way. Returns the answers for those who waited for it."""
        flight = self.flight
        assert flight is not None
        ask = flight.ask
        self.flight = None
        self.acked = ask.seq
        self.era = reply.era
        if reply.generation == self.generation:
            self.tokens += reply.lent
        else:
            self.tokens = reply.lent
            self.generation = reply.generation
            self.total += self.spent - self.counted
            self.spent = self.counted = self.returned = 0
            self.last = None
        left = (reply.ends - reply.now) / 1e6
        self.ends = flight.sent + left if reply.ends else 0.0
        if ask.needs or ask.extra > 0:
            asked = ask.ttl / 1e6  # not the limit's present one: it may have other numbers by now
            self.until = flight.sent + (min(asked, left) if reply.ends else asked) * 0.99
        if ask.burst > self.limit.burst:
            self._shed()
        if flight.told is not None and self.charges is not None:
            self.charges.confirmed(flight.told)
            paid = self.charges.pay(self.tokens, flight.told)
            self.tokens -= paid
            self.spent += paid
            self.total -= paid
        self.sharers = reply.sharers
        self.beyond = max(0, reply.level) if reply.sharers == 1 else 0
        self.full_at = now + reply.full / 1e6
        self.ahead_at = now + min(1.0, max(self.hold, (ask.extra - reply.lent) / 2 * self.per_token)) if reply.lent < ask.extra else 0.0
        self.low = min(self.low, self.tokens // 2)
        if reply.level <= 0 and (reply.elsewhere == 0 or reply.level < 0 or reply.lent < ask.extra):
            self.refused_cost = 1
            # As long as it takes even if all that others hold comes back.
            wait = reply.full / 1e6 - (self.limit.burst - 1 + reply.elsewhere) * self.per_token
            self.refused_until = now + max(self.hold if ask.extra > 0 else 0.0, self._bounded(wait if not reply.ends else left))
        return self._share(flight, reply, now)

    def _bounded(self, wait: float) -> float:
        """How long nothing is asked of a store that has no tokens for `wait` seconds. Until the window ends there may be more of them, when
        the limit is raised, or when others give some back."""
        return min(wait, HELD) if self.ends else wait

    def _share(self, flight: Flight, reply: Reply, now: float) -> list[tuple[Waiter, Grant]]:
        answers: list[tuple[Waiter, Grant]] = []
        left, lost = reply.granted, 0
        refused = False
        remaining = self.tokens + max(0, reply.level)
        for waiter in flight.waiters:
            if not refused and left >= waiter.cost:
                left -= waiter.cost
                if waiter.over:
                    lost += waiter.cost
                else:
                    self.total += waiter.cost
                    self.grants.append((waiter.question, reply.seq))
                    answers.append((waiter, self.granted(now, remaining=remaining)))
                continue
            if not refused:
                refused = True
                self.refused_cost = waiter.cost
                self.refused_until = now + (max(self.hold, self._bounded(reply.wait / 1e6)) if reply.wait >= 0 else 1.0)
            if not waiter.over:
                answers.append((waiter, self.refusal(now)))
        if lost:
            self.refunds.append((flight.ask.seq, lost))
        return answers

    def again(self) -> None:
        """Nothing was done of the ask under way: those who waited for it wait for the next one."""
        flight, self.flight = self.flight, None
        self.waiting.extendleft(reversed(flight.waiters if flight else []))

    def failed(self) -> list[Waiter]:
        """The ask under way came to nothing. Returns who must be answered otherwise: all that wait."""
        flight, self.flight = self.flight, None
        waiters = [*(flight.waiters if flight else ()), *self.waiting]
        self.waiting.clear()
        return [waiter for waiter in waiters if not waiter.over]

    def charge(self, tokens: int, now: float) -> None:
        """Charges what an answer has cost: to the tokens in hand, and what these do not cover to the bucket, with the next ask."""
        if self.local is not None:
            self.local = max(self.local - tokens, min(self.local, float(-self.limit.most_debt)))
        paid = min(self.tokens, tokens) if now < self.until else 0
        self.tokens -= paid
        self.spent += paid
        if paid < tokens:
            assert self.charges is not None, "whoever charges sees to it"
            self.charges.charged += tokens - paid
            self.total += tokens - paid

    def give_back(self, question: TokenQuestion, now: float) -> None:
        """Undoes a spending, as far as that can be done without ever passing the limit.

        A token in hand can only take the place of one that the store still believes to be in hand: whatever was admitted before the last
        ask counts as spent there, and its place in the bucket may have been filled again.
        """
        if self.last is question and now < self.until:
            self.last = None
            self.spent -= question.cost
            self.tokens += question.cost
            return
        for at, (admitted, seq) in enumerate(self.grants):
            if admitted is question:
                del self.grants[at]
                self.refunds.append((seq, question.cost))
                self.refused_until = 0.0
                return

    def spend_local(self, cost: int, now: float, sharers: int, ends: float = 0.0) -> Grant:
        """Answers from a local bucket with this lessee's share of the limit (failure mode Local). `ends`: when the calendar's window does,
        on the lessee's clock; its share is there once in it."""
        share = max(self.sharers, sharers)
        burst = max(1.0, self.limit.burst / share)
        rate = self.limit.rate / share
        level = self.local
        if level is None or (ends and now >= self.local_ends):
            level, self.local_at, self.local_ends = burst, now, ends
        self.local = level = min(burst, level + max(0.0, now - self.local_at) * rate)
        self.local_at = now
        if level >= cost:
            self.local = level = level - cost
            return Grant(True, int(level), ends - now if ends else (burst - level) / rate)
        if ends:
            return Grant(False, 0, ends - now, ends - now)
        wait = (cost - level) / rate if cost <= burst else FOREVER
        return Grant(False, 0, (burst - level) / rate, wait)


def settled(question: TokenQuestion) -> Grant | None:
    """The answer to a question that needs no bucket: it costs nothing, or more than there can ever be."""
    limit = question.limit
    if question.cost <= 0:
        return Grant(True, 0, 0.0)
    if limit.tokens <= 0 or limit.interval <= 0 or question.cost > limit.burst:
        return Grant(False, 0, 0.0, FOREVER)
    return None

"""Leases tokens by the batch and spends them locally: what the gateway's driver and the rate-limit service ask.

In the steady state a request is answered by `take`, from what is in hand: a look-up and a subtraction. Asks go to the store in the
background, ahead of need; only a bucket that is new, empty or too small to share makes a request wait for one. Each bucket has at most one
ask under way, and all that come meanwhile share the next.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from quota.bucket import ASTRAY, Ask, Reply
from quota.calendar import windows
from quota.debt import Charges
from quota.lease import FOREVER, IDLE, Flight, Known, Lease, Waiter, settled
from quota.lessee_metrics import report
from quota.slot_lessee import SlotLessee, Surroundings
from quota.store import Failure, Store, bucket_key
from quota.timing import Handle, Timers, boottime
from quota.usage import refusing, slots_usage, usage
from telemetry.record import Telemetry

_TICK: Final = 0.1
_ROUND: Final = 5
"""Ticks in which every lease is looked at once."""
_FORGET: Final = 15.0
_TRIES: Final = 8
_STORES: Final = 1024
"""Stores whose last answers are remembered; all are forgotten when there are more."""
_TELL_EVERY: Final = 60.0
"""Seconds between two lines of the log that say that the store fails."""
_log = logging.getLogger(__name__)


class QuotaLessee:
    """A `mesh.questions.Lessee` over a store. Its owner is the wiring; it belongs to one event loop (and one worker)."""

    def __init__(
        self,
        store: Store,
        *,
        holder: str,
        clock: Callable[[], float] = boottime,
        timers: Timers | None = None,
        telemetry: Telemetry | None = None,
        sharers: int = 1,
        wall: Callable[[], float] = time.time,
        max_buckets: int = 16_384,
        max_waiting: int = 10_000,
    ) -> None:
        """`holder` names this process among the lessees; a random part is added, since another life of it must never be taken for this one.
        `clock`: seconds, counting suspension. `timers`: the running event loop if not given. `sharers`: how many lessees there are, as far
        as is known. `wall`: seconds since the epoch, believed until the store has told its time. `max_buckets`: how many buckets are known
        at once; `max_waiting`: how many requests may wait."""
        self.holder = f"{holder}/{secrets.token_hex(6)}"
        self.sharers = sharers
        self._store = store
        self._clock = clock
        self._wall = wall
        self._timers: Timers = timers or asyncio.get_running_loop()
        self._leases: dict[tuple[str, tuple[str, ...]], Lease] = {}
        self._max_buckets = max_buckets
        self._max_waiting = max_waiting
        self._waiting = 0
        self._flights = 0
        self._round: list[tuple[tuple[str, tuple[str, ...]], Lease]] = []
        self._slice = 1
        self._closed = False
        self._known: dict[int, Known] = {}
        """The last answer of each store, by its era: a cluster is many."""
        self._era = 0
        self._tell_at: dict[str, float] = {}
        """When a kind of failure may be told of again."""
        self.asks = 0
        """Asks that went to the store. They are numbered by this: a bucket's numbers go up, also when its lease is begun anew."""
        self.failures: dict[str, int] = {}
        """Requests answered by their limit's failure mode, by it."""
        self.unanswered: dict[str, int] = {}
        """Asks that the store did not answer, by `Failure.kind`."""
        self.slots = SlotLessee(
            store,
            Surroundings(
                lambda: self.holder,
                lambda: self.sharers,
                clock,
                self._timers.call_later,
                lambda era: self._known.get(era or self._era),
                self._remember,
                self._failed,
                self._fell_back,
            ),
            max_limits=max_buckets,
            max_waiting=max_waiting,
        )
        """Concurrency limits."""
        self.charged = 0
        self.uncharged = {"forgiven": 0, "lost": 0}
        """Of these, what no bucket has paid: beyond the limit's `maxDebt`, or since it is not known whether the store has charged it."""
        self._tick: Handle = self._timers.call_later(_TICK, self._sweep)
        if telemetry is not None:
            report(self, telemetry)

    def take(self, question: TokenQuestion, now: float) -> Grant | None:
        """See `mesh.questions.Lessee`. Leases run on the lessee's own clock: `now` is not used."""
        limit = question.limit
        lease = self._leases.get((limit.name, question.key))
        if lease is None:
            return self.slots.take(question) if limit.concurrency else None
        if lease.limit is not limit and not self._follow(lease, limit):
            return None
        at = self._clock()
        cost = question.cost
        if lease.tokens >= cost > 0 and at < lease.until:
            tokens = lease.tokens = lease.tokens - cost
            lease.spent += cost
            lease.used = at
            lease.last = question
            if tokens <= lease.low and lease.flight is None and at >= lease.ahead_at:
                self._send(lease, at)
            tokens += lease.beyond
            missing = limit.burst - tokens
            if lease.ends:
                return lease.granted(at, remaining=tokens)
            return Grant(True, tokens, missing * lease.per_token if missing > 0 else 0.0)
        if at < lease.refused_until and cost >= lease.refused_cost:
            return lease.refusal(at)
        return None

    def _follow(self, lease: Lease, limit: QuotaLimit) -> bool:
        """A new snapshot may have new numbers for a limit. False when they leave nothing to grant."""
        if limit.tokens <= 0 or limit.interval <= 0 or limit.burst <= 0:
            return False
        if limit != lease.limit:
            if lease.set_limit(limit) and lease.flight is None:
                self._send(lease, self._clock())
        else:
            lease.limit = limit
        return True

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """See `mesh.questions.Lessee`."""
        if question.limit.concurrency:
            return self.slots.ask(question, done)
        grant = settled(question)
        if grant is None:
            grant = self.take(question, 0.0)
        elif not grant.admitted:
            self._count_refused(question)
        if grant is not None:
            return done(grant)
        at = self._clock()
        limit = question.limit
        lease = self._lease(question, at)
        if lease is None or self._closed or self._waiting >= self._max_waiting:
            reason = (
                "the lessee is closed" if self._closed else "too many buckets are in use" if lease is None else "too many requests wait"
            )
            return done(self._fallback(None, limit, question.cost, reason, at))
        waiter = Waiter(question, done)
        waiter.timer = self._timers.call_later(limit.timeout, self._late, lease, waiter)
        self._waiting += 1
        lease.waiting.append(waiter)
        lease.used = at
        if lease.flight is None:
            self._send(lease, at)
        return None

    def _count_refused(self, question: TokenQuestion) -> None:
        """Counts what is refused without a bucket being asked, for those who look who is refused."""
        at = self._clock()
        lease = self._lease(question, at)
        if lease is not None:
            lease.refused += 1
            lease.refused_at = lease.used = at

    def give_back(self, question: TokenQuestion) -> None:
        """See `mesh.questions.Lessee`."""
        lease = self._leases.get((question.limit.name, question.key))
        if lease is not None and question.cost > 0:  # a question that costs nothing never spent anything
            lease.give_back(question, self._clock())

    def charge(self, question: TokenQuestion, tokens: int) -> None:
        """See `mesh.questions.Lessee`."""
        at = self._clock()
        self.charged += tokens
        lease = None if self._closed else self._lease(question, at)
        if lease is None:
            self.uncharged["lost"] += tokens
            return
        if lease.charges is None:
            lease.charges = Charges(self.charged)
        lease.charge(tokens, at)
        lease.used = at
        if lease.flight is None and (lease.due(at) or (lease.tokens <= lease.low and at >= lease.ahead_at and lease.batch)):
            self._send(lease, at)

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """See `mesh.questions.Lessee`."""
        if question.limit.concurrency:
            return self.slots.peek(question, done)
        grant = settled(question)
        if grant is not None:
            return done(grant)
        at = self._clock()
        limit, cost = question.limit, question.cost
        lease = self._leases.get((limit.name, question.key)) or Lease(bucket_key(limit.name, question.key), limit, at, 0)
        if lease.tokens >= cost and at < lease.until:
            return done(lease.granted(at, remaining=lease.tokens + lease.beyond))

        def answered(answer: Reply | Failure) -> None:
            if isinstance(answer, Reply) and answer.ends == ASTRAY:
                self._remember(Known(answer.era, answer.now, at, self._clock()))
                if known is None:
                    return self.peek(question, done)
                answer = Failure("the store's clock shows another window of the calendar")
            if isinstance(answer, Failure):
                return done(Grant(limit.failure_mode == "Allow", error=answer.reason))
            full = answer.full / 1e6
            if answer.wait == 0:
                return done(Grant(True, answer.level, full))
            return done(Grant(False, answer.level, full, answer.wait / 1e6 if answer.wait > 0 else FOREVER))

        self.asks += 1
        needs, ttl = ((cost, 1),), int(lease.ttl * 1e6)
        known = self._known.get(self._era)
        now = self._windows(limit, at, known)
        ask = Ask(self.holder, 0, 0, 0, 0, 0, (), needs, 0, self.sharers, ttl, limit.rate, limit.burst, True, windows=now)
        return self._store.ask(lease.key, ask, answered)

    def _lease(self, question: TokenQuestion, at: float) -> Lease | None:
        """The lease for a question's bucket, made if there is room for it."""
        name = (question.limit.name, question.key)
        lease = self._leases.get(name)
        if lease is None:
            if len(self._leases) >= self._max_buckets and not self._evict(at):
                return None
            lease = self._leases[name] = Lease(bucket_key(*name), question.limit, at, self.asks, self.charged)
        return lease

    def _evict(self, at: float) -> bool:
        """Makes room: of a few of the oldest, takes the first that nobody waits for, and rather one that was not used just now."""
        fallback = None
        for _ in range(min(_TRIES, len(self._leases))):
            name = next(iter(self._leases))
            lease = self._leases.pop(name)
            kept = lease.busy or lease.owes
            if not kept and at - lease.used > 1.0:
                self._drop(lease, at)
                return True
            self._leases[name] = lease
            fallback = fallback or (None if kept else name)
        if fallback is None:
            return False
        self._drop(self._leases.pop(fallback), at)
        return True

    def _drop(self, lease: Lease, at: float) -> None:
        if lease.tokens and at < lease.until:
            self._send(lease, at, returning=True)

    def _send(self, lease: Lease, at: float, *, returning: bool = False, renewing: bool = False) -> None:
        """Asks the store for what waits and what should be in hand."""
        self.asks += 1
        if lease.charges is not None:
            self.uncharged["lost"] += lease.charges.forgo(at)
        known = self._known.get(lease.era or self._era)
        windows = self._windows(lease.limit, at, known)
        flight = lease.next_ask(self.holder, self.asks, at, self.sharers, known, windows=windows, returning=returning, renewing=renewing)
        self._flights += 1

        def done(answer: Reply | Failure) -> None:
            self._flights -= 1
            self._answered(lease, flight, answer)

        self._store.ask(lease.key, flight.ask, done, strict=lease.limit.strict)

    def _windows(self, limit: QuotaLimit, at: float, known: Known | None) -> tuple[int, ...]:
        """The windows of a limit by the calendar, by the store's time as far as it is known."""
        if limit.calendar is None:
            return ()
        return windows(limit.calendar, int(self._wall() * 1e6) if known is None else known.now + int((at - known.came) * 1e6))

    def _answered(self, lease: Lease, flight: Flight, answer: Reply | Failure) -> None:
        if lease.flight is not flight:
            return None
        at = self._clock()
        answers: list[tuple[Waiter, Grant]]
        if isinstance(answer, Reply) and answer.ends == ASTRAY:
            # The store lives in another window of the calendar than this process believed, which goes by the store's time from now on.
            self._remember(Known(answer.era, answer.now, flight.sent, at))
            if not flight.ask.seen:
                lease.again()
                lease.era = answer.era
                return self._send(lease, at)
            answer = Failure("the store's clock shows another window of the calendar")
        if isinstance(answer, Failure) or answer.stale or answer.seq != flight.ask.seq:
            failure = answer if isinstance(answer, Failure) else Failure("the store answered another ask")
            reason = failure.reason
            self._failed(failure)
            if flight.told is not None and lease.charges is not None:
                lease.charges.failed(flight.told, at, sent=failure.sent)
            answers = [(waiter, self._fallback(lease, lease.limit, waiter.cost, reason, at)) for waiter in lease.failed()]
        else:
            if answer.era:
                self._remember(Known(answer.era, answer.now, flight.sent, at))
            answers = lease.answered(answer, at)
            answers += self._serve(lease, at)
            self.uncharged["forgiven"] += answer.forgiven
            if lease.waiting or lease.owes:
                self._send(lease, at)
        for waiter, grant in answers:
            self._finish(waiter, grant)
        return None

    def _remember(self, known: Known) -> None:
        if len(self._known) >= _STORES:
            self._known.clear()
        self._known[known.era] = known
        self._era = known.era

    def _serve(self, lease: Lease, at: float) -> list[tuple[Waiter, Grant]]:
        """Answers those who came meanwhile, as far as that is known now."""
        answers: list[tuple[Waiter, Grant]] = []
        for _ in range(len(lease.waiting)):
            waiter = lease.waiting.popleft()
            if waiter.over:
                continue
            if lease.tokens >= waiter.cost and at < lease.until:
                lease.tokens -= waiter.cost
                lease.spent += waiter.cost
                lease.last = waiter.question
                answers.append((waiter, lease.granted(at, remaining=lease.tokens + lease.beyond)))
            elif at < lease.refused_until and waiter.cost >= lease.refused_cost:
                answers.append((waiter, lease.refusal(at)))
            else:
                lease.waiting.append(waiter)
        return answers

    def _late(self, lease: Lease, waiter: Waiter) -> None:
        """The limit's time is over. What is granted later is given back (`Lease.answered`)."""
        at, reason = self._clock(), "the store did not answer in time"
        self._complain("late", reason, at)
        self._finish(waiter, self._fallback(lease, lease.limit, waiter.cost, reason, at))

    def _complain(self, kind: str, reason: str, at: float) -> None:
        if at >= self._tell_at.get(kind, at):
            self._tell_at[kind] = at + _TELL_EVERY
            _log.warning("the store of buckets cannot be asked (%s); limits go by their failureMode until it can", reason)

    def _finish(self, waiter: Waiter, grant: Grant) -> None:
        if waiter.over:
            return
        waiter.over = True
        waiter.timer.cancel()
        self._waiting -= 1
        try:
            waiter.done(grant)
        except Exception:
            _log.exception("what a quota's answer was for went wrong")

    def _fallback(self, lease: Lease | None, limit: QuotaLimit, cost: int, reason: str, at: float) -> Grant:
        """The failure mode's answer. A local bucket's is an answer like any other; without a bucket to keep it in, it refuses."""
        self._fell_back(limit.failure_mode)
        if limit.failure_mode == "Local" and lease is not None:
            now = self._windows(limit, 0.0, None)
            return lease.spend_local(cost, at, self.sharers, at + now[1] / 1e6 - self._wall() if now else 0.0)
        return Grant(limit.failure_mode == "Allow", error=reason)

    def _failed(self, failure: Failure) -> None:
        self.unanswered[failure.kind] = self.unanswered.get(failure.kind, 0) + 1
        self._complain(failure.kind, failure.reason, self._clock())

    def _fell_back(self, mode: str) -> None:
        self.failures[mode] = self.failures.get(mode, 0) + 1

    def _sweep(self) -> None:
        """Looks at some of the leases: gives back what is not used, renews what is, forgets what means nothing any more."""
        if self._closed:
            return
        self._tick = self._timers.call_later(_TICK, self._sweep)
        self.slots.sweep()
        if not self._round:
            self._round = list(self._leases.items())
            self._slice = len(self._round) // _ROUND + 1
        at = self._clock()
        for _ in range(min(self._slice, len(self._round))):
            name, lease = self._round.pop()
            if self._leases.get(name) is lease and not lease.busy:
                self._tend(name, lease, at)

    def _tend(self, name: tuple[str, tuple[str, ...]], lease: Lease, at: float) -> None:
        idle = at - lease.used
        if lease.owes:
            if lease.due(at):
                self._send(lease, at)
        elif lease.tokens and at < lease.until:
            if idle > min(IDLE, lease.ttl):
                self._send(lease, at, returning=True)
            elif lease.until - at < lease.ttl * 0.4:
                self._send(lease, at, renewing=True)
        elif lease.refunds and at - lease.asked_at < lease.ttl:
            self._send(lease, at, returning=True)
        elif idle > _FORGET:
            del self._leases[name]

    def state(self) -> dict[str, Any]:
        """How it is doing, for `status`."""
        return {
            "holder": self.holder,
            "buckets": len(self._leases),
            "tokens": sum(lease.tokens for lease in self._leases.values()),
            "waiting": self._waiting,
            "asks": self.asks + self.slots.asks,
            "slots": {"inUse": self.slots.in_use, "leased": self.slots.held},
            "failures": dict(self.failures),
            "store": self._store.state(),
        }

    def usage(self) -> dict[str, Any]:
        """Which buckets are used, and who is refused, for `tollhouse quota top`."""
        now = self._clock()
        top, slots = usage(self._leases.items(), now), slots_usage(self.slots.leases(), now)
        refused = refusing(self._leases.items(), now)
        return {"holder": self.holder, "buckets": len(self._leases), "top": top, "slots": slots, "refusing": refused}

    async def close(self, grace: float = 1.0) -> None:
        """Gives every token back, waiting up to `grace` seconds for the store. The store is left open."""
        self._closed = True
        self._tick.cancel()
        end = self._clock() + grace
        await self.slots.close(grace)
        while True:
            at = self._clock()
            for lease in self._leases.values():
                if lease.flight is None and (lease.due(at) or (lease.tokens and at < lease.until)):
                    self._send(lease, at, returning=True)
            if self._flights == 0 or at >= end:
                break
            await asyncio.sleep(0.005)
        for lease in self._leases.values():
            for waiter in lease.failed():
                self._finish(waiter, self._fallback(lease, lease.limit, waiter.cost, "the lessee is closed", self._clock()))
        self._leases.clear()

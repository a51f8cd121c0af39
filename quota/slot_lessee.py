"""Leases slots of concurrency limits, holds one for each request in progress, and gives back what is not used. A part of `QuotaLessee`.

In the steady state a request takes a slot that is in hand, and leaves it there at its end. Leases are renewed for as long as something is
in progress on them, however long that is. What becomes of it when a lease ends because the store can't be asked is `quota.slots`' to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec

from mesh.model import QuotaLimit
from mesh.questions import Grant, SlotQuestion, TokenQuestion
from quota.lease import FOREVER, Known
from quota.slot_lease import AGAIN, HOLD, RENEW, HeldSlot, SlotFlight, SlotLease, SlotWaiter, share_of
from quota.slots import TTL, SlotAsk, SlotReply
from quota.store import Failure, Store, bucket_key, slots_key
from telemetry.record import Telemetry

_TICK: Final = 0.1
_ROUND: Final = 5
"""Ticks in which every lease is looked at once."""
_SOON: Final = 0.01
"""Seconds after which a slot that became free is given back, while others are refused."""
_FORGET: Final = 15.0
_TRIES: Final = 8
_RETRY: Final = 0.5
"""Seconds between two asks that try to have requests counted whose lease has ended."""

_log = logging.getLogger(__name__)

Name = tuple[str, tuple[str, ...]]
CALLERS: Final = 64
"""Callers of one limit's slots that have shares of their own at a lessee; those beyond have one together."""


class Surroundings(msgspec.Struct, frozen=True):
    """What it has in common with the lessee of tokens."""

    holder: Callable[[], str]
    sharers: Callable[[], int]
    now: Callable[[], float]
    """Seconds on the lessee's clock."""
    later: Callable[..., Any]
    """As `quota.lessee.Timers.call_later`."""
    known: Callable[[int], Known | None]
    """What an answer of that era told of its store's time."""
    heard: Callable[[Known], None]
    """Takes note of what an answer told."""
    trouble: Callable[[Failure], None]
    """The store did not answer."""
    fell_back: Callable[[str], None]
    """A request was answered by its limit's failure mode."""


class SlotLessee:
    """Owned by a `QuotaLessee`."""

    def __init__(self, store: Store, around: Surroundings, *, max_limits: int = 16_384, max_waiting: int = 10_000) -> None:
        self._store = store
        self._around = around
        self._leases: dict[Name, SlotLease] = {}
        self._groups: dict[Name, list[SlotLease]] = {}
        """The leases of all callers of a limit's slots."""
        self._max = max_limits
        self._max_waiting = max_waiting
        self._waiting = 0
        self._flights = 0
        self._closed = False
        self._round: list[tuple[Name, SlotLease]] = []
        self._slice = 1
        self.asks = 0
        """Asks that went to the store. They are numbered by this: a limit's numbers go up, also when its lease is begun anew."""
        self.lapsed = 0
        """Requests that went on after their lease."""
        self.cut = 0
        """Requests that were cut off at the end of their lease."""

    def report(self, telemetry: Telemetry) -> None:
        """Adds its metrics."""
        telemetry.gauge_function("tollhouse_quota_slots_in_use", "Requests in progress that concurrency limits count.", lambda: self.in_use)
        telemetry.gauge_function("tollhouse_quota_slots", "Slots of concurrency limits that are on lease.", lambda: self.held)
        telemetry.counter_function(
            "tollhouse_quota_slots_lapsed_total",
            "Requests that went on, or were cut off, when the lease of their slot ended unrenewed.",
            lambda: {("went_on",): float(self.lapsed), ("cut",): float(self.cut)},
            ("result",),
        )

    def take(self, question: TokenQuestion) -> Grant | None:
        """As `mesh.questions.Lessee.take`."""
        lease = self._leases.get(name_of(question))
        if lease is None:
            return None
        if lease.limit is not question.limit:
            self._follow(lease, question)
        at = self._around.now()
        lease.used = at
        if lease.usable(at):
            return lease.begin(self, at)
        return lease.refusal() if at < lease.refused_until else None

    def _follow(self, lease: SlotLease, question: TokenQuestion) -> None:
        """A new snapshot may have another number for a limit."""
        limit = question.limit
        if lease.caller == share_of(question)[0]:
            _, lease.weight, lease.reserve = share_of(question)
        if limit.concurrency != lease.limit.concurrency:
            lease.refused_until = 0.0
            lease.held = min(lease.held, max(limit.concurrency, len(lease.slots)))
        lease.limit = limit

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """As `mesh.questions.Lessee.ask`."""
        if question.limit.concurrency <= 0:
            return done(Grant(False, 0, 0.0, FOREVER))
        grant = self.take(question)
        if grant is not None:
            return done(grant)
        lease = self._lease(question)
        if lease is None or self._closed or self._waiting >= self._max_waiting:
            reason = "the lessee is closed" if self._closed else "too many limits are in use" if lease is None else "too many requests wait"
            return done(self._fallback(None, question.limit, reason))
        at = self._around.now()
        if lease.usable(at):  # of the one that those have together who are too many
            return done(lease.begin(self, at))
        if at < lease.refused_until:
            return done(lease.refusal())
        waiter = SlotWaiter(done)
        waiter.timer = self._around.later(question.limit.timeout, self._late, lease, waiter)
        self._waiting += 1
        lease.waiting.append(waiter)
        if lease.flight is None:
            self._send(lease)
        return None

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """As `mesh.questions.Lessee.peek`."""
        limit = question.limit
        lease = self._leases.get(name_of(question))
        at = self._around.now()
        if lease is not None and lease.usable(at):
            return done(Grant(True, lease.left(at)))

        def answered(answer: SlotReply | Failure) -> None:
            if isinstance(answer, Failure):
                return done(Grant(limit.failure_mode == "Allow", error=answer.reason))
            return done(Grant(answer.free > 0, answer.free, 0.0, 0.0 if answer.free > 0 else AGAIN))

        self.asks += 1
        look = look_ask(self._around.holder(), limit, share_of(question)[2])
        return self._store.ask_slots(slots_key(limit.name, question.key), look, answered)

    def _lease(self, question: TokenQuestion) -> SlotLease | None:
        """The lease for a question, made if there is room for it."""
        name = name_of(question)
        lease = self._leases.get(name)
        if lease is None:
            whole = (question.limit.name, question.key)
            if type(question) is SlotQuestion and question.caller and len(self._groups.get(whole, ())) >= CALLERS:
                return self._lease(msgspec.structs.replace(question, caller="", weight=1))
            if len(self._leases) >= self._max and not self._evict():
                return None
            lease = self._leases[name] = SlotLease(slots_key(question.limit.name, question.key), question, self._around.now())
            self._groups.setdefault(whole, []).append(lease)
        return lease

    def _forget(self, lease: SlotLease) -> None:
        """It is not among the leases any more."""
        name = (lease.limit.name, lease.key_values)
        group = [each for each in self._groups.get(name, ()) if each is not lease]
        if group:
            self._groups[name] = group
        else:
            self._groups.pop(name, None)

    def _local(self, lease: SlotLease) -> bool:
        """Whether one more may begin within this lessee's share of the limit (failure mode Local)."""
        used = sum(len(each.slots) for each in self._groups.get((lease.limit.name, lease.key_values), (lease,)))
        most = max(1, lease.limit.concurrency // max(1, self._around.sharers()))
        return used < max(1, most - lease.reserve)

    def _evict(self) -> bool:
        """Makes room: of a few of the oldest, takes the first that nobody uses."""
        for _ in range(min(_TRIES, len(self._leases))):
            name = next(iter(self._leases))
            lease = self._leases.pop(name)
            if not lease.busy:
                self._forget(lease)
                if lease.held and self._around.now() < lease.until:
                    lease.pressed_until = lease.until
                    self._send(lease)
                return True
            self._leases[name] = lease
        return False

    def released(self, lease: SlotLease, slot: HeldSlot) -> None:
        """A request has ended."""
        lease.slots.discard(slot)
        at = self._around.now()
        lease.used = at
        if lease.soon is None and at < lease.pressed_until and not self._closed:
            lease.soon = self._around.later(_SOON, self._give_back, lease)

    def _give_back(self, lease: SlotLease) -> None:
        lease.soon = None
        if lease.flight is None and lease.held > len(lease.slots) and not self._closed:
            self._send(lease)

    def _send(self, lease: SlotLease) -> None:
        self.asks += 1
        around = self._around
        # A lessee is a holder of its own for each caller that has a share.
        holder = f"{around.holder()}#{bucket_key(lease.caller, (str(lease.reserve > 0),))[-32:]}" if lease.shared else around.holder()
        flight = lease.next_ask(holder, self.asks, around.now(), around.sharers(), around.known(lease.era))
        self._flights += 1

        def done(answer: SlotReply | Failure) -> None:
            self._flights -= 1
            self._answered(lease, flight, answer)

        self._store.ask_slots(lease.key, flight.ask, done, strict=lease.limit.strict)

    def _answered(self, lease: SlotLease, flight: SlotFlight, answer: SlotReply | Failure) -> None:
        if lease.flight is not flight:
            return
        around = self._around
        at = around.now()
        if isinstance(answer, Failure) or answer.stale or answer.seq != flight.ask.seq:
            failure = answer if isinstance(answer, Failure) else Failure("the store answered another ask")
            around.trouble(failure)
            for waiter in lease.failed():
                self._finish(waiter, self._fallback(lease, lease.limit, failure.reason))
            return
        if answer.era:
            around.heard(Known(answer.era, answer.now, flight.sent, at))
        waiters = [*lease.answered(answer, at), *lease.waiting]
        lease.waiting.clear()
        if lease.cuts:
            self._arm(lease, at)
        for place, waiter in enumerate(waiters):
            if waiter.over:
                continue
            if lease.usable(at):
                self._finish(waiter, lease.begin(self, at))
            elif place >= len(flight.waiters):  # it came while the ask was under way, which did not ask for it
                lease.waiting.append(waiter)
            else:
                lease.refused_until = at + HOLD
                lease.refused += 1
                self._finish(waiter, Grant(False, 0, 0.0, AGAIN))
        if lease.waiting and lease.flight is None:
            self._send(lease)

    def _late(self, lease: SlotLease, waiter: SlotWaiter) -> None:
        failure = Failure("the store did not answer in time")
        self._around.trouble(failure)
        self._finish(waiter, self._fallback(lease, lease.limit, failure.reason))

    def _finish(self, waiter: SlotWaiter, grant: Grant) -> None:
        if waiter.over:
            return
        waiter.over = True
        waiter.timer.cancel()
        self._waiting -= 1
        _tell(waiter.done, grant)

    def _fallback(self, lease: SlotLease | None, limit: QuotaLimit, reason: str) -> Grant:
        """The failure mode's answer. What it admits is in progress, and is counted again once the store answers."""
        self._around.fell_back(limit.failure_mode)
        if lease is not None and limit.failure_mode == "Local":
            if self._local(lease):
                return lease.begin(self, self._around.now())
            return lease.refusal()
        if lease is not None and limit.failure_mode == "Allow":
            return lease.begin(self, self._around.now(), reason)
        return Grant(limit.failure_mode == "Allow", error=reason)

    def sweep(self) -> None:
        """Looks at some of the leases: renews those in use, gives back what is not used. To be called ten times a second."""
        if not self._leases:
            return
        if not self._round:
            self._round = list(self._leases.items())
            self._slice = len(self._round) // _ROUND + 1
        at = self._around.now()
        for _ in range(min(self._slice, len(self._round))):
            name, lease = self._round.pop()
            if self._leases.get(name) is lease and lease.flight is None:
                self._tend(name, lease, at)

    def _tend(self, name: Name, lease: SlotLease, at: float) -> None:
        if at >= lease.until:
            self._tend_lapsed(name, lease, at)
        elif lease.held > lease.target(at) or (lease.held and lease.until - at < RENEW):
            self._send(lease)

    def _tend_lapsed(self, name: Name, lease: SlotLease, at: float) -> None:
        lease.held = 0
        if lease.slots:
            if lease.until and not lease.lapse_noted:
                lease.lapse_noted = True
                self.lapsed += len(lease.slots)
            if at - lease.asked_at >= _RETRY:
                self._send(lease)
        elif at - lease.used > _FORGET and not lease.busy:
            del self._leases[name]
            self._forget(lease)

    def _arm(self, lease: SlotLease, at: float) -> None:
        if lease.lapse_timer is None:
            lease.lapse_timer = self._around.later(max(0.0, lease.until - at), self._lapse, lease)

    def _lapse(self, lease: SlotLease) -> None:
        """The lease of a limit that cuts off what goes on has ended, unless it was renewed."""
        lease.lapse_timer = None
        at = self._around.now()
        if at < lease.until:
            if lease.slots or lease.held:
                self._arm(lease, at)
            return
        lease.held = 0
        self._cut_off(lease, len(lease.slots))

    def _cut_off(self, lease: SlotLease, count: int) -> None:
        for slot in list(lease.slots)[:count]:
            lease.slots.discard(slot)
            self.cut += 1
            _tell(slot.cut_off)

    def leases(self) -> list[tuple[Name, SlotLease]]:
        """What it knows, for people."""
        return list(self._leases.items())

    @property
    def in_use(self) -> int:
        """Requests in progress that a limit counts."""
        return sum(len(lease.slots) for lease in self._leases.values())

    @property
    def held(self) -> int:
        """Slots on lease."""
        at = self._around.now()
        return sum(lease.held for lease in self._leases.values() if at < lease.until)

    async def close(self, grace: float) -> None:
        """Gives back every slot that is not in use, waiting up to `grace` seconds for the store."""
        self._closed = True
        end = self._around.now() + grace
        while True:
            at = self._around.now()
            for lease in self._leases.values():
                if lease.flight is None and at < lease.until and lease.held > len(lease.slots):
                    lease.pressed_until = lease.until
                    self._send(lease)
            if self._flights == 0 or at >= end:
                break
            await asyncio.sleep(0.005)
        for lease in self._leases.values():
            for timer in (lease.soon, lease.lapse_timer):
                if timer is not None:
                    timer.cancel()
            for waiter in lease.failed():
                self._finish(waiter, self._fallback(None, lease.limit, "the lessee is closed"))
        self._leases.clear()
        self._groups.clear()


def _tell(callback: Callable[..., object], *arguments: Any) -> None:
    """Calls what is somebody else's: its defect is not ours."""
    try:
        callback(*arguments)
    except Exception:
        _log.exception("what a quota's answer was for went wrong")


def name_of(question: TokenQuestion) -> Name:
    """The name of a lease: each caller that has a share has one, and those for whom slots are held back."""
    if type(question) is not SlotQuestion:
        return question.limit.name, question.key
    return question.limit.name, (*question.key, question.caller, "ordinary" if question.reserve else "any")


def look_ask(holder: str, limit: QuotaLimit, reserve: int = 0) -> SlotAsk:
    """An ask that looks, and changes nothing."""
    return SlotAsk(holder, 0, 0, 0, 1, 0, 0, 1, limit.concurrency, TTL, reserve=reserve, peek=True)

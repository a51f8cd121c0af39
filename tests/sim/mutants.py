"""Decision code that is wrong on purpose: a simulation that does not catch it would prove nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.questions import Grant
from quota.bucket import Ask, Bucket, Reply, apply
from quota.clock import StoreClock
from quota.lease import Lease, Waiter
from quota.lessee import QuotaLessee


def charge_after_grant(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """Lends tokens, and takes them out of the bucket only when they are reported as spent."""
    known = bucket.holders.get(ask.holder)
    seq = known.seq if known is not None else 0
    reply = apply(bucket, ask, now)
    if not reply.stale and ask.seq > seq:
        bucket.level += reply.lent
        bucket.holders[ask.holder].out -= reply.lent
    return reply


def forget_a_return(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """What is given back is not put back."""
    return apply(bucket, msgspec.structs.replace(ask, returned=0), now)


def carry_out_twice(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """An ask that comes again is carried out again."""
    known = bucket.holders.get(ask.holder)
    if known is not None and known.seq == ask.seq:
        known.seq -= 1
    return apply(bucket, ask, now)


def refill_what_is_out(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """Refills the place of tokens that are on lease."""
    return apply(bucket, msgspec.structs.replace(ask, burst=ask.burst + bucket.outstanding), now)


def forget_a_debt(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """A bucket is never emptier than empty."""
    reply = apply(bucket, ask, now)
    bucket.level = max(0.0, bucket.level)
    return reply


def charge_what_is_told_again(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """Does not remember what it has charged to whom."""
    known = bucket.holders.get(ask.holder)
    if known is not None and known.seq != ask.seq:
        known.charged = 0
    return apply(bucket, ask, now)


def believe_the_clock(clock: StoreClock, ask: Ask, wall: int) -> int:
    """Goes by the wall clock."""
    return wall


def outlive_the_window(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """Leases that go on when their window of the calendar has ended: nobody is told that it ends."""
    return msgspec.structs.replace(apply(bucket, ask, now), ends=0)


def carry_over(bucket: Bucket, ask: Ask, now: int) -> Reply:
    """What is left of a window is there in the next one, too."""
    left = bucket.level if bucket.ends and now >= bucket.ends else 0
    reply = apply(bucket, ask, now)
    bucket.level += left if not reply.stale else 0
    return reply


class _FromTheAnswer(Lease):
    __slots__ = ()

    def answered(self, reply: Reply, now: float) -> list[tuple[Waiter, Grant]]:
        answers = super().answered(reply, now)
        self.until = now + self.ttl
        return answers


class _KeepsWhatItReturns(Lease):
    __slots__ = ()

    def _return(self, tokens: int) -> None:
        self.returned += tokens


class _TellsAChargeOnce(Lease):
    __slots__ = ()

    def failed(self) -> list[Waiter]:
        if self.charges is not None:
            self.charges.settled = self.charges.doubted = self.charges.charged
        return super().failed()


class _ChargesNothing(Lease):
    __slots__ = ()

    def charge(self, tokens: int, now: float) -> None:
        pass


class _ForgetsToReport(Lease):
    __slots__ = ()

    def next_ask(self, *arguments: Any, **more: Any) -> Any:
        flight = super().next_ask(*arguments, **more)
        self.flight = flight = msgspec.structs.replace(flight, ask=msgspec.structs.replace(flight.ask, spent=0))
        return flight


def lessee_with(kind: type[Lease]) -> Any:
    """A maker of lessees whose leases are of that kind."""

    class Mutant(QuotaLessee):
        def _lease(self, question: Any, at: float) -> Lease | None:
            lease = super()._lease(question, at)
            if lease is not None and type(lease) is Lease:
                lease.__class__ = kind
            return lease

    return Mutant


MUTANTS: dict[str, dict[str, Any]] = {
    "charge after grant": {"apply_": charge_after_grant},
    "refill the place of what is out": {"apply_": refill_what_is_out},
    "believe the clock": {"tell_": believe_the_clock},
    "forget a return": {"apply_": forget_a_return},
    "carry out twice": {"apply_": carry_out_twice},
    "run a lease from its answer": {"make": lessee_with(_FromTheAnswer)},
    "spend what was given back": {"make": lessee_with(_KeepsWhatItReturns)},
    "a lease outlives its window": {"apply_": outlive_the_window},
    "a window inherits what was left": {"apply_": carry_over},
    "forget a debt": {"apply_": forget_a_debt},
    "charge what is told again": {"apply_": charge_what_is_told_again},
    "tell a charge once": {"make": lessee_with(_TellsAChargeOnce)},
    "charge nothing": {"make": lessee_with(_ChargesNothing)},
    "forget to report": {"make": lessee_with(_ForgetsToReport)},
}
OF_CALENDARS = ("a lease outlives its window", "a window inherits what was left")
"""Those that only limits by the calendar can tell."""

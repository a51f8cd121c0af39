"""Slots' decision code that is wrong on purpose, as in `tests.sim.mutants`."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from mesh.questions import TokenQuestion
from quota.lessee import QuotaLessee
from quota.slot_lease import HeldSlot, SlotFlight, SlotLease
from quota.slot_lessee import SlotLessee
from quota.slots import SlotAsk, SlotReply, Slots, apply_slots


def lend_without_counting(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """What is lent beyond what is kept is not written down."""
    known = slots.holders.get(ask.holder)
    seq = known.seq if known is not None else 0
    reply = apply_slots(slots, ask, now)
    if not reply.stale and ask.seq > seq:
        slots.holders[ask.holder].out = max(ask.keep, ask.busy)
    return reply


def lend_at_once(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """A store that has just begun lends as if nothing could be out."""
    slots.closed = 0
    return apply_slots(slots, ask, now)


def keep_what_is_given_back(slots: Slots, ask: SlotAsk, now: int) -> SlotReply:
    """The store does not take back what a holder does not keep."""
    known = slots.holders.get(ask.holder)
    return apply_slots(slots, msgspec.structs.replace(ask, keep=max(ask.keep, known.out if known is not None else 0)), now)


class _UsesALapsedLease(SlotLease):
    __slots__ = ()

    def answered(self, reply: SlotReply, now: float) -> Any:
        waiters = super().answered(reply, now)
        self.until += 2.0
        return waiters


class _UsesWhatItGaveBack(SlotLease):
    __slots__ = ()

    def next_ask(self, *arguments: Any, **more: Any) -> SlotFlight:
        held = self.held
        flight = super().next_ask(*arguments, **more)
        self.held = held
        return flight


class _CountsFromTheAnswer(SlotLease):
    __slots__ = ()

    def answered(self, reply: SlotReply, now: float) -> Any:
        waiters = super().answered(reply, now)
        self.until = math.inf
        return waiters


class _NeverReleases(SlotLessee):
    def released(self, lease: SlotLease, slot: HeldSlot) -> None:
        if slot.over and self.asks % 7:
            super().released(lease, slot)


class _NeverCuts(SlotLessee):
    def _cut_off(self, lease: SlotLease, count: int) -> None:
        return None


class _NeverRenews(SlotLessee):
    def _tend(self, name: Any, lease: SlotLease, at: float) -> None:
        if at >= lease.until or lease.held > lease.target(at):
            super()._tend(name, lease, at)


def lessee_with(lease: type[SlotLease] | None = None, lessee: type[SlotLessee] | None = None) -> Any:
    """A maker of lessees whose slots are leased so."""

    def make(*arguments: Any, **more: Any) -> QuotaLessee:
        made = QuotaLessee(*arguments, **more)
        if lessee is not None:
            made.slots.__class__ = lessee
        if lease is not None:
            plain = made.slots._lease

            def leased(question: TokenQuestion) -> SlotLease | None:
                found = plain(question)
                if found is not None:
                    found.__class__ = lease
                return found

            made.slots._lease = leased  # type: ignore[method-assign]
        return made

    return make


SLOT_MUTANTS: dict[str, dict[str, Any]] = {
    "lend without counting": {"apply_slots_": lend_without_counting},
    "lend at once after a failover": {"apply_slots_": lend_at_once},
    "keep what is given back": {"apply_slots_": keep_what_is_given_back},
    "use a lapsed lease": {"make": lessee_with(lease=_UsesALapsedLease)},
    "use what was given back": {"make": lessee_with(lease=_UsesWhatItGaveBack)},
    "believe that a lease has no end": {"make": lessee_with(lease=_CountsFromTheAnswer)},
    "forget to release": {"make": lessee_with(lessee=_NeverReleases)},
    "never cut off": {"make": lessee_with(lessee=_NeverCuts)},
}

"""One lessee's part of one concurrency limit: which requests are in progress, how many slots it holds, and how many to ask for next.

Pure: times are arguments, in seconds on the lessee's clock (CLOCK_BOOTTIME). `quota.slot_lessee` does the asking.

How many slots are held follows the demand: as many as were in use at once within the last two seconds, and a quarter more when that was
too little. While somebody in the fleet is refused, none is held that is not in use, and none taken beyond the share that the store allows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mesh.model import QuotaLimit
from mesh.questions import Grant, SlotGrant, SlotQuestion, TokenQuestion
from quota.lease import Known
from quota.slots import PRESSED, TTL, USABLE, SlotAsk, SlotReply

if TYPE_CHECKING:
    from quota.slot_lessee import SlotLessee

LASTS: Final = TTL / 1e6
RENEW: Final = 0.55 * LASTS
"""A lease is renewed when less of it is left, in seconds."""
WINDOW: Final = 1.0
"""Seconds over which the most requests at once are remembered, twice."""
HOLD: Final = 0.02
"""Seconds for which a refusal holds."""
AGAIN: Final = 1.0
"""Seconds after which a client that was refused may try again: nobody knows when a request ends."""


class HeldSlot:
    """A request in progress: a `mesh.questions.Slot`."""

    __slots__ = ("_cut", "_lease", "_lessee", "lapsed", "over")

    def __init__(self, lessee: SlotLessee, lease: SlotLease) -> None:
        self._lessee = lessee
        self._lease = lease
        self._cut: Callable[[], object] | None = None
        self.over = False
        self.lapsed = False
        """Its lease has ended, and the limit is one that cuts off what goes on."""

    def release(self) -> None:
        """As `mesh.questions.Slot`."""
        if not self.over:
            self.over = True
            self._cut = None
            self._lessee.released(self._lease, self)

    def on_cut(self, cut: Callable[[], object]) -> None:
        """As `mesh.questions.Slot`."""
        if self.lapsed:
            cut()
        else:
            self._cut = cut

    def cut_off(self) -> None:
        """Its time is over."""
        self.over = self.lapsed = True
        cut, self._cut = self._cut, None
        if cut is not None:
            cut()


class SlotWaiter:
    """A request that waits for an answer."""

    __slots__ = ("done", "over", "timer")

    def __init__(self, done: Callable[[Grant], None]) -> None:
        self.done = done
        self.over = False
        """True once it has been answered."""
        self.timer: Any = None


class SlotFlight(msgspec.Struct, frozen=True):
    """An ask that is under way."""

    ask: SlotAsk
    sent: float
    waiters: list[SlotWaiter]


class SlotLease:
    """What a lessee knows of one limit's slots, for one combination of descriptors. Its owner is the lessee."""

    __slots__ = (
        "_before",
        "_peak",
        "_since",
        "admitted",
        "asked_at",
        "caller",
        "elsewhere",
        "era",
        "flight",
        "free",
        "held",
        "key",
        "key_values",
        "lapse_noted",
        "lapse_timer",
        "limit",
        "most",
        "pressed_until",
        "refused",
        "refused_until",
        "reserve",
        "shared",
        "slots",
        "soon",
        "unreported",
        "until",
        "used",
        "waiting",
        "weight",
    )

    def __init__(self, key: str, question: TokenQuestion, now: float) -> None:
        self.key = key
        """The record's name in the store."""
        self.key_values = question.key
        self.caller, self.weight, self.reserve = share_of(question)
        """As in `mesh.questions.SlotQuestion`."""
        self.shared = type(question) is SlotQuestion
        self.limit: QuotaLimit = question.limit
        self.slots: set[HeldSlot] = set()
        """Requests in progress."""
        self.held = 0
        """Slots on lease; they count before `until` only."""
        self.until = 0.0
        self.most: float = math.inf
        """How many may be in use while there is pressure."""
        self.pressed_until = 0.0
        self.free = self.elsewhere = 0
        """As the store told last: slots that nobody has, those that others have, and requests in progress in the fleet."""
        self.refused_until = 0.0
        self.refused = self.admitted = 0
        """Requests, in all."""
        self.unreported = 0
        """Requests that were refused without asking, since the last ask."""
        self.era = 0
        self.used = now
        self.asked_at = -math.inf
        self.waiting: deque[SlotWaiter] = deque()
        self.flight: SlotFlight | None = None
        self.soon: Any = None
        """Timer of an ask that gives back."""
        self.lapse_timer: Any = None
        self.lapse_noted = False
        self._peak = self._before = 0
        self._since = now

    @property
    def busy(self) -> bool:
        """Whether it means something to somebody."""
        return self.flight is not None or bool(self.waiting) or bool(self.slots)

    @property
    def cuts(self) -> bool:
        """Whether what goes on after its lease is cut off."""
        return self.limit.strict and self.limit.failure_mode == "Deny"

    def usable(self, now: float) -> bool:
        """Whether one more request may begin."""
        used = len(self.slots)
        return now < self.until and used < self.held and (now >= self.pressed_until or used < self.most)

    def begin(self, lessee: SlotLessee, now: float, error: str = "") -> SlotGrant:
        """The answer for an admitted request, which is in progress from now on."""
        slot = HeldSlot(lessee, self)
        self.slots.add(slot)
        self.admitted += 1
        self._look(now)
        return SlotGrant(admitted=True, remaining=self.left(now), error=error, slot=slot)

    def left(self, now: float) -> int:
        """Slots that are left as far as is known: a lower bound."""
        return max(0, (self.held if now < self.until else 0) - len(self.slots)) + (0 if self.elsewhere else self.free)

    def refusal(self) -> Grant:
        """The answer while no slot is known to be free."""
        self.refused += 1
        self.unreported += 1
        return Grant(False, 0, 0.0, AGAIN)

    def _look(self, now: float) -> None:
        """Takes note of how many are in use."""
        used = len(self.slots)
        if now - self._since >= WINDOW:
            self._before = self._peak if now - self._since < 2 * WINDOW else used
            self._peak = used
            self._since = now
        elif used > self._peak:
            self._peak = used

    def target(self, now: float) -> int:
        """How many slots to hold."""
        self._look(now)
        used = len(self.slots)
        return used if now < self.pressed_until else max(used, self._peak, self._before)

    def next_ask(self, holder: str, seq: int, now: float, sharers: int, known: Known | None) -> SlotFlight:
        """Makes the next ask, number `seq`, and notes it as under way. What it does not keep is given back from now on."""
        waiters = [waiter for waiter in self.waiting if not waiter.over]
        self.waiting.clear()
        used, need = len(self.slots), len(waiters)
        self.held = keep = min(self.held, self.target(now)) if now < self.until else 0
        missing = max(0, need - max(0, keep - used))
        limit = self.limit
        ask = SlotAsk(
            holder,
            seq,
            keep,
            used,
            missing,
            max(1, (used + need) // 4) if missing and now >= self.pressed_until else 0,
            min(self.unreported, limit.concurrency),
            sharers,
            limit.concurrency,
            TTL,
            self.cuts,
            self.caller,
            self.weight,
            self.reserve,
            False,
            *(known.since(now) if known is not None else ()),
        )
        self.unreported = 0
        self.asked_at = now
        self.flight = SlotFlight(ask, now, waiters)
        return self.flight

    def answered(self, reply: SlotReply, now: float) -> list[SlotWaiter]:
        """Takes in the answer to the ask under way. Returns those who waited for it and have no answer yet."""
        flight = self.flight
        assert flight is not None
        self.flight = None
        self.era = reply.era
        self.held = reply.held
        self.until = flight.sent + LASTS * USABLE
        self.lapse_noted = False
        self.free, self.elsewhere = reply.free, reply.elsewhere
        self.pressed_until = now + PRESSED / 1e6 if reply.pressed else 0.0
        self.most = reply.most
        return [waiter for waiter in flight.waiters if not waiter.over]

    def failed(self) -> list[SlotWaiter]:
        """The ask under way came to nothing. Returns who must be answered otherwise: all that wait."""
        flight, self.flight = self.flight, None
        waiters = [*(flight.waiters if flight else ()), *self.waiting]
        self.waiting.clear()
        return [waiter for waiter in waiters if not waiter.over]


def share_of(question: TokenQuestion) -> tuple[str, int, int]:
    """The caller, its weight and what is held back from it."""
    return (question.caller, question.weight, question.reserve) if type(question) is SlotQuestion else ("", 1, 0)

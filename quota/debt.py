"""What answers have cost beyond what their requests had paid, on its way from a lessee to the bucket.

The one who holds tokens pays from them at once. What they do not cover is told to the store as a sum that only ever grows, with how much of
it an answer has confirmed: the store charges the difference to the sum that it knows of this holder, so a charge that is told twice is made
once, and one whose ask got lost is made by the next. The bucket goes into debt by it (`quota.bucket`), and whoever comes next is refused
until that is paid.

An ask that got no answer may have been carried out. The store knows for `quota.bucket.CHARGES_KEPT` what it has charged to whom; when a
lessee has not heard for nearly as long, it gives up what was in that ask, since it must never be charged twice. What was never sent stays
to be told for as long as the lessee lives.

Pure: times are arguments, in seconds on the lessee's clock.
"""

from __future__ import annotations

from typing import Final

import msgspec

from quota.bucket import CHARGES_KEPT

DOUBT: Final = CHARGES_KEPT / 1e6 - 10.0
"""Seconds after which a charge whose fate is not known is given up."""
AGAIN: Final = 1.0
"""Seconds until a charge that could not be told is told again, if nothing else is asked meanwhile."""


class Told(msgspec.Struct, frozen=True):
    """What an ask says of charges, and what was known before it went out."""

    charged: int
    settled: int
    doubted: int
    doubted_at: float


class Charges:
    """The charges of one lessee to one bucket. Its owner is the lease."""

    __slots__ = ("again_at", "charged", "counted", "doubted", "doubted_at", "settled")

    def __init__(self, base: int) -> None:
        """`base`: at least what this lessee has charged to this bucket before, if anything. All sums count from there."""
        self.charged = base
        self.settled = base
        """Confirmed, or given up."""
        self.doubted = base
        """What was in asks that may have been carried out."""
        self.doubted_at = 0.0
        """When the first ask of these went out."""
        self.counted = base
        """What the lease's speed has been measured with."""
        self.again_at = 0.0
        """Not told before, unless something else is asked."""

    @property
    def owed(self) -> int:
        """Tokens that have yet to be charged, as far as is known."""
        return self.charged - self.settled

    def forgo(self, now: float) -> int:
        """Gives up what has been in doubt for too long. Returns the tokens."""
        lost = self.doubted - self.settled
        if lost <= 0 or now - self.doubted_at < DOUBT:
            return 0
        self.settled = self.doubted
        return lost

    def tell(self, now: float) -> Told:
        """What the next ask says; it goes out now."""
        told = Told(self.charged, self.settled, self.doubted, self.doubted_at)
        if self.charged > self.settled:
            if self.doubted <= self.settled:
                self.doubted_at = now
            self.doubted = self.charged
        return told

    def pay(self, tokens: int, told: Told) -> int:
        """Pays up to `tokens` of what `told` did not say, from tokens in hand. Returns how many."""
        paid = min(tokens, self.charged - max(told.charged, self.settled))
        self.charged -= paid
        self.counted = min(self.counted, self.charged)
        return paid

    def confirmed(self, told: Told) -> None:
        """The ask that said `told` was carried out."""
        self.settled = max(self.settled, told.charged)
        self.doubted = max(self.doubted, self.settled)

    def failed(self, told: Told, now: float, *, sent: bool) -> None:
        """The ask that said `told` got no answer; without `sent` it never left."""
        self.again_at = now + AGAIN
        if not sent:
            self.doubted, self.doubted_at = max(told.doubted, self.settled), told.doubted_at

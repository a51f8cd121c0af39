"""Stories in which requests cost something after their answers: what was charged is held against what was told, and against the limit."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import msgspec

from mesh.questions import TokenQuestion
from mesh.quota_cost import Usage
from quota.debt import Charges
from quota.lessee import QuotaLessee
from quota.store import bucket_key
from tests.sim.redis import EPSILON, Broken

if TYPE_CHECKING:
    from tests.sim.story import Gateway, Shape, Story

SHARE: Final = 0.35
"""Of the stories are such."""


def with_charges(seed: int, shape: Shape) -> Shape:
    """The shape of a seed's story, in which answers may cost something. Drawn apart, so that a seed's story is otherwise as it was."""
    rng = random.Random(seed ^ 0x5EED)
    if rng.random() >= SHARE or shape.limit.calendar is not None:
        return shape
    burst = shape.limit.burst
    limit = msgspec.structs.replace(shape.limit, usage=Usage(source="header"), most_debt=1_000_000)
    most = rng.choice((3, burst, 3 * burst))
    return msgspec.structs.replace(shape, limit=limit, undone=0.0, used=(0, rng.randint(1, most), rng.randint(1, most)))


class Books:
    """What gateways were told that answers have cost, and what became of it. Its owner is the story."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self.charges: list[tuple[str, QuotaLessee, Charges, int]] = []
        """Key, lessee, what it had yet to pay, and where its sums began."""
        self.spent: dict[str, list[tuple[float, int, float | None]]] = {}
        """By key: when tokens were taken, how many, and how many may be owed in all just then; None where that is not looked at."""

    def admitted(self, question: TokenQuestion, at: float, *, in_hand: bool) -> None:
        """A request was let through."""
        self._note(question.key[0], at, question.cost, in_hand)

    def answered(self, gateway: Gateway, question: TokenQuestion, tokens: int) -> None:
        """The answer says what the request has cost more."""
        lessee, name = gateway.lessee, (question.limit.name, question.key)
        before = lessee._leases.get(name)
        base = before.charges.charged if before is not None and before.charges is not None else None
        lessee.charge(question, tokens)
        charges = lessee._leases[name].charges
        assert charges is not None
        if all(each is not charges for _, _, each, _ in self.charges):
            self.charges.append((question.key[0], lessee, charges, charges.charged - tokens if base is None else base))
        self._note(question.key[0], self._story.world.now, tokens, True)

    def _note(self, key: str, at: float, tokens: int, looks: bool) -> None:
        self.spent.setdefault(key, []).append((at, tokens, self._owed(key) if looks else None))

    def _owed(self, key: str) -> float:
        """What the bucket is short of, what gateways have yet to tell it, and what went with the data or with a gateway."""
        story = self._story
        name = bucket_key(story.shape.limit.name, (key,))
        on_its_way = sum(charges.owed for of, _, charges, _ in self.charges if of == key)
        return story.redis.debt(name, story.shape.limit.rate) + story.redis.debts_lost.get(name, 0.0) + on_its_way

    def check(self, key: str) -> None:
        """What was used beyond the limit is owed, and what was told was charged, once."""
        limit, faults = self._story.shape.limit, self._story.shape.faults
        by_the_clock = "forward" not in faults  # a clock that is set forward ends keys, and with them debts
        level, stamp = float(limit.burst), 0.0
        for at, tokens, owed in sorted(self.spent.get(key, []), key=lambda each: each[0]):
            level = min(limit.burst, level + (at - stamp) * limit.rate) - tokens
            stamp = at
            if by_the_clock and owed is not None and level < -owed - 0.01:
                raise Broken(f"{key}: {-level:.3f} tokens more than the limit were used, and {owed:.3f} are owed, at {at:.3f} s")
        name = bucket_key(limit.name, (key,))
        for lessee in {id(lessee): lessee for of, lessee, _, _ in self.charges if of == key}.values():
            own = [(charges, base) for of, whose, charges, base in self.charges if of == key and whose is lessee]
            made = self._story.redis.charged.get((name, lessee.holder), 0.0)
            said = sum(charges.charged - base for charges, base in own)
            confirmed = sum(charges.settled - base for charges, base in own) - lessee.uncharged["lost"]
            # What a store had charged that lost its data is charged again by the next one: it is told again.
            most = float("inf") if name in self._story.redis.debts_lost else said
            if not confirmed - EPSILON <= made <= most + EPSILON:
                raise Broken(f"{key}: {lessee.holder} said {said}, was told that {confirmed} were charged, and {made} were")

"""A world with a virtual clock for lessees, stores that lose and double answers, and the check of what a limit admits in any window."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from quota.bucket import Ask, Reply
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.store import Done, Failure


def limit(name: str = "shop/orders/caller", tokens: int = 10, interval: float = 1.0, burst: int = 20, **more: Any) -> QuotaLimit:
    return QuotaLimit(name=name, level="route", per=(), tokens=tokens, interval=interval, burst=burst, **more)


class Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class World:
    """Time passes only in `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.store_behind = 0.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def clock(self) -> float:
        return self.now

    def store_clock(self) -> int:
        return int((self.now - self.store_behind) * 1e6)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(lambda: callback(*args))
        heapq.heappush(self._heap, (self.now + delay, next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            at, _, timer = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            if timer.callback is not None:
                timer.callback()
        self.now = end

    def lessee(self, store: Any, **more: Any) -> QuotaLessee:
        return QuotaLessee(store, holder="gateway", clock=self.clock, timers=self, **more)


class FaultyStore:
    """Passes asks on to a `MemoryStore`; each has a fate: what happens to it and to its answer."""

    FATES = ("fine", "slow", "lost ask", "lost answer", "late ask", "doubled", "doubled late")

    def __init__(self, world: World, inner: MemoryStore) -> None:
        self.world = world
        self.inner = inner
        self.fates: list[str] = []
        self.asks = 0
        self.decided: dict[tuple[str, int], float] = {}
        """When each ask was carried out."""

    def ask(self, key: str, ask: Ask, done: Done, *, strict: bool = False) -> None:
        self.asks += 1
        fate = self.fates.pop(0) if self.fates else "fine"
        if fate in {"lost ask", "late ask"}:
            self.world.call_later(0.25, done, Failure("lost"))
            if fate == "late ask":
                self.world.call_later(0.9, self._apply, key, ask)
            return
        reply = self._apply(key, ask)
        if fate.startswith("doubled"):
            again = self._apply(key, ask)
            assert again == reply
            if fate == "doubled late":
                self.world.call_later(1.1, self._apply, key, ask)
        if fate == "lost answer":
            self.world.call_later(0.25, done, Failure("lost"))
        elif fate == "fine":
            done(reply)
        else:
            self.world.call_later(0.15, done, reply)

    def _apply(self, key: str, ask: Ask) -> Reply | Failure:
        self.decided.setdefault((ask.holder, ask.seq), self.world.now)
        got: list[Reply | Failure] = []
        self.inner.ask(key, ask, got.append)
        return got[0]

    def state(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        return None


class Ledger:
    """Who was admitted when. A request that is admitted with the ask that carried it counts from when the store granted it."""

    def __init__(self, world: World, store: FaultyStore) -> None:
        self.world = world
        self.store = store
        self.admitted: list[tuple[float, TokenQuestion]] = []
        self.refused = 0

    def request(self, lessee: QuotaLessee, question: TokenQuestion) -> None:
        grant = lessee.take(question, self.world.now)
        if grant is not None:
            self._note(grant, question, self.world.now)
            return

        def done(answer: Grant) -> None:
            lease = lessee._leases.get((question.limit.name, question.key))
            carried = next((seq for admitted, seq in lease.grants if admitted is question), 0) if lease else 0
            self._note(answer, question, self.store.decided[lessee.holder, carried] if carried else self.world.now)

        lessee.ask(question, done)

    def _note(self, grant: Grant, question: TokenQuestion, at: float) -> None:
        if grant.admitted:
            self.admitted.append((at, question))
        else:
            self.refused += 1

    def give_back(self, lessee: QuotaLessee, number: int) -> None:
        """The request was refused by something else: it never got through."""
        _, question = self.admitted.pop(number)
        lessee.give_back(question)

    def worst(self, rate: float) -> float:
        """The most by which any window's admissions pass `rate x time`: what must not be above the burst."""
        worst = total = 0.0
        least = float("inf")
        for at, question in sorted(self.admitted, key=lambda entry: entry[0]):
            least = min(least, total - rate * at)
            total += question.cost
            worst = max(worst, total - rate * at - least)
        return worst

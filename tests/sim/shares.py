"""Stories of a concurrency limit whose slots callers share: who gets how much of it while there is too little."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from mesh.model import QuotaLimit
from mesh.questions import Grant, SlotQuestion, TokenQuestion
from tests.sim.network import Weather
from tests.sim.slots import CALM, END, SlotGateway, SlotShape, SlotStory
from tests.sim.world import Process


class Caller(msgspec.Struct):
    """One of those who share."""

    name: str
    demand: float
    """Requests in progress that it would have, on average."""
    weight: int = 1
    reserve: int = 0
    since: float = 0.0
    """When it comes."""


class SharedStory(SlotStory):
    """Callers at several gateways. `share`: what each had in progress, on average, in a time when all is well."""

    def __init__(self, seed: int, concurrency: int, callers: list[Caller], *, gateways: int = 3, lasts: float = 0.2, **more: Any) -> None:
        self.callers = callers
        self.areas = dict.fromkeys((each.name for each in callers), 0.0)
        self.refusals = dict.fromkeys((each.name for each in callers), 0)
        self.passed = dict.fromkeys((each.name for each in callers), 0)
        limit = QuotaLimit(name="sim/limit", level="route", per=(), tokens=0, concurrency=concurrency)
        super().__init__(seed, shape=SlotShape(limit, gateways, 1.0, lasts, Weather(delay=0.0005), (), True), **more)

    def _load(self) -> None:
        rng = random.Random(self.seed)
        for caller in self.callers:
            self.world.after(caller.since, lambda caller=caller: self._next(caller, rng))  # type: ignore[misc]

    def _next(self, caller: Caller, rng: random.Random) -> None:
        if self.world.now <= self.end:
            question = SlotQuestion(self.shape.limit, ("k",), 1, caller.name, caller.weight, caller.reserve)
            rng.choice(self.gateways).request(question)
            self.world.after(rng.expovariate(caller.demand / self.shape.lasts), lambda: self._next(caller, rng))

    def note(self, gateway: SlotGateway, process: Process, question: TokenQuestion, grant: Grant) -> None:
        super().note(gateway, process, question, grant)
        assert isinstance(question, SlotQuestion)
        if self.world.now >= CALM:
            (self.passed if grant.admitted else self.refusals)[question.caller] += 1

    def lasts(self, rng: random.Random) -> float:
        """All requests last alike, so that what is in progress can be reckoned."""
        return rng.expovariate(1 / self.shape.lasts)

    def _count(self) -> None:
        now = min(self.world.now, END)
        if now > self._looked:
            for one in self.in_progress:
                assert isinstance(one.question, SlotQuestion)
                self.areas[one.question.caller] += now - self._looked
        super()._count()

    def _used(self) -> None:
        """Not judged here."""

    @property
    def shares(self) -> dict[str, float]:
        """What each had in progress, on average."""
        return {name: area / (END - CALM) for name, area in self.areas.items()}

"""From a seed to a story of a concurrency limit: a fleet, requests that last, faults. What is in progress is held against the limit at
every admission."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from mesh.model import QuotaLimit
from mesh.questions import Grant, SlotGrant, TokenQuestion
from quota.clock import StoreClock
from quota.lessee import QuotaLessee
from quota.slots import SlotAsk, apply_slots
from quota.store import slots_key
from tests.sim.network import Link, Weather
from tests.sim.redis import ApplySlots, Broken, Redis
from tests.sim.world import Process, World

FAULTS_FROM: Final = 2.0
FAULTS_UNTIL: Final = 8.0
CALM: Final = 31.0
"""By then all is well again: every lease of the bad times has ended, and what lasted over them as well."""
END: Final = 38.0
QUIET: Final = 6.0
"""Seconds after `END` in which all requests end, and all slots are given back."""
LONGEST: Final = 14.0
"""Seconds that a request may last."""
LEAST_USED: Final = 0.85
FAULTS: Final = ("weather", "cut", "crash", "stop", "stall", "failover", "emptied", "forward", "back")


class SlotShape(msgspec.Struct):
    """What a story is about."""

    limit: QuotaLimit
    gateways: int
    demand: float
    """Times the limit, all together."""
    lasts: float
    """Seconds, on average."""
    weather: Weather
    faults: tuple[str, ...]
    full: bool


def slot_shape_of(rng: random.Random) -> SlotShape:
    """What the story of a seed is about."""
    gateways = rng.choice((1, 2, 3, 5, 8))
    limit = QuotaLimit(
        name="sim/limit", level="route", per=(), tokens=0, concurrency=rng.choice((1, 2, 3, 10, 24)), strict=rng.random() < 0.5,
        failure_mode="Deny",
    )  # fmt: skip
    if rng.random() < 0.15:  # leases end while their requests go on
        limit = msgspec.structs.replace(limit, strict=True, concurrency=max(3, limit.concurrency))
        return SlotShape(limit, rng.choice((2, 3)), 2.0, rng.choice((2.0, 8.0)), Weather(delay=0.001), ("cut_for_long",), True)
    return SlotShape(
        limit=limit,
        gateways=gateways,
        demand=rng.choice((0.3, 0.8, 2.0, 3.0)),
        lasts=rng.choice((0.1, 0.3, 2.0)),
        weather=Weather(delay=rng.choice((0.0002, 0.001, 0.005))),
        faults=tuple(rng.choices(FAULTS, k=rng.choice((0, 1, 2, 4)))),
        full=rng.random() < 0.7,
    )


class InProgress:
    """One request that was let through."""

    __slots__ = ("gateway", "grant", "outlived", "process", "question")

    def __init__(self, gateway: SlotGateway, grant: SlotGrant, question: TokenQuestion) -> None:
        self.question = question
        self.gateway = gateway
        self.process = gateway.process
        self.grant = grant
        self.outlived = False
        """It has gone on after the lease that it began on."""


class SlotGateway:
    """A process with a lessee; after a crash another one takes its place."""

    def __init__(self, story: SlotStory, number: int) -> None:
        self.story = story
        self.number = number
        self.weight = 1.0
        self.begin()

    def begin(self) -> None:
        """Starts the process."""
        story = self.story
        self.process = Process(story.world, story.world.rng.uniform(-2e-4, 2e-4))
        self.link = Link(story.world, self.process, story.redis, story.shape.weather)
        story.started += 1
        self.lessee = story.make(
            self.link, holder=f"g{self.number}", clock=self.process.clock, timers=self.process, sharers=story.shape.gateways
        )
        self.lessee.holder = f"g{self.number}/{story.started}"

    def request(self, question: TokenQuestion | None = None) -> None:
        """A client's request."""
        if self.process.stopped:
            return
        question = question or TokenQuestion(self.story.shape.limit, ("k",))
        noted = partial(self.story.note, self, self.process, question)
        grant = self.lessee.take(question, 0.0)
        if grant is not None:
            noted(grant)
        else:
            self.lessee.ask(question, noted)


class SlotStory:
    """One run."""

    def __init__(
        self,
        seed: int,
        *,
        shape: SlotShape | None = None,
        apply_slots_: ApplySlots = apply_slots,
        make: Callable[..., QuotaLessee] = QuotaLessee,
    ) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.shape = shape or slot_shape_of(rng)
        self.world = World(rng)
        self.redis = Redis(self.world, apply_slots_=apply_slots_)
        if self.shape.full:
            self.redis.record = (self.redis.run, StoreClock(born=1, era=1, since=1))
        self.make = make
        self.started = 0
        self.gateways = [SlotGateway(self, number) for number in range(self.shape.gateways)]
        self.in_progress: set[InProgress] = set()
        self.admitted = self.refused = self.cut = 0
        self.area = 0.0
        """Requests in progress x seconds, while all is well."""
        self._looked = CALM
        self.end = END
        self.fair = msgspec.structs.astuple(self.shape.weather)
        self.told: list[str] = []
        self.broken = ""
        self._load()
        for name in self.shape.faults:
            began = rng.uniform(FAULTS_FROM, FAULTS_UNTIL - 0.5)
            self.world.at(began, partial(getattr(self, "_" + name)))

    def _load(self) -> None:
        """Requests come at random (Poisson), and who gets most of them shifts."""
        rng = self.world.rng
        rate = self.shape.demand * self.shape.limit.concurrency / self.shape.lasts

        def shift() -> None:
            for gateway in self.gateways:
                gateway.weight = rng.choice((0.0, 0.1, 1.0, 5.0)) or 1e-9
            self.world.after(rng.uniform(1.0, 6.0), shift)

        def next_one() -> None:
            if self.world.now <= self.end:
                rng.choices(self.gateways, [each.weight for each in self.gateways])[0].request()
                self.world.after(rng.expovariate(rate), next_one)

        shift()
        next_one()

    def note(self, gateway: SlotGateway, process: Process, question: TokenQuestion, grant: Grant) -> None:
        """Keeps account of an answer."""
        if not isinstance(grant, SlotGrant):
            self.refused += 1
            return
        self.admitted += 1
        self._count()
        one = InProgress(gateway, grant, question)
        one.process = process
        self.in_progress.add(one)
        grant.slot.on_cut(partial(self._cut_off, one))
        lasts = self.lasts(self.world.rng)
        if self.world.now > END - LONGEST:
            lasts = min(lasts, max(0.01, END - self.world.now))
        self.world.after(lasts, lambda: process.deliver(partial(self._over, one)))
        self._within()

    def lasts(self, rng: random.Random) -> float:
        """Seconds that a request lasts."""
        return min(LONGEST, rng.expovariate(1 / self.shape.lasts)) if rng.random() < 0.95 else rng.uniform(0, LONGEST)

    def _over(self, one: InProgress) -> None:
        self._count()
        self.in_progress.discard(one)
        one.grant.slot.release()

    def _cut_off(self, one: InProgress) -> None:
        self._count()
        self.cut += 1
        self.in_progress.discard(one)

    def _count(self) -> None:
        """Adds up what was in progress until now."""
        now = min(self.world.now, END)
        if now > self._looked:
            self.area += len(self.in_progress) * (now - self._looked)
            self._looked = now

    def _within(self) -> None:
        """No more than the limit allows is in progress. What has outlived its lease counts only where that is cut off; a process that is
        stopped cuts it off when it goes on."""
        limit = self.shape.limit
        counted = 0
        for one in list(self.in_progress):
            if one.process.dead:
                self.in_progress.discard(one)
                continue
            lease = one.grant.slot._lease  # type: ignore[attr-defined]
            ended = one.process.clock() >= lease.until
            one.outlived = one.outlived or ended
            if one.outlived and (not limit.strict or one.process.stopped) and self.world.now < CALM:
                continue
            counted += 1
        if counted > limit.concurrency and not self.broken:  # raised at the end: a lessee lives through what goes wrong in who asked it
            self.broken = f"{counted} requests are in progress at {self.world.now:.3f} s, and {limit.concurrency} may be"

    # Faults

    def _tell(self, what: str) -> None:
        self.told.append(f"{self.world.now:.3f} {what}")

    def _weather(self) -> None:
        rng, weather = self.world.rng, self.shape.weather
        weather.delay, weather.slow = rng.choice((0.002, 0.02, 0.08)), rng.choice((0.0, 0.05, 0.3))
        weather.lost, weather.doubled = rng.choice((0.0, 0.1, 0.4)), rng.choice((0.0, 0.2, 0.5))
        self._tell(f"the network: {weather}")

        def clear() -> None:
            weather.delay, weather.slow, weather.lost, weather.doubled = self.fair

        self.world.at(FAULTS_UNTIL, clear)

    def _cut(self) -> None:
        gateway = self.world.rng.choice(self.gateways)
        link, seconds = gateway.link, self.world.rng.uniform(0.5, 15.0)
        self._tell(f"gateway {gateway.number} is cut off for {seconds:.3f} s")
        link.cut = True
        self.world.after(seconds, lambda: setattr(link, "cut", False))

    def _cut_for_long(self) -> None:
        """Longer than a lease lasts, of a gateway that has had a share."""
        gateway = max(self.gateways, key=lambda each: each.lessee.slots.in_use)
        self._tell(f"gateway {gateway.number} is cut off for 13 s")
        gateway.link.cut = True
        self.world.after(13.0, lambda: setattr(gateway.link, "cut", False))

    def _crash(self) -> None:
        gateway = self.world.rng.choice(self.gateways)
        seconds = self.world.rng.uniform(0.1, 2.0)
        self._tell(f"gateway {gateway.number} dies and comes back in {seconds:.3f} s")
        gateway.process.dead = True
        self.world.after(seconds, gateway.begin)

    def _stop(self) -> None:
        gateway = self.world.rng.choice(self.gateways)
        seconds = self.world.rng.choice((0.1, 0.5, 2.0, 6.0, 12.0))
        self._tell(f"gateway {gateway.number} is stopped for {seconds:.3f} s")
        gateway.process.stop(seconds)

    def _stall(self) -> None:
        seconds = self.world.rng.choice((0.05, 0.3, 1.0, 3.0, 11.0))
        self._tell(f"Redis stalls for {seconds:.3f} s")
        self.redis.stall(seconds)

    def _failover(self) -> None:
        self._tell("another Redis takes over")
        self.redis.fail_over()

    def _emptied(self) -> None:
        self._tell("Redis is restarted without its data")
        self.redis.restart_empty()

    def _forward(self) -> None:
        knowing = [each for each in self.gateways if each.lessee._known and not each.process.stopped]
        if not knowing or self.redis.record is None:
            return  # nobody could tell, which `docs/quota.md` says
        seconds = self.world.rng.choice((0.4, 4.0, 60.0))
        self._tell(f"Redis' clock is set forward by {seconds} s")
        self.redis.offset += seconds
        self.redis.was_set = True
        lessee, process = knowing[0].lessee, knowing[0].process
        known = lessee._known[lessee._era]
        look = msgspec.structs.replace(_LOOK, **dict(zip(("era", "seen", "least", "most"), known.since(process.clock()), strict=True)))
        self.redis.tell(self.redis.record[1], look, self.redis.wall)  # type: ignore[arg-type]

    def _back(self) -> None:
        seconds = self.world.rng.choice((0.3, 4.0, 60.0))
        self._tell(f"Redis' clock is set back by {seconds} s")
        self.redis.offset -= seconds
        self.redis.was_set = True

    # What must hold

    def run(self) -> SlotStory:
        """Runs the story to its end. Raises `Broken`."""
        self.world.run(END + QUIET)
        self._count()
        if self.broken:
            raise Broken(self.broken)
        self._nothing_leaks()
        self._used()
        return self

    def _nothing_leaks(self) -> None:
        """Once nothing is in progress, all slots are there again."""
        if self.in_progress:
            raise Broken(f"{len(self.in_progress)} requests never ended")
        kept = self.redis.slots.get(slots_key(self.shape.limit.name, ("k",)))
        if kept is not None and kept[1].outstanding:
            raise Broken(f"{kept[1].outstanding} slots are out, and nothing is in progress")
        for gateway in self.gateways:
            if gateway.lessee.slots.in_use or gateway.lessee.slots.held:
                raise Broken(
                    f"gateway {gateway.number} has {gateway.lessee.slots.in_use} slots in use and holds {gateway.lessee.slots.held}"
                )

    @property
    def used(self) -> float:
        """The part of the limit that was in use, on average, while all was well."""
        return self.area / (self.shape.limit.concurrency * (END - CALM))

    def _used(self) -> None:
        """Under steady demand of twice the limit or more, nearly all of it is used."""
        shape = self.shape
        if shape.demand >= 2.0 and shape.limit.concurrency >= 10 and shape.lasts <= 0.3 and self.used < LEAST_USED:
            raise Broken(f"only {self.used:.3f} of the slots were in use, {CALM} s to {END} s")

    def __str__(self) -> str:
        shape = self.shape
        return "\n".join([f"seed {self.seed}: {shape.limit}, {shape.gateways} gateways, demand {shape.demand}", *self.told])


_LOOK: Final = SlotAsk("", 0, 0, 0, 0, 0, 0, 1, 1, 1)


def slots_wrong_with(seed: int, **more: Any) -> str:
    """What goes wrong with a seed; empty when nothing does."""
    story = SlotStory(seed, **more)
    try:
        story.run()
    except Broken as broken:
        return f"{broken}\n{story}\nto see it again: python -m tests.sim --slots --from {seed} --seeds 1"
    return ""

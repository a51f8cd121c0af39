"""From a seed to a story: a limit, a fleet, a load, faults. What was admitted is held against the limit in every window of time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import msgspec

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from quota.bucket import Ask, apply
from quota.calendar import window
from quota.clock import StoreClock, tell
from quota.lessee import QuotaLessee
from quota.store import bucket_key
from tests.sim.debt import Books, with_charges
from tests.sim.network import Link, Weather
from tests.sim.redis import EPSILON, Apply, Broken, Redis, Tell
from tests.sim.world import Process, World

FAULTS_FROM: Final = 2.0
FAULTS_UNTIL: Final = 8.0
"""Seconds between which faults begin and have ended."""
MEASURED_FROM: Final = 21.0
"""By then every lease of the bad times has ended, and what began anew has begun: what is used is measured from here."""
END: Final = 27.0
QUIET: Final = 4.5
"""Seconds after `END` without a request, in which all that is not used is given back; then all is asked for."""
LEAST_USED: Final = 0.85
LEAST_BACK: Final = 0.8

MakeLessee = Callable[..., QuotaLessee]


class Shape(msgspec.Struct):
    """What a story is about."""

    limit: QuotaLimit
    gateways: int
    keys: int
    costs: tuple[int, ...]
    demand: float
    """Times the limit's rate, all together."""
    undone: float
    """The chance that an admitted request is refused by something else, and its token given back."""
    weather: Weather
    faults: tuple[str, ...]
    floods: tuple[float, ...]
    """When all that a limit could ever hold is asked for at once, twice."""
    full: bool
    """Whether Redis has been there for long, with buckets that are full."""
    skew: float = 0.0
    """How wrong gateways' wall clocks may be, in seconds."""
    used: tuple[int, ...] = ()
    """What answers cost beyond their requests' costs; empty when they never do."""


FAULTS: Final = ("weather", "cut", "crash", "stop", "edge", "stall", "failover", "emptied", "forward", "back")


def shape_of(rng: random.Random) -> Shape:
    """What the story of a seed is about."""
    gateways = rng.choice((1, 2, 3, 5, 8))
    if rng.random() < 0.4:  # too small to share, or nearly
        tokens, interval, burst = rng.randint(1, 5), rng.choice((1.0, 2.0, 5.0)), rng.randint(1, 2 * gateways + 2)
    else:
        tokens, interval = rng.randint(5, 60), 1.0
        burst = rng.randint(2 * gateways, max(2 * gateways, 8 * tokens))
    limit = QuotaLimit(name="sim/limit", level="route", per=(), tokens=tokens, interval=interval, burst=burst)
    costs = (1,) if rng.random() < 0.6 or burst < 3 else (1, 1, 2, 3)
    if rng.random() < 0.1:  # nothing but the end of a lease, when the bucket is full, and the lease is shorter than what it holds lasts
        rate = rng.randint(20, 60)
        limit = msgspec.structs.replace(limit, tokens=rate, interval=1.0, burst=rng.randint(rate, 3 * rate))
        fair, faults = Weather(delay=0.001), rng.choice((("edge",), ("edge", "edge")))
        return Shape(limit, rng.randint(1, 3), 1, (1,), rng.uniform(0.05, 0.2), 0.0, fair, faults, (), True)
    return Shape(
        limit=limit,
        gateways=gateways,
        keys=rng.choice((1, 1, 2)),
        costs=costs,
        demand=rng.choice((0.1, 0.5, 1.5, 1.5, 3.0)),
        undone=rng.choice((0.0, 0.0, 0.1, 0.3)),
        weather=Weather(delay=rng.choice((0.0002, 0.001, 0.005))),
        faults=tuple(rng.choices(FAULTS, k=rng.choice((0, 1, 2, 4)))),
        floods=tuple(rng.uniform(1.0, MEASURED_FROM) for _ in range(rng.choice((0, 1, 3)))),
        full=rng.random() < 0.5,
    )


class Admission:
    """One request that was let through."""

    __slots__ = ("at", "cost", "question", "undone", "window")

    def __init__(self, at: float, question: TokenQuestion, window: float = 0) -> None:
        self.at = at
        """When: for one that waited, when the store decided it."""
        self.question = question
        self.cost = question.cost
        self.undone = False
        self.window = window
        """The calendar's, named by its end on the store's clock."""


class Gateway:
    """A process with a lessee; after a crash another one takes its place."""

    def __init__(self, story: Story, number: int) -> None:
        self.story = story
        self.number = number
        self.weight = 1.0
        self.begin()

    def begin(self) -> None:
        """Starts the process."""
        story = self.story
        self.process = Process(story.world, story.world.rng.uniform(-2e-4, 2e-4))
        self.link = Link(story.world, self.process, story.redis, story.shape.weather)
        story.links.append(self.link)
        self.lessee = story.make(
            self.link,
            holder=f"g{self.number}",
            clock=self.process.clock,
            timers=self.process,
            sharers=story.shape.gateways,
            wall=story.wall(),
        )
        self.lessee.holder = f"g{self.number}/{len(story.links)}"  # the random part would make every run another one

    def crash(self, down: float) -> None:
        """Dies, and is started again after `down` seconds."""
        self.process.dead = True
        self.story.world.after(down, self.begin)

    def request(self, key: str, cost: int) -> None:
        """A client's request."""
        story = self.story
        if self.process.stopped:
            return
        story.asked.setdefault(key, []).append((story.world.now, cost))
        question = TokenQuestion(story.shape.limit, (key,), cost)
        grant = self.lessee.take(question, story.world.now)
        if grant is not None:
            story.note(self, question, grant, None)
            return
        lessee = self.lessee

        def done(answer: Grant) -> None:
            lease = lessee._leases.get((question.limit.name, question.key))
            carried = next((seq for admitted, seq in lease.grants if admitted is question), 0) if lease else 0
            name = (bucket_key(question.limit.name, question.key), lessee.holder, carried)
            story.note(self, question, answer, story.redis.decided.get(name), story.redis.windows.get(name))

        lessee.ask(question, done)


class Story:
    """One run."""

    def __init__(
        self, seed: int, *, shape: Shape | None = None, apply_: Apply = apply, tell_: Tell = tell, make: MakeLessee = QuotaLessee
    ) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.shape = shape or with_charges(seed, shape_of(rng))
        self.world = World(rng)
        self.redis = Redis(self.world, apply_, tell_)
        if self.shape.full:
            self.redis.record = (self.redis.run, StoreClock(born=1, era=1, since=1))
        self.make = make
        self.links: list[Link] = []
        self.books = Books(self)
        self.gateways = [Gateway(self, number) for number in range(self.shape.gateways)]
        self.admitted: dict[str, list[Admission]] = {}
        self.asked: dict[str, list[tuple[float, int]]] = {}
        """When each request for a key came, and what it costs."""
        self.refused = 0
        self.end = END
        """When clients ask no more."""
        self.fair = msgspec.structs.astuple(self.shape.weather)
        self.told: list[str] = []
        """What happened, for whoever replays it."""
        self._load()
        for name in self.shape.faults:
            began = rng.uniform(FAULTS_FROM, FAULTS_UNTIL - 0.5)
            self.world.at(began, lambda name=name: getattr(self, "_" + name)())  # type: ignore[misc]

    # The load

    def _load(self) -> None:
        """Requests come at random (Poisson), and who gets most of them shifts."""
        rng = self.world.rng
        mean = sum(self.shape.costs) / len(self.shape.costs)
        limit = self.shape.limit
        # Of a window's tokens as many as are asked for in six seconds: there are none left in most.
        rate = self.shape.demand * (limit.rate or limit.burst / min(6.0, limit.interval)) / mean

        def shift() -> None:
            for gateway in self.gateways:
                gateway.weight = rng.choice((0.0, 0.1, 1.0, 5.0)) or 1e-9
            self.world.after(rng.uniform(1.0, 6.0), shift)

        def next_one(key: str) -> None:
            if self.world.now > self.end:
                return
            gateway = rng.choices(self.gateways, [each.weight for each in self.gateways])[0]
            gateway.request(key, rng.choice(self.shape.costs))
            self.world.after(rng.expovariate(rate), lambda: next_one(key))

        shift()
        for moment in self.shape.floods:
            self.world.at(moment, self._flood)
        for number in range(self.shape.keys):
            self.world.after(rng.expovariate(rate), lambda number=number: next_one(f"k{number}"))  # type: ignore[misc]

    def _flood(self) -> None:
        rng = self.world.rng
        for _ in range(2 * self.shape.limit.burst):
            rng.choice(self.gateways).request("k0", rng.choice(self.shape.costs))

    def wall(self) -> Callable[[], float]:
        """A gateway's wall clock."""
        wrong = self.world.rng.uniform(-self.shape.skew, self.shape.skew) if self.shape.skew else 0.0
        return lambda: self.world.now + 1e6 + wrong

    def note(self, gateway: Gateway, question: TokenQuestion, grant: Grant, decided: float | None, ends: int | None = None) -> None:
        """Keeps account of an answer. `ends`: of the window in which the store decided it."""
        if not grant.admitted:
            self.refused += 1
            return
        calendar = self.shape.limit.calendar
        end = 0.0 if calendar is None else ends / 1e6 if ends else window(calendar, self.redis.time_of(question) / 1e6)[1]
        admission = Admission(self.world.now if decided is None else decided, question, end)
        self.admitted.setdefault(question.key[0], []).append(admission)
        if self.shape.used:
            self.books.admitted(question, admission.at, in_hand=decided is None)
            more, lessee = self.world.rng.choice(self.shape.used), gateway.lessee
            if more:
                lasts = self.world.rng.choice((0.002, 0.1, 0.1, 2.0))

                def answered() -> None:
                    if gateway.lessee is lessee:
                        self.books.answered(gateway, question, more)

                process = gateway.process
                self.world.after(lasts, lambda: process.deliver(answered))
        if self.world.rng.random() < self.shape.undone:
            lessee = gateway.lessee

            def undo() -> None:
                admission.undone = True
                lessee.give_back(question)

            self.world.after(self.world.rng.uniform(0, 0.3), lambda: gateway.process.deliver(undo))

    # Faults

    def _tell(self, what: str) -> None:
        self.told.append(f"{self.world.now:.3f} {what}")

    def _weather(self) -> None:
        rng, weather = self.world.rng, self.shape.weather
        fair = self.fair
        weather.delay, weather.slow = rng.choice((0.002, 0.02, 0.08)), rng.choice((0.0, 0.05, 0.3))
        weather.lost, weather.doubled = rng.choice((0.0, 0.1, 0.4)), rng.choice((0.0, 0.2, 0.5))
        self._tell(f"the network: {weather}")

        def clear() -> None:
            weather.delay, weather.slow, weather.lost, weather.doubled = fair

        self.world.at(FAULTS_UNTIL, clear)

    def _cut(self) -> None:
        gateway = self.world.rng.choice(self.gateways)
        link, seconds = gateway.link, self.world.rng.uniform(0.5, 5.0)
        self._tell(f"gateway {gateway.number} is cut off for {seconds:.3f} s")
        link.cut = True
        self.world.after(seconds, lambda: setattr(link, "cut", False))

    def _crash(self) -> None:
        gateway = self.world.rng.choice(self.gateways)
        seconds = self.world.rng.uniform(0.1, 2.0)
        self._tell(f"gateway {gateway.number} dies and comes back in {seconds:.3f} s")
        gateway.crash(seconds)

    def _stop(self) -> None:
        gateway = self.world.rng.choice(self.gateways)
        seconds = self.world.rng.choice((0.1, 0.5, 2.0, 6.0))
        self._tell(f"gateway {gateway.number} is stopped for {seconds:.3f} s")
        gateway.process.stop(seconds)

    def _edge(self) -> None:
        """The answer to one ask is late, nothing gets through after it, and all is asked for when the lease ends: to the store, and then to
        whoever counts from the answer."""
        rng = self.world.rng
        gateway, late = rng.choice(self.gateways), rng.choice((0.05, 0.2, 1.0, 4.0))
        link, process = gateway.link, gateway.process
        self._tell(f"gateway {gateway.number} hears the next answer {late:.3f} s late, and nothing more")

        def asked(ask: Ask) -> None:
            link.asked = None
            process.stop(late)
            self.world.after(late + 0.1, lambda: setattr(link, "cut", True))
            self.world.after(ask.ttl / 1e6 + rng.uniform(0.0, late), self._flood)
            self.world.after(ask.ttl / 1e6 + late, lambda: setattr(link, "cut", False))

        link.asked = asked

    def _stall(self) -> None:
        seconds = self.world.rng.choice((0.05, 0.3, 1.0, 3.0))
        self._tell(f"Redis stalls for {seconds:.3f} s")
        self.redis.stall(seconds)

    def _failover(self) -> None:
        self._tell("another Redis takes over")
        self.redis.fail_over()

    def _emptied(self) -> None:
        self._tell("Redis is restarted without its data")
        self.redis.restart_empty()

    def _forward(self) -> None:
        seconds = self.world.rng.choice((4.0, 60.0, 3600.0))
        knowing = [each for each in self.gateways if each.lessee._known and not each.process.stopped]
        if not knowing or self.redis.record is None:
            return  # nobody could tell, which `docs/quota.md` says
        self._tell(f"Redis' clock is set forward by {seconds} s")
        self.redis.offset += seconds
        self.redis.was_set = True
        # Gateways ask all the time: one of those that know asks first.
        lessee, process = knowing[0].lessee, knowing[0].process
        known = lessee._known[lessee._era]
        ask = Ask("", 0, 0, 0, 0, 0, (), (), 0, 1, 0, 1.0, 1, False, *known.since(process.clock()))
        self.redis.tell(self.redis.record[1], ask, self.redis.wall)

    def _back(self) -> None:
        seconds = self.world.rng.choice((0.3, 4.0, 60.0, 3600.0))
        self._tell(f"Redis' clock is set back by {seconds} s")
        self.redis.offset -= seconds
        self.redis.was_set = True

    # What must hold

    def until(self, end: float) -> None:
        """Runs the story, without its end, to a moment. Raises `Broken`."""
        self.end = end
        self.world.run(end)
        for key, admissions in self.admitted.items():
            self._within(key, admissions)

    def run(self) -> Story:
        """Runs the story to its end. Raises `Broken`."""
        self.world.at(END + QUIET, self._flood)
        self.world.run(END + QUIET + 1.0)
        for key, admissions in self.admitted.items():
            self._within(key, admissions)
            self._conserved(key, admissions)
            self.books.check(key)
        self._used()
        return self

    def _within(self, key: str, admissions: list[Admission]) -> None:
        """In every window no more than burst + rate x time: as if each admission took tokens from one bucket, full at first."""
        limit = self.shape.limit
        if limit.calendar is not None:
            self._within_windows(key, admissions)
            return
        level, stamp = float(limit.burst), 0.0
        for admission in sorted(admissions, key=lambda each: each.at):
            if admission.undone:
                continue
            level = min(limit.burst, level + (admission.at - stamp) * limit.rate) - admission.cost
            stamp = admission.at
            if level < -0.001:
                raise Broken(f"{key}: {-level:.3f} tokens more than the limit allows, at {stamp:.3f} s")

    def _within_windows(self, key: str, admissions: list[Admission]) -> None:
        """In every window of the calendar no more than its tokens."""
        spent: dict[float, int] = {}
        for each in admissions:
            if not each.undone:
                spent[each.window] = spent.get(each.window, 0) + each.cost
        for end, tokens in spent.items():
            if tokens > self.shape.limit.burst:
                raise Broken(f"{key}: {tokens} tokens in the window until {end - 1e6} s, which has {self.shape.limit.burst}")

    def _conserved(self, key: str, admissions: list[Admission]) -> None:
        """No token is spent that the store did not give."""
        spent = sum(each.cost for each in admissions if not each.undone)
        granted = self.redis.granted.get(bucket_key(self.shape.limit.name, (key,)), 0)
        if spent > granted + EPSILON:
            raise Broken(f"{key}: {spent} tokens were spent, and {granted} granted")

    def used(self, since: float, until: float) -> float:
        """What was admitted in a time, against one bucket that all requests would have been sent to without delay."""
        limit = self.shape.limit
        admitted = sum(each.cost for every in self.admitted.values() for each in every if since <= each.at < until and not each.undone)
        ideal = 0
        for asked in self.asked.values():
            level, stamp = 0.0, 0.0
            for at, cost in asked:
                level, stamp = min(limit.burst, level + (at - stamp) * limit.rate), at
                if level >= cost:
                    level -= cost
                    ideal += cost if since <= at < until else 0
        # A need that does not fit keeps those behind it waiting.
        return (admitted + max(self.shape.costs) - 1) / ideal if ideal else 1.0

    def _used(self) -> None:
        """Once all is well, nearly all of a limit can be used, and bad times leave nothing behind."""
        shape = self.shape
        if shape.limit.calendar is not None:
            self._used_windows()
            return
        if shape.undone or shape.used or shape.limit.rate * (END - MEASURED_FROM) < 20 or shape.limit.burst / shape.limit.rate < 0.25:
            return
        used = self.used(MEASURED_FROM, END)
        if shape.demand > 1.0 and used < LEAST_USED:
            raise Broken(f"only {used:.3f} of the limit was used, {MEASURED_FROM} s to {END} s")
        used = self.used(END + QUIET, END + QUIET + 1.0)
        if used < LEAST_BACK:
            raise Broken(f"only {used:.3f} of what must have come back was there after {QUIET} quiet seconds")

    def _used_windows(self) -> None:
        """The window after the bad times is used up, if there was anybody to do it."""
        limit = self.shape.limit
        if self.shape.undone or len(self.shape.costs) > 1:
            return
        for key, asked in self.asked.items():
            ends = sorted({each.window for each in self.admitted.get(key, ())})
            wanted = sum(cost for at, cost in asked if at > END + QUIET - 0.001)
            if ends and wanted > 2 * limit.burst and limit.calendar is not None and limit.calendar.unit == "Minute":
                tokens = sum(each.cost for each in self.admitted[key] if each.window == ends[-1] and not each.undone)
                if tokens < LEAST_BACK * limit.burst - max(self.shape.costs):
                    raise Broken(f"{key}: only {tokens} of {limit.burst} were used in a window with more demand than that")

    def __str__(self) -> str:
        shape = self.shape
        return "\n".join([f"seed {self.seed}: {shape.limit}, {shape.gateways} gateways, demand {shape.demand}, {shape.used=}", *self.told])


def wrong_with(seed: int, *, words: str = "", **more: Any) -> str:
    """What goes wrong with a seed, and how to see it again (`words`: with which options); empty when nothing does."""
    story = Story(seed, **more)
    try:
        story.run()
    except Broken as broken:
        return f"{broken}\n{story}\nto see it again: python -m tests.sim --from {seed} --seeds 1{words}"
    return ""

"""After `policy activate` or `policy data publish` has returned, no gateway decides by the revision or the data before: under lost, delayed
and reordered events, and answers that were on their way.

Real are the source over etcd, the keeper, the decider with what it keeps, the client of the decision points, the driver, the reporter and
the command's wait; made up is what lies beyond the wires (`virtual_etcd`). Each seed is one story, always the same. That the property can
fail is shown by mutants of the code, each of which some story catches.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec
import pytest

from discovery.acknowledged import Acknowledgements, wait_until
from discovery.etcd import Put
from discovery.etcd_source import EtcdSource
from discovery.keys import config_key
from discovery.reports import Reporter
from gateway.driver import Driver, Waiting
from gateway.place import Place
from gateway.plan import Permit, Settled
from mesh.backoff import Backoff
from mesh.documents import Key
from mesh.model import EMPTY, DecisionPolicy, Snapshot
from mesh.policies import active_data_body, active_policy_body, data_body, revision_body
from mesh.policy import EntryPoint, ReadSet, Revision, digest_of
from mesh.policy_data import DataRevision, data_digest, root_text, with_data
from mesh.questions import Decision, DecisionQuestion, Grant, TokenQuestion, Verdict
from mesh.refusals import Denied
from pdp.bundle_services import BundleServices
from pdp.client import PdpClient
from pdp.decider import PolicyDecider
from pdp.kept import KeptDecisions
from pdp.rpc import Result
from tests.gateway.gateway_world import LIMIT, POLICY, a_head, a_rule, an_outcome, pending_of, place_of
from tests.tollhouse.virtual_etcd import DecisionPoint, EtcdClient, EtcdServer, VirtualLoop, virtual_loop
from tollhouse import gateway_process
from tollhouse.gateway_process import tell
from tollhouse.keeper import Keeper
from tollhouse.policy_supply import NotReady, Supply
from tollhouse.shown import staleness

SEEDS = (*range(20), 57)
GATEWAYS = 3
STALENESS = 4.0
MADE = ReadSet(values=(("attributes", "request", "http", "path"),))
ALL_DATA = ((),)


def a_revision(number: int) -> Revision:
    modules = {"policy/a.rego": f"package shop\n# {number}\n"}
    fresh = msgspec.structs.replace(MADE, volatile=("rand.intn",))
    points = {
        "shop.varies": EntryPoint(path="shop.varies", digest=f"{number:064x}", reads=MADE, data=ALL_DATA),
        "shop.fresh": EntryPoint(path="shop.fresh", digest=f"{number:064x}", reads=fresh, data=ALL_DATA),
        "shop.steady": EntryPoint(path="shop.steady", digest="5" * 64, reads=MADE, data=()),
    }
    return Revision(digest=digest_of(modules, b"{}"), modules=modules, entry_points=points)


REVISIONS = tuple(a_revision(number) for number in range(4))
STEADY = "edge/steady"


def some_data(number: int) -> tuple[DataRevision, ...]:
    """What is at one root; none for the first."""
    value = f'{{"number":{number}}}'.encode()
    return (DataRevision(digest=data_digest(("shop", "numbers"), value), root=("shop", "numbers"), value=value),) if number else ()


DATA = tuple(some_data(number) for number in range(4))


def policy(name: str, failure_mode: Any = "Deny") -> DecisionPolicy:
    return msgspec.structs.replace(POLICY, name=f"edge/{name}", decision=f"shop.{name}", timeout=1.5, failure_mode=failure_mode)


RULES = (
    a_rule(decisions=(policy("varies"),)),
    a_rule(decisions=(policy("steady"), policy("varies"))),
    a_rule(decisions=(policy("fresh"), policy("varies", "Allow")), limits=(LIMIT,)),
    a_rule(decisions=(policy("varies"), policy("fresh")), limits=(LIMIT, msgspec.structs.replace(LIMIT, name="other"))),
)


class SlowTokens:
    """A lessee whose tokens come a while later, or are in hand."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def take(self, question: TokenQuestion, now: float) -> Grant | None:
        return Grant(admitted=True) if self.dice.random() < 0.3 else None

    def ask(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        asyncio.get_running_loop().call_later(self.dice.choice((0.001, 0.05, 0.7)), done, Grant(admitted=self.dice.random() < 0.9))

    def give_back(self, question: TokenQuestion) -> None:
        """They are many."""

    def peek(self, question: TokenQuestion, done: Callable[[Grant], None]) -> None:
        """Nobody does."""


class Settlement(msgspec.Struct):
    """How one request ended."""

    gateway: int
    time: float
    settled: Any
    decisions: list[tuple[DecisionQuestion, Decision]]


class OneGateway:
    """The parts of `tollhouse gateway` that have to do with policy, wired as there."""

    def __init__(self, number: int, world: World) -> None:
        self.number = number
        self.world = world
        self.dice = dice = random.Random(f"{world.seed} {number}")
        self.etcd: Any = EtcdClient(world.etcd, dice)
        self.point = DecisionPoint(world.loop, dice)
        self.client = PdpClient(["virtual:1"], self.point)
        self.decider = PolicyDecider(central=self.client, kept=KeptDecisions(), clock=world.loop.time)
        nobody: Any = None  # there are no bundles here
        supply = Supply(nobody, BundleServices(), prepare=self._load) if world.data else None
        self.keeper = Keeper(EtcdSource(self.etcd), self._compile, supply=supply)
        self.snapshot = EMPTY
        self.driver = Driver(self.decider, SlowTokens(dice), world.loop.time, staleness(self.keeper, world.loop))
        self.reporter = Reporter(self.etcd, "edge", "ingress", f"copy{number}")

    @staticmethod
    async def _compile(*_: Any) -> Revision:
        raise AssertionError("nothing is compiled here")

    async def _load(self, *_: Any) -> None:
        await asyncio.sleep(self.dice.choice((0.0, 0.01, 0.3, 2.0)))
        if self.dice.random() < 0.1:
            raise NotReady("not yet")

    async def start(self) -> None:
        async def prepare(snapshot: Snapshot) -> None:
            if snapshot.policy is not None:
                await self.client.holds(snapshot.policy.digest, gateway_process.HELD_WITHIN)

        def apply(snapshot: Snapshot) -> None:
            self.snapshot = snapshot

        self.keeper.add(prepare)
        self.keeper.add(apply)
        self.keeper.add(self.decider.enact)
        self.keeper.on_force(lambda: tell(self.reporter, self.keeper))
        await self.keeper.start()
        await self.reporter.start()

    async def request(self) -> None:
        """One request, from its head to its permit."""
        dice, loop = self.dice, self.world.loop
        place = place_of(dice.choice(RULES))
        place = Place(
            msgspec.structs.replace(place.snapshot, policy=self.snapshot.policy), place.gateway, place.listener, (place.listener,), ""
        )
        pending = pending_of(place, a_head(f"/orders/{dice.randrange(6)}".encode()))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.choice((0.01, 0.3, 1.0)))  # its body comes slowly
        outcome = an_outcome(pending)
        settled: asyncio.Future[Settled] = loop.create_future()

        def done(result: Settled) -> None:
            self.world.settled.append(Settlement(self.number, loop.time(), result, list(outcome.decisions)))
            if not settled.done():  # the story ends
                settled.set_result(result)

        result = self.driver.drive(pending, outcome, done)
        if not isinstance(result, Waiting):
            done(result)
        await settled

    async def traffic(self) -> None:
        while True:
            await asyncio.sleep(self.dice.choice((0.001, 0.02, 0.1)))
            self.world.keep(self.request())

    async def trouble(self) -> None:
        """Its line to etcd breaks now and then, and is cut for long at times."""
        while True:
            await asyncio.sleep(self.dice.choice((0.3, 1.0, 4.0)))
            self.etcd.break_streams()
            if self.dice.random() < 0.25:
                self.etcd.cut = True
                await asyncio.sleep(self.dice.choice((0.5, 3.0, 30.0)))
                self.etcd.cut = False


class Turn(msgspec.Struct):
    """One activation."""

    digest: str
    began: float
    returned: float | None = None
    """None when it did not succeed."""


class World:
    """One story."""

    def __init__(self, seed: int, loop: VirtualLoop, *, data: bool = False) -> None:
        """`data`: whether data change, too."""
        self.data = data
        self.seed = seed
        self.loop = loop
        self.dice = random.Random(seed)
        self.etcd = EtcdServer(loop)
        self.settled: list[Settlement] = []
        self.turns: list[Turn] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.gateways: list[OneGateway] = []

    def keep(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def document(self, kind: str, body: dict[str, Any]) -> Put:
        name = body["metadata"]["name"]
        return Put(config_key(Key("tollhouse.dev", kind, "", name)), msgspec.json.encode(body))

    async def activate(self, client: Any, revision: Revision, data: tuple[DataRevision, ...], changed: str) -> None:
        """Changes the ActivePolicy or the ActiveData; both say `revision` and `data` then."""
        turn = Turn(with_data(revision, data).digest if data else revision.digest, self.loop.time())
        self.turns.append(turn)
        roots = {each.root: each.digest for each in data}
        body = active_policy_body(revision.digest) if changed == "ActivePolicy" else active_data_body(roots)
        written = await client.commit([self.document(changed, body)])
        for gateway in self.gateways:
            self.keep(gateway.point.learn(turn.digest))
        wanted = {root_text(root): digest for root, digest in roots.items()}
        patience = self.dice.choice((1.0, 10.0, 60.0))
        standing = await wait_until(
            client,
            lambda report: report.policy == revision.digest and (changed == "ActivePolicy" or report.data == wanted),
            written,
            patience,
            since=turn.began,
            cut_off_after=STALENESS + 16.0,
        )
        if not standing.missing:
            turn.returned = self.loop.time()

    async def play(self) -> None:
        mesh = {
            "apiVersion": "tollhouse.dev/v1",
            "kind": "Mesh",
            "metadata": {"name": "mesh"},
            "spec": {"trustDomain": "shop.example", "policy": {"maxStaleness": f"{STALENESS:g}s"}},
        }
        revisions = [self.document("PolicyRevision", revision_body(each)) for each in REVISIONS]
        data = [self.document("DataRevision", data_body(each)) for parts in DATA for each in parts]
        self.etcd.write([self.document("Mesh", mesh), *revisions, *data])
        self.gateways = [OneGateway(number, self) for number in range(GATEWAYS)]
        client: Any = EtcdClient(self.etcd, self.dice)
        await self.activate(client, REVISIONS[0], DATA[0], "ActivePolicy")
        for gateway in self.gateways:
            await gateway.start()
            self.keep(gateway.traffic())
            self.keep(gateway.trouble())
        await asyncio.sleep(1.0)
        current = {"ActivePolicy": 0, "ActiveData": 0}
        for _ in range(6):
            changed = self.dice.choice(sorted(current)) if self.data else "ActivePolicy"
            current[changed] = self.dice.choice([number for number in range(len(REVISIONS)) if number != current[changed]])
            await self.activate(client, REVISIONS[current["ActivePolicy"]], DATA[current["ActiveData"]], changed)
            await asyncio.sleep(self.dice.choice((0.0, 0.5, 2.5)))

    def wrong(self) -> list[str]:
        """Every decision by a revision that could not be in force any more."""
        found = []
        for each in self.settled:
            if not isinstance(each.settled, (Permit, Denied)):
                continue
            done = [at for at, turn in enumerate(self.turns) if turn.returned is not None and turn.returned < each.time]
            allowed = {turn.digest for turn in self.turns[max(done, default=0) :] if turn.began <= each.time}
            for question, decision in each.decisions:
                varies = question.policy.name != STEADY and decision.verdict is not Verdict.ERROR
                if varies and decision.revision not in allowed:
                    found.append(f"gateway {each.gateway} at {each.time:.4f}: {question.policy.name} by {decision.revision[:12]}")
        return found


def story(seed: int, *, data: bool = False) -> World:
    def midway(self: Backoff) -> float:  # it has dice of its own otherwise
        step, self._next = self._next, min(self._next * 2, self._most)
        return step * 0.75

    async def at_once(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:  # threads have a time of their own
        return work(*arguments, **named)

    with virtual_loop() as loop, mock.patch.object(Backoff, "next", midway), mock.patch.object(asyncio, "to_thread", at_once):
        world = World(seed, loop, data=data)
        loop.run_until_complete(world.play())
        return world


@pytest.mark.parametrize("seed", SEEDS)
def test_no_gateway_decides_by_the_old_revision(seed: int) -> None:
    assert story(seed).wrong() == []


@pytest.mark.parametrize("seed", SEEDS[:12])
def test_no_gateway_decides_by_the_old_data(seed: int) -> None:
    assert story(seed, data=True).wrong() == []


def test_the_stories_are_worth_telling() -> None:
    """Requests pass and are denied, commands succeed and fail, answers are kept, and stories are told the same way twice."""
    worlds = [story(seed) for seed in SEEDS[:8]]
    settled = [each for world in worlds for each in world.settled]
    turns = [turn for world in worlds for turn in world.turns]
    assert sum(isinstance(each.settled, Permit) for each in settled) > 300
    assert sum(isinstance(each.settled, Denied) for each in settled) > 300
    assert any(decision.kept for each in settled for _, decision in each.decisions)
    assert any(turn.returned is None for turn in turns)
    assert sum(turn.returned is not None for turn in turns) > len(turns) // 2
    again = story(SEEDS[0])
    assert [(each.gateway, each.time) for each in again.settled] == [(each.gateway, each.time) for each in worlds[0].settled]


async def _acknowledged_first(self: Keeper, snapshot: Snapshot) -> None:
    self.in_force, self._at = snapshot, self._reading
    for witness in self._witnesses:
        witness()
    await _give(self, snapshot)


_give = Keeper._give
_outcome = PdpClient.outcome


def _credulous(self: PdpClient, replica: Any, result: Result, digest: str, now: float) -> Any:
    self._ours = False
    try:
        return _outcome(self, replica, result, digest, now)
    finally:
        self._ours = True


def _by_digest(self: Acknowledgements, report: Any) -> bool:
    return self._wanted(report)


def _contact_of_the_source(self: Keeper) -> float | None:
    return self.source.status.last_contact


def _named_by_policy(revision: Revision, parts: Any, *, merged: bool = True) -> Revision:
    made = with_data(revision, parts, merged=merged)
    return msgspec.structs.replace(made, digest=revision.digest, entry_points=revision.entry_points)


def _data_that_come(snapshot: Snapshot, waiting: str = "") -> dict[str, str]:
    return {root_text(each.root): each.digest for each in snapshot.data}


MUTANTS: dict[str, Callable[[], Any]] = {
    "it acknowledges before it applies": lambda: mock.patch.object(Keeper, "_give", _acknowledged_first),
    "answers on their way count": lambda: mock.patch.object(PolicyDecider, "_ask_anew", lambda self, flight: False),
    "questions made before are asked as they were": lambda: mock.patch.object(PolicyDecider, "_current", lambda self, question: question),
    "a request that waits for something else hears nothing": lambda: mock.patch.object(Waiting, "_hear", lambda self: False),
    "nothing is enacted": lambda: mock.patch.object(PolicyDecider, "enact", lambda self, snapshot: None),
    "an answer for another revision is taken": lambda: mock.patch.object(PdpClient, "outcome", _credulous),
    "a report of earlier counts": lambda: mock.patch.object(Acknowledgements, "_applies", _by_digest),
    "a contact counts before what came with it is in force": lambda: mock.patch.object(Keeper, "contact", property(_contact_of_the_source)),
    "staleness stops nobody": lambda: mock.patch(f"{__name__}.staleness", lambda keeper, loop: lambda: False),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: str) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(MUTANTS[mutant]())
        assert any(story(seed).wrong() for seed in SEEDS)


MUTANTS_OF_DATA: dict[str, Callable[[], Any]] = {
    "they do not count in a revision's name": lambda: mock.patch("tollhouse.policy_supply.with_data", _named_by_policy),
    "they are acknowledged when they come": lambda: mock.patch.object(gateway_process, "data_in", _data_that_come),
}


@pytest.mark.parametrize("mutant", MUTANTS_OF_DATA)
def test_a_mutant_of_data_is_caught(mutant: str) -> None:
    with MUTANTS_OF_DATA[mutant]():
        assert any(story(seed, data=True).wrong() for seed in SEEDS)

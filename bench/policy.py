"""`python -m bench.policy` (`make bench-policy`): what a decision costs, kept and fresh, here, beside and over the wire. Prints Markdown.

Beside our decision point stands the same policy in Go: an ext_authz server that embeds OPA, as the OPA-Envoy plugin does, without its
decision log and metrics (`bench/authz`). CPU is summed over all threads and processes of whoever decides, so that the load's own does not
matter; decisions a second for one core follow from it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc import aio

from bench import build, procfs
from bench.contenders import BY_AREA, POLICY, grants
from gateway.grpc_channel import GrpcChannels
from mesh.http import HTTP11, RequestHead
from mesh.model import DecisionPolicy
from mesh.peer import Caller, Peer
from mesh.policy import Revision
from mesh.questions import Asking, Decision, DecisionQuestion, Verdict
from pdp.asker import Asker, EngineAsker
from pdp.build import worker_binary
from pdp.client import PdpClient
from pdp.decider import PolicyDecider
from pdp.engines.worker import WorkerPool
from pdp.input import check_request
from pdp.kept import KeptDecisions
from pdp.publish import publish
from tests import servers

DECISION = "bench.authz.decision"
METHOD = "/envoy.service.auth.v3.Authorization/Check"
CALLERS = [f"c{number}" for number in range(10)]
AREAS = ("orders", "stock", "catalog", "users", "carts", "prices", "images", "search", "login", "admin")
POLICY_HERE = DecisionPolicy(name="bench/central", level="route", decision=DECISION, timeout=5.0)
IDENTITIES, PATHS = 10_000, 1_000
_peer = Peer(address="127.0.0.1", port=50_000)


def asking(caller: str, path: bytes) -> Asking:
    """A request as a gateway has it when it asks."""
    headers = [(b"user-agent", b"bench/1"), (b"accept", b"*/*"), (b"x-request-id", b"0f1e2d3c")]
    head = RequestHead(b"GET", b"https", b"shop.bench.example", path, headers, HTTP11, 0, path, None)
    who = Caller(f"spiffe://bench.example/ns/callers/sa/{caller}")
    return Asking(head, _peer, who, "edge/in", "https", "shop/all#0", "/**", "shop/all", 1_700_000_000.0)


def requests() -> Iterator[Asking]:
    """Requests of which no two are the same."""
    for number in itertools.count():
        yield asking(CALLERS[number % len(CALLERS)], b"/catalog/%d" % number)


async def in_flight(count: int, together: int, one: Callable[[], Awaitable[object]]) -> float:
    """Does `one` `count` times, `together` at a time; seconds that it took."""
    left = count

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await one()

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(together)))
    return time.perf_counter() - started


def asked(asker: Asker | PolicyDecider, question: DecisionQuestion) -> asyncio.Future[Decision]:
    """The answer to come."""
    found: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

    def done(decision: Decision) -> None:
        if decision.verdict is Verdict.ERROR:
            raise SystemExit(f"a question failed: {decision.cause}: {decision.reason}")
        found.set_result(decision)

    asker.ask(question, done)
    return found


def row(*cells: object) -> str:
    """A row of a table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


@asynccontextmanager
async def workers(policy: str, callers: list[str]) -> AsyncIterator[tuple[WorkerPool, Revision]]:
    """A worker as a gateway has it, and the policy as it is published."""
    pool = WorkerPool(binary=worker_binary(), workers=1)
    await pool.start()
    try:
        revision = await publish(pool, {"authz.rego": policy}, grants(callers).encode(), (DECISION,))
        await pool.load(revision)
        yield pool, revision
    finally:
        await pool.close()


async def fresh(count: int, stack: ExitStack) -> tuple[int, set[int]]:
    """Fresh decisions of a decision point and of its peer in Go, which are left running; the port of ours, and all their processes."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollhouse-bench-policy-")))
    (folder / "authz.rego").write_text(POLICY)
    (folder / "data.json").write_text(grants(CALLERS))
    ours, theirs = servers.free_port(), servers.free_port()
    pdp = servers.tollhouse(
        "pdp", "--policy", str(folder), "--decision", DECISION, "--listen", f"127.0.0.1:{ours}", ready=lambda: servers.answers(ours)
    )
    command = [str(build.binary("authz")), "-listen", f"127.0.0.1:{theirs}", "-policy", str(folder)]
    peer = servers.Process(command, ready=lambda: servers.answers(theirs), name="authz")
    for process in (pdp, peer):
        stack.callback(process.close)
        process.start()
    print("### Fresh decisions over gRPC, 32 in flight\n")
    print(row("who decides", "CPU µs a decision", "of that in Python", "decisions/s for one core", "decisions/s seen here"))
    print(row("---", "---:", "---:", "---:", "---:"))
    for name, port, process in (("tollhouse pdp, one worker", ours, pdp), ("OPA in Go, as the plugin", theirs, peer)):
        tree = procfs.tree([process.pid])
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(
                METHOD, request_serializer=CheckRequest.SerializeToString, response_deserializer=CheckResponse.FromString
            )
            one = partial(_check, call, (check_request(each, POLICY_HERE) for each in requests()))
            await in_flight(500, 32, one)
            before, python = procfs.cpu(tree), procfs.cpu([process.pid])
            seconds = await in_flight(count, 32, one)
            used, python = (procfs.cpu(tree) - before) / count, (procfs.cpu([process.pid]) - python) / count
        share = f"{python:.0f} µs" if len(tree) > 1 else "-"
        print(row(name, f"{used:.0f}", share, f"{1e6 / used:,.0f}", f"{count / seconds:,.0f}"), flush=True)
    print()
    return ours, procfs.tree([pdp.pid, peer.pid])


async def _check(call: Callable[..., Awaitable[CheckResponse]], checks: Iterator[CheckRequest]) -> None:
    answer = await call(next(checks), timeout=10)
    assert answer.status.code == 0, answer


async def central(port: int, revision: Revision, seconds: float) -> None:
    """Latency of a question of a gateway's client, at a constant rate."""
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(
            METHOD, request_serializer=CheckRequest.SerializeToString, response_deserializer=CheckResponse.FromString
        )
        answer = await call(check_request(next(requests()), POLICY_HERE), timeout=10)
        digest = answer.dynamic_metadata["tollhouse.dev"]["revision"]
    held = msgspec.structs.replace(revision, digest=digest)
    client = PdpClient((f"127.0.0.1:{port}",), GrpcChannels(asyncio.get_running_loop()))
    taken: list[float] = []
    waiting: set[asyncio.Future[Decision]] = set()
    source = requests()

    async def one() -> None:
        began = time.perf_counter()
        await asked(client, DecisionQuestion(POLICY_HERE, next(source), held))
        taken.append(time.perf_counter() - began)

    count = int(200 * seconds)
    for together in (1, 8):
        await in_flight(count // 4, together, one)
        taken.clear()
        used = time.process_time()
        await in_flight(count, together, one)
        used = (time.process_time() - used) / count
        _latencies(f"central, over loopback, {together} in flight", used, taken)
    taken.clear()
    rate = 1_000
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.2
    used = time.process_time()
    for number in range(int(rate * seconds)):
        due = start + number / rate
        if (left := due - loop.time()) > 0:
            await asyncio.sleep(left)
        future = asked(client, DecisionQuestion(POLICY_HERE, next(source), held))
        future.add_done_callback(lambda _, due=due: taken.append(loop.time() - due))  # type: ignore[misc]
        waiting.add(future)
        future.add_done_callback(waiting.discard)
    if waiting:
        await asyncio.wait(waiting)
    used = (time.process_time() - used) / len(taken)
    await client.close()
    _latencies("central, over loopback, 1,000/s", used, taken)


def _latencies(name: str, used: float, taken: list[float], worker: str = "") -> None:
    taken.sort()
    p50, p99 = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
    print(row(name, f"{used * 1e6:.0f}", worker, f"{p50 * 1e6:.0f}", f"{p99 * 1e6:.0f}"), flush=True)


async def local(pool: WorkerPool, revision: Revision, count: int, theirs: set[int]) -> None:
    """What a question to a worker of the gateway's own costs; `theirs` are processes that have nothing to do with it."""
    asker, source = EngineAsker(pool), requests()
    taken: list[float] = []

    async def one() -> None:
        started = time.perf_counter()
        await asked(asker, DecisionQuestion(POLICY_HERE, next(source), revision))
        taken.append(time.perf_counter() - started)

    await in_flight(500, 8, one)
    taken.clear()
    here = [pid for pid in procfs.tree([os.getpid()]) if pid not in theirs | {os.getpid()}]
    gateway, worker = time.process_time(), procfs.cpu(here)
    await in_flight(count, 8, one)
    gateway, worker = (time.process_time() - gateway) / count, (procfs.cpu(here) - worker) / count
    _latencies("local, 8 in flight", gateway, taken, f"{worker:.0f}")


def kept(pool: WorkerPool, revision: Revision, count: int) -> None:
    """What a look-up of a decision in hand costs, its key included."""
    decider = PolicyDecider(central=EngineAsker(pool), kept=KeptDecisions())
    point = revision.entry_points[DECISION]
    table = decider._kept
    assert table is not None
    known = [asking(CALLERS[number % 10], b"/catalog/%d" % number) for number in range(1000)]
    for each in known:
        key = table.key_for(each, POLICY_HERE, point)
        assert key is not None
        table.put(key, Decision(verdict=Verdict.ALLOW), 0.0, None)
    best = []
    for _ in range(5):
        questions = [DecisionQuestion(POLICY_HERE, each, revision) for each in known for _ in range(count // 1000)]
        started = time.process_time()
        for question in questions:
            decider.recall(question, 1.0)
        best.append((time.process_time() - started) / len(questions))
    assert table.misses == 0
    print(row("kept", f"{statistics.median(best) * 1e6:.2f}", "", "", ""), flush=True)


class Traffic:
    """Requests of 10,000 identities to 1,000 paths, some far more often than others (Zipf with exponent 1)."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.sums = [list(itertools.accumulate(1 / (rank + 1) for rank in range(size))) for size in (IDENTITIES, PATHS)]

    def next(self) -> Asking:
        """One request."""
        identity, path = (bisect_left(sums, self.rng.random() * sums[-1]) for sums in self.sums)
        return asking(f"c{identity}", f"/{AREAS[path % len(AREAS)]}/{path}".encode())


async def change(name: str, policy: str, count: int) -> None:
    """Hit rate before and after a change of revision, and what the change costs."""
    callers = [f"c{number}" for number in range(IDENTITIES)]
    async with workers(policy, callers) as (pool, revision):
        changed = await publish(pool, {"authz.rego": policy}, grants([*callers, "another"]).encode(), (DECISION,))
        table = KeptDecisions()
        decider = PolicyDecider(central=EngineAsker(pool), kept=table)
        traffic = Traffic()
        now = revision
        slow: list[float] = []
        most = 0

        async def one() -> None:
            nonlocal most
            question = DecisionQuestion(POLICY_HERE, traffic.next(), now)
            if decider.recall(question, time.monotonic()) is None:
                started = time.perf_counter()
                waiting = asked(decider, question)
                most = max(most, len(decider._open))
                await waiting
                slow.append(time.perf_counter() - started)

        async def phase(size: int) -> tuple[float, float, int]:
            """Hit rate, the p99 of what was asked, and questions that were asked of the engine."""
            slow.clear()
            hits, misses = table.hits, table.misses
            await in_flight(size, 64, one)
            looked = (table.hits - hits) + (table.misses - misses)
            slow.sort()
            return (table.hits - hits) / looked, slow[len(slow) * 99 // 100] if slow else 0.0, len(slow)

        await phase(count)
        warm = await phase(count)
        most = 0
        started = time.perf_counter()
        await pool.load(changed)
        loading = time.perf_counter() - started
        now = changed
        after = [await phase(count // 10) for _ in range(5)]
        back = await phase(count)
        await decider.close()
        print(
            row(
                name,
                f"{warm[0]:.1%}",
                ", ".join(f"{each[0]:.0%}" for each in after),
                f"{back[0]:.1%}",
                f"{after[0][1] * 1e3:.1f} ms",
                most,
                f"{loading * 1e3:.0f} ms",
                f"{len(table):,}",
                f"{table.bytes / 2**20:.0f} MiB",
            ),
            flush=True,
        )


async def everything(count: int) -> None:
    """All of it."""
    with ExitStack() as stack:
        port, theirs = await fresh(count, stack)
        async with workers(POLICY, CALLERS) as (pool, revision):
            print("### What a decision costs a gateway\n")
            print(row("decision", "gateway CPU µs", "worker CPU µs", "p50 µs", "p99 µs"))
            print(row("---", "---:", "---:", "---:", "---:"))
            kept(pool, revision, max(count, 1000))
            await local(pool, revision, count, theirs)
            await central(port, revision, max(2.0, count / 2000))
    print(f"\n### {IDENTITIES:,} identities × {PATHS:,} paths, and a change of revision\n")
    names = [
        "the policy reads",
        "hits",
        f"of each {count // 2:,} requests after a change",
        "hits after that",
        "p99 of those asked just then",
    ]
    names += ["most waiting at once (of 64)", "loading it", "kept", "memory"]
    print(row(*names))
    print(row(*("---" for _ in names)))
    await change("caller, method, whole path", POLICY, count * 5)
    await change("caller, method, first segment", BY_AREA, count * 5)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.policy", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="questions of each kind")
    asyncio.run(everything(parser.parse_args().count))


if __name__ == "__main__":
    main()

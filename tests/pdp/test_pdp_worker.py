"""The pool of workers, over real ones: what it answers, and what happens when workers die, hang, eat memory or are in the way."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from engine_world import GOOD, alive, ask, kill, pool, revision, until

from mesh.policy import Revision
from pdp.build import worker_binary
from pdp.engines import Evaluation, PolicyError
from pdp.engines.engine import EngineUnavailable
from pdp.engines.quarantine import Quarantine
from pdp.engines.worker import WorkerPool
from telemetry.record import Telemetry

D = "shop.authz."
ENDLESS_BUILTIN = """package slow

stuck := count(format_int(bits.lsh(1, 100000000), 10)) if input.who == "stuck"

fine := true
"""


@pytest.mark.parametrize(
    ("path", "who", "kind", "value"),
    [
        (D + "decision", "web", "result", {"allowed": True, "rule": "web reads"}),
        ("data.shop.authz.decision", "x", "result", {"allowed": False, "reason": "not you"}),
        ("shop/authz/decision", "web", "result", {"allowed": True, "rule": "web reads"}),
        (D + "admin", "admin", "result", True),
        (D + "admin", "web", "undefined", None),
        (D + "nothing", "web", "undefined", None),
        (D + "word", "web", "result", "yes"),
    ],
)
def test_what_a_policy_says_is_what_comes_back(path: str, who: str, kind: str, value: object) -> None:
    async def run() -> Evaluation:
        async with pool() as engine:
            await engine.load(revision())
            return await ask(engine, revision(), path, who)

    answer = asyncio.run(run())
    assert answer.kind == kind
    assert (msgspec.json.decode(answer.value) if answer.value else None) == value


@pytest.mark.parametrize(
    ("path", "document", "reason"),
    [
        (D + "conflict", b'{"who": 1}', "conflict"),
        (D + "decision", b"{", "input"),
        (D + "endless", b"{}", "timeout"),
        ("a..b", b"{}", "eval"),
    ],
)
def test_errors_say_what_they_are(path: str, document: bytes, reason: str) -> None:
    async def run() -> Evaluation:
        async with pool() as engine:
            done: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
            engine.evaluate(revision(), path, document, 0.4, done.set_result)
            answer = await done
            assert (await ask(engine, revision(), D + "word")).value == b'"yes"'
            return answer

    answer = asyncio.run(run())
    assert (answer.kind, answer.reason) == ("error", reason)
    assert answer.message


def test_a_policy_that_does_not_compile_says_where() -> None:
    async def run() -> None:
        async with pool() as engine:
            broken = revision("package a\n\nok if {\n\tinput.x ==\n}\n\nok if unknown(1)\n")
            with pytest.raises(PolicyError) as caught:
                await engine.load(broken)
            assert str(caught.value).startswith("authz.rego:5:")
            answer = await ask(engine, broken, "a.ok")
            assert (answer.kind, answer.reason) == ("error", "unavailable")
            unsafe = revision('package a\n\nok := http.send({"url": "http://x", "method": "get"})\n')
            with pytest.raises(PolicyError, match=r"http\.send is not allowed"):
                await engine.load(unsafe)
            await engine.load(revision())
            assert (await ask(engine, revision(), D + "word")).kind == "result"

    asyncio.run(run())


def test_a_question_for_a_revision_that_is_not_loaded_waits_for_it() -> None:
    async def run() -> None:
        async with pool(workers=2) as engine:
            answers = await asyncio.gather(*(ask(engine, revision(), D + "decision") for _ in range(50)))
            assert {answer.kind for answer in answers} == {"result"}

    asyncio.run(run())


def test_revisions_are_kept_apart_and_the_oldest_is_let_go() -> None:
    many = [revision(f"package a\n\nnumber := {n}\n") for n in range(7)]

    async def run() -> None:
        async with pool(keep=2, workers=2) as engine:
            for _ in range(2):
                answers = [ask(engine, each, "a.number", timeout=10) for each in many for _ in range(20)]
                got = [answer.value for answer in await asyncio.gather(*answers)]
                assert got == [str(n).encode() for n in range(7) for _ in range(20)]
            assert len(engine.state().revisions) == 2

    asyncio.run(run())


def test_a_worker_that_is_killed_while_asked_loses_no_question() -> None:
    async def run() -> None:
        async with pool(workers=2) as engine:
            await engine.load(revision())
            for _ in range(6):
                answers = [ask(engine, revision(), D + "decision", timeout=10) for _ in range(200)]
                await until("one that is asked", lambda: any(worker.open for worker in engine.state().workers))
                kill(next(worker.pid for worker in engine.state().workers if worker.open))
                assert {answer.kind for answer in await asyncio.gather(*answers)} == {"result"}
                await until("a restart", lambda: any(worker.state == "running" for worker in engine.state().workers))
            await until("both", lambda: all(worker.state == "running" for worker in engine.state().workers))
            assert engine.state().deaths == 6
            assert engine.state().pending == 0

    asyncio.run(run())


@pytest.mark.parametrize("path", ["memory", "arrays"])
def test_a_policy_that_eats_memory_ends_its_worker_and_nothing_else(path: str) -> None:
    async def run() -> None:
        async with pool(memory=96 << 20, threads=2) as engine:
            await engine.load(revision())
            bad = [ask(engine, revision(), D + path, timeout=20) for _ in range(2)]
            good = [ask(engine, revision(), D + "decision", timeout=20) for _ in range(50)]
            for answer in await asyncio.gather(*bad):
                assert (answer.kind, answer.reason) == ("error", "crashed"), answer
            assert {answer.kind for answer in await asyncio.gather(*good)} == {"result"}

    asyncio.run(run())


BESIDE = """package beside

slow := count([i | some i in numbers.range(1, 60000); i % 2 == 0])

bad["1"] := bits.lsh(1, 100000000000)

bad["2"] := bits.lsh(1, 200000000000)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_innocent_entry_point_is_not_put_aside_for_what_runs_beside_it(workers: int) -> None:
    """Each bad one ends a worker twice: once beside others, and once alone, which shows that it was it."""
    what = revision(BESIDE)

    async def run() -> None:
        async with pool(workers=workers, threads=2, quarantine=Quarantine(deaths=2)) as engine:
            await engine.load(what)
            good: list[asyncio.Future[Evaluation]] = []
            going = True

            async def keep_asking() -> None:
                while going:
                    good.append(ask(engine, what, "beside.slow", timeout=30))
                    await good[-1]

            asking = [asyncio.create_task(keep_asking()) for _ in range(2 * workers)]
            for number in ("1", "2"):
                await until("all threads at work", lambda: all(worker.open == 2 for worker in engine.state().workers))
                answer = await ask(engine, what, f"beside.bad.{number}", timeout=30)
                assert (answer.kind, answer.reason) == ("error", "crashed")
            going = False
            await asyncio.gather(*asking)
            assert engine.state().deaths == 4
            assert {(await each).value for each in good} == {b"30000"}
            assert (await ask(engine, what, "beside.slow", timeout=30)).kind == "result"

    asyncio.run(run())


def test_what_keeps_ending_workers_is_put_aside() -> None:
    async def run() -> None:
        async with pool(quarantine=Quarantine(deaths=2, term=0.3, longest=0.5)) as engine:
            await engine.load(revision())
            assert (await ask(engine, revision(), D + "memory", timeout=10)).reason == "crashed"
            assert (await ask(engine, revision(), D + "memory")).reason == "quarantined"
            assert engine.state().quarantined == 1
            assert (await ask(engine, revision(), D + "decision")).kind == "result"
            deaths = engine.state().deaths
            await until("its term is over", lambda: ask(engine, revision(), D + "memory", timeout=10).done() is False)
            await until("it is tried again", lambda: engine.state().deaths > deaths)

    asyncio.run(run())


def test_a_frozen_worker_is_ended_and_its_deadline_kept() -> None:
    async def run() -> None:
        async with pool() as engine:
            await engine.load(revision())
            pid = engine.state().workers[0].pid
            kill(pid, signal.SIGSTOP)
            started = time.monotonic()
            answer = await ask(engine, revision(), D + "decision", timeout=0.2)
            assert answer.reason == "timeout"
            assert time.monotonic() - started >= 0.2
            await until("another worker", lambda: engine.state().workers[0].pid not in {0, pid})
            assert not alive(pid)
            assert (await ask(engine, revision(), D + "decision")).kind == "result"

    asyncio.run(run())


def test_a_builtin_that_can_not_be_interrupted_blocks_nobody_for_long() -> None:
    what = revision(ENDLESS_BUILTIN)

    async def run() -> None:
        async with pool(threads=1, quarantine=Quarantine(deaths=1)) as engine:
            await engine.load(what)
            assert (await ask(engine, what, "slow.stuck", "stuck", timeout=0.1)).reason == "timeout"
            assert (await ask(engine, what, "slow.fine", timeout=10)).value == b"true"
            assert engine.state().deaths == 1
            assert (await ask(engine, what, "slow.stuck", "stuck", timeout=0.1)).reason == "quarantined"

    asyncio.run(run())


def test_what_waits_is_bounded() -> None:
    async def run() -> None:
        async with pool(max_pending=10) as engine:
            await engine.load(revision())
            kill(engine.state().workers[0].pid, signal.SIGSTOP)
            answers = [ask(engine, revision(), D + "decision", timeout=0.3) for _ in range(30)]
            reasons = [answer.reason for answer in await asyncio.gather(*answers)]
            assert reasons == ["timeout"] * 10 + ["overloaded"] * 20
        async with pool(max_bytes=100) as engine:
            assert (await ask(engine, revision(), D + "decision", "x" * 200)).reason == "overloaded"
            assert (await ask(engine, revision(), D + "decision")).kind == "result"

    asyncio.run(run())


def test_decisions_that_may_be_named_are_bounded() -> None:
    async def run() -> None:
        async with pool() as engine:
            answers = await asyncio.gather(*(ask(engine, revision(), f"shop.nothing{n}", timeout=30) for n in range(1100)))
            assert [answer.kind for answer in answers].count("undefined") == 1024
            assert {answer.reason for answer in answers[1024:]} == {"overloaded"}

    asyncio.run(run())


def test_commands_run_beside_the_questions() -> None:
    async def run() -> None:
        async with pool(workers=0) as engine:
            version = await engine.command({"op": "version"})
            assert version["version"].startswith("1.")
            assert "http.send" in version["forbidden"]
            found = await engine.command({"op": "check", "modules": {"a.rego": "package a\n\nx if"}, "data": b"{}"})
            assert found["problems"][0]["row"] == 3
            assert (await engine.command({"op": "no"}))["problems"]
            with pytest.raises(EngineUnavailable, match="longer than"):
                many = "numbers.range(1, 1000000)"
                slow = f"package a_test\n\ntest_x if {{\n\tsome i in {many}\n\tsome j in {many}\n\ti + j < 0\n}}\n"
                await engine.command({"op": "test", "modules": {"a_test.rego": slow}}, timeout=0.5)
            assert "version" in await engine.command({"op": "version"})
            assert (await ask(engine, revision(), D + "word")).reason == "unavailable"
            with pytest.raises(EngineUnavailable):
                await engine.load(revision())
        with pytest.raises(EngineUnavailable):
            await engine.command({"op": "version"})

    asyncio.run(run())


def test_closing_answers_what_is_open_and_leaves_no_process() -> None:
    async def run() -> None:
        async with pool(workers=2) as engine:
            await engine.load(revision())
            await engine.command({"op": "version"})
            pids = [worker.pid for worker in engine.state().workers]
            answers = [ask(engine, revision(), D + "endless", timeout=30) for _ in range(20)]
            await asyncio.sleep(0)
            await engine.close()
            assert {answer.reason for answer in await asyncio.gather(*answers)} == {"unavailable"}
            assert not any(map(alive, pids))
            assert (await ask(engine, revision(), D + "word")).reason == "unavailable"

    asyncio.run(run())


def test_a_binary_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        engine = WorkerPool(binary=tmp_path / "none")
        with pytest.raises(EngineUnavailable, match="none"):
            await engine.start()
        await engine.close()

    asyncio.run(run())


ORPHAN = """
import asyncio, sys
sys.path[:0] = [{tests!r}]
from engine_world import pool, revision, ask
async def run():
    async with pool(workers=2) as engine:
        await engine.load(revision())
        answers = [ask(engine, revision(), "shop.authz.endless", timeout=60) for _ in range(5000)]
        await asyncio.sleep(0.05)
        print(*(worker.pid for worker in engine.state().workers), flush=True)
        await asyncio.gather(*answers)
asyncio.run(run())
"""


def test_workers_end_with_a_parent_that_is_killed() -> None:
    script = ORPHAN.format(tests=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        parent.kill()
    end = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < end, "the workers outlived their parent"
        time.sleep(0.02)


def test_a_revision_whose_loading_ends_the_worker_is_refused() -> None:
    huge = revision(data='{"x": [' + ",".join(['{"aaaa":{"bbbb":[1,2,3]}}'] * 600_000) + "]}")

    async def run() -> None:
        async with pool(memory=64 << 20) as engine:
            with pytest.raises(EngineUnavailable, match="keeps ending the workers"):
                await engine.load(huge)
            assert (await ask(engine, huge, D + "word")).reason == "unavailable"
            assert (await ask(engine, revision(), D + "word", timeout=10)).kind == "result"

    asyncio.run(run())


def test_whatever_happens_every_question_is_answered_once_and_in_time() -> None:
    """Good, bad and endless policies, and workers that are killed and frozen at random. `ask` fails on a second answer."""
    chance = random.Random(5)
    telemetry = Telemetry()

    async def run() -> None:
        async with pool(workers=2, memory=192 << 20, keep=2, telemetry=telemetry, quarantine=Quarantine(term=0.2, longest=0.4)) as engine:
            revisions = [revision(), revision(GOOD + "\n# again\n"), revision(GOOD + "\n# and again\n")]
            waiting: list[tuple[str, asyncio.Future[Evaluation]]] = []
            end = time.monotonic() + 3
            while time.monotonic() < end:
                for _ in range(20):
                    path = chance.choices(["decision", "word", "endless", "memory", "conflict"], [60, 30, 3, 1, 6])[0]
                    waiting.append((path, ask(engine, chance.choice(revisions), D + path, timeout=0.5)))
                await asyncio.sleep(0.02)
                running = [worker.pid for worker in engine.state().workers if worker.state == "running"]
                if running and chance.random() < 0.1:
                    kill(chance.choice(running), chance.choice([signal.SIGKILL, signal.SIGSTOP]))
            answers = [(path, await asyncio.wait_for(each, 3.0)) for path, each in waiting]
            assert engine.state().pending == 0
            assert engine.state().deaths > 5
            told = telemetry.page().decode()
            assert f"tollhouse_opa_worker_deaths_total {engine.state().deaths}\n" in told
            assert "tollhouse_opa_questions_pending 0\n" in told
            results = {(path, answer.value) for path, answer in answers if answer.kind == "result"}
            assert results == {("decision", b'{"allowed":true,"rule":"web reads"}'), ("word", b'"yes"')}
            # A worker that is killed from outside looks like one that its question has ended.
            assert {answer.reason for path, answer in answers if path == "word"} <= {"", "timeout", "crashed", "quarantined"}

    asyncio.run(run())


def test_a_bundle_that_was_not_fetched_is_not_an_empty_policy() -> None:
    async def run() -> None:
        async with pool() as engine:
            with pytest.raises(EngineUnavailable, match="bundle"):
                await engine.load(Revision(digest="sha256:b", bundle="https://bundles.example/b.tar.gz"))

    asyncio.run(run())


def test_worker_binary_is_there() -> None:
    assert worker_binary().is_file()
    assert GOOD


def test_other_data_for_the_same_modules_is_not_compiled_again() -> None:
    rego = "package shop\n\ndecision := data.limits.most > input.n\n"
    small, large, clash = (revision(rego, f'{{"limits": {{"most": {most}}}}}') for most in (1, 9, 5))
    clash = msgspec.structs.replace(clash, digest="sha256:clash", data=b'{"shop": {"decision": 1}}')

    async def run() -> None:
        async with pool() as made:
            sent: list[bytes] = []
            await made.load(small)
            (child,) = [seat.child for seat in made._seats if seat.child is not None]
            command = child.command

            async def seen(text: bytes) -> bytes:
                sent.append(text)
                return await command(text)

            child.command = seen  # type: ignore[method-assign]
            await made.load(large)
            assert b"package" not in sent[-1]
            assert small.digest.encode() in sent[-1]
            for what, value in ((small, b"false"), (large, b"true"), (small, b"false")):
                answered: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
                made.evaluate(what, "shop.decision", b'{"n": 3}', 5.0, answered.set_result)
                assert (await answered).value == value
            with pytest.raises(PolicyError, match="conflict"):
                await made.load(clash)
            child.loaded.add("sha256:gone")
            made._held.hold(msgspec.structs.replace(small, digest="sha256:gone"))
            made._held._held.move_to_end("sha256:gone", last=False)
            await made.load(msgspec.structs.replace(large, digest="sha256:again"))
            assert b"package" in sent[-1], "the worker does not hold what it was thought to hold"

    asyncio.run(run())

"""`WorkerPool`: OPA as child processes of ours.

A pool has a fixed number of seats, and in each at most one worker (`pdp.engines.child`). Every worker holds the same revisions: those
that were loaded or asked for last. A question goes to the worker with the fewest open ones that holds its revision, and waits in the
pool's queue while there is none.

When a worker ends, it is started again after a jittered back-off (the first time at once), and:

* questions that it had not begun are asked of another;
* the one that it was in is to blame, and is asked once more; a second death answers it with `crashed`;
* when it was in several, nobody knows which did it: each is asked again *alone*, so that only the one that does it again is blamed.
  A busy innocent entry point never shares the fate of a bad one.

An entry point that keeps ending workers is put aside for a while (`pdp.engines.quarantine`). Deadlines are enforced here as well as in
the worker, and a worker that is still in a question long after its deadline is ended: some of OPA's builtins can't be interrupted.

Commands (check, plan, test, ...) run in a worker of their own, so that a long test run holds no question up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mesh.policy import Revision
from pdp.engines.child import Child, Question
from pdp.engines.clerk import Clerk, end
from pdp.engines.deadlines import TICK, Deadlines
from pdp.engines.engine import Done, EngineUnavailable, Evaluation, PolicyError, failure, segments
from pdp.engines.held import HeldRevisions
from pdp.engines.loader import Loader
from pdp.engines.quarantine import Culprit, Quarantine
from pdp.engines.seat import PoolState, Seat
from telemetry.record import Telemetry

_log = logging.getLogger(__name__)
_HANG: Final = 1.0
"""Seconds past its deadline after which a question's worker is taken to hang."""
_HEALTHY: Final = 10.0
"""Seconds of life after which a worker's next restart is at once again."""
_PATHS: Final = 1024
"""Different entry points that may be asked for: a worker prepares each, and keeps it."""
_MIB: Final = 1 << 20


class WorkerPool:
    """A `pdp.engines.Engine` over worker processes, and the place for commands about modules. Owned by one event loop."""

    def __init__(
        self,
        *,
        binary: Path,
        workers: int = 1,
        threads: int = 2,
        memory: int = 512 * _MIB,
        max_pending: int = 4096,
        max_bytes: int = 64 * _MIB,
        keep: int = 4,
        allow_builtins: Sequence[str] = (),
        forbid_builtins: Sequence[str] = (),
        quarantine: Quarantine | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`binary` is `pdp.build.worker_binary()`'s. `workers` processes (0 for commands only) evaluate on `threads` threads each and end
        above `memory` bytes. At most `max_pending` questions with `max_bytes` of documents wait. `keep` revisions are held."""
        self._binary = binary
        self._threads = threads
        self._arguments = [f"-memory={memory}"]
        if allow_builtins:
            self._arguments.append(f"-allow-builtins={','.join(allow_builtins)}")
        if forbid_builtins:
            self._arguments.append(f"-forbid-builtins={','.join(forbid_builtins)}")
        self._max_pending = max_pending
        self._max_bytes = max_bytes
        self._quarantine = Quarantine() if quarantine is None else quarantine
        self._seats = [Seat() for _ in range(workers)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._held = HeldRevisions(keep)
        self._paths: set[Culprit] = set()
        self._queue: deque[Question] = deque()
        self._suspects: deque[Question] = deque()
        self._deadlines: Deadlines | None = None
        self._loader = Loader(self._loaded, self._refuse, self._held.revisions)
        self._restarting: set[asyncio.Task[None]] = set()
        self._changed: asyncio.Event = asyncio.Event()
        self._clerk = Clerk(binary, self._arguments)
        self._pending = 0
        self._bytes = 0
        self._closed = False
        self.deaths = 0
        self.quarantined = 0
        if telemetry is not None:
            telemetry.counter_function("tollhouse_opa_worker_deaths_total", "Workers that ended unasked.", lambda: self.deaths)
            telemetry.counter_function(
                "tollhouse_opa_quarantined_total", "Questions of policies that are put aside.", lambda: self.quarantined
            )
            telemetry.gauge_function("tollhouse_opa_questions_pending", "Questions without an answer.", lambda: self._pending)
            telemetry.gauge_function(
                "tollhouse_opa_workers", "Workers that run.", lambda: sum(seat.state == "running" for seat in self._seats)
            )

    # Engine

    async def start(self) -> None:
        """Starts the workers. Raises `EngineUnavailable` when they can't be started at all."""
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, self._overdue)
        for seat in self._seats:
            await self._occupy(seat)
            if seat.state != "running":
                raise EngineUnavailable(f"the OPA worker {self._binary} can't be started")

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        """As `Engine.evaluate`. A revision that is not held yet is brought in, within the question's time."""
        loop, deadlines = self._loop, self._deadlines
        if loop is None or deadlines is None or self._closed or not self._seats:
            done(failure("unavailable", "no OPA worker runs here"))
            return
        if self._pending >= self._max_pending or self._bytes + len(document) > self._max_bytes:
            done(failure("overloaded", f"{self._pending} questions with {self._bytes} bytes wait for the OPA workers"))
            return
        now = loop.time()
        culprit = (revision.digest, path)
        if self._quarantine and (left := self._quarantine.remaining(culprit, now)):
            self.quarantined += 1
            done(failure("quarantined", f"{path} keeps ending its worker and is not asked for another {left:.0f} s"))
            return
        if (problem := self._admit(culprit, revision, now)) is not None:
            done(problem)
            return
        question = Question(revision, path, document, now + timeout, done)
        self._pending += 1
        self._bytes += len(document)
        deadlines.expect(question)
        if not self._place(question, now):
            self._queue.append(question)

    async def load(self, revision: Revision) -> None:
        """As `Engine.load`: returns when every worker that runs now holds it, at least one does, and raises otherwise."""
        if self._closed or not self._seats:
            raise EngineUnavailable("no OPA worker runs here")
        loop = asyncio.get_running_loop()
        self._held.pardon(revision.digest)
        if message := self._held.refusal(revision.digest, loop.time()):
            raise EngineUnavailable(message)
        self._hold(revision)
        end = loop.time() + 30.0
        while not self._closed:
            children = [seat.child for seat in self._seats if seat.state == "running" and seat.child is not None]
            results = await asyncio.gather(*(self._loader.bring(child, revision) for child in children), return_exceptions=True)
            for result in results:
                if isinstance(result, PolicyError):
                    raise result
            if any(revision.digest in child.loaded for child in children):
                return
            if message := self._held.refusal(revision.digest, loop.time()):
                raise EngineUnavailable(message)
            if loop.time() >= end:
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
        raise EngineUnavailable("no OPA worker stays up to load the revision")

    async def command(self, request: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:  # noqa: ASYNC109 - one number for callers
        """Has a worker do something with modules (`op`: check, plan, test, format, version; see `pdp/opa/commands.go`), in a worker of
        its own. `timeout` is in seconds. Raises `EngineUnavailable` when that worker can't start, dies, or takes longer."""
        if self._closed:
            raise EngineUnavailable("the OPA workers have been ended")
        return await self._clerk.ask(request, timeout)

    async def close(self) -> None:
        """As `Engine.close`; returns when every worker has been reaped."""
        if self._closed:
            return
        self._closed = True
        self._changed.set()
        children = []
        for seat in self._seats:
            seat.state = "closed"
            if seat.timer is not None:
                seat.timer.cancel()
            if seat.child is not None:
                children.append(seat.child)
                self._abandon(seat.child)
        for question in (*self._queue, *self._suspects):
            self._finish(question, failure("unavailable", "the OPA workers are being ended"))
        self._queue.clear()
        self._suspects.clear()
        self._loader.close()
        for task in self._restarting:
            task.cancel()
        await asyncio.gather(*(end(child) for child in children), self._clerk.close())

    def state(self) -> PoolState:
        """What the pool is doing now."""
        now = self._loop.time() if self._loop is not None else 0.0
        seats = tuple(seat.show(now) for seat in self._seats)
        return PoolState(seats, self._held.digests(), self._pending, self.deaths, self.quarantined)

    # Parent of the children

    def answered(self, question: Question, answer: Evaluation) -> None:
        """A worker has answered."""
        if answer.reason == "unavailable" and question.done is not None and question.tries < 2:
            question.tries += 1  # it was told to forget the revision while the question was on its way
            self._hold(question.revision)
            self._queue.append(question)
        else:
            self._finish(question, answer)
        if self._suspects or self._queue or question.suspect:
            self._settle()

    def died(self, child: Child, why: str) -> None:
        """A worker has ended."""
        seat = next((seat for seat in self._seats if seat.child is child), None)
        if seat is None or self._closed or self._loop is None:
            self._abandon(child)
            return
        self.deaths += 1
        now = self._loop.time()
        _log.warning("OPA worker %d ended (%s)", child.pid, why)
        suspects = child.running()
        if child.condemned:  # ended by us: the others that it was in did nothing
            suspects = []
        left = [question for question in child.open.values() if question.done is not None and question not in suspects]
        child.open.clear()
        self._vacate(seat, child, now)
        loading = next(iter(child.loading), "")  # commands are carried out one after the other
        if loading and not suspects and not child.condemned and self._held.death(loading, now):
            _log.warning("%s is put aside: loading it keeps ending workers", loading)
            self._give_up(loading, self._held.refusal(loading, now))
        for question in suspects:
            self._suspect(question, len(suspects) == 1, why, now)
        self._queue.extend(left)
        self._settle()

    # Questions

    def _admit(self, culprit: Culprit, revision: Revision, now: float) -> Evaluation | None:
        """Why a question can't be asked at all, if so; makes sure that its revision is held."""
        if culprit not in self._paths:
            try:
                segments(culprit[1])
            except ValueError as problem:
                return failure("eval", str(problem))
            if len(self._paths) >= _PATHS:
                return failure("overloaded", f"more than {_PATHS} different decisions are asked for")
        if revision.digest not in self._held:
            if message := self._held.refusal(revision.digest, now):
                return failure("unavailable", message)
            self._hold(revision)
        self._held.use(revision.digest)
        self._paths.add(culprit)
        return None

    def _place(self, question: Question, now: float) -> bool:
        """Asks a worker, if there is one that can be asked."""
        digest = question.revision.digest
        best: Child | None = None
        for seat in self._seats:
            child = seat.child
            if seat.state != "running" or child is None or child.solo or digest not in child.loaded:
                continue
            if best is None or len(child.open) < len(best.open):
                best = child
        if best is None or (question.suspect and best.open):
            return False
        if question.suspect:
            best.solo = True
        best.ask(question, now)
        return True

    def _settle(self) -> None:
        """Asks whatever can be asked now; suspects first, because they need a worker that is in nothing else."""
        assert self._loop is not None
        now = self._loop.time()
        for seat in self._seats:
            if seat.child is not None and seat.child.solo and not seat.child.open:
                seat.child.solo = False
        for waiting in (self._suspects, self._queue):
            for _ in range(len(waiting)):
                question = waiting.popleft()
                if question.done is not None and not self._place(question, now):
                    waiting.append(question)
                    self._want(question.revision)

    def _want(self, revision: Revision) -> None:
        """A question waits for a revision: if it has been let go in the meantime, it is brought in again."""
        digest = revision.digest
        if digest not in self._held and not any(seat.child is not None and digest in seat.child.loading for seat in self._seats):
            self._hold(revision)

    def _finish(self, question: Question, answer: Evaluation) -> None:
        done = question.done
        if done is None:
            return
        question.done = None
        self._pending -= 1
        self._bytes -= len(question.document)
        question.document = b""
        try:
            done(answer)
        except Exception:
            _log.exception("what was to be done with a decision failed")

    def _suspect(self, question: Question, certain: bool, why: str, now: float) -> None:
        """A worker ended while it was in `question`."""
        question.tries += 1
        if certain:
            self._blame(question, now)
            if question.tries > 1:
                self._finish(question, failure("crashed", f"{question.path} ended its worker twice ({why})"))
        if question.done is not None:
            question.suspect = True
            self._suspects.append(question)

    def _blame(self, question: Question, now: float) -> None:
        culprit = (question.revision.digest, question.path)
        if self._quarantine.blame(culprit, now):
            left = self._quarantine.remaining(culprit, now)
            _log.warning("%s of %s is put aside for %.0f s: it keeps ending its worker", question.path, question.revision.digest, left)

    def _abandon(self, child: Child) -> None:
        """Answers what a worker leaves behind when nobody else will be asked."""
        for question in list(child.open.values()):
            self._finish(question, failure("unavailable", "the OPA workers are being ended"))
        child.open.clear()

    # Deadlines

    def _overdue(self, late: list[Question]) -> None:
        for question in late:
            self._finish(question, failure("timeout", f"{question.path} took longer than its time"))
        if self._loop is not None and not self._closed:
            self._queue = deque(question for question in self._queue if question.done is not None)
            self._suspects = deque(question for question in self._suspects if question.done is not None)
            self._loop.call_later(_HANG, self._end_hanging)

    def _end_hanging(self) -> None:
        """Ends workers that are still in what should have ended long ago; `died` then does the rest."""
        assert self._loop is not None
        latest = self._loop.time() - _HANG + TICK
        for seat in self._seats:
            child = seat.child
            if child is not None and any(question.deadline <= latest for question in child.open.values()):
                _log.warning("OPA worker %d hangs; ending it", child.pid)
                for question in child.running():
                    if question.deadline <= latest:
                        self._blame(question, self._loop.time())
                child.condemned = True
                child.kill()

    # Revisions

    def _hold(self, revision: Revision) -> None:
        """Holds a revision from now on, and lets go of the one that was used longest ago."""
        for digest in self._held.hold(revision):
            self._paths = {culprit for culprit in self._paths if culprit[0] != digest}
            for seat in self._seats:
                if seat.child is not None and digest in seat.child.loaded:
                    seat.child.forget(digest)
        for seat in self._seats:
            if seat.state == "running" and seat.child is not None and revision.digest not in seat.child.loaded:
                self._loader.bring(seat.child, revision)

    def _loaded(self, child: Child, digest: str) -> None:
        """A worker has a revision now."""
        child.loaded.add(digest)
        self._changed.set()
        self._settle()
        if digest not in self._held:  # let go in the meantime; what waited for it has been asked
            child.forget(digest)

    def _refuse(self, digest: str, message: str) -> None:
        self._held.refuse(digest, message)
        self._give_up(digest, message)

    def _give_up(self, digest: str, message: str) -> None:
        """Answers those who wait for a revision that can't be held."""
        for question in [question for question in (*self._queue, *self._suspects) if question.revision.digest == digest]:
            self._finish(question, failure("unavailable", message))
        self._changed.set()

    # Seats

    async def _occupy(self, seat: Seat) -> None:
        assert self._loop is not None
        seat.state = "starting"
        seat.timer = None
        child = seat.child = Child(self, self._loop, self._threads)
        try:
            await child.spawn(self._binary, self._arguments)
        except OSError as problem:
            _log.error("OPA worker can't be started: %s", problem)
            if seat.child is child and not self._closed:
                self._vacate(seat, child, self._loop.time())
            return
        if self._closed:
            child.kill()
            return
        if seat.child is child:
            seat.state = "running"
            for revision in self._held.revisions():
                self._loader.bring(child, revision)
            self._settle()
            self._changed.set()

    def _vacate(self, seat: Seat, child: Child, now: float) -> None:
        assert self._loop is not None
        seat.child = None
        seat.state = "waiting"
        seat.restarts += 1
        at_once = seat.restarts == 1 or now - child.started > _HEALTHY
        if at_once:
            seat.backoff.reset()
        seat.timer = self._loop.call_later(0.0 if at_once else seat.backoff.next(), self._restart, seat)

    def _restart(self, seat: Seat) -> None:
        if self._loop is not None and not self._closed:
            task = self._loop.create_task(self._occupy(seat))
            self._restarting.add(task)
            task.add_done_callback(self._restarting.discard)

"""For the tests of engines: revisions, questions as futures, and a pool of real workers."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from mesh.policy import EntryPoint, ReadSet, Revision
from pdp.build import worker_binary
from pdp.engines import Engine, Evaluation
from pdp.engines.quarantine import Quarantine
from pdp.engines.worker import WorkerPool

GOOD = """package shop.authz

decision := {"allowed": true, "rule": "web reads"} if input.who == "web"

else := {"allowed": false, "reason": "not you"}

admin if input.who == "admin"

word := "yes"

endless if {
	some i in numbers.range(1, 1000000)
	some j in numbers.range(1, 1000000)
	i + j < 0
}

memory := bits.lsh(1, 100000000000)

arrays := count(numbers.range(1, 100000000))

conflict := 1 if input.who

conflict := 2 if input.who
"""


def revision(source: str = GOOD, data: str = "{}", entries: tuple[str, ...] = ("shop.authz.decision",), **kwargs: Any) -> Revision:
    digest = "sha256:" + hashlib.sha256((source + data).encode()).hexdigest()
    reads = ReadSet(values=(("who",),))
    points = {path: EntryPoint(path=path, digest=digest + path, reads=reads) for path in entries}
    return Revision(digest=digest, modules={"authz.rego": source}, data=data.encode(), entry_points=points, **kwargs)


def ask(engine: Engine, what: Revision, path: str, who: str = "web", timeout: float = 5.0) -> asyncio.Future[Evaluation]:
    """Asks; the future fails the test when it is answered twice."""
    answered: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()
    engine.evaluate(what, path, msgspec.json.encode({"who": who}), timeout, answered.set_result)
    return answered


@asynccontextmanager
async def pool(**kwargs: Any) -> AsyncIterator[WorkerPool]:
    made = WorkerPool(binary=worker_binary(), **{"quarantine": Quarantine(deaths=99), **kwargs})
    try:
        await made.start()
        yield made
    finally:
        await made.close()


async def until(what: str, condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        with Path(f"/proc/{pid}/stat").open() as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)

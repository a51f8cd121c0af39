"""`tollhouse gateway --workers N`: the parent of several gateway processes.

The parent binds the listening sockets, one for each worker and address, and hands them to workers that it starts with exec (never fork).
It accepts nothing itself. A worker that dies is started again on the same sockets, and a rolling restart (SIGUSR2) starts the new worker
before the old one drains, so that no connection in a queue is lost. The parent's admin page adds the workers' pages up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from mesh.backoff import Backoff
from mesh.model import Snapshot
from telemetry.merge import merge
from telemetry.trials import merged
from tollhouse.sockets import BUNDLES, Place, bind, hand_over

log = logging.getLogger("tollhouse.workers")

READY_TIMEOUT = 60.0
"""Seconds that a new worker may take until it is ready."""
PAGE_TIMEOUT = 2.0
LINK_VARIABLE = "TOLLHOUSE_LINK"
"""The file descriptor over which a worker tells that it is ready, and learns that its parent is gone."""


def wanted_addresses(snapshot: Snapshot, key: str, address: str) -> set[Place]:
    """Place the gateway `key` is to listen: at the Gateway's own addresses, else at `address` from the command line."""
    config = snapshot.gateways.get(key)
    if config is None:
        return set()
    kinds = {"UDP": socket.SOCK_DGRAM}
    return {
        (host, listener.port, kinds.get(listener.protocol, socket.SOCK_STREAM))
        for host in config.hosts(address or "0.0.0.0")
        for listener in config.listeners
    }


class Worker:
    """One place among the workers: its sockets, and the process that has them now."""

    def __init__(self, number: int, command: Sequence[str], folder: Path, bundles: socket.socket | None = None) -> None:
        self.number = number
        self.bundles = bundles
        """Where it serves bundles, if it is the one that does."""
        self.sockets: dict[Place, socket.socket] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.admin = folder / f"worker-{number}.sock"
        self._command = command
        self._generation = 0
        self._folder = folder
        self._link: socket.socket | None = None

    async def start(self) -> bool:
        """Starts a process on the sockets; True once it is ready, False when it ended or took too long."""
        self._generation += 1
        self.admin = self._folder / f"worker-{self.number}-{self._generation}.sock"
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        environment, numbers = hand_over(self.sockets.values())
        environment[LINK_VARIABLE] = str(theirs.fileno())
        if self.bundles is not None:
            environment[BUNDLES] = str(self.bundles.fileno())
            numbers = (*numbers, self.bundles.fileno())
        process = subprocess.Popen(  # noqa: S603, ASYNC220 -- ourselves; an exec takes a millisecond
            [sys.executable, "-m", "tollhouse", *self._command, "--admin", str(self.admin)],
            env={**os.environ, **environment, "NOTIFY_SOCKET": ""},
            pass_fds=(*numbers, theirs.fileno()),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.process, self._link = process, ours
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                self.ready = await loop.sock_recv(ours, 16) != b""
        except (TimeoutError, OSError):
            self.ready = False
        if not self.ready and process.poll() is None:
            process.terminate()
        return self.ready

    def gone(self) -> bool:
        """Whether its process has ended."""
        return self.process is None or self.process.poll() is not None

    def signal(self, number: int) -> None:
        """Sends a signal to its process, if there is one."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def page(self, path: str) -> bytes:
        """What its admin page says at `path`; empty when it says nothing in time."""
        try:
            async with asyncio.timeout(PAGE_TIMEOUT):
                reader, writer = await asyncio.open_unix_connection(str(self.admin))
                writer.write(f"GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
                answer = await reader.read()
                writer.close()
        except (TimeoutError, OSError):
            return b""
        return answer.partition(b"\r\n\r\n")[2]


class Fleet:
    """All workers of one gateway. Its owner calls `apply` with each snapshot, `watch` once, and `stop` in the end."""

    def __init__(
        self, key: str, address: str, count: int, command: Sequence[str], drain: float, bundles: socket.socket | None = None
    ) -> None:
        """`bundles` is a listening socket for bundles. The first worker has it alone: bundles of two processes, one a moment behind, would
        have an OPA go back and forth between two revisions."""
        self.key = key
        self.address = address
        self.drain = drain
        self._folder = Path(tempfile.mkdtemp(prefix="tollhouse-workers-"))
        self._bundles = bundles
        self.workers = [Worker(number, command, self._folder, None if number else bundles) for number in range(count)]
        self._bound: set[Place] = set()
        self._busy = asyncio.Lock()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.restarts = 0

    @property
    def ready(self) -> bool:
        """Whether every worker serves."""
        return all(worker.ready and not worker.gone() for worker in self.workers)

    def bind(self, wanted: set[Place]) -> bool:
        """Binds what is wanted and not bound yet, and closes what is no longer wanted. True when anything changed. Raises OSError, and
        changes nothing then."""
        new = wanted - self._bound
        made: list[tuple[Worker, Place, socket.socket]] = []
        try:
            for where in sorted(new):
                made += [(worker, where, bind(where, shared=True)) for worker in self.workers]
        except OSError:
            for _, _, each in made:
                each.close()
            raise
        for worker, where, each in made:
            worker.sockets[where] = each
        for where in self._bound - wanted:
            for worker in self.workers:
                worker.sockets.pop(where).close()
        changed = wanted != self._bound
        self._bound = set(wanted)
        return changed

    async def start(self, wanted: set[Place]) -> bool:
        """Binds and starts all workers; True when all are ready."""
        self.bind(wanted)
        return all(await asyncio.gather(*(worker.start() for worker in self.workers)))

    def apply(self, snapshot: Snapshot) -> None:
        """Takes a new snapshot: other listeners mean other sockets, and those mean new processes."""
        wanted = wanted_addresses(snapshot, self.key, self.address)
        if not wanted or wanted == self._bound:
            return
        try:
            self.bind(wanted)
        except OSError as problem:
            log.error("%s: %s; the listeners stay as they are", problem.filename, problem.strerror)
            return
        self.roll()

    def roll(self) -> None:
        """Replaces every worker by a new process, one after the other."""
        self._keep(asyncio.get_running_loop().create_task(self._roll()))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _roll(self) -> None:
        async with self._busy:
            for worker in self.workers:
                old = worker.process
                if self._stopping:
                    return
                if not await worker.start():
                    log.error("worker %d: the new process did not become ready; the old one stays", worker.number)
                    worker.process, worker.ready = old, True
                    continue
                self.restarts += 1
                if old is not None and old.poll() is None:
                    old.send_signal(signal.SIGTERM)
                    await self._reap([old])

    async def watch(self) -> None:
        """Starts workers again that have died, until `stop`."""
        backoffs = [Backoff(0.1, 10.0) for _ in self.workers]
        due = [0.0 for _ in self.workers]
        while not self._stopping:
            await asyncio.sleep(0.1)
            if self._busy.locked():
                continue
            for worker, backoff in zip(self.workers, backoffs, strict=True):
                if worker.gone() and time.monotonic() >= due[worker.number]:
                    status = worker.process.returncode if worker.process else None
                    log.error("worker %d ended (status %s); starting it again", worker.number, status)
                    self.restarts += 1
                    due[worker.number] = time.monotonic() + backoff.next()
                    if await worker.start():
                        backoff.reset()

    def signal(self, number: int) -> None:
        """Sends a signal to all workers."""
        for worker in self.workers:
            worker.signal(number)

    async def stop(self) -> None:
        """Drains all workers, and ends those that take too long."""
        self._stopping = True
        for worker in self.workers:
            for each in worker.sockets.values():
                each.close()
        if self._bundles is not None:
            self._bundles.close()
        self.signal(signal.SIGTERM)
        await self._reap([worker.process for worker in self.workers if worker.process is not None])
        for path in self._folder.glob("*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    async def _reap(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        end = time.monotonic() + self.drain + 5.0
        while any(process.poll() is None for process in processes) and time.monotonic() < end:  # noqa: ASYNC110 -- processes have no event
            await asyncio.sleep(0.05)
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    async def metrics(self) -> bytes:
        """The workers' metrics in one page."""
        return merge(await asyncio.gather(*(worker.page("/metrics") for worker in self.workers)))

    async def every(self, path: str, name: str) -> bytes:
        """The workers' JSON pages, put together: of each what it has under `name`, a list."""
        pages = await asyncio.gather(*(worker.page(path) for worker in self.workers))
        return msgspec.json.encode({name: [each for page in pages if page for each in msgspec.json.decode(page)[name]]})

    async def trials(self) -> bytes:
        """The workers' differences between what is tried and what is in force, in one page."""
        return merged([page for worker in self.workers if (page := await worker.page("/trials"))])

    async def first(self, path: str) -> bytes:
        """One worker's page: all have the same configuration in force, or will in a moment."""
        for worker in self.workers:
            found = await worker.page(path)
            if found:
                return found
        return b"{}"


class Link:
    """A worker's end: tells the parent that it is ready, and stops the worker when the parent is gone."""

    def __init__(self) -> None:
        number = os.environ.pop(LINK_VARIABLE, "")
        self._socket = socket.socket(fileno=int(number)) if number else None

    @property
    def there(self) -> bool:
        """Whether this process is a worker."""
        return self._socket is not None

    def ready(self) -> None:
        """The worker serves."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(b"ready")

    async def parent_gone(self) -> None:
        """Returns when the parent has ended; never for a process without one."""
        if self._socket is None:
            await asyncio.Event().wait()
            return
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(self._socket, 1)

"""`DirectorySource`: resources and policies from files below a directory, watched.

Every `*.yaml`, `*.yml` and `*.json` holds resources; `policy/` holds Rego. The tree is looked at 25 times a second by a thread of its
own: 0.14 ms for 100 files, and never more than a tenth of the time while nothing changes. That sees changes on network file systems,
through swapped symbolic links and in folders that were made just now, by the same few lines; where inotify has word of a change
(`discovery.notices`), it is looked for at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from discovery.files import DirectoryProblem
from discovery.notices import Notices
from discovery.source import Change, OnChange, SourceStatus
from discovery.tree import PATIENCE, Tree

log = logging.getLogger("tollhouse.discovery")

INTERVAL = 0.04
"""Seconds between two looks."""
AGAIN = 0.015
"""Seconds from the beginning of one look to that of the next while something changes."""


class DirectorySource:
    """A `Source` over one directory. Owns its thread; made, started and stopped in one event loop."""

    def __init__(self, path: Path, *, interval: float = INTERVAL) -> None:
        """`interval` in seconds."""
        self._path = path
        self._interval = interval
        self._tree = Tree(path)
        self._thread: ThreadPoolExecutor | None = None
        self._on_change: OnChange | None = None
        self._task: asyncio.Task[None] | None = None
        self._poke = asyncio.Event()
        self._contact: float | None = None
        self._cost = 0.0
        self._began = -math.inf
        self._notices: Notices | None = None
        self._reload = False
        self._stale = "the directory was not read yet"

    @property
    def status(self) -> SourceStatus:
        """How it is doing now."""
        resources, files = self._tree.count
        return SourceStatus(
            connected=not self._stale,
            revision=self._tree.digest,
            last_contact=self._contact,
            stale=self._stale,
            text=f"directory {self._path}: {resources} resources in {files} files" + (f"; {self._stale}" if self._stale else ""),
        )

    async def start(self, on_change: OnChange) -> None:
        """Delivers the first state and goes on looking; see `Source.start`."""
        self._on_change = on_change
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tollhouse-directory")
        try:
            self._notices = Notices(self._poke.set)
        except OSError as problem:
            log.info("no word of changes from the kernel (%s): they are found by looking", problem)
        end = time.monotonic() + 2 * PATIENCE
        await self._look()
        while self._tree.pending and time.monotonic() < end:
            await asyncio.sleep(AGAIN)
            await self._look()
        self._deliver(self._tree.everything())
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends looking."""
        self._on_change = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._notices is not None:
            self._notices.close()
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def reload(self) -> None:
        """Looks at once, and reads every file again (for SIGHUP)."""
        self._reload = True
        self._poke.set()

    async def _run(self) -> None:
        while True:
            rest = self._began + AGAIN - time.monotonic()
            if self._tree.pending:
                await asyncio.sleep(max(rest, 0.0))
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(self._interval, 10 * self._cost)):
                        await self._poke.wait()
                # However often there is word: half of the time goes into looking at most.
                await asyncio.sleep(max(self._began + max(AGAIN, 2 * self._cost) - time.monotonic(), 0.0))
            self._poke.clear()
            try:
                change = await self._look()
            except Exception:
                log.exception("looking at %s failed", self._path)
                self._stale = "looking at the directory failed; the log says why"
                continue
            if change is not None:
                self._deliver(change)

    async def _look(self) -> Change | None:
        assert self._thread is not None
        self._began = began = time.monotonic()
        if self._reload:
            self._reload = False
            self._tree.forget()
        try:
            change = await asyncio.get_running_loop().run_in_executor(self._thread, self._tree.look, began)
        except DirectoryProblem as problem:
            if self._stale != str(problem):
                log.warning("%s; what was last read stays in force", problem)
            self._stale = str(problem)
            return None
        if change is None and not self._tree.pending:
            self._cost = time.monotonic() - began  # what is read is read once, and no reason to look less often
        self._stale = ""
        if self._notices is not None:
            self._notices.watch(self._tree.folders)
        if not self._tree.pending:
            self._contact = began
        return change

    def _deliver(self, change: Change) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(change)
        except Exception:
            log.exception("a change of %s could not be applied", self._path)

"""Lines written to a file or to stdout by a thread of their own, so that a slow disk or a full pipe never holds the data path.

What is offered waits in a bounded queue; what does not fit is dropped and counted. Formatting is the thread's work too, in small
batches, so that it gives the interpreter back often.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

QUEUE = 4096
BATCH = 16
GATHER = 0.02
"""Seconds from the first item to the first write: a busy gateway wakes the thread fifty times a second and not for each request."""

STDOUT = "-"


class LineWriter(Generic[Item]):
    """Owns the queue, the thread and the file. `offer` is for the data path; everything else is for the process's wiring."""

    def __init__(self, path: str, render: Callable[[Item], bytes], queue: int = QUEUE) -> None:
        """`path` is a file to append to, or `-` for stdout; `render` gives whole lines with their newlines, and runs in the thread.

        Raises OSError when the file cannot be opened: that is for the one who starts the process to see.
        """
        self.path = path
        self.dropped = 0
        """Items that found no room."""
        self.failed = 0
        """Items that could not be rendered or written."""
        self.written = 0
        self.problem = ""
        """Why the last write failed; empty once one has worked."""
        self._render = render
        self._limit = queue
        self._queue: deque[Item] = deque()
        self._wake = threading.Event()
        self._asleep = False
        self._stop = False
        self._reopen = False
        self._torn = False
        """A line was written in part: the next one begins on a line of its own."""
        self._descriptor = self._open()
        self._thread = threading.Thread(target=self._run, name=f"log {path}", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, item: Item) -> bool:
        """Queues `item`; False when there is no room. Never blocks."""
        if len(self._queue) >= self._limit:
            self.dropped += 1
            return False
        self._queue.append(item)
        if self._asleep:
            self._asleep = False
            self._wake.set()
        return True

    def reopen(self) -> None:
        """Opens the file anew before the next line (SIGHUP, after it was moved away)."""
        self._reopen = True
        self._wake.set()

    def close(self, timeout: float = 2.0) -> None:
        """Writes what waits, for at most `timeout` seconds, and ends the thread."""
        self._stop = True
        self._wake.set()
        self._thread.join(timeout)
        if not self._thread.is_alive() and self.path != STDOUT and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.dropped += len(self._queue)
        self._queue.clear()

    def _open(self) -> int:
        if self.path == STDOUT:
            return 1
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _run(self) -> None:
        while True:
            if self._reopen:
                self._renew()
            if not self._queue:
                if self._stop:
                    return
                self._sleep()
                continue
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._write(batch)

    def _sleep(self) -> None:
        self._wake.clear()
        self._asleep = True
        # An item may have come between the look at the queue and now: its `offer` saw nobody asleep.
        if not self._queue and not self._stop and not self._reopen:
            self._wake.wait()
        self._asleep = False
        if not self._stop:
            time.sleep(GATHER)

    def _renew(self) -> None:
        self._reopen = False
        if self.path == STDOUT:
            return
        try:
            fresh = self._open()
        except OSError as error:
            self.problem = f"{self.path} cannot be opened again: {error.strerror}"
            return
        os.close(self._descriptor)
        self._descriptor = fresh

    def _write(self, batch: list[Item]) -> None:
        lines = []
        for item in batch:
            try:
                lines.append(self._render(item))
            except Exception as error:  # one item that cannot be shown must not end the log
                self.failed += 1
                self.problem = f"a line could not be made: {error!r}"
        data = memoryview(b"".join([b"\n", *lines] if self._torn else lines))
        whole = len(data)
        try:
            while data:
                data = data[self._put(data) :]
        except OSError as error:
            self._torn = self._torn or len(data) < whole
            self.failed += len(lines)
            self.problem = f"{self.path} cannot be written: {error.strerror}"
            time.sleep(GATHER)
            return
        self._torn = False
        self.written += len(lines)
        self.problem = ""

    def _put(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # somebody made our stdout non-blocking
            if self._stop:
                raise
            time.sleep(GATHER)
            return 0

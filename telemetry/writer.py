"""Lines written to a file or to stdout by a thread of their own.

Formatting is the thread's work too, in small batches, so that it gives the interpreter back often.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from telemetry.background import GATHER, MOST_BYTES, QUEUE, Background, Item

STDOUT = "-"


class LineWriter(Background[Item]):
    """Owns the file besides the queue and the thread."""

    def __init__(
        self,
        path: str,
        render: Callable[[Item], bytes],
        queue: int = QUEUE,
        weigh: Callable[[Item], int] | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """`path` is a file to append to, or `-` for stdout; `render` gives whole lines with their newlines, and runs in the thread. The
        others are as for `Background`.

        Raises OSError when the file cannot be opened: that is for the one who starts the process to see.
        """
        super().__init__(f"log {path}", queue, weigh, most_bytes)
        self.path = path
        self._render = render
        self._reopen = False
        self._torn = False
        """A line was written in part: the next one begins on a line of its own."""
        self._descriptor = self._open()
        self.begin()

    def reopen(self) -> None:
        """Opens the file anew before the next line (SIGHUP, after it was moved away)."""
        self._reopen = True
        self._wake.set()

    def _open(self) -> int:
        if self.path == STDOUT:
            return 1
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _ended(self) -> None:
        if self.path != STDOUT and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _pending(self) -> bool:
        return self._reopen

    def _between(self) -> None:
        if not self._reopen:
            return
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

    def _work(self, batch: list[Item]) -> None:
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

"""Work done by a thread of its own, so that a slow disk, a full pipe or a server that stalls never holds the data path.

What is offered waits in a queue that is bounded in items and in bytes; what does not fit is dropped and counted.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")

QUEUE = 4096
"""Items that wait at most."""
MOST_BYTES = 16 << 20
"""Bytes that wait at most, where items are weighed."""
BATCH = 16
GATHER = 0.02
"""Seconds from the first item to its turn: a busy gateway wakes the thread fifty times a second and not for each request."""


class Background(Generic[Item]):
    """Owns the queue and the thread. `offer` is for the data path; everything else is for the process's wiring."""

    def __init__(
        self,
        name: str,
        queue: int = QUEUE,
        weigh: Callable[[Item], int] | None = None,
        most_bytes: int = MOST_BYTES,
        batch: int = BATCH,
    ) -> None:
        """`weigh` gives an item's bytes, of which at most `most_bytes` wait; without it items alone are counted. At most `batch` are worked
        on at a time. A subclass calls `begin` when it is ready."""
        self.dropped = 0
        """Items that found no room."""
        self.failed = 0
        """Items that were lost on their way."""
        self.written = 0
        self.problem = ""
        """What went wrong last; empty once it has gone well again."""
        self._limit = queue
        self._weigh = weigh
        self._most = most_bytes
        self._batch = batch
        self._offered = 0
        """Bytes that were ever queued; written by who offers alone, as `_taken` is by the thread: no lock is needed."""
        self._taken = 0
        self._queue: deque[Item] = deque()
        self._wake = threading.Event()
        self._asleep = False
        self._stop = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name[:15], daemon=True)

    def __len__(self) -> int:
        return len(self._queue)

    def begin(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def offer(self, item: Item) -> bool:
        """Queues `item`; False when there is no room. Never blocks."""
        if len(self._queue) >= self._limit:
            self.dropped += 1
            return False
        weigh = self._weigh
        if weigh is not None:
            weight = weigh(item)
            if self._offered - self._taken + weight > self._most:
                self.dropped += 1
                return False
            self._offered += weight
        self._queue.append(item)
        if self._asleep:
            self._asleep = False
            self._wake.set()
        return True

    def close(self, timeout: float = 2.0) -> None:
        """Works on what waits, for at most `timeout` seconds, and ends the thread."""
        self._stop = True
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._ended()
        self.dropped += len(self._queue)
        self._queue.clear()

    @abstractmethod
    def _work(self, batch: list[Item]) -> None:
        """Deals with a batch, in the thread. Counts what it does."""

    def _between(self) -> None:
        """Called in the thread before each look at the queue."""

    def _pending(self) -> bool:
        """Whether there is something to do in `_between`, though nothing is queued."""
        return False

    def _ended(self) -> None:
        """The thread has ended."""

    def _run(self) -> None:
        while True:
            self._between()
            if not self._queue:
                if self._stop:
                    return
                self._sleep()
                continue
            batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
            self._work(batch)
            if self._weigh is not None:
                self._taken += sum(map(self._weigh, batch))

    def _sleep(self) -> None:
        self._wake.clear()
        self._asleep = True
        # An item may have come between the look at the queue and now: its `offer` saw nobody asleep.
        if not self._queue and not self._stop and not self._pending():
            self._wake.wait()
        self._asleep = False
        if not self._stop:
            self._gather()

    def _gather(self) -> None:
        """Lets items gather before they are worked on."""
        time.sleep(GATHER)

"""Which sockets are ready, and the writes that this leads to: one turn of the data path.

asyncio makes an object for each event and runs it through several calls; here one of its callbacks serves all sockets of a worker.
They are watched by an epoll of their own, which asyncio watches in turn. In one turn everything that is ready is read and worked on,
then everything that was written meanwhile goes out, once for each connection. What is written together is read, and answered,
together, also by the peers; one that is woken by each write by itself takes the processor in between.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable
from typing import Final, Protocol

log = logging.getLogger("tollhouse.gateway")

MOST_EVENTS: Final = 128
"""Sockets served in one turn before the rest of the process gets its own."""
SCRATCH: Final = 256 * 1024
READ: Final = select.EPOLLIN
WRITE: Final = select.EPOLLOUT
# An error or a hang-up is told to whoever waits, for whatever: it finds out by trying.
_NOT_WRITE: Final = ~select.EPOLLOUT
_NOT_READ: Final = ~select.EPOLLIN

Call = Callable[[], object]


class Flushable(Protocol):
    """A connection with output to write."""

    def flush(self) -> None:
        """Writes it."""
        ...


class Poller:
    """Owns the epoll of a worker's connections, and the list of those that have something to write. Belongs to one event loop.

    A call may be made once too often, for an event of a socket that has been closed since and whose number another one has: calls must
    bear that nothing is ready.
    """

    __slots__ = ("_epoll", "_inside", "_readers", "_scheduled", "_scratch", "_writers", "loop", "waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._epoll: select.epoll | None = None
        """There while something is watched."""
        self._readers: dict[int, Call] = {}
        self._writers: dict[int, Call] = {}
        self._scheduled = False
        self._inside = False
        self.waiting: list[Flushable] = []
        self._scratch: memoryview | None = None

    @property
    def scratch(self) -> memoryview:
        """Memory for whoever is done with it before the loop goes on."""
        if self._scratch is None:
            self._scratch = memoryview(bytearray(SCRATCH))
        return self._scratch

    # Watching

    def add_reader(self, fd: int, call: Call) -> None:
        """Calls `call` in each turn in which `fd` can be read (or has failed), until `remove_reader`."""
        known = fd in self._readers or fd in self._writers
        self._readers[fd] = call
        self._watch(fd, known)

    def add_writer(self, fd: int, call: Call) -> None:
        """As `add_reader`, for writing."""
        known = fd in self._readers or fd in self._writers
        self._writers[fd] = call
        self._watch(fd, known)

    def remove_reader(self, fd: int) -> None:
        """Watches `fd` no longer for reading. To be called before it is closed."""
        if self._readers.pop(fd, None) is not None:
            self._unwatch(fd)

    def remove_writer(self, fd: int) -> None:
        """Watches `fd` no longer for writing. To be called before it is closed."""
        if self._writers.pop(fd, None) is not None:
            self._unwatch(fd)

    def _mask(self, fd: int) -> int:
        return (READ if fd in self._readers else 0) | (WRITE if fd in self._writers else 0)

    def _watch(self, fd: int, known: bool) -> None:
        epoll = self._epoll
        if epoll is None:
            epoll = self._epoll = select.epoll()
            self.loop.add_reader(epoll.fileno(), self._turn)
        if known:
            epoll.modify(fd, self._mask(fd))
        else:
            epoll.register(fd, self._mask(fd))

    def _unwatch(self, fd: int) -> None:
        epoll = self._epoll
        if epoll is None:
            return
        mask = self._mask(fd)
        if mask:
            epoll.modify(fd, mask)
            return
        epoll.unregister(fd)
        if not self._readers and not self._writers:
            self._epoll = None
            self.loop.remove_reader(epoll.fileno())
            epoll.close()

    # A turn

    def _turn(self) -> None:
        epoll = self._epoll
        if epoll is None:
            return
        readers, writers = self._readers, self._writers
        self._inside = True
        for fd, events in epoll.poll(0, MOST_EVENTS):
            # Either may have been removed by a call before it: another connection's, or its own.
            try:
                if events & _NOT_WRITE:
                    call = readers.get(fd)
                    if call is not None:
                        call()
                if events & _NOT_READ:
                    call = writers.get(fd)
                    if call is not None:
                        call()
            except Exception:  # one connection's defect must not leave the others unserved
                log.exception("a connection could not be served")
        self._inside = False
        if self.waiting:
            self.run()

    def mark(self, connection: Flushable) -> None:
        """Has `connection` flushed at the end of the turn, or soon. The connection sees to it that it marks itself once only."""
        self.waiting.append(connection)
        if not self._inside and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.run)

    def run(self) -> None:
        """Flushes all that wait, also those that begin to wait meanwhile."""
        self._scheduled = True
        while self.waiting:
            waiting, self.waiting = self.waiting, []
            for connection in waiting:
                try:
                    connection.flush()
                except Exception:  # one connection's defect must not leave the others unwritten
                    log.exception("a connection could not be flushed")
        self._scheduled = False

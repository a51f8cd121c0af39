"""An event loop whose time is made, and an etcd and decision points that live in it: they delay, lose and reorder as a seed says.

What is stood in for is what is at the other end of a wire. The clients are the real ones, down to the calls on their channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from discovery.etcd import EOF, Delete, Entry, EtcdUnavailable, Listing, Put, Unchanged
from discovery.keys import end_of
from mesh.http import Header
from mesh.questions import Decision, Verdict
from pdp.check import check_response
from pdp.input import REVISION
from pdp.point import REVISION_CAUSE
from pdp.rpc import CAUSE, CHECK, Code, Done, Result


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing is left to do, and then at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        scheduled: list[Any] = self._scheduled  # type: ignore[attr-defined]
        if not self._ready:  # type: ignore[attr-defined]
            if not scheduled:
                raise AssertionError("everybody waits for everybody")
            self._now = max(self._now, scheduled[0].when())
        super()._run_once()  # type: ignore[misc]


@contextlib.contextmanager
def virtual_loop() -> Iterator[VirtualLoop]:
    """A loop; `time.monotonic` is its time."""
    loop = VirtualLoop()
    with mock.patch.object(time, "monotonic", loop.time):
        try:
            yield loop
        finally:
            while tasks := asyncio.all_tasks(loop):  # those that end may begin others
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.close()


class EtcdServer:
    """The contents, their history, and the leases."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.revision = 1
        self.log: list[tuple[int, bytes, bytes | None]] = []
        self.now: dict[bytes, Entry] = {}
        self.leases: dict[int, float] = {}
        self.ttls: dict[int, int] = {}
        self.watchers: list[Callable[[], None]] = []

    def write(self, operations: Sequence[Put | Delete]) -> int:
        """One transaction."""
        self.revision += 1
        for each in operations:
            if isinstance(each, Put):
                self.now[each.key] = Entry(each.key, each.value, self.revision, each.lease)
                self.log.append((self.revision, each.key, each.value))
            elif self.now.pop(each.key, None) is not None:
                self.log.append((self.revision, each.key, None))
        for watcher in list(self.watchers):
            watcher()
        return self.revision

    def expire(self) -> None:
        """Ends the leases whose time is over."""
        for lease in [lease for lease, until in self.leases.items() if until <= self.loop.time()]:
            self.end(lease)

    def end(self, lease: int) -> None:
        """Ends a lease, and its keys."""
        self.leases.pop(lease, None)
        gone: list[Put | Delete] = [Delete(key) for key, entry in self.now.items() if entry.lease == lease]
        if gone:
            self.write(gone)


class EtcdClient:
    """What `discovery` uses of `discovery.etcd.Etcd`, at the end of a line that is slow, breaks, or is cut."""

    timeout = 3.0
    where = "virtual"

    def __init__(self, server: EtcdServer, dice: random.Random) -> None:
        self.server = server
        self.dice = dice
        self.cut = False
        self.streams: list[WatchCall] = []

    async def _line(self) -> None:
        """One way of a message."""
        await asyncio.sleep(self.dice.choice((0.0005, 0.001, 0.005, 0.05)))
        if self.cut:
            await asyncio.sleep(1.0)
            raise EtcdUnavailable("etcd virtual: cut off")
        self.server.expire()

    async def list(self, start: bytes, end: bytes | None = None) -> Listing:
        await self._line()
        last = end_of(start) if end is None else end
        found = tuple(entry for key, entry in sorted(self.server.now.items()) if start <= key < last)
        listing = Listing(self.server.revision, 1, found, 1)
        await self._line()
        return listing

    async def now(self, key: bytes) -> Listing:
        await self._line()
        listing = Listing(self.server.revision, 1, (), 1)
        await self._line()
        return listing

    async def get(self, key: bytes) -> Entry | None:
        await self._line()
        return self.server.now.get(key)

    async def commit(self, operations: Sequence[Put | Delete], conditions: Sequence[Unchanged] = ()) -> int | None:
        await self._line()
        done = self.server.write(operations)
        await self._line()
        return done

    async def grant(self, ttl: int) -> int:
        await self._line()
        lease = len(self.server.ttls) + 1
        self.server.ttls[lease] = ttl
        self.server.leases[lease] = self.server.loop.time() + ttl
        return lease

    async def revoke(self, lease: int) -> None:
        await self._line()
        self.server.end(lease)

    async def keep_alive(self, lease: int) -> int:
        await self._line()
        if lease not in self.server.leases:
            return 0
        self.server.leases[lease] = self.server.loop.time() + self.server.ttls[lease]
        return self.server.ttls[lease]

    def endpoint(self) -> Any:
        return SimpleNamespace(host="virtual", watch=SimpleNamespace(Watch=lambda metadata: WatchCall(self)))

    async def metadata(self, endpoint: Any) -> tuple[()]:
        return ()

    def leave(self, endpoint: Any) -> None:
        """There is one."""

    def break_streams(self) -> None:
        """Ends every watch; what was on its way is lost."""
        for stream in list(self.streams):
            stream.broken()


class WatchCall:
    """One watch's stream: what is sent arrives in its order, each later than the one before."""

    def __init__(self, client: EtcdClient) -> None:
        self.client = client
        self.server = client.server
        self.next = 0
        self.span = (b"", b"")
        self.arrives = 0.0
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.ended = False

    async def write(self, request: Any) -> None:
        await self.client._line()
        if request.HasField("create_request"):
            create = request.create_request
            self.span, self.next = (create.key, create.range_end), create.start_revision
            self.client.streams.append(self)
            self.server.watchers.append(self._look)
            self._send(created=True)
            self._look()
        else:
            self._send()

    def _look(self) -> None:
        found = [each for each in self.server.log if each[0] >= self.next and self.span[0] <= each[1] < self.span[1]]
        self.next = self.server.revision + 1
        if found:
            self._send(found)

    def _send(self, changes: Sequence[tuple[int, bytes, bytes | None]] = (), *, created: bool = False) -> None:
        events = [
            SimpleNamespace(kv=SimpleNamespace(key=key, value=value or b"", mod_revision=number), type=1 if value is None else 0)
            for number, key, value in changes
        ]
        header = SimpleNamespace(revision=self.server.revision)
        answer = SimpleNamespace(
            compact_revision=0, canceled=False, cancel_reason="", events=events, fragment=False, created=created, header=header
        )
        self.arrives = max(self.arrives, self.server.loop.time()) + self.client.dice.choice((0.0005, 0.002, 0.02, 0.2))
        self.server.loop.call_at(self.arrives, self._arrived, answer)

    def _arrived(self, answer: Any) -> None:
        if not self.ended and not self.client.cut:
            self.inbox.put_nowait(answer)

    async def read(self) -> Any:
        return EOF if self.ended and self.inbox.empty() else await self.inbox.get()

    def broken(self) -> None:
        self.cancel()
        self.inbox.put_nowait(EOF)

    def cancel(self) -> None:
        self.ended = True
        if self._look in self.server.watchers:
            self.server.watchers.remove(self._look)
        if self in self.client.streams:
            self.client.streams.remove(self)


class DecisionPoint:
    """What answers a `PdpClient`'s calls: it holds revisions from some time on, and now and then it is slow, silent, or wrong."""

    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.held: list[str] = []

    async def learn(self, digest: str) -> None:
        """Holds `digest` a while from now, as one of its last three."""
        await asyncio.sleep(self.dice.choice((0.0, 0.01, 0.1, 0.6)))
        self.held = [*(each for each in self.held if each != digest), digest][-3:]

    def open(self, target: str, *, pings: bool) -> DecisionPoint:
        """As `pdp.rpc.Channels.open`: it is its own channel."""
        del target, pings
        return self

    def start(self, method: bytes, metadata: Sequence[Header], message: bytes, seconds: float, done: Done) -> Any:
        """As `pdp.rpc.Channel.start`."""
        assert method == CHECK
        return self.loop.create_task(self._call(dict(metadata)[REVISION.encode()].decode(), message, self.loop.time() + seconds, done))

    def close(self) -> None:
        """As `pdp.rpc.Channel.close`."""

    async def _call(self, digest: str, message: bytes, deadline: float, done: Done) -> None:
        """One call, both its ways."""
        await asyncio.sleep(self.dice.choice((0.0005, 0.002, 0.05)))
        trailers = ((CAUSE.encode(), REVISION_CAUSE.encode()),)
        if digest not in self.held:
            done(Result(Code.FAILED_PRECONDITION, "not held", b"", trailers))
            return
        if not message:
            done(Result(Code.INVALID_ARGUMENT, "no question"))
            return
        if self.dice.random() < 0.03:
            digest = self.dice.choice(self.held)  # confused: it answers for another
        await asyncio.sleep(self.dice.choice((0.0005, 0.002, 0.05, 0.4, 0.9, 5.0)))
        if self.loop.time() > deadline:
            done(Result(Code.DEADLINE_EXCEEDED, "late"))
            return
        verdict = self.dice.choice((Verdict.ALLOW, Verdict.ALLOW, Verdict.DENY))
        decision = Decision(verdict=verdict, revision=digest, status=403 if verdict is Verdict.DENY else 0)
        done(Result(Code.OK, "", check_response(decision).SerializeToString()))

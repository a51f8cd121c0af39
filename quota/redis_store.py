"""Buckets in Redis: asks of one turn of the event loop go out together, each is answered within the time budget, whatever Redis does.

Keys: `tollhouse:quota:{quota}:<limit>:<digest>` for a bucket and `tollhouse:quota:{quota}@born` for the record of the beginning (one for
all buckets with a single server, one per shard of buckets in a cluster, see `SHARDS`). A server without any record is either new or was
restarted empty; nobody can tell, so buckets start empty. Whoever knows that the server is new says so in its address
(`?start=full`). After a failover or a restart of a server that had a record they start empty in any case.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from redis.exceptions import ResponseError

from quota.breaker import Breaker
from quota.bucket import Ask, Reply
from quota.redis_address import Address, read_url
from quota.redis_cluster import SHARDS, tag_of
from quota.redis_errors import Trouble, trouble
from quota.redis_link import Link, link
from quota.redis_server import Call
from quota.slots import SlotAsk, SlotReply
from quota.store import Done, Failure, SlotsDone

_BATCH: Final = 256
_TASKS: Final = 4
_LANES: Final = 4 * SHARDS

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Reply).decode
_decode_slots = msgspec.msgpack.Decoder(SlotReply).decode
_LATE: Final = Trouble("timeout", "Redis does not answer in time")


class _Lane:
    """What is asked of one server."""

    __slots__ = ("breaker", "flushing", "last", "name", "pending", "tasks")

    def __init__(self, name: str, breaker: Breaker) -> None:
        self.name = name
        self.breaker = breaker
        self.pending: deque[tuple[float, Call, Done]] = deque()
        """With when each must be answered, which is in order."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.flushing = False
        self.last = _LATE
        """What went wrong last."""


class RedisStore:
    """A `quota.store.Store` over Redis 6.2 or later. Its owner is the wiring; it belongs to one event loop."""

    def __init__(
        self,
        url: str,
        *,
        budget: float = 0.25,
        max_pending: int = 20_000,
        breaker: Callable[[], Breaker] = Breaker,
        prefix: str = "tollhouse:quota",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`url` as in `quota.redis_address`; `budget`: seconds that an ask may take in all; raises ValueError for a URL that can't be read.
        `breaker` makes one for each server; `loop`: the running one if not given."""
        self.address: Address = read_url(url)
        self.last_error = ""
        self._loop = loop or asyncio.get_running_loop()
        self._link: Link = link(self.address, budget)
        self._budget = budget
        self._max = max_pending
        self._breaker = breaker
        self._prefix = prefix
        self._lanes: dict[str, _Lane] = {}
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.asks = 0
        """Asks that were sent to Redis."""
        self.batches = 0
        self.failures = 0
        """Asks that got no answer."""

    def ask_slots(self, key: str, ask: SlotAsk, done: SlotsDone, *, strict: bool = False) -> None:
        """See `quota.store.Store`."""
        self.ask(key, ask, done, strict=strict)  # type: ignore[arg-type]

    def ask(self, key: str, ask: Ask | SlotAsk, done: Done, *, strict: bool = False) -> None:
        """See `quota.store.Store`."""
        now = self._loop.time()
        if self._closed:
            return self._fail(done, Trouble("closed", "the store is closed"))
        if self._waiting >= self._max:
            return self._fail(done, Trouble("overload", "too many asks are waiting for Redis"))
        call = self._call(key, ask, strict)
        lane = self._lane(self._link.lane(call))
        if not lane.breaker.allows(now):
            return self._fail(done, lane.last)
        lane.pending.append((now + self._budget, call, done))
        self._waiting += 1
        if not lane.flushing:
            lane.flushing = True
            self._loop.call_soon(self._flush, lane)
        if self._timer is None:
            self._timer = self._loop.call_at(now + self._budget, self._expire)
        return None

    def _lane(self, name: str) -> _Lane:
        lane = self._lanes.get(name)
        if lane is None:
            if len(self._lanes) >= _LANES:  # nodes came and went
                self._lanes = {name: lane for name, lane in self._lanes.items() if lane.pending or lane.tasks}
            lane = self._lanes[name] = _Lane(name, self._breaker())
        return lane

    def _call(self, key: str, ask: Ask | SlotAsk, strict: bool) -> Call:
        name = key.encode("utf-8", "replace")
        tag = tag_of(name) if self.address.kind == "cluster" else b"quota"
        prefix = b"%b:{%b}" % (self._prefix.encode(), tag)
        return Call(prefix + b":" + name, prefix + b"@born", _encode(ask), strict, type(ask) is SlotAsk)

    def _fail(self, done: Done, why: Trouble) -> None:
        self.failures += 1
        done(Failure(why.reason, why.kind))

    def _flush(self, lane: _Lane) -> None:
        """Starts as many batches as may be under way."""
        lane.flushing = False
        while lane.pending and len(lane.tasks) < _TASKS:
            batch = [lane.pending.popleft() for _ in range(min(_BATCH, len(lane.pending)))]
            self._waiting -= len(batch)
            task = self._loop.create_task(self._run(lane, batch))
            lane.tasks.add(task)
            task.add_done_callback(lambda task: self._ended(lane, task))

    def _ended(self, lane: _Lane, task: asyncio.Task[None]) -> None:
        lane.tasks.discard(task)
        self._flush(lane)

    def _expire(self) -> None:
        """Gives up what has waited too long to be sent."""
        self._timer = None
        now = self._loop.time()
        for lane in list(self._lanes.values()):
            while lane.pending and lane.pending[0][0] <= now:
                self._waiting -= 1
                self._fail(lane.pending.popleft()[2], lane.last)
        nearest = min((lane.pending[0][0] for lane in self._lanes.values() if lane.pending), default=None)
        if nearest is not None and self._timer is None:
            self._timer = self._loop.call_at(nearest, self._expire)

    async def _run(self, lane: _Lane, batch: Sequence[tuple[float, Call, Done]]) -> None:
        self.asks += len(batch)
        self.batches += 1
        try:
            async with asyncio.timeout_at(batch[0][0]):
                answers = await self._link.run(lane.name, [call for _, call, _ in batch])
        except asyncio.CancelledError:
            self._failed(lane, batch, Trouble("closed", "the store is closed"))
            raise
        except Exception as problem:
            return self._failed(lane, batch, trouble(problem))
        troubles = [
            trouble(answer, call.key) if isinstance(answer, ResponseError) else None
            for (_, call, _), answer in zip(batch, answers, strict=True)
        ]
        grave = next((each for each in troubles if each is not None and each.everyone), None)
        if grave is None:
            lane.breaker.succeeded()
        else:
            self._note(lane, grave)
            lane.breaker.failed(self._loop.time())
        for (_, call, done), answer, why in zip(batch, answers, troubles, strict=True):
            self._answer(call, done, answer, why)
        return None

    def _note(self, lane: _Lane, why: Trouble) -> None:
        lane.last = why
        self.last_error = f"{lane.name}: {why.reason}" if lane.name else why.reason

    def _answer(self, call: Call, done: Done, answer: bytes | ResponseError, why: Trouble | None) -> None:
        if why is not None:
            self.last_error = why.reason
            return self._fail(done, why)
        try:
            reply = _decode_slots(answer) if call.slots else _decode(answer)  # type: ignore[arg-type]
        except (msgspec.DecodeError, TypeError):
            return self._fail(done, Trouble("other", "Redis gave an answer that can't be read"))
        return done(reply)  # type: ignore[arg-type]

    def _failed(self, lane: _Lane, batch: Sequence[tuple[float, Call, Done]], why: Trouble) -> None:
        now = self._loop.time()
        self._note(lane, why)
        lane.breaker.failed(now)
        for _, _, done in batch:
            self._fail(done, why)
        if lane.breaker.state(now) == "open":
            waiting, lane.pending = lane.pending, deque()
            self._waiting -= len(waiting)
            for _, _, done in waiting:
                self._fail(done, why)

    def state(self) -> dict[str, Any]:
        """How the store is doing, for `status`. The breaker's state is that of the server that does worst."""
        now = self._loop.time()
        states = {lane.breaker.state(now) for lane in self._lanes.values()}
        return {
            "store": self.address.shown,
            "breaker": next((state for state in ("open", "half-open") if state in states), "closed"),
            "lastError": self.last_error,
            "pending": self._waiting,
            "asks": self.asks,
            "batches": self.batches,
            "failures": self.failures,
        }

    async def close(self) -> None:
        """Sends what is waiting, gives it the time budget, and ends."""
        self._closed = True
        end = self._loop.time() + self._budget
        while (self._waiting or self._tasks()) and self._loop.time() < end:
            for lane in list(self._lanes.values()):
                self._flush(lane)
            if tasks := self._tasks():
                await asyncio.wait(tasks, timeout=max(0.0, end - self._loop.time()), return_when=asyncio.FIRST_COMPLETED)
        for task in self._tasks():
            task.cancel()
        if tasks := self._tasks():
            await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes.values():
            while lane.pending:
                self._waiting -= 1
                self._fail(lane.pending.popleft()[2], Trouble("closed", "the store is closed"))
        if self._timer is not None:
            self._timer.cancel()
        await self._link.close()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for lane in self._lanes.values() for task in lane.tasks]

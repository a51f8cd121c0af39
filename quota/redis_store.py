"""Buckets in Redis: asks of one turn of the event loop go out together, each is answered within the time budget, whatever Redis does.

Keys: `tollhouse:quota:{quota}:<limit>:<digest>` for a bucket and `tollhouse:quota:{quota}@born` for the record of the beginning (one for
all buckets with a single server, one per shard of buckets in a cluster, see `SHARDS`). A server without any record is either new or was
restarted empty; nobody can tell, so buckets start empty. Whoever knows that the server is new says so in its address
(`?start=full`). After a failover or a restart of a server that had a record they start empty in any case.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from quota.breaker import Breaker
from quota.bucket import Ask, Reply
from quota.redis_link import Address, Call, Link, link, read_url
from quota.store import Done, Failure

SHARDS: Final = 256
"""Into how many slots a cluster's buckets are spread."""
_BATCH: Final = 256
_TASKS: Final = 4
_ENDING: Final = (BusyLoadingError, ClusterDownError, MasterDownError, ReadOnlyError, TryAgainError)
"""Answers of a server that can't serve just now."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Reply).decode


class RedisStore:
    """A `quota.store.Store` over Redis 6.2 or later. Its owner is the wiring; it belongs to one event loop."""

    def __init__(
        self,
        url: str,
        *,
        budget: float = 0.25,
        max_pending: int = 20_000,
        breaker: Breaker | None = None,
        prefix: str = "tollhouse:quota",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`url` as in `quota.redis_link`; `budget`: seconds that an ask may take in all; raises ValueError for a URL that can't be read.
        `loop`: the running one if not given."""
        self.address: Address = read_url(url)
        self.last_error = ""
        self._loop = loop or asyncio.get_running_loop()
        self._link: Link = link(self.address, budget)
        self._budget = budget
        self._max = max_pending
        self._breaker = breaker or Breaker()
        self._prefix = prefix
        self._pending: deque[tuple[float, Call, Done]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.asks = 0
        """Asks that were sent to Redis."""
        self.batches = 0
        self.failures = 0
        """Asks that got no answer."""

    def ask(self, key: str, ask: Ask, done: Done, *, strict: bool = False) -> None:
        """See `quota.store.Store`."""
        now = self._loop.time()
        if self._closed:
            return self._fail(done, "the store is closed")
        if len(self._pending) >= self._max:
            return self._fail(done, "too many asks are waiting for Redis")
        if not self._breaker.allows(now):
            return self._fail(done, self.last_error or "Redis does not answer")
        self._pending.append((now + self._budget, self._call(key, ask, strict), done))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if self._timer is None:
            self._timer = self._loop.call_at(now + self._budget, self._expire)
        return None

    def _call(self, key: str, ask: Ask, strict: bool) -> Call:
        name = key.encode("utf-8", "replace")
        tag = b"%02x" % (zlib.crc32(name) % SHARDS) if self.address.kind == "cluster" else b"quota"
        prefix = b"%b:{%b}" % (self._prefix.encode(), tag)
        return Call(prefix + b":" + name, prefix + b"@born", _encode(ask), strict)

    def _fail(self, done: Done, reason: str) -> None:
        self.failures += 1
        done(Failure(reason))

    def _flush(self) -> None:
        """Starts as many batches as may be under way."""
        self._flushing = False
        while self._pending and len(self._tasks) < _TASKS:
            batch = [self._pending.popleft() for _ in range(min(_BATCH, len(self._pending)))]
            task = self._loop.create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._flush()

    def _expire(self) -> None:
        """Gives up what has waited too long to be sent."""
        self._timer = None
        now = self._loop.time()
        while self._pending and self._pending[0][0] <= now:
            self._fail(self._pending.popleft()[2], self.last_error or "Redis does not answer in time")
        if self._pending:
            self._timer = self._loop.call_at(self._pending[0][0], self._expire)

    async def _run(self, batch: Sequence[tuple[float, Call, Done]]) -> None:
        self.asks += len(batch)
        self.batches += 1
        try:
            async with asyncio.timeout_at(batch[0][0]):
                answers = await self._link.run([call for _, call, _ in batch])
        except TimeoutError:
            return self._failed(batch, "Redis does not answer in time")
        except (RedisError, OSError) as problem:
            return self._failed(batch, str(problem) or type(problem).__name__)
        except asyncio.CancelledError:
            self._failed(batch, "the store is closed")
            raise
        except Exception as problem:
            return self._failed(batch, f"{type(problem).__name__}: {problem}")
        if any(isinstance(answer, _ENDING) for answer in answers):
            self._breaker.failed(self._loop.time())
            self.last_error = next(str(answer) for answer in answers if isinstance(answer, _ENDING))
        else:
            self._breaker.succeeded()
        for (_, _, done), answer in zip(batch, answers, strict=True):
            self._answer(done, answer)
        return None

    def _answer(self, done: Done, answer: bytes | ResponseError) -> None:
        if isinstance(answer, ResponseError):
            self.last_error = str(answer)
            return self._fail(done, self.last_error)
        try:
            reply = _decode(answer)
        except (msgspec.DecodeError, TypeError):
            return self._fail(done, "Redis gave an answer that can't be read")
        return done(reply)

    def _failed(self, batch: Sequence[tuple[float, Call, Done]], reason: str) -> None:
        now = self._loop.time()
        self.last_error = reason
        self._breaker.failed(now)
        for _, _, done in batch:
            self._fail(done, reason)
        if self._breaker.state(now) == "open":
            waiting, self._pending = self._pending, deque()
            for _, _, done in waiting:
                self._fail(done, reason)

    def state(self) -> dict[str, Any]:
        """How the store is doing, for `status`."""
        return {
            "store": self.address.shown,
            "breaker": self._breaker.state(self._loop.time()),
            "lastError": self.last_error,
            "pending": len(self._pending),
            "asks": self.asks,
            "batches": self.batches,
            "failures": self.failures,
        }

    async def close(self) -> None:
        """Sends what is waiting, gives it the time budget, and ends."""
        self._closed = True
        end = self._loop.time() + self._budget
        while (self._pending or self._tasks) and self._loop.time() < end:
            self._flush()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=max(0.0, end - self._loop.time()))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._pending:
            self._fail(self._pending.popleft()[2], "the store is closed")
        if self._timer is not None:
            self._timer.cancel()
        await self._link.close()

"""The keys of token issuers: fetched ahead of need, refreshed, and the last good ones kept for as long as an outage lasts.

`KeyStore` has one `Keys` for each source that the configuration names. What is to be done when is decided by `Schedule`, which is pure:

* keys are fetched as soon as a source is named, and again every `REFRESH` seconds (Istio's 20 minutes)
* a failed fetch is tried again after a second, doubled up to a minute and spread; meanwhile nobody else causes one
* a token whose key is not there has the set fetched at once, since issuers change keys; but not more often than every `UNKNOWN_EVERY`
  seconds, so that nobody can have an issuer flooded by inventing key ids
* one fetch at a time; all who need it wait for that one, no more than `MOST_WAITING` of them
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Protocol

from mesh.backoff import Backoff
from mesh.jwks import KeySet, parse_keys
from mesh.tokens import KeySource

log = logging.getLogger("tollhouse.jwks")

REFRESH: Final = 1200.0
"""Seconds; the last tenth of it is spread."""
FIRST_RETRY: Final = 1.0
MOST_RETRY: Final = 60.0
UNKNOWN_EVERY: Final = 10.0
MOST_WAITING: Final = 1000

Fetch = Callable[[KeySource], Awaitable[bytes]]
"""Gets the text of a key set, within the source's time. Raises `FetchError`."""


class FetchError(Exception):
    """Why keys could not be fetched, in one sentence."""


class Counts(Protocol):
    """What is told of each fetch."""

    def fetched(self, source: str, result: str) -> None:
        """`result`: `ok` or `failed`."""
        ...


class Schedule:
    """When one source is fetched. Times are monotonic seconds."""

    __slots__ = ("_backoff", "_random", "began", "due", "failing", "unknown_at")

    def __init__(self, now: float, rng: random.Random | None = None) -> None:
        self._random = rng or random.Random()  # noqa: S311 -- spreads load, guards nothing
        self._backoff = Backoff(FIRST_RETRY, MOST_RETRY, self._random)
        self.due = now
        """When to fetch next."""
        self.began: float | None = None
        """When the fetch in progress began; None when there is none."""
        self.failing = False
        """Whether the last one failed."""
        self.unknown_at = now
        """From when on a token with an unknown key may cause a fetch."""

    def begin(self, now: float) -> bool:
        """Whether to fetch now because it is due; if so, it has begun."""
        if self.began is not None or now < self.due:
            return False
        self.began = now
        return True

    def wanted(self, now: float) -> bool:
        """Whether it is worth to wait for a fetch, for the sake of a token whose key is not there."""
        return self.began is not None or now >= self.due or (not self.failing and now >= self.unknown_at)

    def want(self, now: float) -> bool:
        """Whether to fetch now for the sake of such a token; if so, it has begun."""
        if self.began is not None or not self.wanted(now):
            return False
        self.began = now
        return True

    def succeeded(self, now: float) -> None:
        """The fetch brought keys."""
        self._backoff.reset()
        self.began, self.failing = None, False
        self.unknown_at = now + UNKNOWN_EVERY
        self.due = now + REFRESH * (1 - self._random.random() / 10)

    def failed(self, now: float) -> None:
        """It did not."""
        self.began, self.failing = None, True
        self.due = now + self._backoff.next()


class Keys:
    """The keys of one source. Its owner is the store."""

    __slots__ = ("_ask", "_clock", "_waiting", "error", "fetched", "schedule", "set", "source")

    def __init__(self, source: KeySource, clock: Callable[[], float], ask: Callable[[Keys], None]) -> None:
        self.source = source
        self._clock = clock
        self._ask = ask
        self._waiting: dict[int, Callable[[], None]] = {}
        self.set: KeySet | None = parse_keys(source.inline) if source.inline else None
        """The newest good one."""
        self.fetched = clock()
        """When it was fetched (monotonic seconds)."""
        self.error = ""
        """Why the last fetch failed; empty when it did not."""
        self.schedule: Schedule | None = None if source.inline else Schedule(clock())

    @property
    def wanted(self) -> bool:
        """Whether it is worth to wait for newer keys."""
        return self.schedule is not None and len(self._waiting) < MOST_WAITING and self.schedule.wanted(self._clock())

    def wait(self, done: Callable[[], None]) -> Callable[[], None]:
        """Calls `done` once, later, when a fetch has ended, however it did; one is begun if none is in progress. Returns what makes it
        not be called."""
        number = id(done)
        self._waiting[number] = done
        if self.schedule is not None and self.schedule.want(self._clock()):
            self._ask(self)
        return lambda: self._forget(number)

    def _forget(self, number: int) -> None:
        self._waiting.pop(number, None)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def tell(self) -> None:
        """Lets go all who wait."""
        waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            try:
                done()
            except Exception:
                log.exception("a request that waited for keys failed")


async def never(source: KeySource) -> bytes:
    """Fetches nothing."""
    raise FetchError(f"keys are not fetched here ({source.name})")


class KeyStore:
    """The keys of every source that is in use. Belongs to one event loop; `follow` says what is in use."""

    def __init__(self, fetch: Fetch = never, *, clock: Callable[[], float], counts: Counts | None = None) -> None:
        """`clock`: monotonic seconds, the loop's."""
        self._fetch = fetch
        self._clock = clock
        self._counts = counts
        self._keys: dict[KeySource, Keys] = {}
        self._tasks: dict[Keys, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def of(self, source: KeySource) -> Keys:
        """The keys of a source; that it was asked for makes it one in use until `follow` says otherwise."""
        found = self._keys.get(source)
        if found is None:
            found = self._keys[source] = Keys(source, self._clock, self._begin)
        return found

    def follow(self, sources: Iterable[KeySource]) -> None:
        """Has the keys of these sources fetched ahead of need, and forgets all others."""
        wanted = dict.fromkeys(sources)
        for source in [source for source in self._keys if source not in wanted]:
            keys = self._keys.pop(source)
            task = self._tasks.pop(keys, None)
            if task is not None:
                task.cancel()
            keys.tell()
        for source in wanted:
            self.of(source)
        self._look()

    def state(self) -> list[dict[str, Any]]:
        """Each source, as JSON types: for `status`."""
        now = self._clock()
        return [
            {
                "source": keys.source.name,
                "keys": len(keys.set.keys) if keys.set is not None else 0,
                "ids": [key.kid for key in keys.set.keys] if keys.set is not None else [],
                "unused": list(keys.set.left_out) if keys.set is not None else [],
                "age": round(now - keys.fetched, 1) if keys.set is not None and keys.schedule is not None else None,
                "error": keys.error,
                "waiting": keys.waiting,
            }
            for keys in self._keys.values()
        ]

    async def close(self) -> None:
        """Ends what is in progress."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for keys in self._keys.values():
            keys.tell()

    def _look(self) -> None:
        """Begins every fetch that is due, and looks again when the next one is."""
        if self._closed:
            return
        now = self._clock()
        coming: list[float] = []
        for keys in self._keys.values():
            schedule = keys.schedule
            if schedule is None:
                continue
            if schedule.begin(now):
                self._begin(keys)
            elif schedule.began is None:
                coming.append(schedule.due)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if coming:
            self._timer = asyncio.get_running_loop().call_later(max(0.01, min(coming) - now), self._look)

    def _begin(self, keys: Keys) -> None:
        task = asyncio.get_running_loop().create_task(self._run(keys))
        self._tasks[keys] = task

    async def _run(self, keys: Keys) -> None:
        schedule = keys.schedule
        assert schedule is not None, "inline keys are not fetched"
        source = keys.source
        try:
            async with asyncio.timeout(source.timeout):
                text = await self._fetch(source)
            fresh = parse_keys(text)
        except (FetchError, ValueError, TimeoutError) as problem:
            why = f"no answer within {source.timeout:g} s" if isinstance(problem, TimeoutError) else str(problem)
            if why != keys.error:
                log.error("keys of %s could not be fetched: %s", source.name, why)
            keys.error = why
            self._ended(keys, schedule.failed, "failed")
            return
        except asyncio.CancelledError:
            schedule.failed(self._clock())
            raise
        except Exception as problem:
            log.exception("keys of %s could not be fetched", source.name)
            keys.error = str(problem)
            self._ended(keys, schedule.failed, "failed")
            return
        if keys.error:
            log.info("keys of %s are fetched again", source.name)
        keys.error, keys.fetched = "", self._clock()
        if keys.set != fresh:
            keys.set = fresh
            for why in fresh.left_out:
                log.warning("keys of %s: %s", source.name, why)
        self._ended(keys, schedule.succeeded, "ok")

    def _ended(self, keys: Keys, then: Callable[[float], None], result: str) -> None:
        self._tasks.pop(keys, None)
        then(self._clock())
        if self._counts is not None:
            self._counts.fetched(keys.source.name, result)
        keys.tell()
        self._look()

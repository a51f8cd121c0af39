"""One key that is there as long as its owner is: written under a lease, written again whenever it or the lease was lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from discovery.etcd import Etcd, EtcdError, Put, within
from mesh.backoff import Backoff

log = logging.getLogger("tollhouse.discovery")

LEAST_TTL = 2
"""Seconds; etcd makes a shorter one longer."""
SPACING = 0.05
"""Seconds: the least time between two writes; of what is set in between the last counts."""
STOP_BUDGET = 3.0


class LeasedKey:
    """Keeps one key. Owns its lease and its task; made, started and stopped in one event loop. The client is its caller's."""

    def __init__(self, etcd: Etcd, key: bytes, *, ttl: int = 10) -> None:
        """`ttl`: seconds after which the key goes when its owner is gone."""
        self._etcd = etcd
        self._key = key
        self._ttl = max(LEAST_TTL, ttl)
        self._value: bytes | None = None
        self._written: bytes | None = None
        """What was last written under the current lease."""
        self._lease = 0
        self._kept_at = 0.0
        self._backoff = Backoff(0.1, self._ttl / 3)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.problem = ""
        """Why the key may not be there as it should; empty when it is."""

    @property
    def written(self) -> bool:
        """Whether etcd has the value that was set last, as far as we know."""
        return self._value is not None and self._written == self._value and not self.problem

    def set(self, value: bytes) -> None:
        """The value from now on; written soon."""
        if value != self._value:
            self._value = value
            self._wake.set()

    def start(self) -> None:
        """Begins to keep the key (once a value is set)."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self, last: bytes | None = None) -> None:
        """Takes the key away, after writing `last` for those who watch it. When etcd doesn't answer, the lease's end does it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        lease, self._lease, self._written = self._lease, 0, None
        if lease:
            try:
                await within(STOP_BUDGET, self._leave(lease, last), f"etcd {self._etcd.where}")
            except EtcdError as error:
                log.warning("%s; %s goes when its lease ends, in %d s", error, self._key.decode(), self._ttl)

    async def _leave(self, lease: int, last: bytes | None) -> None:
        if last is not None:
            with contextlib.suppress(EtcdError):  # the lease has ended: then there is nobody to be told
                await self._etcd.commit([Put(self._key, last, lease)])
        await self._etcd.revoke(lease)

    async def _run(self) -> None:
        while True:
            try:
                await self._once()
                self._backoff.reset()
                wait = self._ttl / 3
            except EtcdError as error:
                if "lease not found" in str(error):
                    self._lease = 0
                if self.problem != str(error):
                    log.warning("%s: %s", self._key.decode(), error)
                self.problem = str(error)
                wait = self._backoff.next()
            except Exception:
                log.exception("keeping %s failed", self._key.decode())
                self.problem = "keeping it failed; the log says why"
                wait = self._backoff.next()
            await asyncio.sleep(SPACING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            self._wake.clear()

    async def _once(self) -> None:
        value = self._value
        if value is None:
            return
        if self._lease and time.monotonic() - self._kept_at >= self._ttl / 3 - SPACING:
            sent = time.monotonic()
            if await self._etcd.keep_alive(self._lease):
                self._kept_at = sent
            else:
                log.warning("%s: its lease has ended; writing it again", self._key.decode())
                self._lease = 0
        if not self._lease:
            self._written = None
            sent = time.monotonic()
            self._lease = await self._etcd.grant(self._ttl)
            self._kept_at = sent
        if self._written == value:
            entry = await self._etcd.get(self._key)
            if entry is not None and entry.lease not in {0, self._lease}:
                self._complain("another process writes this key as well; give each its own name")
                return
            if entry is not None and entry.lease and entry.value == value:
                self.problem = ""
                return
            log.warning("%s: somebody changed or deleted it; writing it again", self._key.decode())
        await self._etcd.commit([Put(self._key, value, self._lease)])
        self._written = value
        self.problem = ""

    def _complain(self, problem: str) -> None:
        if self.problem != problem:
            log.warning("%s: %s", self._key.decode(), problem)
        self.problem = problem

"""A worker's place in a pool, and what is shown of it."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from mesh.backoff import Backoff
from pdp.engines.child import Child

SeatState = Literal["starting", "running", "waiting", "closed"]


class WorkerState(msgspec.Struct, frozen=True):
    """One seat of a pool."""

    state: SeatState
    pid: int
    open: int
    """Questions that it has been asked and has not answered."""
    restarts: int
    uptime: float
    """Seconds."""


class PoolState(msgspec.Struct, frozen=True):
    """All of a pool."""

    workers: tuple[WorkerState, ...]
    revisions: tuple[str, ...]
    """Digests that it holds, the one used last at the end."""
    pending: int
    """Questions without an answer."""
    deaths: int
    """Workers that ended unasked, ever."""
    quarantined: int
    """Questions that were refused because their entry point is put aside, ever."""


class Seat:
    """A worker's place: starting → running → waiting → starting ..., and closed in the end. Owned by the pool."""

    __slots__ = ("backoff", "child", "restarts", "state", "timer")

    def __init__(self) -> None:
        self.state: SeatState = "waiting"
        self.child: Child | None = None
        self.backoff = Backoff()
        self.restarts = 0
        self.timer: asyncio.TimerHandle | None = None

    def show(self, now: float) -> WorkerState:
        """What there is to see at `now`, on the loop's clock."""
        child = self.child
        if child is None:
            return WorkerState(self.state, 0, 0, self.restarts, 0.0)
        return WorkerState(self.state, child.pid, len(child.open), self.restarts, now - child.started)

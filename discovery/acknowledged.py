"""Waiting until every gateway that runs applies a change of policy: their reports, watched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec

from discovery.etcd import Etcd, EtcdError, EtcdUnavailable, Listing, within
from discovery.keys import GATEWAYS, end_of
from discovery.reports import Report, read_report
from discovery.watch import Batch, Stream, watch

SPAN = (GATEWAYS.encode(), end_of(GATEWAYS.encode()))
Applies = Callable[[Report], bool]
_LOOK = 1.0
_AGAIN = 0.1
"""Seconds until etcd is asked again after it failed."""


class Standing(msgspec.Struct, frozen=True):
    """Who applies a change."""

    applied: int
    missing: tuple[Report, ...]
    """Those that do not yet, the lost ones included."""
    lost: tuple[Report, ...]
    """Of these the ones whose reports ended without a word: such a gateway has died, or it can't reach etcd and may go on deciding."""
    cut_off: tuple[Report, ...] = ()
    """Those that were lost so long ago that they refuse to decide, wherever they are (`Mesh.policy.maxStaleness`)."""


class Acknowledgements:
    """Who applies a change, by the reports that come and go. Pure: times are seconds on one monotonic clock."""

    def __init__(self, applies: Applies, written: int, since: float, cut_off_after: float | None = None) -> None:
        """`applies` tells whether a report is as the change wants it, which was made at `since` by a write at etcd's revision `written`;
        `cut_off_after` seconds later nobody who has not heard of it decides any more."""
        self._wanted = applies
        self._written = written
        self._dead_at = None if cut_off_after is None else since + cut_off_after
        self._reports: dict[bytes, Report] = {}
        self._lost: dict[bytes, Report] = {}

    def replace(self, entries: dict[bytes, bytes]) -> None:
        """All reports that there are."""
        for key in [key for key in self._reports if key not in entries]:
            self.take(key, None)
        for key, value in entries.items():
            self.take(key, value)

    def take(self, key: bytes, value: bytes | None) -> None:
        """One report, or that it is gone."""
        before = self._reports.pop(key, None)
        report = None if value is None else read_report(key, value)
        if report is not None and not report.leaving:
            self._reports[key] = report
            self._lost.pop(key, None)
        elif report is not None:
            self._lost.pop(key, None)
        elif before is not None and not self._applies(before):
            self._lost[key] = before

    def _applies(self, report: Report) -> bool:
        """What it says alone does not tell: it may be from the last time that the same policy was in force."""
        return self._wanted(report) and report.source.isdecimal() and int(report.source) >= self._written

    def standing(self, now: float) -> Standing:
        """How it is at `now`."""
        missing = tuple(each for each in self._reports.values() if not self._applies(each))
        lost = tuple(self._lost.values())
        dead = self._dead_at is not None and now >= self._dead_at
        return Standing(
            applied=len(self._reports) - len(missing),
            missing=missing if dead else missing + lost,
            lost=() if dead else lost,
            cut_off=lost if dead else (),
        )


async def wait_until(
    etcd: Etcd,
    applies: Applies,
    written: int,
    timeout: float,  # noqa: ASYNC109 -- says who is missing then
    *,
    since: float | None = None,
    cut_off_after: float | None = None,
    progress: Callable[[Standing], None] | None = None,
) -> Standing:
    """Waits until `applies` is true of every gateway that runs, at most `timeout` seconds, and returns how it stands then.

    `written` is etcd's revision of the change that they are to apply: who has not followed so far does not, whatever it reports.
    `since` (of the event loop's clock; now, if it is not given) and `cut_off_after` are as for `Acknowledgements`; `progress` is told each
    time that it has changed. Raises EtcdError when etcd does not answer for as long.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    table = Acknowledgements(applies, written, loop.time() if since is None else since, cut_off_after)
    complete = asyncio.Event()
    told: Standing | None = None

    def look() -> Standing:
        nonlocal told
        standing = table.standing(loop.time())
        if standing != told and progress is not None:
            progress(standing)
        told = standing
        if not standing.missing:
            complete.set()
        return standing

    def changed(batch: Batch) -> None:
        for event in batch.events:
            table.take(event.key, event.value)
        look()

    failed: EtcdError | None = EtcdUnavailable(f"etcd {etcd.where}: it was not asked")
    while True:
        try:
            listing = await within(max(end - loop.time(), 1.0), etcd.list(*SPAN), f"etcd {etcd.where}")
            table.replace({entry.key: entry.value for entry in listing.entries})
            failed = None
            look()
            await _follow(etcd, listing, changed, complete, look, end)
        except EtcdError as problem:
            failed = problem
            await asyncio.sleep(min(_AGAIN, max(0.0, end - loop.time())))
        standing = look()
        if failed is None and (complete.is_set() or loop.time() >= end):
            return standing
        if failed is not None and loop.time() >= end:
            raise failed


async def _follow(
    etcd: Etcd, listing: Listing, changed: Callable[[Batch], None], complete: asyncio.Event, look: Callable[[], object], end: float
) -> None:
    """Watches until it is complete, or the time is over. Raises EtcdError."""
    loop = asyncio.get_running_loop()
    last = Listing(listing.revision, listing.cluster, (), listing.term)
    watching = asyncio.create_task(watch(etcd, SPAN, last, Stream(listing.revision), changed, lambda _: None))
    waiting = asyncio.create_task(complete.wait())
    try:
        while not complete.is_set() and (left := end - loop.time()) > 0:
            await asyncio.wait({watching, waiting}, timeout=min(left, _LOOK), return_when=asyncio.FIRST_COMPLETED)
            if watching.done() and not complete.is_set():
                watching.result()
            look()  # time alone cuts off those that are lost
    finally:
        watching.cancel()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError, EtcdError):
            await watching

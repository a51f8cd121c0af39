"""`EtcdSource`: resources and instances from etcd, watched, with the last good state on disk.

It lists at a revision and watches from the next (`discovery.watch`). A lost connection is resumed where it stopped; after a compaction,
or when etcd turns out to be another one, it lists again and delivers only what is different. While etcd is away what was delivered
stays in force; many instances that vanish together are kept while they answer (`discovery.outage`).

An etcd that came back *empty*, as another cluster or with an older history, lost its data: the resources stay in force until it holds
some again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from discovery.contents import Contents, Snapshot, encoded
from discovery.etcd import Entry, Etcd, EtcdCompacted, EtcdError, EtcdOtherHistory, EtcdTooLarge, EtcdUnavailable, Listing, within
from discovery.instances import name_of
from discovery.keys import CONFIG, WATCHED
from discovery.source import OnChange, SourceStatus
from discovery.state_file import StateFileError, load, save
from discovery.watch import PROBE_EVERY, Batch, Stream, check_history, watch
from mesh.backoff import Backoff
from mesh.documents import Instance

log = logging.getLogger("tollhouse.discovery")

START_BUDGET = 8.0
"""Seconds that a start waits for etcd before it goes on with what was saved."""
GATHER = 0.025
"""Seconds: the least time between two changes; what comes in between is delivered as one."""
SAVE_EVERY = 5.0
"""Seconds: the least time between two writes of the state file."""
ASK_BUDGET = 1.0
"""Seconds that a kept instance has to accept a connection."""
ASK_AT_ONCE = 64


class EtcdSource:
    """A `Source` over one etcd. Owns its tables, its tasks and its state file; made, started and stopped in one event loop."""

    def __init__(self, etcd: Etcd, *, state_file: Path | None = None, probe_every: float = PROBE_EVERY) -> None:
        """`probe_every` (seconds) is how often it is checked that nothing is missing."""
        self._etcd = etcd
        self._state_file = state_file
        self._probe_every = probe_every
        self._contents = Contents()
        self._on_change: OnChange | None = None
        self._last: Listing | None = None
        """The newest listing (without its entries): which cluster, revision and term what we hold is of."""
        self._revision = 0
        self._relist = True
        self._backoff = Backoff(0.05, 5.0)
        self._delivered = 0
        """The revision up to which everything has been handed out."""
        self._delivered_at = 0.0
        self._later: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._saver: asyncio.Task[None] | None = None
        self._saved_at = 0.0
        self._saved_wall = 0.0
        self._unsaved = False
        self._connected = False
        self._contact: float | None = None
        self._stale = "etcd was not asked yet"
        self._held = ""
        self._started = False
        self._taking = False
        self._status: SourceStatus | None = None
        self._stopping = asyncio.Event()

    @property
    def status(self) -> SourceStatus:
        """How it is doing now."""
        if self._status is None:
            self._status = self._current()
        return self._status

    def _current(self) -> SourceStatus:
        documents, instances = self._contents.counts()
        what = f"{documents} resources, {instances} instances at revision {self._revision}"
        if self._contact is None and self._saved_wall:
            what += f", saved {datetime.fromtimestamp(self._saved_wall, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return SourceStatus(
            connected=self._connected,
            revision=str(self._revision),
            delivered=str(self._delivered),
            last_contact=self._contact,
            stale=self._stale,
            text=f"etcd {self._etcd.where}: {what}" + (f"; {self._stale}" if self._stale else ""),
        )

    async def start(self, on_change: OnChange) -> None:
        """Delivers the first state and goes on watching; see `Source.start`."""
        self._on_change = on_change
        await self._restore()
        try:
            sent = time.monotonic()
            await self._take(await within(START_BUDGET, self._etcd.list(*WATCHED), f"etcd {self._etcd.where}"), sent)
        except EtcdError as error:
            self._lost(error)
        self._deliver(replace=True)
        self._started = True
        self._spawn(self._run())
        self._spawn(self._ask_kept())

    async def stop(self) -> None:
        """Ends the watch and saves what is not saved yet. The client stays open: its owner closes it."""
        self._on_change = None
        self._stopping.set()
        if self._later is not None:
            self._later.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._saver is not None:
            await asyncio.gather(self._saver, return_exceptions=True)
        self._connected, self._status = False, None

    def _spawn(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- etcd ----------------------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                if self._relist:
                    await self._list()
                    self._deliver()
                await self._watch()
            except (EtcdCompacted, EtcdOtherHistory, EtcdTooLarge) as error:
                log.warning("%s: listing again", error)
                self._relist = True
            except EtcdError as error:
                self._lost(error)
            except Exception:
                log.exception("watching etcd failed")
                self._lost(EtcdUnavailable("watching etcd failed; the log says why"))
                self._relist = True
            await asyncio.sleep(self._backoff.next())

    async def _list(self) -> None:
        sent = time.monotonic()
        await self._take(await self._etcd.list(*WATCHED), sent)

    async def _take(self, listing: Listing, sent: float) -> None:
        same = False
        if self._last is not None:
            try:
                check_history(self._last, listing, self._revision, self._etcd.where)
                same = True
            except EtcdOtherHistory as error:
                log.warning("%s", error)
        empty = not any(entry.key.startswith(CONFIG.encode()) for entry in listing.entries)
        hold = not same and empty and self._contents.has_documents
        chunks = self._contents.replace(listing.entries, time.monotonic(), same_history=same, keep_documents=hold, confirmed=self._started)
        self._taking = True
        for _ in chunks:
            await asyncio.sleep(0)
        self._taking = False
        if hold:
            self._deliver()
            self._connected, self._status = True, None
            self._held = "etcd lost its data (it is empty, and not the one it was); the last good resources stay in force: apply them again"
            if self._state_file:
                self._held += f", or delete {self._state_file} and restart to begin anew"
            raise EtcdUnavailable(self._held)
        self._held = ""
        self._last = Listing(listing.revision, listing.cluster, (), listing.term)
        self._revision = listing.revision
        self._relist = False
        self._answered(sent)

    async def _watch(self) -> None:
        assert self._last is not None
        stream = Stream(self._revision)
        await watch(self._etcd, WATCHED, self._last, stream, self._on_batch, self._on_contact, probe_every=self._probe_every)

    def _on_batch(self, batch: Batch) -> None:
        now = time.monotonic()
        for event in batch.events:
            if event.value is None:
                self._contents.delete(event.key, now)
            else:
                self._contents.put(Entry(event.key, event.value, event.revision))
        self._revision = batch.revision
        self._deliver_soon()

    def _on_contact(self, sent: float) -> None:
        if self._later is not None:
            self._deliver()
        self._answered(sent)

    def _answered(self, sent: float) -> None:
        self._contact = sent
        self._connected, self._status = True, None
        if self._stale:
            log.info("etcd %s: in contact", self._etcd.where)
            self._stale = ""
        self._backoff.reset()

    def _lost(self, error: EtcdError) -> None:
        if not self._held:
            self._connected = False
        if self._stale != str(error):
            read = self._contact is not None or self._saved_wall
            log.warning(
                "%s; %s",
                error,
                "what was last read stays in force" if read else "nothing was read before: nothing is in force until it answers",
            )
        self._stale, self._status = str(error), None

    # -- out -----------------------------------------------------------------------------------------------------------------------

    def _deliver_soon(self) -> None:
        if self._later is None:
            loop = asyncio.get_running_loop()
            wait = self._delivered_at + GATHER - loop.time()
            if wait <= 0:
                self._deliver()
            else:
                self._later = loop.call_later(wait, self._deliver)

    def _deliver(self, *, replace: bool = False) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._delivered_at = asyncio.get_running_loop().time()
        self._delivered, self._status = self._revision, None
        change = self._contents.change(time.monotonic(), replace=replace)
        if change is None or self._on_change is None:
            return
        self._unsaved = True
        try:
            self._on_change(change)
        except Exception:
            log.exception("a change from etcd could not be applied")
        if self._state_file is not None and self._contact is not None and self._saver is None:
            self._saver = asyncio.get_running_loop().create_task(self._save_later())

    # -- instances that vanished ---------------------------------------------------------------------------------------------------

    async def _ask_kept(self) -> None:
        while True:
            now = time.monotonic()
            due = self._contents.keeper.due(now, ASK_AT_ONCE)
            if due:
                await asyncio.gather(*(self._ask(instance) for _, instance in due))
                self._deliver_soon()
            await asyncio.sleep(0.1)

    async def _ask(self, instance: Instance) -> None:
        port = next(iter(instance.ports.values()))
        refused = False
        try:
            async with asyncio.timeout(ASK_BUDGET):
                _, writer = await asyncio.open_connection(instance.address, port)
        except ConnectionRefusedError:
            refused = True
        except (OSError, TimeoutError):
            pass
        else:
            writer.transport.abort()
            refused = self._contents.keeper.overdue(name_of(instance), time.monotonic())
            if not refused:
                self._contents.kept_answered(instance)
                return
        self._contents.kept_silent(instance, time.monotonic(), refused=refused)

    # -- disk ----------------------------------------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        if self._state_file is None:
            return
        try:
            saved = await asyncio.to_thread(load, self._state_file)
        except StateFileError as error:
            log.warning("%s", error)
            return
        if saved is None:
            return
        for _ in self._contents.replace((Entry(key, value, revision) for key, revision, value in saved.entries), 0.0, same_history=False):
            await asyncio.sleep(0)
        self._last = Listing(saved.revision, saved.cluster, (), saved.term)
        self._revision = saved.revision
        self._saved_wall = saved.saved

    async def _save_later(self) -> None:
        try:
            while self._unsaved:
                wait = max(0.0, self._saved_at + SAVE_EVERY - time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._stopping.wait()
                await self._save()
        finally:
            self._saver = None

    async def _save(self) -> None:
        path, last = self._state_file, self._last
        if path is None or last is None or self._taking:
            return
        self._unsaved = False
        self._saved_at = time.monotonic()
        entries, revision = list(self._contents.entries()), self._revision

        def write() -> None:
            save(
                path,
                Snapshot(
                    cluster=last.cluster,
                    revision=revision,
                    term=last.term,
                    saved=time.time(),
                    entries=tuple((key, number, encoded(what)) for key, number, what in entries),
                ),
            )

        try:
            await asyncio.to_thread(write)
        except OSError as error:
            log.warning("the state file %s can't be written: %s", path, error.strerror)

"""What the policy of a snapshot is made of, brought here before it is in force.

A PolicyRevision may name a bundle behind a URL in place of modules and data, and data may have revisions of their own. Such a snapshot has
revisions that are not whole, and `Supply` makes them so, beside everything else: it fetches bundles (or takes them from disk), checks their
digests, and signatures where they are configured, puts the data together, and has the process's engine load it all. Until that is done the
policy before stays in force, nobody is told that the new one is applied, and it is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from mesh.backoff import Backoff
from mesh.documents import Key, Problem
from mesh.model import Snapshot
from mesh.policies import ACTIVE_NAME
from mesh.policy import Revision
from mesh.policy_data import DataRevision, data_digest, root_text, value_at, with_data
from pdp.bundle_cache import BundleCache
from pdp.bundle_fetch import FetchProblem, fetch
from pdp.bundle_files import Bundle, BundleProblem, read_bundle
from pdp.bundle_services import BundleServices, ServicesProblem
from pdp.engines.engine import EngineUnavailable, PolicyError
from pdp.publish import Checker
from tollhouse.output import Complaint

log = logging.getLogger("tollhouse.policy")

ACTIVE: Final = Key("tollhouse.dev", "ActivePolicy", "", ACTIVE_NAME)
FIELDS: Final = {"policy": "revision", "shadow": "shadow", "canary": "canary"}
"""Of a snapshot, and what ActivePolicy calls them."""
HELD: Final = 3
"""Bundles that are held in memory, those in force among them."""
FIRST: Final = 0.5
"""Seconds until the second try."""
MOST: Final = 30.0
"""Seconds between two tries at most."""


class NotReady(Exception):
    """Something that has to be there before a revision can decide is not; the message says what."""


Prepare = Callable[[Revision, str, Snapshot], Awaitable[None]]
"""Makes sure that a revision can decide here. It is told what for (`policy`, `shadow` or `canary`) and in which snapshot, and raises
`NotReady`, `PolicyError` or `EngineUnavailable`."""


class _Order:
    """One revision that is wanted whole, or as whole as this process needs it."""

    __slots__ = ("field", "made", "needed", "parts", "problem", "source", "task", "waited")

    def __init__(self, source: Revision, parts: tuple[DataRevision, ...], field: str, needed: bool) -> None:
        self.source = source
        self.parts = parts
        self.field = field
        self.needed = needed
        self.waited = False
        self.made: Revision | None = None
        self.problem = ""
        self.task: asyncio.Task[None] | None = None

    def is_for(self, source: Revision, parts: tuple[DataRevision, ...], field: str, needed: bool) -> bool:
        """Whether it is the order for this."""
        if self.field != field or self.needed != needed:
            return False
        return (self.source is source or self.source == source) and (self.parts is parts or self.parts == parts)


class Supply:
    """Makes revisions whole. Owned by one event loop; `Keeper` fills its snapshots with it."""

    def __init__(
        self,
        checker: Checker,
        services: BundleServices,
        *,
        cache: BundleCache | None = None,
        needs: Callable[[Snapshot], bool] = lambda _: True,
        prepare: Prepare | None = None,
    ) -> None:
        """`checker` opens bundles. `needs` says whether this process evaluates by itself what is in the snapshot, and so needs modules and
        data; `prepare` is asked before a revision that had to be brought here is in force."""
        self._checker = checker
        self._services = services
        self._cache = cache
        self._needs = needs
        self._prepare = prepare
        self._orders: list[_Order] = []
        self._bundles: OrderedDict[str, Bundle] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._wake: Callable[[], None] = lambda: None
        self.waiting = ""
        """Why what ActivePolicy names is not in force; empty when it is."""
        self.undecided = False
        """Whether it is the revision that decides which is not in force."""

    def on_progress(self, wake: Callable[[], None]) -> None:
        """Calls `wake` when `fill` would have another answer."""
        self._wake = wake

    def fill(self, snapshot: Snapshot, before: Snapshot) -> Snapshot:
        """`snapshot` with its revisions whole. What is not there yet is on its way, and until then what is in force is that of `before`."""
        self._snapshot = snapshot
        needed = self._needs(snapshot)
        orders: list[_Order] = []
        changes: dict[str, Any] = {}
        found: list[Problem] = []
        self.undecided = False
        for field, name in FIELDS.items():
            revision: Revision | None = getattr(snapshot, field)
            if revision is None or not (revision.bundle or snapshot.data):
                continue
            wanted = revision, snapshot.data, field, needed
            order = next((each for each in self._orders if each.is_for(*wanted)), None) or _Order(*wanted)
            orders.append(order)
            changes[field] = order.made
            if order.made is None and field == "policy":  # what is tried is not tried meanwhile
                changes[field] = before.policy
                self.undecided = True
            if order.made is None:
                found.append(_problem(order, name, kept=changes[field] is not None))
        gone, self._orders = [each for each in self._orders if each not in orders], orders
        for order in gone:
            if order.task is not None:
                order.task.cancel()
        for order in orders:
            if order.task is None:
                order.task = asyncio.get_running_loop().create_task(self._bring(order))
        self.waiting = "; ".join(problem.message for problem in found)
        if not changes:
            return snapshot
        return msgspec.structs.replace(snapshot, **changes, problems=(*snapshot.problems, *found))

    async def settle(self, seconds: float, *, new: bool = False) -> None:
        """Waits until everything is there that `fill` was asked for, for at most `seconds`. `new`: only what has not been waited for."""
        orders = [order for order in self._orders if not (new and order.waited)]
        for order in orders:
            order.waited = True
        tasks = [order.task for order in orders if order.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def close(self) -> None:
        """Gives up what is on its way."""
        tasks = [order.task for order in self._orders if order.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring(self, order: _Order) -> None:
        backoff = Backoff(FIRST, MOST)
        while True:
            try:
                order.made = await self._make(order)
            except (FetchProblem, BundleProblem, ServicesProblem, NotReady, EngineUnavailable, PolicyError) as problem:
                text = " ".join(str(problem).split()) or type(problem).__name__
            except Exception as problem:
                log.exception("a policy revision could not be brought here")
                text = f"{type(problem).__name__}: {problem}"
            else:
                log.info("policy revision %s is here", order.source.digest)
                self._wake()
                return
            if text != order.problem:
                order.problem = text
                self._wake()
            await asyncio.sleep(backoff.next())

    async def _make(self, order: _Order) -> Revision:
        revision = order.source
        if order.needed and revision.bundle:
            bundle = await self._bundle(revision.digest, revision.bundle, lambda found: found.digest)
            revision = msgspec.structs.replace(revision, modules=bundle.modules, data=bundle.data)
        if order.parts:
            parts = [await self._part(part) for part in order.parts]
            merged = order.needed or not revision.bundle
            try:
                revision = await asyncio.to_thread(with_data, revision, parts, merged=merged)
            except ValueError as problem:
                raise NotReady(str(problem)) from None
        if self._prepare is not None and self._snapshot is not None:
            await self._prepare(revision, order.field, self._snapshot)
        return revision

    async def _part(self, part: DataRevision) -> DataRevision:
        """Data with their value."""
        if part.value:
            return part
        if not part.bundle:
            raise NotReady(f"there is no DataRevision for {root_text(part.root) or 'all of data'}, or it is wrong")

        def digest(found: Bundle) -> str:
            value = value_at(found.data, part.root)
            return "" if value is None else data_digest(part.root, value)

        bundle = await self._bundle(part.digest, part.bundle, digest)
        return msgspec.structs.replace(part, value=value_at(bundle.data, part.root) or b"")

    async def _bundle(self, digest: str, url: str, named: Callable[[Bundle], str]) -> Bundle:
        """The bundle in which `named` finds `digest`: from memory, from disk, or from `url`."""
        held = self._bundles.get(digest)
        if held is None:
            held = await self._from_disk(digest, url, named) or await self._from_server(digest, url, named)
        self._bundles[digest] = held
        self._bundles.move_to_end(digest)
        while len(self._bundles) > HELD:
            self._bundles.popitem(last=False)
        return held

    async def _from_disk(self, digest: str, url: str, named: Callable[[Bundle], str]) -> Bundle | None:
        if self._cache is None:
            return None
        packed = await asyncio.to_thread(self._cache.get, digest)
        if packed is None:
            return None
        try:
            return await self._opened(packed, digest, url, named)
        except BundleProblem as problem:
            log.warning("the bundle of %s on disk is fetched anew: %s", digest, problem)
            return None

    async def _from_server(self, digest: str, url: str, named: Callable[[Bundle], str]) -> Bundle:
        fetched = await fetch(url, self._services)
        assert fetched.body is not None
        try:
            bundle = await self._opened(fetched.body, digest, url, named)
        except BundleProblem as problem:
            raise BundleProblem(f"the bundle at {url} can't be used: {problem}") from None
        if self._cache is not None:
            try:
                await asyncio.to_thread(self._cache.put, digest, fetched.body, tuple(self._bundles))
            except OSError as problem:
                log.error("the bundle of %s can't be kept on disk: %s", digest, problem)
        return bundle

    async def _opened(self, packed: bytes, digest: str, url: str, named: Callable[[Bundle], str]) -> Bundle:
        key = (await asyncio.to_thread(self._services.access, url)).key
        bundle = await read_bundle(self._checker, packed, None if key is None else [key], "" if key is None else key.id)
        found = await asyncio.to_thread(named, bundle)
        if found != digest:
            raise BundleProblem(f"its content is {found or 'something else'}: it was changed after it had been published, or is not whole")
        return bundle


def _problem(order: _Order, field: str, *, kept: bool) -> Problem:
    data = " with its data" if order.parts else ""
    why = f": {order.problem}" if order.problem else ""
    return Problem(
        key=ACTIVE,
        path=("spec", field),
        message=f"the revision {order.source.digest[:19]}{data} is not ready here yet{why}",
        reason="RevisionNotReady",
        kept=kept,
    )


def open_supply(
    checker: Checker,
    services: Path | None,
    state: Path | None,
    *,
    needs: Callable[[Snapshot], bool] = lambda _: True,
    prepare: Prepare | None = None,
) -> Supply:
    """A process's `Supply`, by the file that `--bundle-services` names; with a folder for its state, bundles are kept there. Raises
    `Complaint`."""
    known = open_services(services)
    return Supply(checker, known, cache=BundleCache(state / "bundles") if state is not None else None, needs=needs, prepare=prepare)


def open_services(path: Path | None) -> BundleServices:
    """What goes with which bundle server. Raises `Complaint`."""
    services = BundleServices(path)
    try:
        services.check()
    except ServicesProblem as problem:
        raise Complaint(f"--bundle-services: {problem}", 2) from None
    return services

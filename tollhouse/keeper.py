"""From a configuration source to snapshots: what changed goes in, the newest `Snapshot` comes out, to everybody who wants it.

Between the two lie the workspace (`mesh.workspace`) and, for a directory with Rego in it, the compiler (`pdp.publish`). Changes are taken
one after the other; what came while one was compiled is taken together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

import msgspec

from discovery.source import Change, PolicyFiles, Source
from mesh.documents import Document, Key, Problem
from mesh.model import EMPTY, Snapshot
from mesh.policies import active_policy_body, revision_body
from mesh.reading import document_of
from mesh.workspace import Workspace
from pdp.engines.engine import EngineUnavailable, PolicyError
from pdp.publish import NoDecision
from tollhouse.authorization import Authorizer, Compile

log = logging.getLogger("tollhouse.config")

GROUP = "tollhouse.dev"
STARTING = 10.0
"""Seconds that a process waits at its start for a policy that must be brought first; then it serves, and refuses what is decided."""
AT_ONCE = 0.5
"""Seconds that a change waits at most for what it needs: then the policy before goes on, and other changes need not wait."""
AGAIN = 5.0
"""Seconds until AuthorizationPolicies that could not be compiled are tried again."""
Extra = Callable[[Collection[Document]], Collection[Document]]


class Filler(Protocol):
    """Makes the revisions of snapshots whole (`tollhouse.policy_supply.Supply`)."""

    waiting: str
    undecided: bool

    def on_progress(self, wake: Callable[[], None]) -> None:
        """Calls `wake` when `fill` would have another answer."""
        ...

    def fill(self, snapshot: Snapshot, before: Snapshot) -> Snapshot:
        """`snapshot` with its revisions whole, or those of `before` while they are not."""
        ...

    async def settle(self, seconds: float, *, new: bool = False) -> None:
        """Waits until all that was asked for is there, for at most `seconds`; with `new` only for what has not been waited for before."""
        ...


class Taker(Protocol):
    """Somebody who wants the newest snapshot."""

    def __call__(self, snapshot: Snapshot) -> Awaitable[object] | None:
        """Takes it; called in the event loop, in the order in which takers were added. The next one's turn comes when what is returned is
        done, so that what has to be ready before a snapshot is in force can be."""
        ...


def decisions_of(documents: Collection[Document]) -> frozenset[str]:
    """The entry points that AccessPolicies name."""
    found = set()
    for document in documents:
        if document.key.kind == "AccessPolicy" and document.key.group == GROUP:
            spec: Any = document.body.get("spec")
            decision = spec.get("decision") if isinstance(spec, Mapping) else None
            if isinstance(decision, str) and decision:
                found.add(decision)
    return frozenset(found)


def policy_problems(error: PolicyError, *, kept: bool = False) -> tuple[Problem, ...]:
    """What is wrong with a policy, a line each. `kept`: the last good one stays in force."""
    made = []
    for found in error.problems:
        # The parser's messages have the line in question and a mark below it.
        lines = [line.strip() for line in found.message.splitlines()]
        column = f":{found.column}" if found.column else ""
        made.append(
            Problem(
                key=None,
                message="policy: " + ": ".join(line for line in lines if line.strip("^ ")),
                where=f"{found.file}:{found.row}{column}" if found.row else found.file,
                reason="InvalidPolicy",
                kept=kept,
            )
        )
    return tuple(made)


class Keeper:
    """Owns the workspace. `start` returns when the first snapshot has been given out."""

    def __init__(
        self,
        source: Source,
        compile_policy: Compile,
        extra: Extra | None = None,
        authorizer: Authorizer | None = None,
        supply: Filler | None = None,
    ) -> None:
        """`extra` is shown all documents and gives those that are there besides (what `tollhouse up` makes by itself). `authorizer` makes
        AuthorizationPolicies ready to be asked, and `supply` revisions whole; whoever asks nothing needs neither."""
        self.source = source
        self.workspace = Workspace()
        self._compile = compile_policy
        self._extra = extra
        self._authorizer = authorizer
        self._supply = supply
        if supply is not None:
            supply.on_progress(self._progressed)
        self._owed = False
        """Whether the newest snapshot has not been given out, because its AuthorizationPolicies could not be compiled."""
        self._takers: list[Taker] = []
        self._witnesses: list[Callable[[], None]] = []
        self._waiting: list[tuple[Change, str]] = []
        """With each change where its source was."""
        self._reading = self._at = ""
        self._at_rest = False
        self._contact: float | None = None
        """Of the source, when the first of what is not in force yet came."""
        self._something = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._first = asyncio.Event()
        self._files: PolicyFiles | None = None
        self._compiled: tuple[PolicyFiles, frozenset[str]] | None = None
        self._source_problems: tuple[Problem, ...] = ()
        self._policy_problems: tuple[Problem, ...] = ()
        self._published: tuple[Document, ...] = ()
        self.snapshot: Snapshot = EMPTY
        self.in_force: Snapshot = EMPTY
        """The last one that every part has taken; `snapshot` may still be on its way, or have been refused by a part."""
        self.applied = 0
        """Snapshots given out."""

    def add(self, taker: Taker) -> None:
        """Gives `taker` each new snapshot from now on."""
        self._takers.append(taker)

    @property
    def waiting(self) -> str:
        """Why the policy that the configuration names is not in force; empty when it is."""
        return self._supply.waiting if self._supply is not None else ""

    def _progressed(self) -> None:
        self._owed = True
        self._something.set()

    def on_force(self, witness: Callable[[], None]) -> None:
        """Calls `witness` each time that a snapshot has come in force: when all who take snapshots have taken it, and not before."""
        self._witnesses.append(witness)

    async def start(self) -> None:
        """Starts the source and waits until its first state is in force."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        await self.source.start(self._changed)
        first = asyncio.create_task(self._first.wait())
        await asyncio.wait({first, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            first.cancel()
            await self._task

    async def stop(self) -> None:
        """Ends the source; the last snapshot stays."""
        await self.source.stop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _changed(self, change: Change) -> None:
        status = self.source.status
        if self._at_rest and not self._waiting:
            self._contact = status.last_contact
        self._waiting.append((change, status.delivered))
        self._something.set()

    @property
    def position(self) -> str:
        """Up to where `in_force` has followed the source (`SourceStatus.delivered`)."""
        return self.source.status.delivered if self._at_rest and not self._waiting else self._at

    @property
    def contact(self) -> float | None:
        """As `SourceStatus.last_contact`, for what is in force: who heard of a change and is still at work on it goes by the one before."""
        return self.source.status.last_contact if self._at_rest and not self._waiting else self._contact

    async def _run(self) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            changes, self._waiting, self._at_rest = self._waiting, [], False
            if self._owed and not changes:
                await self._give_ready(self.workspace.snapshot)
            for change, self._reading in changes:
                try:
                    await self._apply(change)
                except Exception:
                    if not self._first.is_set():
                        raise
                    log.exception("a change of the configuration could not be applied; the last good one stays in force")
            behind = self._supply is not None and self._supply.undecided
            self._at_rest = self._at == self._reading and not behind
            self._first.set()

    async def _apply(self, change: Change) -> None:
        if change.replace:
            self._files = None
        if change.policy is not None:
            self._files = change.policy
        self._source_problems = change.problems
        upserts, deletes = list(change.upserts), list(change.deletes)
        documents: dict[Key, Document] = {} if change.replace else dict(self.workspace.documents)
        for key in deletes:
            documents.pop(key, None)
        documents.update({document.key: document for document in upserts})
        if self._extra is not None:
            upserts += [document for document in self._extra(documents.values()) if documents.get(document.key) != document]
        published = self._published
        if self._files is not None:
            await self._publish(self._files, decisions_of(documents.values()))
        else:
            self._published, self._compiled, self._policy_problems = (), None, ()
        if change.replace or published is not self._published:
            upserts += self._published
            if not change.replace:
                deletes += [document.key for document in published if document.key not in {new.key for new in self._published}]
        snapshot = self.workspace.update(
            upserts=upserts,
            deletes=deletes,
            instances=change.instances,
            gone_instances=change.gone_instances,
            problems=(*self._source_problems, *self._policy_problems),
            replace=change.replace,
        )
        await self._give_ready(snapshot)

    async def _give_ready(self, snapshot: Snapshot) -> None:
        """Gives `snapshot` out once its AuthorizationPolicies can be asked. While they can't, the one before stays in force; at the start,
        with none before, what they guard is refused."""
        self._owed, ready = False, True
        if self._authorizer is not None:
            try:
                snapshot = await self._authorizer.fill(snapshot)
            except (PolicyError, EngineUnavailable) as problem:
                self._owed, ready = True, False
                asyncio.get_running_loop().call_later(AGAIN, self._something.set)
                message = f"AuthorizationPolicies can't be evaluated now: {problem}"
                before = self.snapshot if self._first.is_set() else snapshot
                found = Problem(key=None, message=message, reason="InvalidPolicy", kept=self._first.is_set())
                snapshot = msgspec.structs.replace(before, problems=(*(each for each in before.problems if each != found), found))
        if self._supply is not None and ready:
            filled = self._supply.fill(snapshot, self.snapshot)
            if self._supply.waiting:
                await self._supply.settle(AT_ONCE if self._first.is_set() else STARTING, new=True)
                filled = self._supply.fill(snapshot, self.snapshot)
            snapshot = filled
        await self._give(snapshot)

    async def _publish(self, files: PolicyFiles, decisions: frozenset[str]) -> None:
        if self._compiled == (files, decisions):
            return
        try:
            try:
                revision = await self._compile(files.modules, files.data, decisions)
            except NoDecision as missing:
                # An AccessPolicy that misspells its decision is an error by itself, and keeps nobody else's policy out of force.
                revision = await self._compile(files.modules, files.data, decisions - missing.decisions)
        except PolicyError as problem:
            self._compiled = (files, decisions)
            self._policy_problems = policy_problems(problem, kept=bool(self._published))
            return
        except EngineUnavailable as problem:
            self._compiled = None
            self._policy_problems = (
                Problem(
                    key=None, message=f"policy: it can't be compiled now: {problem}", reason="InvalidPolicy", kept=bool(self._published)
                ),
            )
            return
        self._compiled = (files, decisions)
        self._policy_problems = ()
        self._published = tuple(document_of(body, "policy/") for body in (revision_body(revision), active_policy_body(revision.digest)))

    async def _give(self, snapshot: Snapshot) -> None:
        before, self.snapshot = self.snapshot, snapshot
        self.applied += 1
        known = set(before.problems)
        for problem in snapshot.problems:
            if problem not in known:
                kept = "; the last good one stays in force" if problem.kept else ""
                log.log(logging.ERROR if problem.severity == "error" else logging.WARNING, "%s%s", problem, kept)
        taken = True
        for taker in self._takers:
            try:
                waiting = taker(snapshot)
                if waiting is not None:
                    await waiting
            except Exception:
                if not self._first.is_set():
                    raise
                log.exception("a part could not take the new configuration")
                taken = False
        if taken:
            self.in_force, self._at = snapshot, self._reading
            for witness in self._witnesses:
                witness()

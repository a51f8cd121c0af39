"""Changes of what policy is in force: one change of the ActivePolicy, written down, and waited for at every gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, TypeVar

import click
import msgspec

from discovery.acknowledged import Standing, wait_until
from discovery.audit import Entry, Log, Unnoted, history, unnoted
from discovery.etcd import Etcd, EtcdError
from discovery.reports import Report
from discovery.store import ABSENT, Store, StoreConflict
from mesh import formats
from mesh.documents import Document, Key
from mesh.policies import ACTIVE_NAME, active_data_of, revision_digest, revision_from_body, spec_body, trial_of, tried_text
from mesh.policy_data import clash, root_text
from mesh.reading import document_of
from tollhouse.commands.config import with_store
from tollhouse.output import Complaint
from tollhouse.parts import open_etcd, unreachable

T = TypeVar("T")
Spec = dict[str, Any]
ACTIVE: Final = Key("tollhouse.dev", "ActivePolicy", "", ACTIVE_NAME)
ACTIVE_DATA: Final = Key("tollhouse.dev", "ActiveData", "", ACTIVE_NAME)
TRIES: Final = 5
SLACK: Final = 16.0
"""Seconds after `maxStaleness` in which a gateway may still be at work on what it heard: loading a policy, asking for a decision point."""
EVERY: Final = 0.3
"""Seconds between two lines of progress."""


class Changed(msgspec.Struct, frozen=True):
    """What the ActivePolicy says, and what it said before."""

    before: Spec
    after: Spec


def change_active(config: str, action: str, reason: str, make: Callable[[Spec], Spec]) -> Changed:
    """Makes the ActivePolicy say what `make` makes of what it says (empty when there is none yet), written down as `action`. A change by
    somebody else in between is seen: `make` is asked again. Raises `Complaint`."""

    async def work(store: Store) -> Changed:
        for _ in range(TRIES):
            there = await store.get(ACTIVE)
            said = there.body.get("spec") if there is not None else None
            before = dict(said) if isinstance(said, Mapping) else {}
            after = make(dict(before))
            await refuse_clash(store, after)
            body = spec_body(after)
            document = document_of(body, f"policy {action}", json.dumps(body, sort_keys=True))
            try:
                await store.apply([document], expect={ACTIVE: there.version if there is not None else ABSENT})
            except StoreConflict:
                continue
            return Changed(before, after)
        raise Complaint("the ActivePolicy is being changed by others all the time; try again")

    return with_store(config, work, action, reason)


async def refuse_clash(store: Store, spec: Spec) -> None:
    """Raises `Complaint` when the own data of a revision that `spec` names leave no room for the data in force."""
    there = await store.get(ACTIVE_DATA)
    roots = active_data_of(there.body.get("spec")) if there is not None else {}
    for field in ("revision", "shadow", "canary") if roots else ():
        name = trial_of(spec.get(field))[0]
        document = await store.get(Key("tollhouse.dev", "PolicyRevision", "", name)) if name else None
        revision = revision_from_body(document.body) if document is not None else None
        for root in roots:
            # Of one behind a URL only those who have fetched it can tell.
            if revision is not None and not revision.bundle and (wrong := clash(revision.data, root)):
                where = root_text(root) or "/"
                raise Complaint(
                    f"{name} leaves no room for the data in force at {where}: {wrong}; take them out of it, or `tollhouse policy data "
                    f"delete {where}`"
                )


def audit_entries(config: str, log: Log = "policy") -> tuple[Entry, ...]:
    """An audit log, the newest first. Raises `Complaint`."""
    return _looked(config, lambda etcd: history(etcd, log))


def changed_elsewhere(config: str, log: Log = "policy") -> tuple[Unnoted, ...]:
    """What was last changed without an entry in an audit log. Raises `Complaint`."""
    return _looked(config, lambda etcd: unnoted(etcd, log))


def _looked(config: str, look: Callable[[Etcd], Awaitable[T]]) -> T:
    async def work() -> T:
        etcd = open_etcd(config)
        try:
            return await look(etcd)
        finally:
            await etcd.close()

    try:
        return asyncio.run(work())
    except EtcdError as problem:
        raise Complaint(unreachable(problem)) from None


def wait_for_gateways(config: str, spec: Spec, timeout: float) -> None:
    """Waits until every gateway that reports applies `spec`, and shows how many do. Raises `Complaint` with those that do not in time."""
    wait_for(config, ACTIVE, spec, lambda report: applies(report, spec), timeout)


def standing_of(
    config: str, applied: Callable[[Report], bool], written: int, timeout: float, cut_off_after: float | None = None
) -> Standing:
    """How the gateways stand to what was `written`, as `discovery.acknowledged.wait_until` has it; shows meanwhile how many apply it.
    Raises `Complaint` when they can't be asked."""

    def progress(standing: Standing) -> None:
        whole = standing.applied + len(standing.missing)
        click.echo(f"{standing.applied} of {whole} gateways apply it", err=True)

    async def work() -> Standing:
        etcd = open_etcd(config)
        try:
            return await wait_until(etcd, applied, written, timeout, cut_off_after=cut_off_after, progress=Rarely(progress))
        finally:
            await etcd.close()

    try:
        return asyncio.run(work())
    except EtcdError as problem:
        raise Complaint(f"it is in force, but who applies it is not known: {unreachable(problem)}") from None


def wait_for(config: str, key: Key, spec: Spec, applied: Callable[[Report], bool], timeout: float) -> None:
    """Waits until `applied` is true of every gateway that reports, and shows of how many it is; the resource `key` says `spec`. Raises
    `Complaint` with those of which it is not in time."""
    documents, _ = with_store(config, lambda store: store.list("tollhouse.dev"))
    there = next((document for document in documents if document.key == key), None)
    if there is None or there.body.get("spec") != spec:
        raise Complaint(f"somebody else has changed the {key.kind} meanwhile; `tollhouse policy history` shows who")
    written = int(there.version or 0)
    staleness = max_staleness(documents)
    cut_off = None if staleness is None else staleness + SLACK
    standing = standing_of(config, applied, written, timeout, cut_off)
    for each in standing.cut_off:
        click.echo(f"{named(each)} was lost before it applied it; by now it decides nothing (Mesh.spec.policy.maxStaleness)", err=True)
    if standing.missing:
        names = ", ".join(named(each, _why(each, standing)) for each in standing.missing)
        hint = ""
        if standing.lost and staleness is None:
            hint = "; one that can't reach etcd goes on by the policy before: Mesh.spec.policy.maxStaleness would stop it"
        raise Complaint(f"after {timeout:g} s these gateways do not apply it yet: {names}{hint}")


def _why(report: Report, standing: Standing) -> str:
    return "its report ended" if report in standing.lost else report.waiting or report.stale


class Rarely:
    """Tells of progress a few times a second, and when it is complete."""

    def __init__(self, tell: Callable[[Standing], None]) -> None:
        self._tell = tell
        self._at = 0.0

    def __call__(self, standing: Standing) -> None:
        """It is so now."""
        now = time.monotonic()
        if standing.missing and now - self._at < EVERY:
            return
        if standing.missing or self._at:
            self._at = now
            self._tell(standing)


def max_staleness(documents: Collection[Document]) -> float | None:
    """`Mesh.spec.policy.maxStaleness`, in seconds."""
    for document in documents:
        spec = document.body.get("spec")
        policy = spec.get("policy") if document.key.kind == "Mesh" and isinstance(spec, Mapping) else None
        text = policy.get("maxStaleness") if isinstance(policy, Mapping) else None
        if isinstance(text, str):
            try:
                return formats.seconds(text)
            except ValueError:  # the mesh is wrong, and so in force as it was before
                return None
    return None


def named(report: Report, why: str = "") -> str:
    """A gateway as people know it."""
    return f"{report.namespace}/{report.name} ({report.instance}{f', {why}' if why else ''})"


def tried_of(spec: Spec, which: str | None) -> tuple[str, str]:
    """Which of shadow and canary is meant, and the name of its revision. Raises `Complaint`."""
    there = {field: trial_of(spec.get(field))[0] for field in ("canary", "shadow") if spec.get(field)}
    if which is not None and which not in there:
        raise Complaint(f"there is no {which}; {f'there is a {next(iter(there))}' if there else 'nothing is tried'}")
    if not there:
        raise Complaint("nothing is tried: there is neither a shadow nor a canary")
    if which is None and len(there) > 1:
        raise Complaint("there are both a canary and a shadow: say which, --which canary or --which shadow", 2)
    field = which or next(iter(there))
    return field, there[field]


def applies(report: Report, spec: Spec) -> bool:
    """Whether a gateway has in force what the ActivePolicy says."""
    wanted = tried_text(trial_of(spec.get("shadow")), trial_of(spec.get("canary")))
    return report.policy == revision_digest(str(spec.get("revision") or "")) and report.tried == wanted

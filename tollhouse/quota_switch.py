"""Changes of limits by hand: one change of a limit's QuotaChange, written down, and waited for at every gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from discovery.address import EtcdAddress
from discovery.audit import author_of, who
from discovery.store import ABSENT, Store, StoreConflict
from mesh import formats
from mesh.documents import Document, Key
from mesh.kinds import check_document
from mesh.model import QuotaLimit
from mesh.quota_changes import KIND, MOST, change_name, ended, instant_text, named_key, values_of
from mesh.reading import document_of
from quota.changes import Numbers
from quota.descriptors import PolicyLimits
from tollhouse.commands.config import together, with_store
from tollhouse.output import Complaint
from tollhouse.parts import is_etcd, open_etcd
from tollhouse.policy_switch import named, standing_of
from tollhouse.quota_limits import key_of, limit_named, numbers_of

GROUP: Final = "tollhouse.dev"
TRIES: Final = 5
RESETS_KEPT: Final = 3600.0
"""Seconds after which a bucket's reset has long been seen by all who knew it from before."""
Item = dict[str, Any]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What `tollhouse quota set` is to do."""

    tokens: int | None = None
    concurrency: int | None = None
    interval: float | None = None
    burst: int | None = None
    lift: bool = False
    block: bool = False
    undo: bool = False
    until: float = 0.0
    """Seconds since the epoch; 0 for no end."""
    reason: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it."""

    limit: QuotaLimit
    values: tuple[str, ...] | None
    """As `mesh.quota_changes.shown_key` has them; None for the whole limit."""
    before: dict[str, Any]
    after: dict[str, Any]
    until: float
    written: int
    """etcd's revision of the change; 0 in a directory."""


def set_limit(config: str, name: str, values: Sequence[str], wanted: Wanted) -> Done:
    """Changes a limit, or what some values of its descriptors have of it. Raises `Complaint`; then nothing has been changed."""

    by = who(author_of(open_etcd(config).address if is_etcd(config) else EtcdAddress(endpoints=())))

    def make(limit: QuotaLimit, items: list[Item], now: float) -> tuple[list[Item], Done]:
        key = named_key(limit, key_of(limit, values)) if values else None
        before = numbers_of(Numbers(limit).shown(key, now))
        others = [item for item in items if item.get("reset") or values_of(item) != key]
        if wanted.undo:
            if len(others) == len(items):
                raise Complaint(
                    f"{name} has not been changed for {' '.join(key) if key else 'all'}; there is nothing to undo{_hint(items)}"
                )
            after = numbers_of(Numbers(_without(limit, key)).shown(key, now))
            return others, Done(limit=limit, values=key, before=before, after=after, until=0.0, written=0)
        item, after = _item(limit, key, before, wanted)
        said = {"since": instant_text(now), "by": by[:256], "reason": wanted.reason}
        until = {"until": instant_text(wanted.until)} if wanted.until else {}
        whom = {} if key is None else {"values": list(key)}
        done = Done(limit=limit, values=key, before=before, after=after, until=wanted.until, written=0)
        return [*others, {**whom, **item, **until, **said}], done

    return write_change(config, name, "quota undo" if wanted.undo else "quota set", wanted.reason, make)


def _without(limit: QuotaLimit, shown: tuple[str, ...] | None) -> QuotaLimit:
    return msgspec.structs.replace(limit, changes=tuple(change for change in limit.changes if change.values != shown))


def _hint(items: Sequence[Item]) -> str:
    changed = [" ".join(values) if (values := values_of(item)) else "all" for item in items if not item.get("reset")]
    return f" (it has been for {', '.join(changed[:5])})" if changed else ""


def _item(limit: QuotaLimit, key: tuple[str, ...] | None, before: dict[str, Any], wanted: Wanted) -> tuple[Item, dict[str, Any]]:
    """An item for `changes`, and the numbers that it makes. All of them are written, so that it says what holds."""
    if wanted.lift:
        return {"lift": True}, {"lifted": True}
    if wanted.block:
        return {"block": True}, {"blocked": True}
    if limit.concurrency:
        if wanted.concurrency is None or wanted.tokens or wanted.interval or wanted.burst:
            raise Complaint(f"{limit.name} counts requests in progress: say --concurrency", 2)
        return {"concurrency": wanted.concurrency}, {"concurrency": wanted.concurrency}
    if wanted.concurrency is not None:
        raise Complaint(f"{limit.name} has tokens: say --tokens, --interval or --burst", 2)
    base = before if "tokens" in before else numbers_of(Numbers(msgspec.structs.replace(limit, changes=())).shown(key, 0.0))
    tokens = wanted.tokens or base["tokens"]
    if "calendar" in base:
        more: Item = {} if wanted.interval is None else {"interval": formats.duration_text(wanted.interval)}
        more |= {} if wanted.burst is None else {"burst": wanted.burst}
        return {"tokens": tokens, **more}, {**base, "tokens": tokens}
    # Who says nothing of the burst means as many seconds of it as there were.
    burst = wanted.burst or max(1, limit.cost, limit.most_cost, round(base["burst"] * tokens / base["tokens"]))
    interval = wanted.interval or base["interval"]
    return (
        {"tokens": tokens, "interval": formats.duration_text(interval), "burst": burst},
        {"tokens": tokens, "interval": interval, "burst": burst},
    )


Make = Callable[[QuotaLimit, list[Item], float], tuple[list[Item], Done]]


def write_change(config: str, name: str, action: str, reason: str, make: Make) -> Done:
    """Makes a limit's QuotaChange say what `make` makes of it. One that somebody else changes in between is read again."""

    async def work(store: Store) -> Done:
        for _ in range(TRIES):
            documents, _ = await store.list()
            there = {document.key: document for document in documents}
            limit = limit_named(PolicyLimits.of(together(documents).snapshot), name)
            namespace, policy, short = limit.name.split("/")
            key = Key(GROUP, KIND, namespace, change_name(policy, short))
            known = there.get(key)
            now = time.time()
            items, done = make(limit, [item for item in _items(known) if not _past(item, now)], now)
            expect = {key: known.version if known is not None else ABSENT}
            try:
                body = {
                    "apiVersion": f"{GROUP}/v1",
                    "kind": KIND,
                    "metadata": {"namespace": namespace, "name": key.name},
                    "spec": {"policy": policy, "limit": short, "changes": items},
                }
                document = document_of(body, action, json.dumps(body, sort_keys=True))
                _check(document, documents, items)
                await store.apply([document], expect=expect)
            except StoreConflict:
                continue
            written = await store.get(key)
            version = written.version if written is not None else ""
            return msgspec.structs.replace(done, written=int(version) if version.isdecimal() else 0)
        raise Complaint(f"{name} is being changed by others all the time; try again")

    return with_store(config, work, action, reason)


def _items(known: Document | None) -> list[Item]:
    spec = known.body.get("spec") if known is not None else None
    found = spec.get("changes") if isinstance(spec, Mapping) else None
    return [dict(item) for item in found or () if isinstance(item, Mapping)]


def _past(item: Item, now: float) -> bool:
    try:
        return ended(item, now) or (bool(item.get("reset")) and ended({"until": item["reset"]}, now - RESETS_KEPT))
    except (ValueError, TypeError):  # written by hand, and wrong: it is replaced
        return True


def _check(document: Document, documents: Sequence[Document], items: Sequence[Item]) -> None:
    """Raises `Complaint` for what would not be in force."""
    if len(items) > MOST:
        raise Complaint(
            f"{document.key} has {MOST} changes already, which is as many as there may be: undo some, or change the QuotaPolicy"
        )
    problems = check_document(document)
    if not problems:
        others = [each for each in documents if each.key != document.key]
        found = together([*others, document]).snapshot.problems
        problems = tuple(problem for problem in found if problem.key == document.key and problem.severity == "error")
    if problems:
        raise Complaint(problems[0].message)


def acknowledged(config: str, done: Done, timeout: float) -> int:
    """Waits until every gateway that reports follows a change, and shows how many do; how many that is. Raises `Complaint` with those that
    do not in time."""
    standing = standing_of(config, lambda _: True, done.written, timeout)
    if standing.missing:
        names = ", ".join(named(each, "its report ended" if each in standing.lost else each.stale) for each in standing.missing)
        raise Complaint(f"after {timeout:g} s these gateways do not apply it yet: {names}; one that can't reach etcd goes on as before")
    return standing.applied

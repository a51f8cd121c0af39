"""Fills an empty etcd from a directory: what `tollhouse up --etcd` begins with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from discovery.audit import Audit
from discovery.directory import DirectorySource
from discovery.source import Change
from discovery.store import StoreError, open_store
from mesh.documents import Document
from mesh.policies import active_policy_body, revision_body
from mesh.reading import document_of
from pdp.engines.engine import EngineUnavailable, PolicyError
from tollhouse.keeper import decisions_of, policy_problems
from tollhouse.output import Complaint
from tollhouse.parts import LazyPool, unreachable

log = logging.getLogger("tollhouse.up")


async def read_directory(directory: Path) -> Change:
    """Everything that is in a directory now, as one change."""
    found: list[Change] = []
    source = DirectorySource(directory)
    await source.start(found.append)
    await source.stop()
    return found[0]


async def seed(url: str, directory: Path, pool: LazyPool, extra: Callable[[Collection[Document]], Collection[Document]]) -> None:
    """Puts the directory's resources, and its policy as the active revision, into the etcd at `url`, if it has no resources yet.

    Raises `Complaint`.
    """
    try:
        store = open_store(url, Audit(action="seed"))
    except ValueError as problem:
        raise Complaint(f"--etcd: {problem}", 2) from None
    try:
        if any(await store.list()):
            return
        change = await read_directory(directory)
        if change.problems:
            raise Complaint(f"{directory} cannot be put into etcd: {change.problems[0]}")
        documents = [*change.upserts, *extra(change.upserts)]
        if change.policy is not None and change.policy.modules:
            revision = await pool.compile(change.policy.modules, change.policy.data, decisions_of(documents))
            documents += [document_of(body, "policy/") for body in (revision_body(revision), active_policy_body(revision.digest))]
        await store.apply(documents)
        log.info("etcd had no resources: %d were put there from %s", len(documents), directory)
    except StoreError as problem:
        raise Complaint(unreachable(problem)) from None
    except PolicyError as problem:
        raise Complaint(f"{directory} cannot be put into etcd: {policy_problems(problem)[0]}") from None
    except EngineUnavailable as problem:
        raise Complaint(str(problem)) from None
    finally:
        await store.close()

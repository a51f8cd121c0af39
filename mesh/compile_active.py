"""From the ActivePolicy to the revisions that decide, and those that are tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from mesh import policies
from mesh.compile_world import Trouble, World
from mesh.documents import Document, Key, Problem
from mesh.model import Snapshot
from mesh.policy import Revision, Share
from mesh.policy_data import DataRevision, root_of

Known = Mapping[str, tuple[Document, Revision]]
"""Revisions that have been read, by name, each with the document that it was read from."""

ALL: Final = Share()


class Tried(msgspec.Struct, frozen=True):
    """What decides, and what is tried on whom."""

    policy: Revision | None = None
    shadow: Revision | None = None
    shadow_share: Share = ALL
    canary: Revision | None = None
    canary_share: Share = ALL


ACTIVE_DATA: Final = Key("tollhouse.dev", "ActiveData", "", policies.ACTIVE_NAME)


def compile_data(world: World, last: Snapshot, found: list[Problem]) -> tuple[DataRevision, ...]:
    """The data that ActiveData names. Of what is not there the value is missing, and no policy is in force without it."""
    active = world.get("ActiveData", "", policies.ACTIVE_NAME)
    if active is None:
        return (DataRevision(digest="", root=()),) if ACTIVE_DATA in world.bad else ()
    known = {(each.digest, each.bundle): each for each in last.data if each.value or each.bundle}
    made: list[DataRevision] = []
    trouble = Trouble(active)
    for number, each in enumerate(active.body["spec"].get("roots") or ()):
        document = world.get("DataRevision", "", each["revision"])
        if document is None or document.body["spec"]["root"] != each["root"]:
            there = "there is no" if document is None else f"{document.body['spec']['root'] or 'all of data'} is the root of"
            message = f"{there} DataRevision {each['revision']}; publish it for {each['root'] or 'all of data'}"
            trouble.add(("spec", "roots", number, "revision"), message, "RevisionNotFound")
            made.append(DataRevision(digest=policies.revision_digest(each["revision"]), root=root_of(each["root"])))
            continue
        spec = document.body["spec"]
        made.append(known.get((spec["digest"], spec.get("bundle") or "")) or policies.data_from_body(document.body))
    kept = last.policy is not None
    found += [msgspec.structs.replace(problem, kept=kept) for problem in trouble.found]
    return tuple(made)


def compile_active(world: World, last: Snapshot, known: Known, found: list[Problem]) -> tuple[Tried, Known]:
    """The revisions that ActivePolicy names, and what has been read of them. One that is not there leaves the one in `last` in force."""
    active = world.get("ActivePolicy", "", policies.ACTIVE_NAME)
    if active is None:
        return Tried(), {}
    spec = active.body["spec"]
    kept: dict[str, tuple[Document, Revision]] = {}
    results: list[tuple[Revision | None, Share]] = []
    for field, before, before_share in (
        ("revision", last.policy, ALL),
        ("shadow", last.shadow, last.shadow_share),
        ("canary", last.canary, last.canary_share),
    ):
        name, share = policies.trial_of(spec.get(field))
        if not name:
            results.append((None, ALL))
            continue
        document = world.get("PolicyRevision", "", name)
        if document is None:
            trouble = Trouble(active)
            still = f"; {before.digest[:19]} stays in force" if before is not None else ""
            trouble.add(("spec", field), f"there is no PolicyRevision {name}; publish it first{still}", "RevisionNotFound")
            found += [msgspec.structs.replace(problem, kept=before is not None) for problem in trouble.found]
            results.append((before, before_share))
            continue
        read = known.get(name)
        revision = read[1] if read is not None and read[0] is document else policies.revision_from_body(document.body)
        if before is not None and before == revision:
            revision = before
        kept[name] = document, revision
        results.append((revision, share))
    (policy, _), (shadow, shadow_share), (canary, canary_share) = results
    return Tried(policy, shadow, shadow_share, canary, canary_share), kept

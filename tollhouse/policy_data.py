"""What `tollhouse policy data` does: revisions of data, which of them are in force at which root, and who made it so."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from discovery.audit import ACTIVE_DATA
from discovery.store import ABSENT, Store, StoreConflict
from mesh.documents import Document, Key
from mesh.formats import bundle_url
from mesh.policies import (
    ACTIVE_NAME,
    active_data_body,
    active_data_of,
    data_body,
    data_from_body,
    revision_digest,
    revision_from_body,
    revision_name,
    trial_of,
)
from mesh.policy import Revision
from mesh.policy_data import DataRevision, Root, canonical_value, clash, data_digest, overlap, root_of, root_text, value_at
from mesh.reading import document_of
from tollhouse.commands.config import with_store
from tollhouse.output import Complaint
from tollhouse.policy_revisions import need_etcd, short

DATA: Final = Key("tollhouse.dev", ACTIVE_DATA, "", ACTIVE_NAME)
KEPT: Final = 20
"""Revisions of one root that stay when a newer one is published; those in force do anyway."""
SLACK: Final = 5
"""How many more there may be until they are taken away."""
TRIES: Final = 5
MOST_FILE: Final = 8 << 20


class Kept(msgspec.Struct, frozen=True):
    """A revision of data that is in etcd."""

    digest: str
    root: Root
    document: Document
    version: int
    """Of etcd, at which it was written."""

    @property
    def bundle(self) -> str:
        """Where it is, when it is behind a URL."""
        return str(self.document.body["spec"].get("bundle") or "")

    @property
    def size(self) -> int:
        """Bytes of its JSON; 0 when it is behind a URL."""
        return 0 if self.bundle else len(canonical_value(self.document.body["spec"].get("data")))

    def text(self) -> str:
        """Its JSON, for people."""
        return json.dumps(self.document.body["spec"].get("data"), indent=2, sort_keys=True, ensure_ascii=False)


class Published(msgspec.Struct, frozen=True):
    """What an etcd has."""

    active: dict[Root, str]
    """The digest in force at each root."""
    revisions: tuple[Kept, ...]
    """The oldest first."""
    policies: tuple[tuple[str, Revision], ...]
    """The revisions of policy that ActivePolicy names, with what it calls them."""


class Changed(msgspec.Struct, frozen=True):
    """What was in force at each root, and what is."""

    before: dict[Root, str]
    after: dict[Root, str]


class Step(msgspec.Struct, frozen=True):
    """One change at one root."""

    time: float
    action: str
    who: str
    reason: str
    root: str
    before: str
    after: str

    def as_value(self) -> dict[str, Any]:
        """For programs."""
        return dict(msgspec.to_builtins(self))


def root_argument(text: str) -> Root:
    """The root that a command is given: `shop/grants`, or `/` for all of data. Raises `Complaint`."""
    try:
        return root_of(text.strip("/"))
    except ValueError as problem:
        raise Complaint(f"ROOT: {problem}", 2) from None


def data_revision(source: str, root: Root, *, services: Path | None = None, by_reference: bool = False) -> DataRevision:
    """The revision of what is in a file, in standard input or in a bundle. Raises `Complaint`."""
    from discovery.etcd_store import MOST_REQUEST
    from tollhouse.bundle_source import BundleSource, is_url, open_bundle
    from tollhouse.policy_work import with_pool

    where = root_text(root) or "all of data"
    if not is_url(source):
        if by_reference or services is not None:
            raise Complaint("--by-reference and --bundle-services are for the URL of a bundle (opa build)", 2)
        value = canonical_value(_read(source))
    else:
        if wrong := bundle_url(source):
            raise Complaint(f"the URL {wrong}", 2)
        bundle = with_pool(Path(source), lambda pool: open_bundle(BundleSource(where=source, services=services), pool))
        found = value_at(bundle.data, root)
        if found is None:
            raise Complaint(f"the bundle {source} has nothing at data.{'.'.join(root)}")
        value = found
    if not root and not value.startswith(b"{"):
        raise Complaint("all of data is an object; for another value say where it is: --root shop/grants", 2)
    made = DataRevision(digest=data_digest(root, value), root=root, value=value)
    if by_reference:
        return msgspec.structs.replace(made, value=b"", bundle=source)
    most = MOST_REQUEST - 50_000
    if len(value) > most:
        raise Complaint(
            f"the data for {where} have {len(value)} bytes, and etcd takes {most}: put them in a bundle (opa build) where gateways can "
            "fetch it, and publish its URL --by-reference"
        )
    return made


def _read(source: str) -> Any:
    from discovery.policy_files import read_policy_file

    try:
        if source == "-":
            content = sys.stdin.buffer.read(MOST_FILE + 1)
        else:
            with Path(source).open("rb") as file:
                content = file.read(MOST_FILE + 1)
    except OSError as problem:
        raise Complaint(f"{source}: {problem.strerror}") from None
    if len(content) > MOST_FILE:
        raise Complaint(f"{source} has more than {MOST_FILE} bytes; put it in a bundle (opa build) and publish its URL --by-reference")
    try:
        # YAML has JSON in it, which is read a hundred times faster as such.
        return read_policy_file("policy/x/data.yaml" if source.endswith((".yaml", ".yml")) else "policy/x/data.json", content).value
    except ValueError as problem:
        raise Complaint(f"{source}: {problem}") from None


def published_data(config: str) -> Published:
    """What an etcd has of data, and the policies that it goes with. Raises `Complaint`."""
    documents, problems = with_store(need_etcd(config), lambda store: store.list("tollhouse.dev"))
    wrong = [each for each in problems if each.key is not None and each.key.kind == ACTIVE_DATA]
    if wrong:
        raise Complaint(str(wrong[0]))
    by_name = {document.key.name: document for document in documents if document.key.kind == "PolicyRevision"}
    active: dict[Root, str] = {}
    revisions: list[Kept] = []
    policies: list[tuple[str, Revision]] = []
    for document in documents:
        spec = document.body.get("spec")
        if not isinstance(spec, Mapping):
            continue
        if document.key == DATA:
            active = active_data_of(spec)
        elif document.key.kind == "DataRevision":
            revisions.append(Kept(str(spec["digest"]), root_of(str(spec["root"])), document, int(document.version or 0)))
        elif document.key.kind == "ActivePolicy":
            for field in ("revision", "shadow", "canary"):
                found = by_name.get(trial_of(spec.get(field))[0])
                if found is not None:
                    policies.append((field, revision_from_body(found.body)))
    return Published(active, tuple(sorted(revisions, key=lambda each: each.version)), tuple(policies))


def data_in_force(config: str) -> tuple[DataRevision, ...]:
    """The data in force, with their values. Raises `Complaint`."""
    there = published_data(config)
    found = []
    for root, digest in sorted(there.active.items()):
        kept = next((each for each in there.revisions if each.root == root and each.digest == digest), None)
        if kept is None or kept.bundle:
            why = f"are in the bundle at {kept.bundle}" if kept is not None else "are not there any more"
            raise Complaint(f"the data in force at {root_text(root) or '/'} {why}: name a folder of policy that has them")
        found.append(data_from_body(kept.document.body))
    return tuple(found)


def refuse_clashes(there: Published, root: Root) -> None:
    """Raises `Complaint` when there is no room for data at `root`."""
    for other in there.active:
        if other != root and overlap(other, root):
            names = [root_text(each) or "all of data" for each in (root, other)]
            raise Complaint(f"{names[0]} and {names[1]}, which has data, overlap; publish at the same root, or delete the other first")
    for field, revision in there.policies:
        # Of one behind a URL only those who have fetched it can tell.
        if not revision.bundle and (wrong := clash(revision.data, root)):
            name = "the active policy" if field == "revision" else f"the {field}"
            raise Complaint(f"{name} {short(revision.digest)} leaves no room for data at {root_text(root) or 'the root'}: {wrong}")


def change_data(config: str, action: str, reason: str, root: Root, digest: str, made: DataRevision | None = None) -> Changed:
    """Puts the revision `digest` in force at `root` (empty: none), and stores `made` in the same transaction, if it is given. Raises
    `Complaint`."""

    async def work(store: Store) -> Changed:
        for _ in range(TRIES):
            there = await store.get(DATA)
            spec = there.body.get("spec") if there is not None else None
            before = active_data_of(spec if isinstance(spec, Mapping) else None)
            after = {each: name for each, name in {**before, root: digest}.items() if name}
            if any(one != other and overlap(one, other) for one in after for other in after):
                raise Complaint(
                    f"data at a root that overlaps {root_text(root) or 'all of data'} have just been published by somebody else"
                )
            bodies = [active_data_body(after), *([data_body(made)] if made is not None else [])]
            documents = [document_of(body, f"policy {action}", json.dumps(body, sort_keys=True)) for body in bodies]
            try:
                await store.apply(documents, expect={DATA: there.version if there is not None else ABSENT})
            except StoreConflict:
                continue
            if made is not None:
                await _trim(store, root, set(after.values()))
            return Changed(before, after)
        raise Complaint("the ActiveData is being changed by others all the time; try again")

    return with_store(config, work, action, reason)


async def _trim(store: Store, root: Root, wanted: set[str]) -> None:
    """Takes the oldest revisions of a root away, when there are many."""
    documents, _ = await store.list("tollhouse.dev", "DataRevision")
    old = [each for each in documents if each.body["spec"]["root"] == root_text(root) and each.body["spec"]["digest"] not in wanted]
    if len(old) <= KEPT + SLACK:
        return
    old.sort(key=lambda each: int(each.version or 0))
    await store.delete([each.key for each in old[: len(old) - KEPT]])


def wait_for_data(config: str, after: Mapping[Root, str], timeout: float) -> None:
    """Waits until every gateway that reports decides by these data. Raises `Complaint` with those that do not in time."""
    from tollhouse.policy_switch import wait_for

    wanted = {root_text(root): digest for root, digest in after.items()}
    wait_for(config, DATA, active_data_body(after)["spec"], lambda report: report.data == wanted, timeout)


def named_data(there: Published, root: str, revision: str) -> Kept:
    """A revision at a root: the one in force, or the one whose digest or name begins with `revision`. Raises `Complaint`."""
    where = root_argument(root)
    kept = [each for each in there.revisions if each.root == where]
    if not kept:
        known = ", ".join(sorted({root_text(each.root) or "/" for each in there.revisions})) or "none"
        raise Complaint(f"no data have been published at {root}; there is {known}")
    if not revision:
        found = [each for each in kept if each.digest == there.active.get(where)]
        if not found:
            raise Complaint(f"no data are in force at {root}")
        return found[0]
    wanted = revision_name(revision)
    fitting = [each for each in kept if wanted and (revision_name(each.digest).startswith(wanted) or each.digest[7:].startswith(wanted))]
    if len(fitting) != 1:
        known = ", ".join(short(each.digest) for each in kept)
        raise Complaint(f"{revision} names {'more than one' if fitting else 'no'} revision of {root}; there is {known}")
    return fitting[0]


def data_history(config: str, root: str | None = None) -> list[Step]:
    """The changes of the data in force, the newest first; of one root, or of all. Raises `Complaint`."""
    from tollhouse.policy_switch import audit_entries

    wanted = None if root is None else root_argument(root)
    steps = []
    for entry in audit_entries(need_etcd(config)):
        for change in entry.changes:
            if change.kind != ACTIVE_DATA:
                continue
            before, after = active_data_of(change.before), active_data_of(change.after)
            for each in sorted({*before, *after}):
                old, new = before.get(each, ""), after.get(each, "")
                if old != new and wanted in (None, each):
                    steps.append(Step(entry.time, entry.action, entry.who, entry.reason, root_text(each), old, new))
    return steps


def data_before(config: str, root: Root, there: Published) -> str:
    """The digest of what was in force at a root before. Raises `Complaint`."""
    current = there.active.get(root, "")
    for step in data_history(config, root_text(root) or "/"):
        for digest in (step.after, step.before):
            if digest and digest != current:
                if digest not in {each.digest for each in there.revisions}:
                    raise Complaint(f"the data before, {short(digest)}, have been taken away; publish them again")
                return revision_digest(digest)
    raise Complaint(f"the history knows of no data at {root_text(root) or '/'} before these; see `tollhouse policy data list`")

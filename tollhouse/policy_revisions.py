"""Revisions as commands name them: a folder, or a published revision by its first digits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mesh.documents import Document
from mesh.policies import revision_from_body, revision_name
from mesh.policy import Revision
from mesh.policy_data import DataRevision, with_data
from pdp.authoring import inspect
from pdp.bundle_fetch import FetchProblem, fetch
from pdp.bundle_files import BundleProblem, read_bundle
from pdp.bundle_services import BundleServices
from pdp.engines.engine import PolicyError, PolicyProblem
from pdp.publish import without_tests
from tollhouse.output import Complaint
from tollhouse.parts import LazyPool, is_etcd
from tollhouse.policy_folder import read_folder
from tollhouse.policy_work import relabelled, text, with_pool

T = TypeVar("T")

LABEL = "tollhouse.dev/name"
"""The label of a PolicyRevision that names it for people; a name is one revision's at a time."""
SHORT = 19
"""Characters of a revision's name that tell it from others."""


def need_etcd(config: str) -> str:
    """`config`, which must name an etcd. Raises `Complaint`."""
    if not is_etcd(config):
        raise Complaint(
            "--config: revisions are kept in an etcd: write etcd://HOST:PORT; in a directory, what is in policy/ is in force", 2
        )
    return config


def published(config: str) -> tuple[list[Document], Mapping[str, Any]]:
    """The PolicyRevisions in an etcd, and the `spec` of the ActivePolicy (empty when there is none)."""
    from tollhouse.commands.config import with_store

    documents, _ = with_store(config, lambda store: store.list("tollhouse.dev"))
    active: Mapping[str, Any] = {}
    for document in documents:
        spec = document.body.get("spec")
        if document.key.kind == "ActivePolicy" and isinstance(spec, Mapping):
            active = spec
    return [document for document in documents if document.key.kind == "PolicyRevision"], active


def digest_like(name: str) -> str:
    """Why `name` can't be a revision's name besides its digest: it could be taken for the digits of another. Empty when it can."""
    if name.startswith("sha256") or not set(name) - set("0123456789abcdef"):
        return f"{name} could be the first digits of a revision; choose a name with other letters"
    return ""


def label_of(document: Document) -> str:
    """What people call a revision; empty for nothing."""
    metadata = document.body.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
    name = labels.get(LABEL) if isinstance(labels, Mapping) else None
    return name if isinstance(name, str) else ""


def labelled(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The body of a PolicyRevision with the name `name`; empty for none."""
    metadata = dict(body["metadata"])
    labels = {key: value for key, value in (metadata.pop("labels", None) or {}).items() if key != LABEL}
    if name:
        labels[LABEL] = name
    return {**body, "metadata": {**metadata, **({"labels": labels} if labels else {})}}


def named(documents: Sequence[Document], name: str) -> Document:
    """The one revision that is called `name`, or whose name or digest begins with it. Raises `Complaint`."""
    called = [document for document in documents if name and label_of(document) == name]
    if len(called) == 1:
        return called[0]
    wanted = revision_name(name)
    fitting = [
        document
        for document in documents
        if document.key.name.startswith(wanted) or document.key.name.removeprefix("sha256-").startswith(wanted)
    ]
    if len(fitting) != 1 or not wanted:
        there = ", ".join(document.key.name[:SHORT] for document in documents) or "none; publish one first"
        raise Complaint(f"{name or 'nothing'} names {'no' if not fitting else 'more than one'} revision; there is {there}")
    return fitting[0]


def revision_of(name: str, config: str) -> Revision:
    """A published revision. Raises `Complaint`."""
    if not config:
        raise Complaint(f"{name} is not a folder; for a published revision, say where: --config etcd://HOST:PORT", 2)
    documents, _ = published(need_etcd(config))
    document = named(documents, name)
    try:
        return revision_from_body(document.body)
    except (KeyError, TypeError, ValueError) as problem:
        raise Complaint(f"{document.key} cannot be read: {problem!r}") from None


async def whole(revision: Revision, pool: LazyPool) -> Revision:
    """A published revision with its modules and data, fetched if they are behind a URL. Raises `Complaint`, `EngineUnavailable`."""
    if not revision.bundle:
        return revision
    try:
        fetched = await fetch(revision.bundle, BundleServices())
        bundle = await read_bundle(pool, fetched.body or b"", None)
    except (FetchProblem, BundleProblem) as problem:
        raise Complaint(f"{revision.digest[:SHORT]} is a bundle behind a URL: {problem}; name its folder instead") from None
    if bundle.digest != revision.digest:
        raise Complaint(f"the bundle at {revision.bundle} has another content than {revision.digest[:SHORT]}; name its folder instead")
    return msgspec.structs.replace(revision, modules=bundle.modules, data=bundle.data)


class Named(msgspec.Struct, frozen=True):
    """What a command was given: a folder, or a published revision."""

    folder: Path | None = None
    revision: Revision | None = None
    parts: tuple[DataRevision, ...] = ()
    """Data with revisions of their own that go with a published one."""

    def shown(self, file: str) -> str:
        """Where the user finds a file that is named as in a revision."""
        return file if self.folder is None else relabelled(PolicyProblem(file=file), self.folder).file


def look_up(what: str, config: str, *, with_data_in_force: bool = False) -> Named:
    """What `what` names. A published revision has only its own data, or also those in force that have revisions of their own. Raises
    `Complaint`."""
    from tollhouse.policy_data import data_in_force

    folder = Path(what)
    if folder.is_dir():
        return Named(folder=folder)
    revision = revision_of(what, config)
    return Named(revision=revision, parts=data_in_force(config) if with_data_in_force else ())


async def entry_points(pool: LazyPool, named: Named) -> set[str]:
    """The decisions that a revision was published with; of a folder, those that METADATA calls entry points. Raises `Complaint`."""
    if named.revision is not None:
        return set(named.revision.entry_points)
    folder = named.folder or Path()
    try:
        found = read_folder(folder)
        names = (await inspect(pool, without_tests(found.modules), found.data)).entrypoints
    except PolicyError as problem:
        raise _said(problem, folder) from None
    return {name.removeprefix("data.") for name in names}


def _said(problem: PolicyError, folder: Path) -> Complaint:
    """What is wrong with a folder: all but the last is shown."""
    *others, last = [text(relabelled(each, folder)) for each in problem.problems]
    for each in others:
        Complaint(each).show()
    return Complaint(last)


async def resolved(pool: LazyPool, named: Named, decisions: Collection[str]) -> Revision:
    """The revision of `named`; of a folder, with those of the `decisions` that it has as entry points. Raises `Complaint`,
    `EngineUnavailable`."""
    if named.revision is not None:
        revision = await whole(named.revision, pool)
        try:
            return with_data(revision, named.parts) if named.parts else revision
        except ValueError as problem:
            raise Complaint(f"{short(revision.digest)}: {problem}") from None
    folder = named.folder or Path()
    try:
        found = read_folder(folder)
        modules = without_tests(found.modules)
        revision = await pool.compile(modules, found.data, ())
    except PolicyError as problem:
        raise _said(problem, folder) from None
    there = []
    for decision in sorted(decisions):
        try:
            await pool.compile(modules, found.data, (decision,))
        except PolicyError:
            continue
        there.append(decision)
    return await pool.compile(modules, found.data, there) if there else revision


def with_workers(work: Callable[[LazyPool], Awaitable[T]], allow: Sequence[str] = ()) -> T:
    """Does `work` with an OPA worker that evaluates. Raises `Complaint`."""
    return with_pool(Path(), work, workers=1, allow=allow)


def short(name: str) -> str:
    """A revision's name or digest as tables show it."""
    return name[:SHORT]

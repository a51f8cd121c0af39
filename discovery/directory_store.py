"""`DirectoryStore`: resources in files below a directory, one file each.

What people wrote stays theirs. A resource is replaced where it lives when that file holds nothing else and no comment that would be
lost; otherwise the one who applies is told which file to edit.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from discovery.files import MOST_FILE_BYTES, DirectoryProblem, scan
from discovery.keys import check_name
from discovery.policy_files import FOLDER
from discovery.store import ABSENT, Applied, StoreConflict, StoreError, StorePartly, check_once
from mesh.documents import Document, Key, Problem
from mesh.rereading import Rereader
from mesh.writing import document_to_yaml

MARK = "# Written by `tollhouse apply`, which replaces it the next time.\n"


class _Home(msgspec.Struct, frozen=True, kw_only=True):
    """The file in which a resource lives."""

    path: Path
    shared: bool
    """Whether it holds anything else."""
    commented: bool
    """Whether there is a comment in it that somebody wrote."""
    document: Document


class _Write(msgspec.Struct, frozen=True, kw_only=True):
    """One file to write."""

    document: Document
    path: Path
    new: bool


class DirectoryStore:
    """A `Store` over one directory; several processes may write to it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def where(self) -> str:
        """The store, for people."""
        return str(self._root)

    async def close(self) -> None:
        """Nothing is open."""

    async def apply(self, documents: Sequence[Document], *, expect: Mapping[Key, str] | None = None) -> Applied:
        """See `Store.apply`. Each file is replaced atomically, all of them within milliseconds (`DirectorySource` takes them together)."""
        check_once(documents)
        return await asyncio.to_thread(self._apply, documents, expect or {})

    async def get(self, key: Key) -> Document | None:
        """See `Store.get`."""
        homes, _ = await asyncio.to_thread(self._read)
        home = homes.get(key)
        return home.document if home else None

    async def list(
        self, group: str | None = None, kind: str | None = None, namespace: str | None = None
    ) -> tuple[tuple[Document, ...], tuple[Problem, ...]]:
        """See `Store.list`."""
        homes, problems = await asyncio.to_thread(self._read)
        wanted = [
            homes[key].document
            for key in sorted(homes)
            if group in {None, key.group} and kind in {None, key.kind} and namespace in {None, key.namespace}
        ]
        return tuple(wanted), problems

    async def delete(self, keys: Sequence[Key], *, expect: Mapping[Key, str] | None = None) -> tuple[Key, ...]:
        """See `Store.delete`."""
        return await asyncio.to_thread(self._delete, list(dict.fromkeys(keys)), expect or {})

    # -- in a thread ---------------------------------------------------------------------------------------------------------------

    def _apply(self, documents: Sequence[Document], expect: Mapping[Key, str]) -> Applied:
        with self._alone():
            homes, _ = self._read()
            unchanged: list[Key] = []
            writes: list[_Write] = []
            for document in documents:
                home = homes.get(document.key)
                if home is not None and home.document.body == document.body:
                    unchanged.append(document.key)
                    continue
                _check_version(document.key, home, expect)
                if home is not None:
                    _check_ours(document.key, home)
                path = home.path.resolve() if home else self._new_path(document.key, {each.path for each in writes})
                writes.append(_Write(document=document, path=path, new=home is None))
            _write(writes, self._root)
        return msgspec.structs.replace(_applied(writes), unchanged=tuple(unchanged))

    def _delete(self, keys: Sequence[Key], expect: Mapping[Key, str]) -> tuple[Key, ...]:
        with self._alone():
            homes, _ = self._read()
            there = {key: homes[key] for key in keys if key in homes}
            for key, home in there.items():
                _check_version(key, home, expect)
                if home.shared:
                    raise StoreError(f"{key} lives in {home.path} with others; take it out there")
            for home in there.values():
                try:
                    home.path.unlink(missing_ok=True)
                except OSError as error:
                    raise StoreError(f"{home.path} can't be deleted: {error.strerror}") from error
        return tuple(there)

    def _read(self) -> tuple[dict[Key, _Home], tuple[Problem, ...]]:
        homes: dict[Key, _Home] = {}
        problems: list[Problem] = []
        try:
            paths = [path for path in sorted(scan(self._root)) if not path.startswith(FOLDER + "/")]
        except DirectoryProblem as problem:
            if self._root.exists():
                raise StoreError(str(problem)) from problem
            return {}, ()
        for name in paths:
            path = self._root / name
            try:
                text = _contents(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problems.append(Problem(key=None, message=f"it can't be read: {error}", where=name))
                continue
            documents, wrong = Rereader(name).read(text)
            problems += wrong
            commented = path.suffix != ".json" and any(
                line.lstrip().startswith("#") or " #" in line for line in text.removeprefix(MARK).splitlines()
            )
            for document in documents:
                home = _Home(path=path, shared=len(documents) > 1 or bool(wrong), commented=commented, document=document)
                homes.setdefault(document.key, home)
        return homes, tuple(problems)

    def _new_path(self, key: Key, taken: set[Path]) -> Path:
        try:
            for part in filter(None, (key.kind, key.namespace, key.name)):
                check_name(part)
        except ValueError as error:
            raise StoreError(str(error)) from error
        stem = "-".join(part for part in (key.kind.lower(), key.namespace, key.name) if part).replace(":", "_")[:200]
        path = self._root / f"{stem}.yaml"
        if path.exists() or path in taken:
            digest = hashlib.sha256("/".join((key.group, key.kind, key.namespace, key.name)).encode()).hexdigest()[:8]
            path = self._root / f"{stem}-{digest}.yaml"
            if path.exists():
                raise StoreError(f"{path} is in the way: it does not hold {key}; move it")
        return path

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._root / ".tollhouse.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"{error.filename or self._root} can't be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _write(writes: Sequence[_Write], root: Path) -> None:
    """Writes all files beside their places, then moves each into its own."""
    ready: list[tuple[Path, Path]] = []
    done = 0
    try:
        for each in writes:
            mode = each.path.stat().st_mode & 0o777 if not each.new else 0o600 if each.document.key.kind == "Secret" else 0o644
            descriptor, name = tempfile.mkstemp(prefix=f".{each.path.name}.", dir=each.path.parent)
            ready.append((Path(name), each.path))
            with open(descriptor, "w") as file:  # noqa: PTH123 -- a descriptor
                os.fchmod(descriptor, mode)
                file.write(_text(each.document, each.path))
                file.flush()
                os.fsync(descriptor)
        for beside, path in ready:
            beside.replace(path)
            done += 1
    except OSError as error:
        message = f"{error.filename or root} can't be written: {error.strerror}"
        if done:
            raise StorePartly(message, _applied(writes[:done])) from error
        raise StoreError(message) from error
    finally:
        for beside, _ in ready[done:]:
            beside.unlink(missing_ok=True)


def _applied(writes: Sequence[_Write]) -> Applied:
    return Applied(
        created=tuple(each.document.key for each in writes if each.new),
        changed=tuple(each.document.key for each in writes if not each.new),
        atomic=len(writes) <= 1,
    )


def _contents(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MOST_FILE_BYTES + 1)
    if len(content) > MOST_FILE_BYTES:
        raise ValueError(f"it has more than {MOST_FILE_BYTES} bytes")
    return content.decode()


def _check_version(key: Key, home: _Home | None, expect: Mapping[Key, str]) -> None:
    if key in expect and expect[key] != (home.document.version if home else ABSENT):
        raise StoreConflict([key])


def _check_ours(key: Key, home: _Home) -> None:
    if home.shared:
        raise StoreError(f"{key} lives in {home.path} with others; change it there")
    if home.commented:
        raise StoreError(f"{key} lives in {home.path}, whose comments would be lost; change it there")


def _text(document: Document, path: Path) -> str:
    if path.suffix == ".json":
        return json.dumps(document.body, indent=2, ensure_ascii=False) + "\n"
    return MARK + document_to_yaml(document)

"""A directory's configuration from one look to the next. Synchronous; `discovery.directory` looks at it from a thread.

A change is taken when two looks in a row see the same files, none of them is being written, and they are still the same after they
were read: what was replaced together (Kubernetes swaps a symbolic link, `..data`) is applied together, and nothing half-written is. Files
that never come to rest hold the others up for `PATIENCE` only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from discovery import policy_files
from discovery.files import Busy, Stamp, read, scan
from discovery.policy_files import PolicyFile, put_together, read_policy_file
from discovery.source import Change, PolicyFiles
from mesh.documents import Document, Key, Problem
from mesh.rereading import Rereader

PATIENCE = 1.0
"""Seconds."""


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """What one file says, as it was last taken."""

    digest: bytes = b""
    documents: tuple[Document, ...] = ()
    policy: PolicyFile | None = None
    problems: tuple[Problem, ...] = ()
    reader: Rereader | None = None


_NOTHING = _File()


class Tree:
    """One directory. Owned by one `DirectorySource`; used from one thread at a time. `now` is monotonic seconds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pending = False
        """Whether the last look saw a change that has not come to rest."""
        self.digest = ""
        """Names what was handed out."""
        self.folders: dict[str, tuple[int, int]] = {}
        """Device and inode of each folder that the last look saw, by its path."""
        self._seen: dict[str, Stamp] = {}
        self._taken: dict[str, Stamp] = {}
        self._since: dict[str, tuple[Stamp | None, float]] = {}
        self._restless_since: float | None = None
        self._files: dict[str, _File] = {}
        self._documents: dict[Key, Document] = {}
        self._policy = PolicyFiles()
        self._problems: tuple[Problem, ...] = ()

    @property
    def count(self) -> tuple[int, int]:
        """How many resources in how many files."""
        return len(self._documents), len(self._files)

    def forget(self) -> None:
        """The next looks read every file again."""
        self._taken = dict.fromkeys(self._taken, Stamp(0, 0, 0, 0, 0))

    def look(self, now: float) -> Change | None:
        """Looks at the directory. Returns what has changed since the last change that was returned. Raises DirectoryProblem."""
        folders: dict[str, tuple[int, int]] = {}
        seen = scan(self.root, folders)
        self.folders = folders
        before, self._seen = self._seen, seen
        if seen == self._taken:
            self.pending, self._restless_since = False, None
            self._since.clear()
            return None
        if self._restless_since is None:
            self._restless_since = now
        impatient = now - self._restless_since >= PATIENCE
        changed = [path for path in {**seen, **self._taken} if seen.get(path) != self._taken.get(path)]
        for path in changed:
            if path not in self._since or self._since[path][0] != seen.get(path):
                self._since[path] = (seen.get(path), now)
        self.pending = True
        resting = [path for path in changed if before.get(path) == seen.get(path) and self._since[path][1] < now]
        if len(resting) < len(changed) and not impatient:
            return None
        contents = self._read(resting, seen, now, impatient)
        if contents is None or (not impatient and scan(self.root) != seen):
            return None
        self._take(contents, seen)
        self.pending = seen != self._taken
        if not self.pending:
            self._restless_since = None
            self._since.clear()
        return self._change()

    def everything(self) -> Change:
        """All that is known, as a first state."""
        has_policy = bool(self._policy.modules) or self._policy.data != b"{}"
        return Change(
            upserts=tuple(self._documents.values()),
            problems=self._problems,
            policy=self._policy if has_policy else None,
            replace=True,
        )

    def _read(self, paths: list[str], seen: dict[str, Stamp], now: float, impatient: bool) -> dict[str, bytes | str | None] | None:
        """The content of each file; None for one that is gone, a string that says why it can't be read. None: come back later."""
        contents: dict[str, bytes | str | None] = {}
        for path in paths:
            stamp = seen.get(path)
            if stamp is None:
                contents[path] = None
                continue
            quiet_for = now - self._since[path][1]
            emptied = stamp.size == 0 and self._files.get(path, _NOTHING).documents and quiet_for < PATIENCE
            if emptied:  # the first half of many ways to write a file
                if not impatient:
                    return None
                continue
            try:
                contents[path] = read(self.root / path, stamp, quiet_for)
            except Busy:
                if not impatient:
                    return None
            except OSError as error:
                contents[path] = f"it can't be read: {error.strerror}"
            except ValueError as error:
                contents[path] = str(error)
        return contents

    def _take(self, contents: dict[str, bytes | str | None], seen: dict[str, Stamp]) -> None:
        for path, content in contents.items():
            if content is None:
                self._files.pop(path, None)
                self._taken.pop(path, None)
                continue
            known = self._files.get(path, _NOTHING)
            if isinstance(content, str):
                self._files[path] = _kept(path, known, b"", content)
            else:
                digest = hashlib.sha256(content).digest()
                if digest != known.digest:
                    take = _policy if _is_policy(path) else _resources
                    self._files[path] = take(path, content, digest, known)
            self._taken[path] = seen[path]

    def _change(self) -> Change | None:
        documents: dict[Key, Document] = {}
        problems: list[Problem] = []
        for _, file in sorted(self._files.items()):
            problems += file.problems
            for document in file.documents:
                first = documents.setdefault(document.key, document)
                if first is not document:
                    problems.append(_twice(first, document))
        policy, clashes = put_together({path: file.policy for path, file in self._files.items() if file.policy is not None})
        problems += clashes
        before, self._documents = self._documents, documents
        old_policy, self._policy = self._policy, policy
        old_problems, self._problems = self._problems, tuple(problems)
        self.digest = _digest(documents, policy)
        change = Change(
            upserts=tuple(document for key, document in documents.items() if before.get(key) != document),
            deletes=tuple(key for key in before if key not in documents),
            problems=self._problems,
            policy=policy if policy != old_policy else None,
        )
        if change.upserts or change.deletes or change.policy is not None or old_problems != self._problems:
            return change
        return None


def _is_policy(path: str) -> bool:
    return path.startswith(policy_files.FOLDER + "/")


def _resources(path: str, content: bytes, digest: bytes, known: _File) -> _File:
    reader = known.reader or Rereader(path)
    try:
        documents, problems = reader.read(content.decode())
    except UnicodeDecodeError as error:
        return _kept(path, known, digest, f"it is not UTF-8: {error.reason} at byte {error.start}")
    if not problems:
        return _File(digest=digest, documents=documents, reader=reader)
    # What is missing may have been taken out or be the part that can't be read: it stays, until the file is right again.
    keys = {document.key for document in documents}
    kept = tuple(document for document in known.documents if document.key not in keys)
    return _File(
        digest=digest,
        documents=documents + kept,
        problems=tuple(msgspec.structs.replace(problem, kept=True) for problem in problems) if kept else problems,
        reader=reader,
    )


def _policy(path: str, content: bytes, digest: bytes, known: _File) -> _File:
    try:
        return _File(digest=digest, policy=read_policy_file(path, content))
    except ValueError as error:
        return _kept(path, known, digest, str(error))


def _kept(path: str, known: _File, digest: bytes, message: str) -> _File:
    kept = bool(known.documents) or known.policy is not None
    problem = Problem(key=None, message=message, where=path, kept=kept)
    return _File(digest=digest, documents=known.documents, policy=known.policy, problems=(problem,), reader=known.reader)


def _twice(first: Document, second: Document) -> Problem:
    return Problem(
        key=second.key,
        message=f"it is in {first.origin.at(())} as well, and that one is in force; take one of them out",
        where=second.origin.at(()),
        reason="Conflict",
    )


def _digest(documents: dict[Key, Document], policy: PolicyFiles) -> str:
    def parts() -> Iterator[str]:
        for key in sorted(documents):
            yield f"{key.group}/{key.kind}/{key.namespace}/{key.name}={documents[key].version}"
        for name in sorted(policy.modules):
            yield f"{name}={hashlib.sha256(policy.modules[name].encode()).hexdigest()}"
        yield hashlib.sha256(policy.data).hexdigest()

    return hashlib.sha256("\n".join(parts()).encode()).hexdigest()[:16]

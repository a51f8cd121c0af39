"""`Store`: what `apply`, `get` and `delete` write to, the same over etcd and over a directory.

Nothing is lost between two writers: what was read is compared again in the moment of writing. `expect` makes that the caller's: it
names the versions that the caller has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from mesh.documents import Document, Key, Problem

if TYPE_CHECKING:
    from discovery.audit import Audit

ABSENT = ""
"""The version of a resource that isn't there, for `expect`."""


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What an `apply` did."""

    created: tuple[Key, ...] = ()
    changed: tuple[Key, ...] = ()
    unchanged: tuple[Key, ...] = ()
    atomic: bool = True
    """Whether all of it happened at one instant."""


class StoreError(Exception):
    """The store could not do it, in one sentence. Nothing was written, unless it is a `StorePartly`."""


class StoreConflict(StoreError):
    """Somebody else changed a resource since it was read: read it again."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = tuple(keys)
        names = ", ".join(map(str, self.keys[:5])) + (f" and {len(self.keys) - 5} more" if len(self.keys) > 5 else "")
        super().__init__(f"{names}: changed since it was read; read it again, make the change anew and apply that")


class StorePartly(StoreError):
    """It failed when some of it was done already."""

    def __init__(self, message: str, done: Applied) -> None:
        self.done = done
        count = len(done.created) + len(done.changed)
        super().__init__(f"{message}; {count} resources before that are written: apply again to write the others")


class Store(Protocol):
    """Where resources are kept."""

    @property
    def where(self) -> str:
        """The store, for people."""
        ...

    async def apply(self, documents: Sequence[Document], *, expect: Mapping[Key, str] | None = None) -> Applied:
        """Makes the store hold these resources. `expect`: versions (`Document.version`, `ABSENT`) that must be there still.

        Raises StoreError; StoreConflict where `expect` does not hold and the resource isn't as wanted already.
        """
        ...

    async def get(self, key: Key) -> Document | None:
        """One resource; None when it isn't there. Raises StoreError; also when it is there and can't be read."""
        ...

    async def list(
        self, group: str | None = None, kind: str | None = None, namespace: str | None = None
    ) -> tuple[tuple[Document, ...], tuple[Problem, ...]]:
        """All resources (None: any), by key, and what can't be read. Raises StoreError."""
        ...

    async def delete(self, keys: Sequence[Key], *, expect: Mapping[Key, str] | None = None) -> tuple[Key, ...]:
        """Takes resources away. Returns those that were there. Raises StoreError."""
        ...

    async def close(self) -> None:
        """Ends the connection, if there is one."""
        ...


def check_once(documents: Sequence[Document]) -> None:
    """Raises StoreError when a resource is there twice."""
    seen: dict[Key, Document] = {}
    for document in documents:
        first = seen.setdefault(document.key, document)
        if first is not document:
            raise StoreError(f"{document.key} is there twice, in {first.origin.at(())} and {document.origin.at(())}; take one of them out")


def open_store(where: str, audit: Audit | None = None) -> Store:
    """The store that an etcd URL or a directory names. Raises ValueError for a bad URL. `audit`: what an etcd's changes of policy are
    written down with; a directory has the history that its owner gives it."""
    if "://" in where:
        from discovery.address import parse_etcd_url
        from discovery.etcd import Etcd
        from discovery.etcd_store import EtcdStore

        return EtcdStore(Etcd(parse_etcd_url(where)), audit)
    from discovery.directory_store import DirectoryStore

    return DirectoryStore(Path(where))

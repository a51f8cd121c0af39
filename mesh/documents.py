"""A resource as it was written: what it is, what it says and where it says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

FieldPath = tuple[str | int, ...]


class Key(msgspec.Struct, frozen=True, order=True):
    """Names one resource. `group` is empty for the core group; `namespace` is empty for a kind that has none."""

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class Origin(msgspec.Struct, frozen=True):
    """Where a resource was written."""

    source: str
    """A file's path, or `etcd <key> at revision <n>`."""
    line: int = 0
    """1-based line of the document's first field; 0 where there are no lines."""
    lines: Mapping[FieldPath, int] = {}
    """The line of each field."""
    above: int = 0
    """How many lines of the text come before the one that `line` and `lines` count from."""

    def at(self, path: FieldPath) -> str:
        """`routes.yaml:14`: the line of the deepest part of `path` that is known, or the source alone."""
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path, self.line)
        return f"{self.source}:{line + self.above}" if line else self.source


class Document(msgspec.Struct, frozen=True):
    """One resource: `body` is the whole of it (`apiVersion`, `kind`, `metadata`, `spec`, ...), as plain JSON types."""

    key: Key
    body: Mapping[str, Any]
    origin: Origin
    version: str = ""
    """Changes whenever the body does: etcd's mod_revision, or a digest of a file's document."""


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One running copy of a service, as it registered itself (`/tollhouse/services/<namespace>/<service>/<instance>`).

    It says where it is, never who it is: that comes from `ServiceIdentity`.
    """

    namespace: str
    service: str
    instance: str
    address: str
    """IP address in text."""
    ports: dict[str, int]
    """Port name to number; the empty name stands for an unnamed port."""
    zone: str = ""
    weight: int = 1
    ready: bool = True


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something wrong in the configuration, worded for the one who wrote it."""

    key: Key | None
    """The resource it is about, if it could be told."""
    path: FieldPath = ()
    message: str
    """One sentence: what is wrong and what to do instead."""
    where: str = ""
    """`routes.yaml:14`."""
    reason: str = "Invalid"
    """The condition's reason in Gateway API's words (`InvalidKind`, `BackendNotFound`, `RefNotPermitted`, ...)."""
    severity: str = "error"
    """`error`: the resource (or the part) is not in force; `warning`: it is, but look at it."""
    kept: bool = False
    """True when the last good version of the resource stays in force."""

    def __str__(self) -> str:
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")
        if not field.isprintable():
            # What somebody wrote into a file must not be able to begin a line of the log.
            field = field.encode("unicode_escape").decode("ascii")
        parts = [str(self.key)] if self.key else []
        parts += [field] if field else []
        return ": ".join([*parts, self.message]) + (f" ({self.where})" if self.where else "")

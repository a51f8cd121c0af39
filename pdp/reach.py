"""What `pdp.readset` deals in: places, what locals may hold, and what it finds out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from mesh.policy import Path, ReadSet

Constant = str | int | tuple[str | int, ...]


class Place(NamedTuple):
    """Something below `input` (local 0) or `data` (local 1)."""

    root: int
    path: Path


class Value(NamedTuple):
    """What a local may hold."""

    places: frozenset[Place] = frozenset()
    """What it may be an alias of; empty for something derived."""
    constant: Constant | None = None


class Why(NamedTuple):
    """Why the whole value at a place is read, for people."""

    reason: str
    file: str
    row: int


class Reach(NamedTuple):
    """What the interpreter found out about one entry point."""

    reads: ReadSet
    data: frozenset[Path]
    """Paths of `data` whose values are read; `()` is all of it."""
    data_defined: frozenset[Path]
    """Paths of `data` of which only the definedness is read."""
    why: Mapping[Path, Why] = {}
    """For paths of `input` whose values are read: what reads them first."""
    seen: Mapping[Path, Why] = {}
    """For all paths of `input` that are followed: where that is first done."""


DERIVED: Final = Value()

"""Data with revisions of their own, and how they come into a revision of policy.

A `DataRevision` is what is at one path below `data`, its root. It changes without the policy: nothing is compiled again, and an entry point
that does not reach what changed keeps its digest, and with it what is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from mesh.policy import EntryPoint, Path, Revision

Root = tuple[str, ...]
"""Names below `data`; empty for all of it."""
ABSENT: Final = "absent"
_level = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[msgspec.Raw])


class DataRevision(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the data at one root."""

    digest: str
    """`sha256:<hex>` over root and value."""
    root: Root
    value: bytes = b""
    """JSON in canonical form; empty where it is behind a URL."""
    bundle: str = ""
    """URL of an OPA bundle in which it is, below its root."""


def root_of(text: str) -> Root:
    """The root that is written `shop/grants`; empty for all data. Raises ValueError for one that can't be."""
    if not text:
        return ()
    parts = tuple(text.split("/"))
    if not all(part and part.isprintable() for part in parts) or len(parts) > 32:
        raise ValueError(f"{text[:80]!r} is not a path below data; write it as in shop/grants")
    return parts


def root_text(root: Root) -> str:
    """A root as people write it."""
    return "/".join(root)


def overlap(one: Root, other: Root) -> bool:
    """Whether one of two roots is at or below the other."""
    length = min(len(one), len(other))
    return one[:length] == other[:length]


def canonical_value(value: Any) -> bytes:
    """The one form of a JSON value. Raises ValueError for what is none."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, RecursionError) as problem:
        raise ValueError(f"it is not JSON: {problem}") from None


def data_digest(root: Root, value: bytes) -> str:
    """The digest that names the revision of a value in canonical form at a root."""
    whole = hashlib.sha256(b"tollhouse data 1\n")
    named = json.dumps(root).encode()
    whole.update(len(named).to_bytes(8, "big") + named)
    whole.update(value)
    return "sha256:" + whole.hexdigest()


def value_at(data: bytes, path: Iterable[str | int]) -> bytes | None:
    """What is at a path of a JSON document, as it is written there; None when there is nothing."""
    here = data
    for part in path:
        try:
            if isinstance(part, int):
                items = _items.decode(here)
                if part >= len(items):
                    return None
                here = bytes(items[part])
                continue
            found = _level.decode(here).get(part)
        except msgspec.DecodeError:  # it is something else
            return None
        if found is None:
            return None
        here = bytes(found)
    return here


def clash(data: bytes, root: Root) -> str:
    """Why data of a revision's own leave no room for others at `root`; empty when they do. Raises nothing."""
    if not root:
        return "" if not _level.decode(data or b"{}") else "it has data of its own, and all of data is to be another revision's"
    here = data or b"{}"
    for length, name in enumerate(root, 1):
        try:
            found = _level.decode(here).get(name)
        except msgspec.DecodeError:
            return f"its own data has data.{'.'.join(root[: length - 1])}, which is no object"
        if found is None:
            return ""
        here = bytes(found)
    return f"its own data has data.{'.'.join(root)}, too"


def with_data(revision: Revision, parts: Sequence[DataRevision], *, merged: bool = True) -> Revision:
    """`revision` with `parts` in its data: another revision, whose digest is that of its policy and of its parts. `merged=False`: for a
    process that does not evaluate, and may not have the policy's own data. Raises ValueError when a part clashes with those."""
    data = revision.data
    if merged:
        for part in parts:
            if wrong := clash(revision.data, part.root):
                raise ValueError(f"the data at {root_text(part.root) or 'the root'} clash with the policy: {wrong}")
        for part in parts:
            data = _put(data or b"{}", part.root, part.value)
    told = sorted((root_text(part.root), part.digest) for part in parts)
    digest = hashlib.sha256(msgspec.json.encode(["tollhouse revision with data 1", revision.digest, told])).hexdigest()
    return msgspec.structs.replace(
        revision,
        digest=f"sha256:{digest}",
        published=revision.digest,
        parts=tuple(told),
        data=data,
        entry_points={path: _entry(point, parts) for path, point in revision.entry_points.items()},
    )


def _put(data: bytes, root: Root, value: bytes) -> bytes:
    if not root:
        return value
    level = _level.decode(data)
    below = bytes(level[root[0]]) if root[0] in level else b"{}"
    level[root[0]] = msgspec.Raw(_put(below, root[1:], value))
    return msgspec.json.encode(level)


def _entry(point: EntryPoint, parts: Sequence[DataRevision]) -> EntryPoint:
    """The entry point, with a digest that covers what it can reach of `parts`."""
    reached: list[tuple[str, str, Any]] = []
    for part in parts:
        name = root_text(part.root)
        if point.data is None:
            reached.append((name, "", part.digest))
            continue
        for path in point.data:
            if (below := _below(path, part.root)) is not None:
                reached.append((name, json.dumps(path), _digest_at(part, below)))
        for path in point.data_defined:
            if (below := _below(path, part.root)) is not None:
                reached.append((name, f"defined {json.dumps(path)}", not below or value_at(part.value, below) is not None))
    if not reached:
        return point
    told = msgspec.json.encode(["tollhouse entry point with data 1", point.digest, sorted(reached, key=lambda each: each[:2])])
    return msgspec.structs.replace(point, digest=hashlib.sha256(told).hexdigest())


def _below(path: Path, root: Root) -> Path | None:
    """What `path` reads of the data at `root`: a path below it (empty for all), or None for nothing of it."""
    length = min(len(path), len(root))
    return path[len(root) :] if path[:length] == root[:length] else None


def _digest_at(part: DataRevision, below: Path) -> str:
    if not below:
        return part.digest
    found = value_at(part.value, below)
    return ABSENT if found is None else hashlib.sha256(found).hexdigest()

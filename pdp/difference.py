"""What two revisions of policy have in common, and what not: modules, data, decisions, and what those read. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from mesh.policy import EntryPoint, Revision
from pdp.report import report


class ModuleChange(msgspec.Struct, frozen=True, kw_only=True):
    """A module that is not the same."""

    name: str
    change: str
    """`added`, `removed` or `changed`."""
    added: int = 0
    """Lines."""
    removed: int = 0
    text: str = ""
    """The difference, as `diff -u` writes it."""


class DecisionChange(msgspec.Struct, frozen=True, kw_only=True):
    """A decision that is not the same."""

    path: str
    change: str
    """`added`, `removed`, or `changed`: it may answer otherwise, and what is kept of it is asked anew."""
    reads_more: tuple[str, ...] = ()
    reads_less: tuple[str, ...] = ()
    keepable: tuple[bool, bool] = (True, True)
    """Whether its answers may be kept, before and after."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is not the same."""

    modules: tuple[ModuleChange, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    """Paths below `data`, each `added`, `removed` or `changed`."""
    decisions: tuple[DecisionChange, ...] = ()
    same: tuple[str, ...] = ()
    """Decisions whose answers are the same, whatever else changed."""


def difference(before: Revision, after: Revision) -> Difference:
    """What is not the same in `after`."""
    names = sorted(before.modules.keys() | after.modules.keys())
    modules = (_module(name, before.modules.get(name), after.modules.get(name)) for name in names)
    old, new = before.entry_points, after.entry_points
    paths = sorted(old.keys() | new.keys())
    return Difference(
        modules=tuple(change for change in modules if change is not None),
        data=tuple(_data(msgspec.json.decode(before.data), msgspec.json.decode(after.data), ())),
        decisions=tuple(change for path in paths if (change := _decision(path, old.get(path), new.get(path))) is not None),
        same=tuple(path for path in paths if path in old and path in new and old[path].digest == new[path].digest),
    )


def _module(name: str, before: str | None, after: str | None) -> ModuleChange | None:
    if before == after:
        return None
    old, new = (before or "").splitlines(), (after or "").splitlines()
    lines = list(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm=""))
    body = lines[2:]
    return ModuleChange(
        name=name,
        change="added" if before is None else "removed" if after is None else "changed",
        added=sum(line.startswith("+") for line in body),
        removed=sum(line.startswith("-") for line in body),
        text="\n".join(lines),
    )


def _data(before: Any, after: Any, at: tuple[str, ...]) -> list[tuple[str, str]]:
    """The topmost places that are not the same: down to the third level, below which it is one change."""
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping) and len(at) < _DEEPEST:
        found: list[tuple[str, str]] = []
        for name in sorted(before.keys() | after.keys()):
            path = (*at, name)
            if name not in before:
                found.append((".".join(("data", *path)), "added"))
            elif name not in after:
                found.append((".".join(("data", *path)), "removed"))
            else:
                found += _data(before[name], after[name], path)
        return found
    return [(".".join(("data", *at)), "changed")]


_DEEPEST = 3


def _decision(path: str, before: EntryPoint | None, after: EntryPoint | None) -> DecisionChange | None:
    if before is not None and after is not None and before.digest == after.digest:
        return None
    old = report(before).reads if before is not None else ()
    new = report(after).reads if after is not None else ()
    return DecisionChange(
        path=path,
        change="added" if before is None else "removed" if after is None else "changed",
        reads_more=tuple(each for each in new if each not in old),
        reads_less=tuple(each for each in old if each not in new),
        keepable=(before is None or before.keepable, after is None or after.keepable),
    )

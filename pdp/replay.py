"""What has been decided, decided again by another revision: who gains access, who loses it, and of whom it can't be told.

Pure: events of a decision log (ours, or OPA's own) and new answers go in, changes come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal
from urllib.parse import unquote

import msgspec

from mesh.policy import Path, ReadSet
from mesh.questions import Decision

Change = Literal["gains", "loses", "differs", "unsure", "same"]
"""`gains`: was not allowed, is now. `loses`: was allowed, is not now. `differs`: a denial became an error, or the other way round.
`unsure`: what the policy reads of it was masked."""
CHANGES: Final[tuple[Change, ...]] = ("loses", "gains", "differs", "unsure", "same")


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a decision log, as far as it matters here."""

    path: str
    """The decision: `shop.authz.decision`."""
    document: Mapping[str, Any]
    """The input, as far as it was written."""
    hidden: tuple[tuple[str, ...], ...] = ()
    """Paths below the input whose values were replaced."""
    erased: tuple[tuple[str, ...], ...] = ()
    """Paths below the input that were taken out."""
    verdict: str = ""
    """`allow`, `deny` or `error`."""
    rule: str = ""
    reason: str = ""
    caller: str = ""
    request: str = ""
    """The request's id, or else the decision's."""
    revision: str = ""
    enforced: bool = True
    provider: str = ""

    @property
    def method(self) -> str:
        """The request's method; empty below HTTP."""
        return str(at(self.document, ("attributes", "request", "http", "method")) or "")

    @property
    def target(self) -> str:
        """The request's path; empty below HTTP."""
        return str(at(self.document, ("attributes", "request", "http", "path")) or "")


class Row(msgspec.Struct, frozen=True):
    """What is grouped: changes of one kind, of one caller, from one rule to another."""

    change: Change
    caller: str
    path: str
    before: str
    """The verdict before, with its rule or reason."""
    after: str


class Group(msgspec.Struct):
    """How many changes there are of a row, and one of them."""

    count: int = 0
    example: str = ""
    """The id of a request."""
    asked: str = ""
    """Its method and path."""


class Tally:
    """Counts changes by row."""

    __slots__ = ("counts", "groups")

    def __init__(self) -> None:
        self.counts: dict[Change, int] = dict.fromkeys(CHANGES, 0)
        self.groups: dict[Row, Group] = {}

    def add(self, event: Recorded, change: Change, before: str, after: str) -> None:
        """Counts one change; what is the same has no row."""
        self.counts[change] += 1
        if change == "same":
            return
        group = self.groups.setdefault(Row(change, event.caller, event.path, before, after), Group())
        group.count += 1
        if not group.example:
            group.example, group.asked = event.request, f"{event.method} {event.target}".strip()

    @property
    def rows(self) -> list[tuple[Row, Group]]:
        """The groups: losses first, and the largest of a kind first."""
        return sorted(self.groups.items(), key=lambda item: (CHANGES.index(item[0].change), -item[1].count, item[0].caller, item[0].before))


def change_of(before: str, after: str) -> Change:
    """The change from one verdict (`allow`, `deny`, `error`) to another."""
    if before == after:
        return "same"
    if after == "allow":
        return "gains"
    return "loses" if before == "allow" else "differs"


def told(verdict: str, rule: str, reason: str) -> str:
    """A verdict and what the policy says of it, for people."""
    more = rule or reason
    return f"{verdict}: {more}" if more else verdict


def told_of(decision: Decision) -> str:
    """The same of a decision."""
    return told(decision.verdict.value, decision.rule, decision.reason)


def recorded(event: Mapping[str, Any]) -> Recorded | None:
    """An event of a decision log; None for one that has nothing to decide anew (no path, or no input). Raises ValueError."""
    path, document = event.get("path"), event.get("input")
    if not isinstance(path, str) or not path or not isinstance(document, Mapping):
        return None
    custom = event.get("custom")
    custom = custom if isinstance(custom, Mapping) else {}
    result = event.get("result")
    fields = result if isinstance(result, Mapping) else {}
    bundles = event.get("bundles")
    ours = bundles.get("tollhouse") if isinstance(bundles, Mapping) else None
    return Recorded(
        path=".".join(part for part in path.removeprefix("data/").replace("/", ".").split(".") if part),
        document=document,
        hidden=_below_input(event.get("masked")),
        erased=_below_input(event.get("erased")),
        verdict=str(custom.get("verdict") or _verdict(event)),
        rule=str(custom.get("rule") or fields.get("rule") or ""),
        reason=str(custom.get("reason") or fields.get("reason") or ""),
        caller=str(custom.get("caller") or at(document, ("attributes", "source", "principal")) or ""),
        request=str(custom.get("request_id") or event.get("decision_id") or ""),
        revision=str((ours.get("revision") if isinstance(ours, Mapping) else "") or ""),
        enforced=not custom.get("shadow"),
        provider=str(custom.get("provider") or ""),
    )


def _verdict(event: Mapping[str, Any]) -> str:
    result = event.get("result")
    allowed = result.get("allowed") if isinstance(result, Mapping) else result
    return "error" if not isinstance(allowed, bool) or event.get("error") else "allow" if allowed else "deny"


def _below_input(pointers: Any) -> tuple[tuple[str, ...], ...]:
    found = []
    for pointer in pointers if isinstance(pointers, list) else []:
        parts = [unquote(part) for part in str(pointer).split("/")[1:]]
        if parts and parts[0] == "input":
            found.append(tuple(parts[1:]))
    return tuple(found)


def at(document: Any, path: Iterable[str]) -> Any:
    """What is at a path of an object of objects; None when there is nothing."""
    for part in path:
        document = document.get(part) if isinstance(document, Mapping) else None
    return document


def missing(event: Recorded, reads: ReadSet) -> tuple[str, ...]:
    """Which of the values that an entry point reads are not in the event: paths below the input, as JSON pointers."""
    found: dict[tuple[str, ...], None] = {}
    for pointer in (*event.hidden, *event.erased):
        gone = pointer in event.erased
        if (
            any(_one_in_the_other(pointer, path) for path in reads.values)
            or any(_above(pointer, path, gone) for path in reads.defined)
            or any(_above(pointer, path, True) for path in (*reads.lengths, *reads.kinds))
            or (gone and any(pointer[:-1] == _text(path) for path in reads.lengths))
        ):
            found[pointer] = None
    return tuple("/" + "/".join(("input", *pointer)) for pointer in found)


def _one_in_the_other(pointer: tuple[str, ...], path: Path) -> bool:
    return all(one == other for one, other in zip(pointer, _text(path), strict=False))


def _above(pointer: tuple[str, ...], path: Path, itself: bool) -> bool:
    """Whether `pointer` is above `path`; or, with `itself`, is it."""
    read = _text(path)
    return read[: len(pointer)] == pointer and (itself or len(pointer) < len(read))


def _text(path: Path) -> tuple[str, ...]:
    return tuple(str(part) for part in path)

"""Why a request was refused: what its decisions say, told from the events that a decision log has of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from pdp.replay import Recorded, recorded


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """One decision of a request."""

    event: Mapping[str, Any]
    record: Recorded
    policy: str
    """`namespace/name` of the AccessPolicy, or `mesh`."""
    level: str
    kept: bool
    at: int
    """Which decision of the request it is, in the order in which they were asked."""

    @property
    def refuses(self) -> bool:
        """Whether it is one that may have refused the request."""
        return self.record.enforced and self.record.verdict != "allow"


def decisions_of(events: Iterable[Mapping[str, Any]], wanted: str) -> list[Told]:
    """The decisions of the request `wanted` (its id, or the id of one of its decisions), in the order in which they were asked."""
    found: list[Told] = []
    other: list[Told] = []
    for event in events:
        custom = event.get("custom")
        custom = custom if isinstance(custom, Mapping) else {}
        by_request = custom.get("request_id") == wanted
        if not by_request and event.get("decision_id") != wanted:
            continue
        document = event.get("input")
        shown = {"path": custom.get("provider") or "?", **event, "input": document if isinstance(document, Mapping) else {}}
        record = recorded(shown)
        if record is None:
            continue
        one = Told(
            event=event,
            record=record,
            policy=str(custom.get("policy") or ""),
            level=str(custom.get("level") or ""),
            kept=bool(custom.get("kept")),
            at=len(found) + len(other),
        )
        (found if by_request else other).append(one)
    return found or other


def culprit(decisions: list[Told]) -> Told | None:
    """The decision that ended the request; None when none did. What could not be answered ended it only where the response flag says so:
    its policy may let such requests pass."""
    for one in decisions:
        if one.refuses and (one.record.verdict == "deny" or _flag(one) in {"UAEE", ""}):
            return one
    return None


def _flag(one: Told) -> str:
    custom = one.event.get("custom")
    return str(custom.get("response_flags") or "") if isinstance(custom, Mapping) else ""


def sentence(decisions: list[Told]) -> str:
    """What became of the request, and why."""
    first, by = decisions[0], culprit(decisions)
    custom = first.event.get("custom")
    custom = custom if isinstance(custom, Mapping) else {}
    status, flag = custom.get("response_code"), custom.get("response_flags")
    answered = f" The client got {status} ({flag})." if status else ""
    if by is None:
        return f"No policy refused it.{answered}"
    what = f"rule {by.record.rule!r}" if by.record.rule else "no rule that it names"
    why = f": {by.record.reason}" if by.record.reason else ""
    verb = "denied" if by.record.verdict == "deny" else "could not be decided"
    where = f"the policy {by.policy}" + (f", attached at the level {by.level}" if by.level and by.policy != by.level else "")
    decision = f" ({by.record.path})" if by.record.path != "?" else ""
    return f"It {'was ' if verb == 'denied' else ''}{verb} by {where}{decision}, {what}{why}.{answered}"

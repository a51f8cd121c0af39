"""What another revision, or a policy in shadow mode, would have decided otherwise: counted, and shown by rule and caller.

Rows are bounded, each has one request as an example. Compared are the answers to one policy about one request: the one that was enforced,
and the one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from mesh.outcome import Outcome
from mesh.questions import Decision, DecisionQuestion, Verdict
from telemetry.metrics import Counter
from telemetry.text import moment, path_of, shown

Kind = Literal["shadow", "canary", "mode"]
"""What is tried: a shadow revision, a revision that decides for some, a policy in shadow mode."""

MOST_ROWS: Final = 1000
LONGEST: Final = 200
"""Characters of a rule or a reason."""
_LESS: Final = "(more)"


class Row(msgspec.Struct, frozen=True):
    """What is grouped."""

    kind: Kind
    revision: str
    """The digest of what is tried; empty for a policy in shadow mode."""
    change: str
    """`gains`, `loses`, `differs` or `error`; see `change_of`."""
    policy: str
    caller: str
    before: str
    """The verdict without it, with its rule or reason."""
    after: str
    """The verdict with it."""


class Seen(msgspec.Struct):
    """How often, and one of them."""

    count: int = 0
    request_id: str = ""
    asked: str = ""
    """Method and path, without the query."""
    time: str = ""


class Trials:
    """Compares decisions. One for a process; the data path calls `compare` for what is not enforced alone."""

    __slots__ = ("_counter", "left_out", "rows")

    def __init__(self, counter: Counter) -> None:
        """`counter` has the labels kind, policy, revision and change."""
        self._counter = counter
        self.rows: dict[Row, Seen] = {}
        self.left_out = 0
        """Differences that no row was left for."""

    def compare(self, outcome: Outcome, asked: DecisionQuestion, decision: Decision) -> None:
        """Counts what a decision that is not enforced would have changed about the request of `outcome`."""
        kind, tried, before, after = _sides(outcome, asked, decision)
        revision = tried.revision.policy if tried.revision is not None and kind != "mode" else ""
        change = change_of(before, after)
        policy = asked.policy.name
        self._counter.inc((kind, policy, revision[:19], change))
        if change in {"same", "undecided"} or after is None:
            return
        caller = outcome.caller.principal if outcome.caller is not None else outcome.peer.principal
        old = _told(before) if before is not None else "not asked"
        row = Row(kind, revision, change, policy, caller, old, _told(after))
        seen = self.rows.get(row)
        if seen is None:
            seen = self._new(row, outcome)
            if seen is None:
                return
        seen.count += 1

    def _new(self, row: Row, outcome: Outcome) -> Seen | None:
        if len(self.rows) >= MOST_ROWS:
            for old in [each for each in self.rows if each.kind == row.kind and each.revision != row.revision]:
                del self.rows[old]  # of what was tried before
        if len(self.rows) >= MOST_ROWS:
            self.left_out += 1
            return None
        head = outcome.head
        asked = f"{shown(head.method)} {path_of(head, query=False)}" if head is not None else ""
        seen = self.rows[row] = Seen(0, shown(outcome.request_id) or "", asked, moment(outcome.started))
        return seen

    def page(self) -> bytes:
        """The rows as JSON, the most frequent first."""
        rows = sorted(self.rows.items(), key=lambda item: -item[1].count)
        shown_rows: list[dict[str, Any]] = [{**msgspec.to_builtins(row), **msgspec.to_builtins(seen)} for row, seen in rows]
        return msgspec.json.encode({"differences": shown_rows, "leftOut": self.left_out})


def merged(pages: Iterable[bytes]) -> bytes:
    """Several pages of `Trials` in one: equal rows are added up."""
    rows: dict[str, dict[str, Any]] = {}
    left_out = 0
    for page in pages:
        found = msgspec.json.decode(page)
        left_out += found["leftOut"]
        for row in found["differences"]:
            same = rows.setdefault(msgspec.json.encode([row[name] for name in Row.__struct_fields__]).decode(), {**row, "count": 0})
            same["count"] += row["count"]
    together = sorted(rows.values(), key=lambda row: -row["count"])
    return msgspec.json.encode({"differences": together, "leftOut": left_out})


def _sides(
    outcome: Outcome, asked: DecisionQuestion, decision: Decision
) -> tuple[Kind, DecisionQuestion, Decision | None, Decision | None]:
    """What is tried, the question that was asked of it, and the two decisions: without it, and with it."""
    policy = asked.policy
    if not policy.trial:
        return "mode", asked, None, decision
    for other, answer in outcome.decisions:
        theirs = other.policy
        if not theirs.trial and theirs.name == policy.name and theirs.level == policy.level:
            if policy.trial == "shadow":
                return "shadow", asked, answer, decision
            return "canary", other, decision, answer
    if policy.trial == "shadow":
        return "shadow", asked, _UNASKED, decision
    return "canary", asked, decision, _UNASKED


_UNASKED: Final = Decision(verdict=Verdict.ERROR, cause="unasked")
"""Stands for the answer of a policy that nobody needed any more."""


def change_of(before: Decision | None, after: Decision | None) -> str:
    """`same`; `gains` and `loses` access; `differs` (a denial that was an error); `error` (only what is tried has no answer); `undecided`
    (the other was never asked: something else had refused the request). Without a `before`, what was not asked let everything pass."""
    if before is _UNASKED or after is _UNASKED or after is None:
        return "undecided"
    old = Verdict.ALLOW if before is None else before.verdict
    new = after.verdict
    if old is new:
        return "same"
    if new is Verdict.ERROR:
        return "error"
    if new is Verdict.ALLOW:
        return "gains"
    return "loses" if old is Verdict.ALLOW else "differs"


def _told(decision: Decision) -> str:
    more = decision.rule or decision.reason
    text = f"{decision.verdict.value}: {more}" if more else decision.verdict.value
    return text if len(text) <= LONGEST else text[:LONGEST] + _LESS

"""The decision log: one line of JSON for each decision, in the shape of OPA's own (openpolicyagent.org, "Decision Logs").

The gateway writes it, since most decisions never reach the PDP. Of the input it has what says which request it was; no headers, no body
and no query, which may hold secrets.
"""

from __future__ import annotations

from typing import Any, Literal

from mesh.outcome import Outcome
from mesh.questions import Decision, DecisionQuestion, Verdict
from telemetry.text import json_line, moment, path_of, shown
from telemetry.writer import LineWriter

Which = Literal["all", "refused"]


class DecisionLog:
    """Where decisions are written to."""

    __slots__ = ("_which", "writer")

    def __init__(self, path: str = "-", which: Which = "all") -> None:
        """`path`: a file, or `-` for stdout. `which`: all decisions, or those that were not *allow*. Raises OSError when the file
        cannot be opened."""
        self._which = which
        self.writer: LineWriter[Outcome] = LineWriter(path, self._render)

    def record(self, outcome: Outcome) -> None:
        """Queues an outcome if it holds a decision to log."""
        decisions = outcome.decisions
        if not decisions:
            return
        if self._which == "refused":
            for _, decision in decisions:
                if decision.verdict is not Verdict.ALLOW:
                    break
            else:
                return
        self.writer.offer(outcome)

    def _render(self, outcome: Outcome) -> bytes:
        return b"".join(
            json_line(fields_of(outcome, at, asked, decision))
            for at, (asked, decision) in enumerate(outcome.decisions)
            if self._which == "all" or decision.verdict is not Verdict.ALLOW
        )


def fields_of(outcome: Outcome, at: int, asked: DecisionQuestion, decision: Decision) -> dict[str, Any]:
    """The fields of the line of the decision number `at` of a request."""
    policy, peer, request, caller = asked.policy, outcome.peer, outcome.head, outcome.caller
    fields: dict[str, Any] = {
        "decision_id": f"{shown(outcome.request_id)}/{at}",
        "timestamp": moment(outcome.started),
        "labels": {"gateway": outcome.gateway, "listener": outcome.listener},
        "path": policy.decision.replace(".", "/") or None,
        "provider": policy.provider or None,
        "policy": policy.name,
        "level": policy.level,
        "revision": decision.revision or None,
        "input": {
            "method": shown(request.method) if request is not None else None,
            "authority": shown(request.authority) if request is not None else None,
            "path": path_of(request, query=False) if request is not None else None,
            "source": (caller.principal if caller is not None else peer.principal) or None,
            "via": (caller.via if caller is not None else "") or None,
            "route": outcome.route or None,
            "service": outcome.service or None,
        },
        "requested_by": f"{peer.address}:{peer.port}",
        # Three answers, as everywhere: an error is neither true nor false.
        "result": {Verdict.ALLOW: True, Verdict.DENY: False, Verdict.ERROR: None}[decision.verdict],
        "verdict": decision.verdict.value,
        "status": decision.status or None,
        "reason": decision.reason or None,
        "rule": decision.rule or None,
        "kept": decision.kept,
        "shadow": policy.shadow,
    }
    if decision.verdict is Verdict.ERROR:
        fields["error"] = {"message": decision.reason}
    return fields

"""What is tried, compared with what is in force."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
import pytest
from telemetry_world import WEB, an_outcome, of

from mesh.model import DecisionPolicy
from mesh.outcome import Outcome
from mesh.policy import Revision
from mesh.questions import Decision, DecisionQuestion, Verdict
from telemetry import trials
from telemetry.record import Telemetry
from telemetry.trials import merged

ALLOW, DENY, ERROR = Verdict.ALLOW, Verdict.DENY, Verdict.ERROR
ACTIVE, OTHER = Revision(digest="sha256:active"), Revision(digest="sha256:other")
POLICY = DecisionPolicy(name="shop/main", level="mesh", decision="a.b")
Trial = Literal["", "shadow", "active"]


def asked(outcome: Outcome, verdict: Verdict, revision: Revision, trial: Trial = "", **changes: Any) -> tuple[DecisionQuestion, Decision]:
    policy = msgspec.structs.replace(POLICY, shadow=trial != "", trial=trial, **changes)
    asking = outcome.decisions[0][0].asking if outcome.decisions else an_outcome().decisions[0][0].asking
    rule = f"{revision.digest[7:]} {verdict.value}"
    return DecisionQuestion(policy, asking, revision), Decision(verdict=verdict, rule=rule, revision=revision.digest)


def an_end(*decided: tuple[Verdict, Revision, Trial]) -> Outcome:
    outcome = an_outcome(verdict=None)
    outcome.decisions = [asked(outcome, verdict, revision, trial) for verdict, revision, trial in decided]
    return outcome


def rows(telemetry: Telemetry) -> list[dict[str, Any]]:
    return list(json.loads(telemetry.trials.page())["differences"])


@pytest.mark.parametrize(
    ("enforced", "tried", "change"),
    [
        (ALLOW, ALLOW, "same"),
        (DENY, DENY, "same"),
        (ERROR, ERROR, "same"),
        (ALLOW, DENY, "loses"),
        (DENY, ALLOW, "gains"),
        (ERROR, ALLOW, "gains"),
        (ERROR, DENY, "differs"),
        (ALLOW, ERROR, "error"),
        (DENY, ERROR, "error"),
    ],
)
@pytest.mark.parametrize("kind", ["shadow", "canary"])
def test_changes_are_counted(enforced: Verdict, tried: Verdict, change: str, kind: str) -> None:
    telemetry = Telemetry()
    if kind == "shadow":
        telemetry.record(an_end((enforced, ACTIVE, ""), (tried, OTHER, "shadow")))
    else:
        telemetry.record(an_end((tried, OTHER, ""), (enforced, ACTIVE, "active")))
    page = telemetry.page()
    labels = {"kind": kind, "policy": "shop/main", "revision": "sha256:other", "change": change}
    assert of(page, "tollhouse_trial_decisions_total", **labels) == 1
    assert of(page, "tollhouse_trial_decisions_total") == 1
    found = rows(telemetry)
    assert len(found) == (change != "same")
    if found:
        (row,) = found
        assert (row["before"], row["after"]) == (f"{enforced.value}: active {enforced.value}", f"{tried.value}: other {tried.value}")
        assert (row["caller"], row["count"], row["asked"], row["request_id"]) == (WEB, 1, "GET /catalog/1", "1111-2222")
        assert "secret" not in json.dumps(row)


def test_an_answer_that_came_first_is_compared_too() -> None:
    telemetry = Telemetry()
    telemetry.record(an_end((DENY, OTHER, "shadow"), (ALLOW, ACTIVE, "")))
    assert rows(telemetry)[0]["change"] == "loses"


def test_an_answer_that_came_late_is_counted_and_logged_once() -> None:
    telemetry = Telemetry()
    outcome = an_end((ALLOW, ACTIVE, ""))
    telemetry.record(outcome)
    telemetry.late(outcome, *asked(outcome, DENY, OTHER, "shadow"))
    assert rows(telemetry)[0]["change"] == "loses"
    assert of(telemetry.page(), "tollhouse_decisions_total", shadow="true", verdict="deny") == 1


def test_what_was_refused_before_is_not_compared() -> None:
    telemetry = Telemetry()
    telemetry.record(an_end((DENY, OTHER, "shadow")))
    assert of(telemetry.page(), "tollhouse_trial_decisions_total", change="undecided") == 1
    assert rows(telemetry) == []


def test_a_policy_in_shadow_mode_is_compared_with_letting_pass() -> None:
    telemetry = Telemetry()
    outcome = an_end()
    question, decision = asked(outcome, DENY, ACTIVE)
    outcome.decisions = [(msgspec.structs.replace(question, policy=msgspec.structs.replace(POLICY, shadow=True)), decision)]
    telemetry.record(outcome)
    (row,) = rows(telemetry)
    assert (row["kind"], row["change"], row["before"], row["revision"]) == ("mode", "loses", "not asked", "")


def test_rows_are_bounded_and_those_of_what_was_tried_before_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "MOST_ROWS", 3)
    telemetry = Telemetry()
    older = Revision(digest="sha256:older")
    for name, revision in [("a", older), ("b", older), ("c", OTHER), ("d", OTHER), ("e", OTHER), ("f", OTHER)]:
        outcome = an_end((ALLOW, ACTIVE, ""), (DENY, revision, "shadow"))
        outcome.caller = msgspec.structs.replace(outcome.caller, principal=name) if outcome.caller is not None else None
        telemetry.record(outcome)
    assert [row["caller"] for row in rows(telemetry)] == ["c", "d", "e"]
    assert json.loads(telemetry.trials.page())["leftOut"] == 1


def test_pages_of_several_processes_are_added_up() -> None:
    pages = []
    for count in (1, 2):
        telemetry = Telemetry()
        for _ in range(count):
            telemetry.record(an_end((ALLOW, ACTIVE, ""), (DENY, OTHER, "shadow")))
        pages.append(telemetry.trials.page())
    (row,) = json.loads(merged(pages))["differences"]
    assert row["count"] == 3

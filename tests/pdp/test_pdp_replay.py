from __future__ import annotations

from typing import Any

import pytest

from mesh.policy import ReadSet
from pdp.replay import Recorded, Tally, change_of, missing, recorded
from pdp.why import culprit, decisions_of, sentence

DOCUMENT = {"attributes": {"source": {"principal": "web"}, "request": {"http": {"method": "GET", "path": "/a"}}}}


def test_an_event_of_ours_is_read() -> None:
    event = {
        "path": "shop/authz/decision",
        "decision_id": "d",
        "input": DOCUMENT,
        "bundles": {"tollhouse": {"revision": "sha256:1"}},
        "masked": ["/input/a%20b/0", "/result/x"],
        "erased": ["/input/c"],
        "custom": {"request_id": "r", "verdict": "deny", "rule": "x", "reason": "y", "caller": "batch", "shadow": True},
    }
    assert recorded(event) == Recorded(
        path="shop.authz.decision",
        document=DOCUMENT,
        hidden=(("a b", "0"),),
        erased=(("c",),),
        verdict="deny",
        rule="x",
        reason="y",
        caller="batch",
        request="r",
        revision="sha256:1",
        enforced=False,
    )


@pytest.mark.parametrize(
    ("result", "verdict", "rule"),
    [
        ({"result": True}, "allow", ""),
        ({"result": False}, "deny", ""),
        ({"result": {"allowed": True, "rule": "x"}}, "allow", "x"),
        ({"result": {"allowed": False}}, "deny", ""),
        ({"result": {"other": 1}}, "error", ""),
        ({}, "error", ""),
        ({"result": True, "error": {"code": "x"}}, "error", ""),
    ],
)
def test_an_event_of_opas_own_is_read(result: dict[str, Any], verdict: str, rule: str) -> None:
    found = recorded({"path": "envoy/authz/allow", "decision_id": "d", "input": DOCUMENT, **result})
    assert found is not None
    assert (found.path, found.verdict, found.rule, found.caller) == ("envoy.authz.allow", verdict, rule, "web")
    assert (found.request, found.method, found.target, found.enforced) == ("d", "GET", "/a", True)


@pytest.mark.parametrize("event", [{}, {"path": "a/b"}, {"path": "", "input": {}}, {"path": "a", "input": "**"}, {"path": 1, "input": {}}])
def test_what_has_nothing_to_decide_is_passed_over(event: dict[str, Any]) -> None:
    assert recorded(event) is None


VALUES = ReadSet(values=(("a", "b"), ("list", 0)))
DEFINED = ReadSet(defined=(("a", "b"),))
LENGTHS = ReadSet(lengths=(("a",),))
KINDS = ReadSet(kinds=(("a", "b"),))


@pytest.mark.parametrize(
    ("reads", "hidden", "erased", "expected"),
    [
        (VALUES, ["a", "b"], [], True),
        (VALUES, ["a", "b", "c"], [], True),
        (VALUES, ["a"], [], True),
        (VALUES, ["a", "x"], [], False),
        (VALUES, [], ["a", "b"], True),
        (VALUES, ["list", "0"], [], True),
        (VALUES, ["list", "1"], [], False),
        (VALUES, [], [], False),
        (ReadSet(values=((),)), ["z"], [], True),
        (DEFINED, ["a", "b"], [], False),
        (DEFINED, [], ["a", "b"], True),
        (DEFINED, ["a"], [], True),
        (DEFINED, ["a", "b", "c"], [], False),
        (LENGTHS, ["a"], [], True),
        (LENGTHS, ["a", "x"], [], False),
        (LENGTHS, [], ["a", "x"], True),
        (KINDS, ["a", "b"], [], True),
        (KINDS, ["a", "b", "c"], [], False),
    ],
)
def test_what_was_masked_and_is_read_is_told(reads: ReadSet, hidden: list[str], erased: list[str], expected: bool) -> None:
    event = Recorded(path="a", document={}, hidden=(tuple(hidden),) if hidden else (), erased=(tuple(erased),) if erased else ())
    found = missing(event, reads)
    assert bool(found) is expected
    assert not found or found[0] == "/input/" + "/".join(hidden or erased)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("allow", "allow", "same"),
        ("deny", "deny", "same"),
        ("deny", "allow", "gains"),
        ("error", "allow", "gains"),
        ("allow", "deny", "loses"),
        ("allow", "error", "loses"),
        ("deny", "error", "differs"),
        ("error", "deny", "differs"),
    ],
)
def test_changes(before: str, after: str, change: str) -> None:
    assert change_of(before, after) == change


def test_changes_are_grouped_by_caller_and_rule_and_losses_come_first() -> None:
    tally = Tally()
    for number, (caller, change) in enumerate([("a", "gains"), ("a", "gains"), ("b", "loses"), ("b", "same"), ("c", "gains")]):
        event = Recorded(path="p", document=DOCUMENT, caller=caller, request=f"r{number}")
        tally.add(event, change, "before", "after")  # type: ignore[arg-type]
    assert [(row.change, row.caller, group.count, group.example, group.asked) for row, group in tally.rows] == [
        ("loses", "b", 1, "r2", "GET /a"),
        ("gains", "a", 2, "r0", "GET /a"),
        ("gains", "c", 1, "r4", "GET /a"),
    ]
    assert tally.counts == {"loses": 1, "gains": 3, "differs": 0, "unsure": 0, "same": 1}


def event(name: str, verdict: str, policy: str = "mesh", **custom: Any) -> dict[str, Any]:
    said = {"request_id": name, "verdict": verdict, "policy": policy, "level": "mesh", "response_code": 403, "response_flags": "UAEX"}
    return {"decision_id": f"{name}-{policy}", "path": "a/b", "input": DOCUMENT, "custom": said | custom}


@pytest.mark.parametrize(
    ("events", "by"),
    [
        ([event("r", "allow"), event("r", "deny", "shop/x")], "shop/x"),
        ([event("r", "allow"), event("r", "deny", "shop/x", shadow=True)], None),
        ([event("r", "error", response_flags="-"), event("r", "deny", "shop/x")], "shop/x"),
        ([event("r", "error", response_flags="UAEE")], "mesh"),
        ([event("r", "allow"), event("other", "deny")], None),
    ],
)
def test_why_a_request_was_refused(events: list[dict[str, Any]], by: str | None) -> None:
    found = decisions_of(events, "r")
    one = culprit(found)
    assert (one.policy if one is not None else None) == by
    assert ("No policy" in sentence(found)) is (by is None)


def test_a_decision_is_found_by_its_own_id_and_without_its_input() -> None:
    (found,) = decisions_of([{**event("r", "deny", rule="x", reason="y"), "input": "**"}], "r-mesh")
    assert found.policy == "mesh"
    assert sentence([found]) == "It was denied by the policy mesh (a.b), rule 'x': y. The client got 403 (UAEX)."
    assert decisions_of([event("r", "deny")], "nobody") == []

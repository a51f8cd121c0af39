"""What a QuotaChange makes of a limit, and what is wrong with one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mesh_world import BASE, check, snapshot, workspace

from mesh.compile_quota import change_problem
from mesh.model import Descriptor, QuotaLimit
from mesh.quota_changes import LimitChange, hidden, instant, instant_text, named_key
from quota.changes import Numbers

ROUTE = """---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: r}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
POLICY: dict[str, Any] = {
    "targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "r"}],
    "limits": [
        {
            "name": "per-key",
            "per": [{"header": "x-key"}, "method"],
            "tokens": 10,
            "burst": 20,
            "overrides": [{"values": ["gold", "GET"], "tokens": 100}],
        },
        {"name": "all", "tokens": 1000, "cost": 5},
        {"name": "daily", "tokens": 1000, "calendar": {"unit": "Day"}},
    ],
}
NOW = instant("2026-06-01T12:00:00Z")


def a_policy(name: str = "orders") -> str:
    body = {"apiVersion": "tollhouse.dev/v1", "kind": "QuotaPolicy", "metadata": {"namespace": "shop", "name": name}, "spec": POLICY}
    return "---\n" + yaml.safe_dump(body)


def a_change(*items: dict[str, Any], limit: str = "per-key", policy: str = "orders", name: str = "") -> str:
    metadata = {"namespace": "shop", "name": name or f"{policy}.{limit}"}
    spec = {"policy": policy, "limit": limit, "changes": list(items)}
    return "---\n" + yaml.safe_dump({"apiVersion": "tollhouse.dev/v1", "kind": "QuotaChange", "metadata": metadata, "spec": spec})


def numbers(*items: dict[str, Any], limit: str = "per-key") -> Numbers:
    made = snapshot(BASE, ROUTE, a_policy(), a_change(*items, limit=limit))
    assert not [problem for problem in made.problems if problem.severity == "error"], made.problems
    (listener,) = made.gateways["edge/gw"].listeners
    (match,) = listener.hosts["*"].prefix[b""]
    found = {each.name.rpartition("/")[2]: each for each in match.rule.limits}
    return Numbers(found[limit])


def told(found: QuotaLimit | None) -> tuple[int, float, int] | str:
    return "lifted" if found is None else (found.tokens, found.interval, found.burst)


@pytest.mark.parametrize(
    ("items", "key", "wanted"),
    [
        ([], ("a", "GET"), (10, 1.0, 20)),
        ([], ("gold", "GET"), (100, 1.0, 100)),
        ([{"tokens": 5}], ("a", "GET"), (5, 1.0, 5)),
        ([{"interval": "1m"}], ("a", "GET"), (10, 60.0, 20)),
        ([{"tokens": 5}], ("gold", "GET"), (100, 1.0, 100)),
        ([{"lift": True}], ("gold", "GET"), "lifted"),
        ([{"block": True}], ("gold", "GET"), (0, 1.0, 20)),
        ([{"tokens": 5, "values": ["a", "GET"]}], ("a", "GET"), (5, 1.0, 5)),
        ([{"tokens": 5, "values": ["a", "GET"]}], ("a", "PUT"), (10, 1.0, 20)),
        ([{"burst": 50, "values": ["gold", "GET"]}], ("gold", "GET"), (100, 1.0, 50)),
        ([{"block": True}, {"tokens": 5, "values": ["a", "GET"]}], ("a", "GET"), (5, 1.0, 5)),
        ([{"lift": True, "values": ["a", "GET"], "until": "2026-06-01T12:00:01Z"}, {"tokens": 2}], ("a", "GET"), "lifted"),
        ([{"lift": True, "values": ["a", "GET"], "until": "2026-06-01T12:00:00Z"}, {"tokens": 2}], ("a", "GET"), (2, 1.0, 2)),
        ([{"lift": True, "until": "2026-06-01T14:00:00+02:00"}], ("a", "GET"), (10, 1.0, 20)),
        ([{"block": True, "values": [hidden("a-long-secret-key"), "GET"]}], ("a-long-secret-key", "GET"), (0, 1.0, 20)),
        ([{"block": True, "values": ["a-long-secret-key", "GET"]}], ("a-long-secret-key", "GET"), (0, 1.0, 20)),
    ],
)  # fmt: skip
def test_which_numbers_hold(items: list[dict[str, Any]], key: tuple[str, ...], wanted: Any) -> None:
    assert told(numbers(*items).of(key, NOW)) == wanted


def test_of_a_limit_by_the_calendar_the_tokens_change() -> None:
    found = numbers({"tokens": 5}, limit="daily").of((), NOW)
    assert found is not None and found.calendar is not None and (found.tokens, found.burst) == (5, 5)


def test_nobody_passes_for_another_by_what_is_shown_of_him() -> None:
    secret = "a-long-secret-key"
    for said in (secret, hidden(secret)):
        made = numbers({"lift": True, "values": [said, "GET"]})
        assert made.of((secret, "GET"), NOW) is None
        assert told(made.of((hidden(secret), "GET"), NOW)) == (10, 1.0, 20)


def test_a_bucket_that_was_reset_has_a_limit_of_its_own_and_the_same_each_time() -> None:
    made = numbers({"values": ["a", "GET"], "reset": "2026-06-01T11:00:00Z"}, {"tokens": 5, "until": "2026-06-01T12:00:01Z"})
    one, other = made.of(("a", "GET"), NOW), made.of(("b", "GET"), NOW)
    assert one is not None and other is not None
    assert one is made.of(("a", "GET"), NOW) and other is made.of(("b", "GET"), NOW)
    assert (one.reset, other.reset) == (NOW - 3600, 0.0) and msgspec.structs.replace(one, reset=0.0) == other
    later = made.of(("a", "GET"), NOW + 2)
    assert later is not None and (later.reset, later.tokens) == (NOW - 3600, 10)


def test_what_others_have_is_the_same_limit_before_and_after() -> None:
    before, after = numbers().of(("b", "PUT"), NOW), numbers({"tokens": 1, "values": ["a", "GET"]}).of(("b", "PUT"), NOW)
    assert before == after


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (a_change({"lift": True}, policy="oders"), "spec.policy: there is no QuotaPolicy shop/oders in force; did you mean orders?"),
        (a_change({"lift": True}, limit="per-kay"), "spec.limit: QuotaPolicy shop/orders has no limit per-kay; did you mean per-key?"),
        (
            a_change({"lift": True, "values": ["a"]}),
            "spec.changes[0]: has 1 values, and shop/orders/per-key has 2 descriptors: header x-key, method",
        ),
        (a_change({"lift": True, "values": ["a"]}, limit="all"), "spec.changes[0]: has 1 values, and shop/orders/all has no descriptors"),
        (a_change({"reset": "2026-06-01T11:00:00Z"}), "spec.changes[0]: resets one bucket: it needs the values of header x-key, method"),
        (
            a_change({"tokens": 4, "burst": 9}, limit="daily"),
            "spec.changes[0]: has burst, and shop/orders/daily goes by the calendar: only its tokens can be changed",
        ),
        (
            a_change({"tokens": 4}, limit="all"),
            "spec.changes[0]: has a burst of 4, less than what a request may cost, 5: such a request would never pass; block says so",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing_and_is_told(change: str, wanted: str) -> None:
    made = workspace(BASE, ROUTE, a_policy(), change)
    (problem,) = [str(each) for each in made.snapshot.problems if each.key is not None and each.key.kind == "QuotaChange"]
    assert wanted in problem
    assert made.snapshot.version == snapshot(BASE, ROUTE, a_policy()).version


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        ([{}], "changes nothing; it needs tokens, interval, burst, concurrency, lift, block or reset"),
        ([{"lift": False}], "changes nothing"),
        ([{"lift": True, "block": True}], "has lift and block; a limit is lifted, or blocked, or has other numbers"),
        ([{"lift": True, "tokens": 1}], "has lift and tokens"),
        ([{"tokens": 1, "reset": "2026-06-01T11:00:00Z"}], "is an item of its own, without other numbers"),
        ([{"tokens": 0}], "is 0; it must be between 1 and 1000000000 tokens"),
        ([{"interval": "0s"}], "must be longer than nothing, and at most a month (31 days)"),
        ([{"interval": "745h"}], "must be longer than nothing, and at most a month (31 days)"),
        ([{"lift": True, "until": "tomorrow"}], '"tomorrow" is not a date and time; write it as in 2026-01-31T12:00:00Z'),
        ([{"lift": True, "until": "2026-02-30T12:00:00Z"}], '"2026-02-30T12:00:00Z" is not a date and time: day is out of range'),
        ([{"lift": True}, {"tokens": 1}], "is the same as item 0; each may be there once"),
    ],
)
def test_what_is_wrong_with_one(items: list[dict[str, Any]], wanted: str) -> None:
    found = check(a_change(*items))
    assert len(found) == 1 and wanted in found[0]


def test_there_is_one_for_a_limit() -> None:
    (found,) = check(a_change({"lift": True}, name="mine"))
    assert "metadata.name: must be orders.per-key, after the policy and the limit" in found


@given(st.integers(0, 4_000_000_000_000))
def test_instants_can_be_read_again(milliseconds: int) -> None:
    assert instant(instant_text(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, abs=1e-3)


@given(st.text(max_size=80))
def test_a_value_is_named_by_itself_and_by_what_is_shown_of_it(value: str) -> None:
    limit = QuotaLimit(name="a/b/c", level="route", per=(Descriptor("cookie", "x"),), tokens=1)
    limit = msgspec.structs.replace(limit, changes=(LimitChange(named_key(limit, (value,)), None),))
    assert Numbers(limit).of((value,), NOW) is None
    assert named_key(limit, (hidden(value),)) in {named_key(limit, (value,)), (hidden(value),)}


def test_a_concurrency_limit_is_changed_by_its_own_number() -> None:
    limit = QuotaLimit(name="a/b/c", level="route", per=(), tokens=0, concurrency=5)
    assert change_problem(limit, {"concurrency": 3}) == "" == change_problem(limit, {"block": True})
    assert "has tokens, and a/b/c counts requests in progress" in change_problem(limit, {"tokens": 3})
    assert "there is no bucket to fill" in change_problem(limit, {"reset": "2026-06-01T11:00:00Z"})
    assert "has concurrency, and a/b/c has tokens" in change_problem(
        QuotaLimit(name="a/b/c", level="route", per=(), tokens=1), {"concurrency": 3}
    )

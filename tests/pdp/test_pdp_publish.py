"""Modules and data in, a revision out: its entry points, its digests, and errors that say where."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from kept_world import Worker, a_worker

import conf
from mesh.policy import EntryPoint, ReadSet, Revision
from pdp.authoring import run_tests
from pdp.engines.engine import PolicyError
from pdp.publish import check, publish, time_to_live
from pdp.report import path_text, report

SHOP = {path.name: path.read_text() for path in (Path(conf.__file__).parent / "examples/shop/policy").glob("*.rego")}


def with_worker(use: Callable[[Worker], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with a_worker() as worker:
            return await use(worker)

    return asyncio.run(run())


def published(modules: dict[str, str], decisions: list[str], data: object = None) -> Revision:
    text = json.dumps(data or {}).encode()
    revision = with_worker(lambda worker: publish(worker, modules, text, decisions))
    assert isinstance(revision, Revision)
    return revision


def refused(modules: dict[str, str], decisions: list[str], data: bytes = b"{}") -> list[str]:
    with pytest.raises(PolicyError) as caught:
        with_worker(lambda worker: publish(worker, modules, data, decisions))
    return [str(problem) for problem in caught.value.problems]


def test_the_shop_reads_four_things() -> None:
    revision = published(SHOP, ["shop.authz.decision"])
    point = revision.entry_points["shop.authz.decision"]
    assert set(point.reads.values) == {
        ("attributes", "source", "principal"),
        ("attributes", "request", "http", "method"),
        ("attributes", "contextExtensions", "gateway"),
        ("parsed_path", 0),
    }
    assert (point.reads.defined, point.reads.lengths, point.reads.kinds, point.reads.volatile, point.reads.widened) == ((), (), (), (), ())
    assert point.keepable
    assert report(point).notes == ()


def test_tests_are_run_and_not_shipped() -> None:
    revision = published(SHOP, ["shop.authz.decision"])
    assert list(revision.modules) == ["authz.rego"]
    results, _ = with_worker(lambda worker: run_tests(worker, SHOP, b"{}"))
    assert len(results) == 8
    assert all(result.passed and result.file == "authz_test.rego" and result.row for result in results)
    assert [result.row for result in results] == sorted(result.row for result in results)


def test_a_test_that_fails_says_so() -> None:
    modules = {"x.rego": "package x\n\na := 1\n", "x_test.rego": "package x_test\n\nimport data.x\n\ntest_a if x.a == 2\n"}
    ((result,), _) = with_worker(lambda worker: run_tests(worker, modules, b"{}"))
    assert (result.passed, result.name, result.package, result.file, result.row) == (False, "test_a", "data.x_test", "x_test.rego", 5)


def test_problems_say_where_they_are() -> None:
    broken = {"a.rego": "package a\n\nallow if {\n\tinput.x ==\n}\n", "b.rego": "package b\n\nallow if data.nope.f(1)\n"}
    (problem,) = refused(broken, ["a.allow"])
    assert problem.startswith("a.rego:5:1: ")
    assert refused({"b.rego": broken["b.rego"]}, ["b.allow"])[0].startswith("b.rego:3:10: ")


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        ("x.alow", "x.alow leads to nothing: no module has such a rule (x.allow)"),
        ("x", "x is a package: a decision is one of its rules (x.allow)"),
        ("x.f", "x.f is a function: a decision is a rule without arguments"),
        ("x..allow", "'x..allow' is not the path of a decision: write it as in shop.authz.decision"),
        ("cfg", "cfg leads to nothing: no module has such a rule (x.allow)"),
    ],
)
def test_a_decision_that_is_none(decision: str, said: str) -> None:
    modules = {"x.rego": "package x\n\nallow if f(input.a)\n\nf(y) if y == 1\n"}
    assert refused(modules, [decision, "x.allow"], b'{"cfg": 1}') == [said]


@pytest.mark.parametrize("data", [b"[]", b"{", b"1", b'{"x": NaN}'])
def test_data_that_is_no_object(data: bytes) -> None:
    assert refused({"x.rego": "package x\n\nallow := 1\n"}, ["x.allow"], data)[0].startswith("data: the data is not")


def test_check_is_strict() -> None:
    unused = {"x.rego": "package x\n\nimport data.y\n\nallow := 1\n"}
    with pytest.raises(PolicyError, match=r"x\.rego:3:1: import data\.y unused"):
        with_worker(lambda worker: check(worker, unused, b"{}"))


def digest(text: str, data: object = None, name: str = "x.rego", more: dict[str, str] | None = None) -> str:
    return published({name: text, **(more or {})}, ["x.allow"], data).entry_points["x.allow"].digest


POLICY = 'package x\n\nallow if data.users[input.u].ok\n\nallow if data.cfg.open == "yes"\n\nunrelated if input.q\n'
DATA = {"users": {"a": {"ok": True}}, "cfg": {"open": "no", "size": 1}, "other": [1]}


def test_changes_that_keep_a_digest() -> None:
    first = digest(POLICY, DATA)
    assert digest(POLICY, DATA) == first
    assert digest("# a comment\n" + POLICY.replace("input.q", "input.qq"), DATA) == first, "another rule"
    assert digest(POLICY, DATA, name="y.rego") == first, "another file name"
    assert digest(POLICY, {**DATA, "other": [2], "more": {}}) == first, "other data"
    assert digest(POLICY, {**DATA, "cfg": {"open": "no", "size": 2}}) == first, "data beside what is read"
    assert digest(POLICY, DATA, more={"z.rego": "package z\n\nallow := input.x\n"}) == first, "another package"


def test_changes_that_make_another_digest() -> None:
    seen = [digest(POLICY, DATA)]
    for text, data in (
        (POLICY.replace('"yes"', '"y"'), DATA),
        (POLICY, {**DATA, "cfg": {"open": "yes"}}),
        (POLICY, {**DATA, "cfg": {}}),
        (POLICY, {**DATA, "users": {"a": {"ok": True}, "b": {"ok": True}}}),
        (POLICY, {**DATA, "users": {"a": {"ok": 1}}}),
        (POLICY, {**DATA, "users": {"a": {"ok": 1.0}}}),
        (POLICY.replace("package x\n", "# METADATA\n# custom: {tollhouse: {ttl: 5s}}\npackage x\n"), DATA),
    ):
        seen.append(digest(text, data))
    for title in ("one", "two"):
        seen.append(digest(f"package x\n\n# METADATA\n# title: {title}\nallow := rego.metadata.rule().title\n"))
    assert len(set(seen)) == len(seen)


def test_a_rule_that_is_reached_from_afar_is_part_of_the_digest() -> None:
    policy = "package x\n\nimport data.lib\n\nallow if lib.ok(input.a)\n"
    one = digest(policy, more={"lib.rego": "package lib\n\nok(v) if v == 1\n"})
    assert digest(policy, more={"lib.rego": "package lib\n\nok(v) if v == 2\n"}) != one


def test_a_revision_is_named_by_what_it_holds() -> None:
    one = published(SHOP, ["shop.authz.decision"], {"a": 1, "b": 2})
    assert one.digest.startswith("sha256:")
    assert published(SHOP, ["shop.authz.decision"], {"b": 2, "a": 1}).digest == one.digest
    assert published({"authz.rego": SHOP["authz.rego"]}, ["shop.authz.decision"], {"a": 1, "b": 2}).digest == one.digest
    assert published(SHOP, ["shop.authz.decision"], {"a": 1, "b": 3}).digest != one.digest
    assert one.opa == "1.22.2"


def test_an_author_may_give_a_time() -> None:
    text = "package x\n\n# METADATA\n# custom:\n#   tollhouse:\n#     ttl: 5s\nallow if time.now_ns() > input.t\n"
    point = published({"x.rego": text}, ["x.allow"]).entry_points["x.allow"]
    assert (point.ttl, point.keepable, point.reads.volatile) == (5.0, True, ("time.now_ns",))
    assert "kept for 5 s" in report(point).notes[0]
    without = published({"x.rego": "package x\n\nallow if time.now_ns() > input.t\n"}, ["x.allow"]).entry_points["x.allow"]
    assert not without.keepable
    assert "asked every time" in report(without).notes[0]


@pytest.mark.parametrize(
    ("custom", "seconds"),
    [
        ([], None),
        ([{"other": 1}], None),
        ([{"tollhouse": {}}], None),
        ([{"tollhouse": {"ttl": "500ms"}}], 0.5),
        ([{"tollhouse": {"ttl": 3}}], 3.0),
        ([{"tollhouse": {"ttl": "2m"}}, {"tollhouse": {"ttl": "1.5s"}}], 1.5),
    ],
)
def test_times_to_live(custom: list[Any], seconds: float | None) -> None:
    assert time_to_live(custom) == seconds


@pytest.mark.parametrize("value", [{"ttl": "5"}, {"ttl": "5 s"}, {"ttl": 0}, {"ttl": True}, {"ttl": None}, {"tll": "5s"}, "5s", []])
def test_times_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"custom\.tollhouse"):
        time_to_live([{"tollhouse": value}])


def test_a_wrong_time_is_an_error_of_the_policy() -> None:
    text = "package x\n\n# METADATA\n# custom: {tollhouse: {ttl: soon}}\nallow := 1\n"
    assert refused({"x.rego": text}, ["x.allow"]) == [
        "x.allow: METADATA custom.tollhouse.ttl: 'soon' is not a time; write it as in 500ms, 5s or 1m"
    ]


def test_what_opa_cannot_plan_reads_everything() -> None:
    """OPA evaluates it but has no plan for it: rules under one prefix that refer to each other."""
    text = 'package x\n\nallow if p.a.y\n\np[k].x if some k in ["a", "b"]\n\np.a.y if p.b.x\n\nother if rand.intn("a", 2) == 1\n'
    point = published({"x.rego": text}, ["x.allow"]).entry_points["x.allow"]
    assert point.reads.values == ((),)
    assert "no plan" in point.reads.widened[0]
    assert point.reads.volatile == ("rand.intn",), "what any module calls counts, since it is not known what this one reaches"
    assert "any difference in the input asks again" in report(point).notes[0]


def test_a_report_warns_of_what_never_comes_twice() -> None:
    def notes(*paths: tuple[str | int, ...]) -> tuple[str, ...]:
        return report(EntryPoint(path="x", digest="", reads=ReadSet(values=paths))).notes

    assert notes(("attributes", "source", "principal")) == ()
    (said,) = notes(("attributes", "request", "time"))
    assert said == "input.attributes.request.time is the time of the request, never twice the same: it is asked every time"
    assert "input.attributes.source has the caller's port" in notes(("attributes", "source"))[0]
    assert len(notes(())) == 4


def test_paths_are_shown_as_rego() -> None:
    assert path_text(("attributes", "headers", "x-tenant", 0)) == 'input.attributes.headers["x-tenant"][0]'
    assert path_text(()) == "input"

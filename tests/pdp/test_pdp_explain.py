"""Explanations: which rules held, and of the others the first condition that did not, with its values, in words."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from kept_world import a_worker

from pdp.authoring import Explanation, Step, explain

SHOP = """package x

import input.request as req

default allow := false

"""
DATA = {"roles": {"ann": ["reader", "writer"]}, "blocked": ["eve"]}
INPUT = {"who": "ann", "request": {"method": "POST", "path": ["orders", "1"], "headers": {"x-a": "1"}}, "levels": [4, 2, 9]}


def explained(text: str, document: Any = INPUT, path: str = "x.allow", seconds: float = 5.0) -> Explanation:
    async def run() -> Explanation:
        modules = {f"{'xyz'[index]}.rego": part for index, part in enumerate((SHOP + text).split("\n---\n"))}
        async with a_worker() as worker:
            return await explain(worker, modules, json.dumps(DATA).encode(), path, json.dumps(document).encode(), seconds)

    return asyncio.run(run())


def first(told: Explanation) -> Step:
    return next(step for step in told.steps if step.kind != "default" and step.depth == 0)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ('input.request.method == "GET"', 'input.request.method == "GET" is false (it is "POST")'),
        ('req.method == "GET"', 'req.method == "GET" is false (it is "POST")'),
        ('"GET" != req.method; req.method in {"GET", "HEAD"}', 'req.method in {"GET", "HEAD"} is false (it is "POST")'),
        ("input.nobody", "input.nobody is not there (input has levels, request, who)"),
        ('input.request.headers["x-b"] == "1"', 'is undefined: input.request.headers["x-b"] is not there (input.request.headers has x-a)'),
        ("input.request.path[5]", 'input.request.path[5] is not there (input.request.path is ["orders", "1"])'),
        ("not input.who", 'not input.who is false (it is "ann")'),
        ("not input.who == input.who", 'not input.who == input.who is false (it is "ann")'),
        ('startswith(input.who, "b")', 'startswith(input.who, "b") is false (it is "ann")'),
        ('startswith(lower(input.who), "b")', 'startswith(lower(input.who), "b") is false (it is "ann")'),
        ("count(input.levels) > 5", "count(input.levels) > 5 is false (it is 3)"),
        ("input.levels[_] == 5", "input.levels[_] == 5 holds for nothing there (input.levels is [4, 2, 9])"),
        ('some role in data.roles[input.who]; role == "admin"', 'role == "admin" is false (it is "reader")'),
        ("every level in input.levels { level > 3 }", "level > 3 is false (it is 2)"),
        ('who := input.who; who == "eve"', 'who == "eve" is false (it is "ann")'),
        ("a := count(input.levels); b := 2; a == b", "a == b is false (a is 3, b is 2)"),
        ("input.who in data.blocked", 'input.who in data.blocked is false (input.who is "ann", data.blocked is ["eve"])'),
        ("false", "false is false or undefined"),
    ],
)
def test_a_condition_in_words(condition: str, said: str) -> None:
    told = explained("allow if {\n\t" + condition.replace("; ", "\n\t") + "\n}")
    step = first(told)
    assert not step.held
    assert step.failed is not None
    assert step.failed.said.endswith(said), step.failed.said
    assert (step.file, step.row) == ("x.rego", 7)
    assert step.failed.row == 7 + 1 + condition.count("; ")
    assert bytes(told.value) == b"false"


def test_the_condition_that_came_furthest_is_told() -> None:
    told = explained('allow if {\n\tsome role in data.roles[input.who]\n\tlevel := input.levels[_]\n\tlevel > 8\n\trole == "admin"\n}')
    step = first(told)
    assert step.failed is not None
    assert step.failed.row == 11
    assert step.tries == 2, "once for each role, since one level is above eight"


def test_rules_that_held_and_what_they_were() -> None:
    told = explained(
        'allow if {\n\tcaller == "ann"\n\tok("b", input.who)\n}\n\ncaller := input.who\n\nok(a, b) if a < b\n\nok(_, b) if b == "ann"\n\n'
        "names contains input.who\n\nnames contains role if some role in data.roles.ann\n"
    )
    shown = [(step.rule, step.kind, step.depth, step.held, step.values) for step in told.steps]
    assert shown == [
        ("allow", "rule", 0, True, ("true",)),
        ("caller", "rule", 1, True, ('"ann"',)),
        ('ok("b", "ann")', "function", 1, False, ()),
        ('ok("b", "ann")', "function", 1, True, ("true",)),
    ]
    failed = told.steps[2].failed
    assert failed is not None
    assert failed.said == 'a < b is false (a is "b", b is "ann")'


def test_else_and_default_and_sets() -> None:
    told = explained(
        'allow := "a" if {\n\tinput.who == "bob"\n} else := "b" if {\n\tcount(names) > 5\n}\n\n'
        'names contains "one" if input.who == "eve"\n\n'
        "names contains input.who\n\nnames contains role if some role in data.roles.ann\n"
    )
    shown = {(step.rule, step.kind, step.row): step for step in told.steps}
    assert not shown["allow", "rule", 7].held
    alternative = shown["allow", "else", 9]
    assert alternative.failed is not None
    assert alternative.failed.said == "count(names) > 5 is false (it is 3)"
    assert shown["allow", "default", 5].held
    assert not shown['names contains "one"', "rule", 13].held
    assert shown["names", "rule", 17].values == ('"reader"', '"writer"')


def test_rules_of_other_files_are_told_where_they_are() -> None:
    told = explained("import data.lib\n\nallow if lib.known(input.who)\n---\npackage lib\n\nknown(name) if {\n\tname in data.blocked\n}\n")
    inner = told.steps[1]
    assert (inner.file, inner.row, inner.rule, inner.depth) == ("y.rego", 3, 'known("ann")', 1)
    assert inner.failed is not None
    assert (inner.failed.file, inner.failed.row) == ("y.rego", 4)


def test_with_changes_what_is_seen() -> None:
    told = explained('allow if ok with input as {"who": "zoe"}\n\nok if input.who == "ann"\n')
    assert told.steps[1].failed is not None
    assert told.steps[1].failed.said == 'input.who == "ann" is false (it is "zoe")'
    told = explained('allow if ok with data.blocked as ["zoe"]\n\nok if input.who in data.blocked\n')
    assert told.steps[1].failed is not None
    assert "eve" not in told.steps[1].failed.said, "what `with` has replaced is not shown as if it were there"


def test_errors_of_builtins_and_prints_are_told() -> None:
    told = explained('allow if {\n\tprint("asked", input.who)\n\tregex.match("[", input.who)\n}\n')
    assert told.printed == "asked ann\n"
    assert "regex.match" in told.errors[0]
    assert first(told).failed is not None


def test_a_conflict_is_an_error_and_its_rules_are_told() -> None:
    told = explained("r := 1 if input.who\n\nr := 2 if input.who\n\nallow if r == 1\n")
    assert (told.kind, told.reason) == ("error", "conflict")
    assert [step.rule for step in told.steps if step.held and step.depth] == ["r", "r"]
    assert told.evaluation.kind == "error"


def test_what_takes_too_long_is_ended() -> None:
    loop = "allow if {\n\tsome i in numbers.range(1, 100000)\n\tsome j in numbers.range(1, 100000)\n\ti + j < 0\n}\n"
    told = explained(loop, seconds=0.5)
    assert (told.kind, told.reason) == ("error", "timeout")
    assert first(told).failed is not None


def test_many_calls_of_one_function_are_told_a_few_times() -> None:
    told = explained("allow if {\n\tsome n in numbers.range(1, 1000)\n\tlarge(n)\n}\n\nlarge(n) if n > 5000\n")
    assert told.more
    assert [step.rule for step in told.steps if step.kind == "function"] == [f"large({n})" for n in range(1, 6)]


def test_long_values_are_cut() -> None:
    told = explained('allow if input.request.method == "GET"', {"request": {"method": "P" * 10_000}})
    failed = first(told).failed
    assert failed is not None
    assert len(failed.said) < 400


def test_what_is_undefined_stays_so() -> None:
    told = explained("other if input.nothing\n", path="x.other")
    assert told.kind == "undefined"
    assert told.evaluation.kind == "undefined"

"""What authors of policy have the OPA worker do: check types, run tests, format, measure, and explain.

Each function takes a `checker` (see `pdp.publish.Checker`), modules (file name to Rego) and data (JSON), and raises `PolicyError` with
everything that is wrong with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pdp.engines.engine import Evaluation, PolicyError, PolicyProblem, Reason, segments
from pdp.publish import Checker, problems_of


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One expression of a policy that did not hold."""

    file: str = ""
    row: int = 0
    text: str = ""
    said: str = ""
    """The expression, and in words what became of it: `method == "GET" is false (it is "POST")`."""


class TestResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one `test_...` rule, or of one of its cases (`test_x/case`)."""

    __test__ = False

    package: str
    """`data.shop.authz_test`"""
    name: str
    file: str = ""
    row: int = 0
    passed: bool = False
    skipped: bool = False
    error: str = ""
    printed: str = ""
    """What its `print` calls said."""
    seconds: float = 0.0
    failed: Condition | None = None
    """The first condition of a failed test that did not hold."""
    because: tuple[Condition, ...] = ()
    """The conditions of the rules that it asked which did not hold."""


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a file the tests reached."""

    file: str
    covered: int
    """Lines that were evaluated."""
    missed: int
    ranges: tuple[tuple[int, int], ...] = ()
    """First and last lines of what was not."""

    @property
    def percent(self) -> float:
        """100 for a file with nothing to evaluate."""
        total = self.covered + self.missed
        return 100.0 * self.covered / total if total else 100.0


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What modules hold."""

    rules: tuple[str, ...] = ()
    entrypoints: tuple[str, ...] = ()
    """What METADATA calls `entrypoint: true`: `data.shop.authz.decision`."""
    packages: dict[str, str] = {}
    """Of each file: `data.shop.authz`."""


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """What evaluations took, one after the other on one core, reading the input and writing the answer included. Times in microseconds."""

    count: int
    seconds: float
    mean: float
    median: float
    high: float
    """99 of 100 took no longer."""
    expressions: float
    """Evaluated for one answer, on average."""
    undefined: int = 0
    """Evaluations without a result."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one definition of a rule."""

    rule: str
    """Its name in its package, with what a function was called with: `allow`, `allowing contains "x"`, `ok("web")`."""
    kind: str = "rule"
    """`rule`, `else`, `default` or `function`."""
    file: str = ""
    row: int = 0
    depth: int = 0
    """How many rules asked for it, one in the other."""
    held: bool = False
    values: tuple[str, ...] = ()
    """Its values, as Rego writes them; several for a set."""
    failed: Condition | None = None
    """The first condition that did not hold; of several tries, of the one that came furthest."""
    tries: int = 0
    """How often that condition was looked at, with different values."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation, and what its rules did on the way."""

    kind: str
    value: msgspec.Raw = msgspec.Raw(b"")
    reason: Reason = ""
    message: str = ""
    steps: tuple[Step, ...] = ()
    more: bool = False
    """There were more steps than are told."""
    printed: str = ""
    errors: tuple[str, ...] = ()
    """Errors of builtins, each of which makes the expression that it is in undefined."""
    expressions: int = 0
    """How many were evaluated, without the help of OPA's rule index."""

    @property
    def evaluation(self) -> Evaluation:
        """The result as an engine gives it."""
        if self.kind == "result":
            return Evaluation("result", bytes(self.value))
        return Evaluation("undefined") if self.kind == "undefined" else Evaluation("error", b"", self.message, self.reason)


async def inspect(
    checker: Checker, modules: Mapping[str, str], data: bytes, schemas: Mapping[str, Any] | None = None, *, strict: bool = False
) -> Inspection:
    """Compiles everything, tests too, with the types that `schemas` give: `""` is that of `input`, METADATA names `a/b` as schema.a.b."""
    reply = await _ask(checker, "inspect", modules, data, schemas=dict(schemas or {}), strict=strict)
    return msgspec.convert({name: reply[name] for name in Inspection.__struct_fields__ if name in reply}, Inspection)


async def run_tests(
    checker: Checker, modules: Mapping[str, str], data: bytes, *, run: str = "", coverage: bool = False
) -> tuple[tuple[TestResult, ...], tuple[Coverage, ...]]:
    """Runs the `test_...` rules of `modules` whose full names the regular expression `run` is found in, in the order of their files.

    With `coverage`, also how much of each file that is not one of tests they reached.
    """
    reply = await _ask(checker, "test", modules, data, run=run, coverage=coverage)
    results = msgspec.convert(reply.get("tests") or [], tuple[TestResult, ...])
    covered = msgspec.convert(reply.get("coverage") or [], tuple[Coverage, ...])
    return tuple(sorted(results, key=lambda result: (result.file, result.row, result.name))), covered


async def reformat(checker: Checker, modules: Mapping[str, str]) -> dict[str, str]:
    """`modules` as `opa fmt` writes them."""
    reply = await _ask(checker, "format", modules, b"{}")
    return msgspec.convert(reply.get("modules") or {}, dict[str, str])


async def measure(
    checker: Checker, modules: Mapping[str, str], data: bytes, decision: str, inputs: Sequence[bytes], seconds: float
) -> Measure:
    """Evaluates `decision` over `inputs` (JSON) in turn, for about `seconds`."""
    reply = await _ask(checker, "bench", modules, data, paths=[segments(decision)], inputs=_raw(inputs), seconds=seconds)
    return msgspec.convert(reply["measure"], Measure)


async def explain(
    checker: Checker, modules: Mapping[str, str], data: bytes, decision: str, document: bytes, seconds: float = 10.0
) -> Explanation:
    """Evaluates `decision` on the input `document` (JSON), and tells what each rule did."""
    reply = await _ask(checker, "explain", modules, data, paths=[segments(decision)], inputs=_raw([document]), seconds=seconds)
    return msgspec.json.decode(msgspec.json.encode(reply["explanation"]), type=Explanation)


async def _ask(checker: Checker, command: str, modules: Mapping[str, str], data: bytes, **more: Any) -> dict[str, Any]:
    reply = await checker.command({"op": command, "modules": dict(modules), "data": msgspec.Raw(data), **more})
    problems = problems_of(reply)
    if problems:
        raise PolicyError(tuple(sorted(problems, key=_place)))
    return reply


def _place(problem: PolicyProblem) -> tuple[str, int, int]:
    return problem.file, problem.row, problem.column


def _raw(inputs: Sequence[bytes]) -> list[msgspec.Raw]:
    return [msgspec.Raw(document) for document in inputs]

"""From modules and data to a checked `mesh.policy.Revision`, and what an author should know about it.

OPA does the compiling (`checker` is a pool of its workers, or anything that takes their commands, see `pdp/opa/commands.go`); what an
entry point reads comes from `pdp.readset`. An entry point's digest covers its plan, the parts of the data that it can reach, what it
reads and its `ttl`: a change elsewhere keeps its digest, and with it what is kept.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, Final, Protocol

import msgspec

from mesh.policy import EntryPoint, Path, Revision, digest_of
from pdp.engines.engine import PolicyError, PolicyProblem, segments
from pdp.plan import PlanError, canonical, read_plan
from pdp.readset import Reach, read_set, widened

TEST_SUFFIX: Final = "_test.rego"

NEVER_TWICE: Final[Mapping[Path, str]] = {
    ("attributes", "request", "time"): "the time of the request",
    ("attributes", "request", "http", "id"): "the id of the request",
    ("attributes", "request", "http", "headers", "x-request-id"): "the id of the request",
    ("attributes", "request", "http", "headers", "traceparent"): "the trace of the request",
    ("attributes", "source", "address", "socketAddress", "portValue"): "the caller's port",
}
"""What is (nearly) never the same in two requests: a policy that reads it is asked every time."""

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_ABSENT: Final = object()
_exact = msgspec.json.Decoder(float_hook=Decimal)
_sorted = msgspec.json.Encoder(order="sorted", decimal_format="number")


class Checker(Protocol):
    """Whoever takes the OPA worker's commands."""

    async def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to `request`, both as in `pdp/opa/commands.go`. Raises `EngineUnavailable`."""
        ...


class TestResult(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one `test_...` rule."""

    __test__ = False

    package: str
    """`data.shop.authz_test`"""
    name: str
    file: str = ""
    row: int = 0
    passed: bool = False
    skipped: bool = False
    error: str = ""
    seconds: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to tell an author about one entry point."""

    path: str
    keepable: bool
    reads: tuple[str, ...]
    """What the answer depends on, one line each: `input.parsed_path[0]`, `input.x (whether it is there)`."""
    notes: tuple[str, ...]
    """What makes it dear, and what to do about it."""


async def publish(
    checker: Checker,
    modules: Mapping[str, str],
    data: bytes,
    decisions: Collection[str],
    *,
    strict: bool = False,
) -> Revision:
    """Checks `modules` (file name to Rego) with `data` (JSON) and makes the revision that serves `decisions` (`shop.authz.decision`).

    Tests (`*_test.rego`) are left out of it. `strict` is OPA's strict mode. Raises `PolicyError` with every problem that was found.
    """
    shipped = without_tests(modules)
    base = _base(data)
    paths, problems = _parse_decisions(decisions)
    request = {"op": "plan", "modules": shipped, "data": msgspec.Raw(data), "strict": strict, "paths": list(map(list, paths.values()))}
    reply = await checker.command(request)
    problems += _problems(reply)
    entries = reply.get("entries") or []
    if problems or len(entries) != len(paths):
        raise PolicyError(tuple(problems) or (PolicyProblem(message="OPA did not plan all decisions"),))
    version = str(reply.get("version", ""))
    points: dict[str, EntryPoint] = {}
    for (name, parts), entry in zip(paths.items(), entries, strict=True):
        wrong = _not_a_decision(name, parts, entry.get("kind", ""), reply.get("rules") or [])
        if wrong:
            problems.append(PolicyProblem(message=wrong))
            continue
        try:
            ttl = time_to_live(entry.get("custom") or [])
        except ValueError as problem:
            problems.append(PolicyProblem(message=f"{name}: {problem}"))
            continue
        points[name] = _entry_point(name, entry, shipped, base, ttl, version, reply.get("builtins") or [])
    if problems:
        raise PolicyError(tuple(problems))
    return Revision(digest=digest_of(shipped, data), modules=shipped, data=data, entry_points=points, opa=version)


async def check(checker: Checker, modules: Mapping[str, str], data: bytes, *, strict: bool = True) -> None:
    """Compiles everything, tests too. Raises `PolicyError`."""
    _base(data)
    problems = _problems(await checker.command({"op": "check", "modules": dict(modules), "data": msgspec.Raw(data), "strict": strict}))
    if problems:
        raise PolicyError(tuple(problems))


async def run_tests(checker: Checker, modules: Mapping[str, str], data: bytes) -> tuple[TestResult, ...]:
    """Runs the `test_...` rules of `modules`, in the order of their files. Raises `PolicyError` when they don't compile."""
    _base(data)
    reply = await checker.command({"op": "test", "modules": dict(modules), "data": msgspec.Raw(data)})
    problems = _problems(reply)
    if problems:
        raise PolicyError(tuple(problems))
    results = msgspec.convert(reply.get("tests") or [], tuple[TestResult, ...])
    return tuple(sorted(results, key=lambda result: (result.file, result.row)))


def without_tests(modules: Mapping[str, str]) -> dict[str, str]:
    """`modules` without the files of tests."""
    return {name: source for name, source in modules.items() if not name.endswith(TEST_SUFFIX)}


def report(point: EntryPoint) -> Report:
    """What to tell the author of `point`."""
    reads, notes = point.reads, []
    shown = [path_text(path) for path in reads.values]
    shown += [f"{path_text(path)} (its length)" for path in reads.lengths]
    shown += [f"{path_text(path)} (its type)" for path in reads.kinds]
    shown += [f"{path_text(path)} (whether it is there)" for path in reads.defined]
    notes += [f"{reason}: any difference in the input asks again" for reason in reads.widened]
    if reads.volatile:
        names = ", ".join(reads.volatile)
        kept = (
            f"kept for {point.ttl:g} s"
            if point.ttl is not None
            else "asked every time; `custom: {tollhouse: {ttl: 5s}}` in the rule's METADATA lets an answer be kept"
        )
        notes.append(f"{names}: not a function of the input, so that it is {kept}")
    for never, what in NEVER_TWICE.items():
        reader = next((path for path in reads.values if never[: len(path)] == path), None)
        if reader is not None:
            notes.append(f"{path_text(reader)} {'is' if reader == never else 'has'} {what}, never twice the same: it is asked every time")
    return Report(path=point.path, keepable=point.keepable, reads=tuple(shown), notes=tuple(dict.fromkeys(notes)))


def path_text(path: Path) -> str:
    """`input.attributes.request.http.headers["x-tenant"]`."""
    text = "input"
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if part.isidentifier() else f"[{json.dumps(part)}]"
    return text


def time_to_live(custom: Collection[Mapping[str, Any]]) -> float | None:
    """The `ttl` in seconds that METADATA's `custom: {tollhouse: {ttl: 5s}}` gives; the shortest of several. Raises ValueError."""
    found: list[float] = []
    for one in custom:
        ours = one.get("tollhouse")
        if ours is None:
            continue
        if not isinstance(ours, Mapping) or set(ours) - {"ttl"}:
            raise ValueError("METADATA custom.tollhouse takes one field, ttl: custom: {tollhouse: {ttl: 5s}}")
        if "ttl" in ours:
            found.append(_seconds(ours["ttl"]))
    return min(found, default=None)


def _seconds(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"METADATA custom.tollhouse.ttl: {value!r} is not a time; write it as in 500ms, 5s or 1m")
    return seconds


def _base(data: bytes) -> dict[str, Any]:
    try:
        base = _exact.decode(data)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise PolicyError((PolicyProblem(file="data", message=f"the data is not JSON: {problem}"),)) from problem
    if not isinstance(base, dict):
        raise PolicyError((PolicyProblem(file="data", message="the data is not a JSON object"),))
    return base


def _parse_decisions(decisions: Collection[str]) -> tuple[dict[str, tuple[str, ...]], list[PolicyProblem]]:
    paths: dict[str, tuple[str, ...]] = {}
    problems: list[PolicyProblem] = []
    for name in sorted(set(decisions)):
        try:
            paths[name] = segments(name)
        except ValueError as problem:
            problems.append(PolicyProblem(message=str(problem)))
    return paths, problems


def _problems(reply: Mapping[str, Any]) -> list[PolicyProblem]:
    return msgspec.convert(reply.get("problems") or [], list[PolicyProblem])


def _not_a_decision(name: str, parts: tuple[str, ...], kind: str, rules: list[str]) -> str:
    if kind == "rule":
        return ""
    if kind == "function":
        return f"{name} is a function: a decision is a rule without arguments"
    path = ".".join(parts)
    known = [rule.removeprefix("data.") for rule in rules]
    if kind == "package":
        inside = [rule for rule in known if rule.startswith(f"{path}.")]
        return f"{name} is a package: a decision is one of its rules{_listed(inside)}"
    return f"{name} leads to nothing: no module has such a rule{_listed(difflib.get_close_matches(path, known, n=3) or known)}"


def _listed(rules: list[str]) -> str:
    if not rules:
        return ""
    more = f" and {len(rules) - 5} more" if len(rules) > 5 else ""
    return f" ({', '.join(rules[:5])}{more})"


def _entry_point(
    name: str,
    entry: Mapping[str, Any],
    modules: Mapping[str, str],
    base: dict[str, Any],
    ttl: float | None,
    version: str,
    builtins: Collection[str],
) -> EntryPoint:
    plan: Any = entry.get("plan")
    reach, program = widened(f"OPA has no plan for it ({entry.get('unplanned') or 'it does not say why'})", builtins), dict(modules)
    if plan is not None:
        try:
            reach, program = read_set(read_plan(plan)), canonical(plan)
        except PlanError as problem:
            reach = widened(str(problem), builtins)
    return EntryPoint(path=name, digest=_digest(program, reach, base, ttl, version), reads=reach.reads, ttl=ttl)


def _digest(program: Any, reach: Reach, base: dict[str, Any], ttl: float | None, version: str) -> str:
    """SHA-256 over what an answer is made of, and over what decides how it may be kept: the read set and the `ttl` are part of it."""
    found = [(path, _at(base, path)) for path in sorted(reach.data, key=repr)]
    reads = reach.reads
    told = {
        "opa": version,
        "program": program,
        "data": [[path, value] if value is not _ABSENT else [path] for path, value in found],
        "defined": [[path, _at(base, path) is not _ABSENT] for path in sorted(reach.data_defined, key=repr)],
        "reads": [reads.values, reads.defined, reads.lengths, reads.kinds, reads.volatile],
        "ttl": ttl,
    }
    return hashlib.sha256(_sorted.encode(told)).hexdigest()


def _at(base: Any, path: Path) -> object:
    for part in path:
        known = part in base if isinstance(base, dict) else isinstance(base, list) and isinstance(part, int) and part < len(base)
        if not known:
            return _ABSENT
        base = base[part]
    return base

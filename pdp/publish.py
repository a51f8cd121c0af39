"""From modules and data to a checked `mesh.policy.Revision`, and what an author should know about it.

OPA does the compiling (`checker` is a pool of its workers, or anything that takes their commands, see `pdp/opa/commands.go`); what an
entry point reads comes from `pdp.readset`. An entry point's digest covers its plan, the parts of the data that it can reach, what it
reads and its `ttl`: a change elsewhere keeps its digest, and with it what is kept.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from mesh.policy import EntryPoint, Path, Revision, digest_of
from pdp.engines.engine import PolicyError, PolicyProblem, segments
from pdp.plan import PlanError, canonical, plan_size, read_plan
from pdp.reach import Reach
from pdp.readset import read_set, widened

TEST_SUFFIX: Final = "_test.rego"

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


class NoDecision(PolicyError):
    """A policy in which nothing is wrong but that some of the decisions that were asked for are none of its rules."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        """`problems`: what is wrong with each, by its name."""
        super().__init__(tuple(PolicyProblem(message=problem) for problem in problems.values()))
        self.decisions = frozenset(problems)


class Studied(NamedTuple):
    """What is known of an entry point besides what its revision carries."""

    reach: Reach
    statements: int
    """Of its plan; 0 without one."""


async def publish(
    checker: Checker,
    modules: Mapping[str, str],
    data: bytes,
    decisions: Collection[str],
    *,
    strict: bool = False,
) -> Revision:
    """Checks `modules` (file name to Rego) with `data` (JSON) and makes the revision that serves `decisions` (`shop.authz.decision`).

    Tests (`*_test.rego`) are left out of it. `strict` is OPA's strict mode. Raises `PolicyError` with every problem that was found,
    `NoDecision` when it is only that some of the decisions are not there.
    """
    return (await study(checker, modules, data, decisions, strict=strict))[0]


async def study(
    checker: Checker,
    modules: Mapping[str, str],
    data: bytes,
    decisions: Collection[str],
    *,
    strict: bool = False,
) -> tuple[Revision, dict[str, Studied]]:
    """As `publish`, with what was found out about each of the `decisions` on the way."""
    shipped = without_tests(modules)
    base = _base(data)
    paths, problems = _parse_decisions(decisions)
    request = {"op": "plan", "modules": shipped, "data": msgspec.Raw(data), "strict": strict, "paths": list(map(list, paths.values()))}
    reply = await checker.command(request)
    problems += problems_of(reply)
    entries = reply.get("entries") or []
    if problems or len(entries) != len(paths):
        raise PolicyError(tuple(problems) or (PolicyProblem(message="OPA did not plan all decisions"),))
    version = str(reply.get("version", ""))
    points: dict[str, EntryPoint] = {}
    studied: dict[str, Studied] = {}
    missing: dict[str, str] = {}
    for (name, parts), entry in zip(paths.items(), entries, strict=True):
        wrong = _not_a_decision(name, parts, entry.get("kind", ""), reply.get("rules") or [])
        if wrong:
            missing[name] = wrong
            continue
        try:
            ttl = time_to_live(entry.get("custom") or [])
        except ValueError as problem:
            problems.append(PolicyProblem(message=f"{name}: {problem}"))
            continue
        points[name], reach = _entry_point(name, entry, shipped, base, ttl, version, reply.get("builtins") or [])
        studied[name] = Studied(reach, plan_size(entry.get("plan")))
    if missing and not problems:
        raise NoDecision(missing)
    if problems:
        raise PolicyError((*(PolicyProblem(message=wrong) for wrong in missing.values()), *problems))
    return Revision(digest=digest_of(shipped, data), modules=shipped, data=data, entry_points=points, opa=version), studied


async def check(checker: Checker, modules: Mapping[str, str], data: bytes, *, strict: bool = True) -> None:
    """Compiles everything, tests too. Raises `PolicyError`."""
    _base(data)
    problems = problems_of(await checker.command({"op": "check", "modules": dict(modules), "data": msgspec.Raw(data), "strict": strict}))
    if problems:
        raise PolicyError(tuple(problems))


def without_tests(modules: Mapping[str, str]) -> dict[str, str]:
    """`modules` without the files of tests."""
    return {name: source for name, source in modules.items() if not name.endswith(TEST_SUFFIX)}


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


def problems_of(reply: Mapping[str, Any]) -> list[PolicyProblem]:
    """What is wrong, by a command's reply."""
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
) -> tuple[EntryPoint, Reach]:
    plan: Any = entry.get("plan")
    reach, program = widened(f"OPA has no plan for it ({entry.get('unplanned') or 'it does not say why'})", builtins), dict(modules)
    if plan is not None:
        try:
            reach, program = read_set(read_plan(plan)), canonical(plan)
        except PlanError as problem:
            reach = widened(str(problem), builtins)
    digest = _digest(program, reach, base, ttl, version)
    data, defined = (tuple(sorted(paths, key=repr)) for paths in (reach.data, reach.data_defined))
    return EntryPoint(path=name, digest=digest, reads=reach.reads, data=data, data_defined=defined, ttl=ttl), reach


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

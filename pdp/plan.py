"""OPA's intermediate representation of one entry point, read from the JSON that `opa build -t plan` (or the worker) writes.

A plan is a program of some thirty statement kinds over numbered locals, without any of Rego's sugar; local 0 is `input`, local 1
is `data` (openpolicyagent.org, "Intermediate Representation"). Here it is only read; `pdp.readset` interprets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

INPUT: Final = 0
DATA: Final = 1

_LOCATION: Final = frozenset(("file", "col", "row", "end_col", "end_row", "text"))

Where = tuple[int, int]
"""The file, by its index in `Plan.files`, and the line that a statement comes from; line 0 is nowhere."""

Fields = dict[str, Any]
"""A statement's fields, as OPA names them."""


class PlanError(ValueError):
    """What came is not a plan."""


class Statement(msgspec.Struct, frozen=True):
    """One operation."""

    kind: str
    """`DotStmt`, `CallStmt`, ..."""
    fields: Fields
    where: Where = (0, 0)


Block = tuple[Statement, ...]
"""Statements that run until one of them is undefined."""


class Function(msgspec.Struct, frozen=True):
    """One function: what a rule was compiled to."""

    name: str
    params: tuple[int, ...]
    blocks: tuple[Block, ...]
    path: tuple[str, ...]
    """Under which name a dynamic call finds it; empty for none."""
    rewritten: frozenset[int]
    """Locals that more than one statement assigns once: two definitions of one rule, which may disagree."""
    tested: frozenset[int]
    """Locals whose mere definedness some statement tests."""
    fresh: tuple[frozenset[int], ...] = ()
    """Of each block the locals that it writes before it reads them. Definitions of one rule are blocks that use the same numbers again:
    what the one before left there is nothing to the next."""


class Plan(msgspec.Struct, frozen=True):
    """The plan of one entry point."""

    strings: tuple[str, ...]
    entries: tuple[Function, ...]
    """The blocks to run, as functions of `input` and `data`."""
    functions: dict[str, Function]
    files: tuple[str, ...] = ()


def read_plan(raw: Fields) -> Plan:
    """Reads a plan's JSON. Raises `PlanError`."""
    try:
        strings = tuple(text["value"] for text in raw["static"].get("strings") or ())
        entries = tuple(_function({**plan, "params": [INPUT, DATA]}) for plan in raw["plans"]["plans"])
        functions = {found["name"]: _function(found) for found in (raw.get("funcs") or {}).get("funcs") or ()}
        files = tuple(text["value"] for text in raw["static"].get("files") or ())
    except (KeyError, TypeError, AttributeError) as problem:
        raise PlanError(f"OPA's plan is not in the form that is known: {problem!r}") from problem
    return Plan(strings, entries, functions, files)


def canonical(raw: Fields) -> Fields:
    """A plan's JSON without what does not change an answer: where in which file each statement came from, and builtins' declarations."""
    static = raw.get("static") or {}
    return {
        "strings": [text["value"] for text in static.get("strings") or ()],
        "plans": _without_location(raw.get("plans")),
        "funcs": _without_location(raw.get("funcs")),
    }


def plan_size(raw: Any) -> int:
    """How many statements a plan's JSON has, nested ones included."""
    if isinstance(raw, dict):
        return ("stmt" in raw) + sum(plan_size(item) for item in raw.values())
    return sum(plan_size(item) for item in raw) if isinstance(raw, list) else 0


def blocks_of(statement: Statement) -> Iterator[Block]:
    """The blocks nested in a statement."""
    if (one := statement.fields.get("block")) is not None:
        yield one
    yield from statement.fields.get("blocks") or ()


def _function(raw: Fields) -> Function:
    blocks = _blocks(raw["blocks"])
    once: dict[int, int] = {}
    tested: set[int] = set()
    _survey(blocks, once, tested)
    return Function(
        raw["name"],
        tuple(raw["params"]),
        blocks,
        tuple(raw.get("path") or ()),
        frozenset(local for local, times in once.items() if times > 1),
        frozenset(tested),
        tuple(_fresh(block) for block in blocks),
    )


_NO_LOCALS: Final = frozenset(("MakeNumberIntStmt", "MakeNumberRefStmt", "AssignIntStmt", "BreakStmt"))
"""Statements in which whole numbers other than the target are not locals."""


def _fresh(block: Block) -> frozenset[int]:
    written: set[int] = set()
    read: set[int] = set()
    _order(block, read, written)
    return frozenset(written)


def _order(block: Block, read: set[int], written: set[int]) -> None:
    for statement in block:
        fields = statement.fields
        targets = ["result"] if statement.kind == "AssignVarOnceStmt" else ["target", "result"]
        if statement.kind == "ScanStmt":
            targets += ["key", "value"]
        for name, value in fields.items():
            if name not in (*targets, "block", "blocks"):
                read.update(number for number in _locals(value, statement.kind) if number not in written)
        written.update(fields[name] for name in targets if name in fields and fields[name] not in read)
        for inner in blocks_of(statement):
            _order(inner, read, written)


def _locals(value: Any, kind: str) -> Iterator[int]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if kind not in _NO_LOCALS:
            yield value
    elif isinstance(value, dict):
        if value.get("type") == "local":
            yield value["value"]
    elif isinstance(value, list):
        for item in value:
            yield from _locals(item, kind)


def _blocks(raw: Any) -> tuple[Block, ...]:
    return tuple(_block(block) for block in raw or ())


def _block(raw: Any) -> Block:
    return tuple(_statement(statement) for statement in (raw or {}).get("stmts") or ())


def _statement(raw: Fields) -> Statement:
    fields = {name: value for name, value in raw["stmt"].items() if name not in _LOCATION}
    if "block" in fields:
        fields["block"] = _block(fields["block"])
    if "blocks" in fields:
        fields["blocks"] = _blocks(fields["blocks"])
    return Statement(raw["type"], fields, (raw["stmt"].get("file") or 0, raw["stmt"].get("row") or 0))


def _survey(blocks: tuple[Block, ...], once: dict[int, int], tested: set[int]) -> None:
    for block in blocks:
        for statement in block:
            if statement.kind == "AssignVarOnceStmt":
                target = statement.fields["target"]
                once[target] = once.get(target, 0) + 1
            elif statement.kind in ("IsDefinedStmt", "IsUndefinedStmt"):
                tested.add(statement.fields["source"])
            _survey(tuple(blocks_of(statement)), once, tested)


def _without_location(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_location(item) for key, item in value.items() if key not in _LOCATION}
    if isinstance(value, list):
        return [_without_location(item) for item in value]
    return value

"""Read sets: what of `input` and of `data` an entry point's answer can depend on.

An abstract interpreter over OPA's plan (`pdp.plan`). A local's abstract value is the set of *places* that it may be an alias of
(`input.attributes`, `data.users`, ...) and, where it is known, the constant that it holds. Everything that a policy derives is
covered by what was read to derive it. What is read is recorded in four kinds, see `mesh.policy.ReadSet`: the value at a place,
only whether it is defined, only its length, only its JSON type.

What makes it sound:

* A branch that may be taken is taken; loops run to a fixpoint; locals join after each block.
* A dynamic call is a call of every function that may match.
* A rule with several definitions, or one that is assigned in a loop, reads the values that it is given: they may conflict, and whether
  they do depends on them.
* `with input.a as v` reads `v` and leaves the aliases as they were: what is read below them may be more than what is needed, never less.
  Only the length of what `v` is put into is not a function of the length that it had, so that it is a read of the value.
* A statement kind that is not known, or more than can be followed, is a read of everything, with the reason in `widened`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from mesh.policy import Path, ReadSet
from pdp.builtins import KINDS, LENGTHS, PURE
from pdp.plan import DATA, INPUT, Block, Fields, Function, Plan, Statement, Where
from pdp.reach import DERIVED, Place, Reach, Value, Why

_DEEPEST: Final = 40
"""Parts of a path that is followed."""
_STEPS: Final = 400_000
"""Statements that are interpreted before it is given up."""

Locals = dict[int, Value]


class _Frame:
    """One function that is being interpreted."""

    __slots__ = ("function", "loops", "returned")

    def __init__(self, function: Function) -> None:
        self.function = function
        self.returned = DERIVED
        self.loops = 0


class _TooLarge(Exception):
    """The plan is larger than what is followed."""


def read_set(plan: Plan) -> Reach:
    """What `plan` can read."""
    interpreter = _Interpreter(plan)
    try:
        for entry in plan.entries:
            interpreter.run(entry, (Value(frozenset([Place(INPUT, ())])), Value(frozenset([Place(DATA, ())]))))
    except _TooLarge:
        interpreter.widen("the policy is larger than what can be followed")
    except (KeyError, TypeError, IndexError, ValueError) as problem:
        interpreter.widen(f"a statement of OPA's plan is not in the form that is known ({type(problem).__name__}: {problem})")
    return interpreter.result()


def widened(reason: str, builtins: Iterable[str]) -> Reach:
    """What must be supposed of an entry point that has no plan; `builtins` are all that its modules call."""
    volatile = tuple(sorted(set(builtins) - PURE))
    return Reach(ReadSet(values=((),), volatile=volatile, widened=(reason,)), frozenset([()]), frozenset())


def join(one: Value | None, other: Value) -> Value:
    """What a local may hold that holds either."""
    if one is None or one == other:
        return other
    return Value(
        one.places | other.places, one.constant if one.constant == other.constant and type(one.constant) is type(other.constant) else None
    )


class _Interpreter:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._values: set[Place] = set()
        self._defined: set[Place] = set()
        self._lengths: set[Place] = set()
        self._kinds: set[Place] = set()
        self._overlaid: set[Place] = set()
        self._volatile: set[str] = set()
        self._widened: dict[str, None] = {}
        self._where: Where = (0, 0)
        self._why: dict[Place, tuple[str, Where]] = {}
        self._seen: dict[Place, Where] = {}
        self._known: dict[tuple[str, tuple[Value, ...]], Value | None] = {}
        self._steps = 0

    # Recording

    def result(self) -> Reach:
        grown = {Place(place.root, place.path[:length]) for place in self._overlaid for length in range(len(place.path))}
        values = _tops(self._values | (self._lengths & grown))
        covered = _covering(values)
        kinds = {place for place in self._kinds if not covered(place)}
        lengths = {place for place in self._lengths if not covered(place)}
        defined = {place for place in self._defined if not covered(place) and place not in kinds}
        reads = ReadSet(
            values=_paths(values),
            defined=_paths(defined),
            lengths=_paths(lengths),
            kinds=_paths(kinds),
            volatile=tuple(sorted(self._volatile)),
            widened=tuple(self._widened),
        )
        data = frozenset(place.path for place in values | kinds | lengths if place.root == DATA)
        why = {place.path: self._told(*told) for place, told in self._why.items() if place.root == INPUT}
        seen = {place.path: self._told("", where) for place, where in self._seen.items() if place.root == INPUT}
        return Reach(reads, data, frozenset(place.path for place in defined if place.root == DATA) - data, why, seen)

    def _told(self, reason: str, where: Where) -> Why:
        file, row = where
        return Why(reason, self._plan.files[file] if row and file < len(self._plan.files) else "", row)

    def widen(self, reason: str) -> None:
        self._widened[reason] = None
        self._values |= {Place(INPUT, ()), Place(DATA, ())}

    def _read(self, value: Value, reason: str) -> None:
        self._values |= value.places
        for place in value.places:
            self._why.setdefault(place, (reason, self._where))

    # Control

    def run(self, function: Function, arguments: tuple[Value, ...]) -> Value:
        key = (function.name, arguments)
        if key in self._known:
            known = self._known[key]
            if known is None:
                self.widen(f"{function.name} calls itself")
                return DERIVED
            return known
        self._known[key] = None
        frame = _Frame(function)
        local: Locals = dict(zip(function.params, arguments, strict=True))
        for block, fresh in zip(function.blocks, function.fresh, strict=True):
            for number in fresh.intersection(local):
                del local[number]
            self._blocks((block,), local, frame)
        self._known[key] = frame.returned
        return frame.returned

    def _blocks(self, blocks: Iterable[Block], local: Locals, frame: _Frame, loop: bool = False) -> None:
        frame.loops += loop
        while True:
            before = dict(local)
            for block in blocks:
                inner = dict(local)
                self._block(block, inner, frame)
                for number, value in inner.items():
                    local[number] = join(local.get(number), value)
            if not loop or local == before:
                break
        frame.loops -= loop

    def _block(self, block: Block, local: Locals, frame: _Frame) -> None:
        for index, statement in enumerate(block):
            self._steps += 1
            if self._steps > _STEPS:
                raise _TooLarge
            if statement.where[1]:
                self._where = statement.where
            if statement.kind == "DotStmt":
                self._dot(statement.fields, local, implied=_goes_on(block, index, frame.function.tested))
                continue
            handler = _HANDLERS.get(statement.kind)
            if handler is not None:
                handler(self, statement.fields, local, frame)
            elif statement.kind not in _HARMLESS:
                self._unknown(statement, local)

    def _unknown(self, statement: Statement, local: Locals) -> None:
        self.widen(f"OPA's plan has a {statement.kind}, which is not known here")
        for value in local.values():
            self._read(value, "a statement is not known")

    def _operand(self, local: Locals, operand: int | Fields) -> Value:
        if isinstance(operand, int):
            return local.get(operand, DERIVED)
        kind, value = operand["type"], operand["value"]
        if kind == "local":
            return local.get(value, DERIVED)
        if kind == "string_index":
            return Value(constant=self._plan.strings[value])
        if kind == "bool":
            return DERIVED
        raise ValueError(f"an operand of type {kind}")

    # Statements

    def _dot(self, fields: Fields, local: Locals, implied: bool) -> None:
        source, key = self._operand(local, fields["source"]), self._operand(local, fields["key"])
        local[fields["target"]] = self._step(source, key, implied)

    def _step(self, source: Value, key: Value, implied: bool = False) -> Value:
        part = key.constant
        if isinstance(part, tuple) or part is None or any(len(place.path) >= _DEEPEST for place in source.places):
            self._read(source, "the key is not a constant, so that any of it may be meant")
            self._read(key, "it is a key")
            return DERIVED
        places = frozenset(Place(place.root, (*place.path, part)) for place in source.places)
        for place in places:
            self._seen.setdefault(place, self._where)
        if not implied:
            self._defined |= places
        return Value(places)

    def _assign(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        local[fields["target"]] = self._operand(local, fields["source"])

    def _assign_once(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        value = self._operand(local, fields["source"])
        if frame.loops or fields["target"] in frame.function.rewritten:
            self._read(value, "it is one of several values of a rule, which must agree")
        local[fields["target"]] = value

    def _read_both(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        alone = any(isinstance(fields.get(side), dict) and fields[side]["type"] == "bool" for side in "ab")
        compared = "it is a condition by itself" if alone else "it is compared as a whole"
        reason = compared if "a" in fields else "it is put into another value"
        for name in ("a", "b", "key", "value"):
            if name in fields:
                self._read(self._operand(local, fields[name]), reason)
        for name in ("target", "object", "set"):
            if name in fields:
                local[fields[name]] = DERIVED

    def _append(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        value, array = self._operand(local, fields["value"]), local.get(fields["array"], DERIVED).constant
        self._read(value, "it is put into an array")
        item = value.constant
        grown = (*array, item) if isinstance(array, tuple) and isinstance(item, str | int) and len(array) < _DEEPEST else None
        local[fields["array"]] = Value(constant=grown)

    def _make_array(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        local[fields["target"]] = Value(constant=())

    def _make_integer(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        number = fields["value"]
        local[fields["target"]] = Value(constant=number if isinstance(number, int) and number >= 0 else None)

    def _make_number(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        text = self._plan.strings[fields["index"] if "index" in fields else fields["Index"]]
        plain = text.isascii() and text.isdigit() and (text == "0" or text[0] != "0") and len(text) < 10
        local[fields["target"]] = Value(constant=int(text) if plain else None)

    def _make(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        local[fields["target"]] = DERIVED

    def _kind(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        self._kinds |= self._operand(local, fields["source"]).places

    def _length(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        self._lengths |= self._operand(local, fields["source"]).places
        local[fields["target"]] = DERIVED

    def _scan(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        self._read(self._operand(local, fields["source"]), "all of it is gone through")
        local[fields["key"]] = local[fields["value"]] = DERIVED
        self._blocks((fields["block"],), local, frame, loop=True)

    def _nested(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        self._blocks(fields["blocks"] if "blocks" in fields else (fields["block"],), local, frame)

    def _with(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        value, target = self._operand(local, fields["value"]), fields["local"]
        old = local.get(target, DERIVED)
        inner = dict(local)
        if fields.get("path"):
            self._read(value, "`with` puts it somewhere else")
            below = tuple(self._plan.strings[index] for index in fields["path"])
            self._overlaid |= {Place(place.root, place.path + below) for place in old.places}
            inner[target] = Value(old.places)
        else:
            inner[target] = value
        self._blocks((fields["block"],), inner, frame)
        for number, found in inner.items():
            if number != target:
                local[number] = join(local.get(number), found)

    def _call(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        name, arguments = fields["func"], tuple(self._operand(local, argument) for argument in fields["args"] or ())
        function = self._plan.functions.get(name)
        local[fields["result"]] = self.run(function, arguments) if function is not None else self._builtin(name, arguments)

    def _call_dynamic(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        del frame
        path = [self._operand(local, part) for part in fields["path"]]
        arguments = tuple(self._operand(local, argument) for argument in fields["args"] or ())
        for part in path:
            self._read(part, "it chooses a rule")
        result = DERIVED
        for function in self._plan.functions.values():
            if len(function.path) == len(path) and all(
                part.constant in (None, name) for part, name in zip(path, function.path, strict=True)
            ):
                got = self.run(function, arguments)
                result = Value(result.places | got.places)
        local[fields["result"]] = result

    def _return(self, fields: Fields, local: Locals, frame: _Frame) -> None:
        value = self._operand(local, fields["source"])
        frame.returned = Value(frame.returned.places | value.places)

    # Builtins

    def _builtin(self, name: str, arguments: tuple[Value, ...]) -> Value:
        if name not in PURE:
            self._volatile.add(name)
        if name in KINDS:
            self._kinds |= arguments[0].places
        elif name in LENGTHS:
            self._lengths |= arguments[0].places
        elif name == "object.get" and len(arguments) == 3:
            return self._object_get(*arguments)
        else:
            for argument in arguments:
                self._read(argument, f"it is passed to {name}" if not name.startswith("internal.") else "it is looked at as a whole")
        return DERIVED

    def _object_get(self, source: Value, key: Value, default: Value) -> Value:
        """`object.get(input, ["a", "b"], d)`: the value there, or `d`; undefined when the source is not an object."""
        path: tuple[str | int, ...] | None = (
            key.constant if isinstance(key.constant, tuple) else (key.constant,) if isinstance(key.constant, str) else None
        )
        if path is None:
            for value in (source, key, default):
                self._read(value, "object.get has a key that is not a constant, so that any of it may be meant")
            return DERIVED
        self._kinds |= source.places
        found = Value(source.places)
        for index, part in enumerate(path):
            found = self._step(found, Value(constant=part), implied=index + 1 < len(path))
        return Value(found.places | default.places)


def _goes_on(block: Block, index: int, tested: frozenset[int]) -> bool:
    """Whether the next thing that happens is a look-up in what this look-up finds: then its definedness is implied by that one's."""
    target = block[index].fields["target"]
    if target in tested:
        return False
    for following in block[index + 1 :]:
        if following.kind == "DotStmt":
            return bool(following.fields["source"] == {"type": "local", "value": target})
        if following.kind not in _CONSTANTS or following.fields.get("target") == target:
            return False
    return False


def _tops(places: Iterable[Place]) -> set[Place]:
    found = set(places)
    return {place for place in found if not any(Place(place.root, place.path[:length]) in found for length in range(len(place.path)))}


def _covering(values: set[Place]) -> Callable[[Place], bool]:
    return lambda place: any(Place(place.root, place.path[:length]) in values for length in range(len(place.path) + 1))


def _paths(places: Iterable[Place]) -> tuple[Path, ...]:
    found = (place.path for place in places if place.root == INPUT)
    return tuple(sorted(found, key=lambda path: [(isinstance(part, int), str(part)) for part in path]))


_Handler = Callable[[_Interpreter, Fields, Locals, _Frame], None]

_CONSTANTS: Final = frozenset(("MakeNumberIntStmt", "MakeNumberRefStmt", "AssignIntStmt"))
_HARMLESS: Final = frozenset(("BreakStmt", "NopStmt", "ResetLocalStmt", "IsDefinedStmt", "IsUndefinedStmt"))
_HANDLERS: Final[dict[str, _Handler]] = {
    "AssignVarStmt": _Interpreter._assign,
    "AssignVarOnceStmt": _Interpreter._assign_once,
    "AssignIntStmt": _Interpreter._make_integer,
    "MakeNumberIntStmt": _Interpreter._make_integer,
    "MakeNumberRefStmt": _Interpreter._make_number,
    "MakeNullStmt": _Interpreter._make,
    "MakeArrayStmt": _Interpreter._make_array,
    "MakeObjectStmt": _Interpreter._make,
    "MakeSetStmt": _Interpreter._make,
    "EqualStmt": _Interpreter._read_both,
    "NotEqualStmt": _Interpreter._read_both,
    "ArrayAppendStmt": _Interpreter._append,
    "ObjectInsertStmt": _Interpreter._read_both,
    "ObjectInsertOnceStmt": _Interpreter._read_both,
    "ObjectMergeStmt": _Interpreter._read_both,
    "SetAddStmt": _Interpreter._read_both,
    "ResultSetAddStmt": _Interpreter._read_both,
    "IsArrayStmt": _Interpreter._kind,
    "IsObjectStmt": _Interpreter._kind,
    "IsSetStmt": _Interpreter._kind,
    "LenStmt": _Interpreter._length,
    "ScanStmt": _Interpreter._scan,
    "NotStmt": _Interpreter._nested,
    "BlockStmt": _Interpreter._nested,
    "WithStmt": _Interpreter._with,
    "CallStmt": _Interpreter._call,
    "CallDynamicStmt": _Interpreter._call_dynamic,
    "ReturnLocalStmt": _Interpreter._return,
}

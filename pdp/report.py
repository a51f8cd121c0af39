"""What to tell the author of a decision: what it reads and why, what that costs in hits, and paths that no input document has."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final

import msgspec

from mesh.policy import EntryPoint, Path, ReadSet
from pdp.engines.engine import PolicyProblem
from pdp.publish import Studied
from pdp.reach import Why
from pdp.values import BODY, at, wanted_parts

NEVER_TWICE: Final[Mapping[Path, str]] = {
    ("attributes", "request", "time"): "the time of the request",
    ("attributes", "request", "http", "id"): "the id of the request",
    ("attributes", "request", "http", "headers", "x-request-id"): "the id of the request",
    ("attributes", "request", "http", "headers", "traceparent"): "the trace of the request",
    ("attributes", "source", "address", "socketAddress", "portValue"): "the caller's port",
}
"""What is (nearly) never the same in two requests: a policy that reads it is asked every time."""

EXTENSIONS: Final = ("gateway", "listener", "route", "template", "service", "via")
"""What our gateways put into `input.attributes.contextExtensions`; an Envoy's configuration may put more there."""
_EXTENSIONS_AT: Final[Path] = ("attributes", "contextExtensions")


class Wide(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is read as a whole, although there is much in it."""

    path: str
    file: str = ""
    row: int = 0
    reason: str = ""
    hits_without: float | None = None
    """Percent of the sample that would be answered from what is kept if this were not read."""

    @property
    def where(self) -> str:
        """`authz.rego:12`, or nothing."""
        return f"{self.file}:{self.row}" if self.row else ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to tell an author about one entry point."""

    path: str
    keepable: bool
    reads: tuple[str, ...]
    """What the answer depends on, one line each: `input.parsed_path[0]`, `input.x (whether it is there)`."""
    notes: tuple[str, ...]
    """What makes it dear, and what to do about it."""
    data: tuple[str, ...] = ()
    """The parts of `data` that it can reach: a change elsewhere keeps what is kept."""
    wide: tuple[Wide, ...] = ()
    hits: float | None = None
    """Percent of the sample that is answered from what is kept."""
    statements: int = 0
    """Of OPA's plan."""
    problems: tuple[PolicyProblem, ...] = ()
    """Paths that no input document has, where OPA's type checker does not look."""
    warnings: tuple[PolicyProblem, ...] = ()


def input_schema() -> dict[str, Any]:
    """The JSON schema of the input document (`pdp.input`)."""
    text = resources.files("pdp").joinpath("input_schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def report(point: EntryPoint, studied: Studied | None = None, sample: Sequence[Any] = ()) -> Report:
    """What to tell the author of `point`; `sample` are input documents, in the order in which they would come."""
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
    if _of_body(reads):
        notes.append("it reads the body: such answers are never kept, where the policy is shown one (withBody)")
    schema = input_schema()
    seen = studied.reach.seen if studied is not None else {}
    return Report(
        path=point.path,
        keepable=point.keepable,
        reads=tuple(shown),
        notes=tuple(dict.fromkeys(notes)),
        data=tuple(sorted(path_text(path, "data") for path in _reached(studied))),
        wide=tuple(_wide(point, studied.reach.why if studied is not None else {}, schema, sample)),
        hits=hit_rate(point, sample) if sample else None,
        statements=studied.statements if studied is not None else 0,
        problems=tuple(_lost(reads, seen, schema)),
        warnings=tuple(_unlikely(reads, seen)),
    )


def hit_rate(point: EntryPoint, sample: Sequence[Any]) -> float:
    """Percent of the second half of `sample` (input documents) that would be answered from what is kept of those before them."""
    if not sample or not point.keepable or _of_body(point.reads):
        return 0.0
    parts = list(wanted_parts(point.reads))
    known: set[object] = set()
    hits = 0
    first = len(sample) // 2
    for index, tree in enumerate(sample):
        key = tuple(part(at(tree, path)) for path, part in parts)
        hits += index >= first and key in known
        known.add(key)
    return 100.0 * hits / (len(sample) - first)


def _of_body(reads: ReadSet) -> bool:
    """Whether it asks for the body, and not only for something that has it in it."""
    paths = (*reads.values, *reads.defined, *reads.lengths, *reads.kinds)
    return any(path[: len(body)] == body for path in paths for body in BODY)


def _reached(studied: Studied | None) -> frozenset[Path]:
    """The outermost paths of `data` that are read."""
    paths = studied.reach.data | studied.reach.data_defined if studied is not None else frozenset()
    return frozenset(path for path in paths if not any(path[:length] in paths for length in range(len(path))))


def path_text(path: Path, root: str = "input") -> str:
    """`input.attributes.request.http.headers["x-tenant"]`."""
    text = root
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if part.isidentifier() else f"[{json.dumps(part)}]"
    return text


def node_at(schema: Mapping[str, Any], path: Path) -> Mapping[str, Any] | str | None:
    """What a schema says is at a path: its node; None where it says nothing; the part that leads nowhere, as text."""
    node: Any = schema
    for part in path:
        if node.get("type") == "object" and "properties" in node:
            if not isinstance(part, str) or part not in node["properties"]:
                return str(part)
            node = node["properties"][part]
        elif node.get("type") == "array":
            if not isinstance(part, int) or "items" not in node:
                return str(part) if not isinstance(part, int) else None
            node = node["items"]
        elif node.get("type") in ("string", "number", "boolean"):
            return str(part)
        else:
            return None
    found: Mapping[str, Any] = node
    return found


def _wide(point: EntryPoint, why: Mapping[Path, Why], schema: Mapping[str, Any], sample: Sequence[Any]) -> Iterator[Wide]:
    reads = point.reads
    for path in reads.values:
        node = node_at(schema, path)
        if not isinstance(node, Mapping) or node.get("type") not in ("object", "array"):
            continue
        said = why.get(path, Why("", "", 0))
        without = None
        if sample:
            rest = tuple(other for other in reads.values if other != path)
            less = msgspec.structs.replace(reads, values=rest)
            without = hit_rate(msgspec.structs.replace(point, reads=less), sample)
        yield Wide(path=path_text(path), file=said.file, row=said.row, reason=said.reason, hits_without=without)


def _lost(reads: ReadSet, seen: Mapping[Path, Why], schema: Mapping[str, Any]) -> Iterator[PolicyProblem]:
    """Paths that lead nowhere: OPA's type checker finds those of references, and not those that `object.get` is given."""
    told = set()
    for path in sorted({*seen, *reads.values, *reads.defined}, key=repr):
        for length in range(1, len(path) + 1):
            part = node_at(schema, path[:length])
            if not isinstance(part, str):
                continue
            if path[:length] not in told:
                told.add(path[:length])
                before = node_at(schema, path[: length - 1])
                known = list(before.get("properties") or ()) if isinstance(before, Mapping) else []
                yield _problem(seen.get(path), f"{path_text(path[:length])} leads nowhere", path[: length - 1], part, known)
            break


def _unlikely(reads: ReadSet, seen: Mapping[Path, Why]) -> Iterator[PolicyProblem]:
    depth = len(_EXTENSIONS_AT)
    for path in sorted({path[: depth + 1] for path in {*seen, *reads.values, *reads.defined} if len(path) > depth}, key=repr):
        part = path[depth]
        if path[:depth] == _EXTENSIONS_AT and isinstance(part, str) and part not in EXTENSIONS:
            where = seen.get(path)
            yield _problem(where, f"{path_text(path)} is not among what a gateway puts there", _EXTENSIONS_AT, part, EXTENSIONS)


def _problem(where: Why | None, said: str, before: Path, part: str, known: Collection[str]) -> PolicyProblem:
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
    if near:
        said += f"; did you mean {path_text((*before, near[0]))}?"
    elif known:
        said += f"; there is {', '.join(sorted(known))}"
    file, row = (where.file, where.row) if where is not None else ("", 0)
    return PolicyProblem(file=file, row=row, code="rego_type_error", message=said)

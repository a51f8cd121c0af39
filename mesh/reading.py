"""From text to documents: YAML (and so JSON), one or many in a text, with the line of each field.

Built on PyYAML's events (libyaml's where it is there) rather than on its loader: nothing in a text can make an object, every bound below
holds before memory is spent, and lines are known. What a schema says about the fields is `mesh.kinds`' business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from mesh.documents import Document, FieldPath, Key, Origin, Problem
from mesh.formats import shown
from mesh.kinds import is_foreign_group, key_of
from mesh.scalars import scalar

MOST_BYTES: Final = 16 * 1024 * 1024
"""Bytes of one text."""
MOST_DEPTH: Final = 64
"""Mappings and lists inside each other."""
MOST_VALUES: Final = 500_000
"""Values in one document, aliases counted with all that they stand for: anchors can't blow it up."""

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAGS: Final = {"tag:yaml.org,2002:" + name: name for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_TYPES: Final[dict[str, tuple[type, ...]]] = {"int": (int,), "float": (int, float), "bool": (bool,), "null": (type(None),)}


class _Refused(Exception):
    """Carries a problem to the one place that reports it."""

    def __init__(self, message: str, line: int, path: FieldPath = ()) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.path = path


def read_documents(text: str | bytes, source: str, above: int = 0) -> tuple[tuple[Document, ...], tuple[Problem, ...]]:
    """The resources in `text` and what is wrong with the others. `source` names the text for people (a file's path), in which `above`
    lines come before it.

    A `List` is taken apart. Where YAML itself is broken, the documents before that place are still returned. The version of a document is
    a digest of its body.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    if len(text) > MOST_BYTES:
        return (), (_problem(source, f"the text has {len(text)} bytes; at most {MOST_BYTES} are read: split it", 0),)
    try:
        for body, lines in _Reader(text, above).documents():
            if body is None:
                continue
            _take(body, Origin(source, lines.get((), 0), lines, above), "", documents, problems)
    except _Refused as refused:
        problems.append(_problem(source, refused.message, refused.line and refused.line + above, refused.path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        problems.append(_problem(source, f"not valid YAML: {what}", mark.line + 1 + above if mark else 0))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(_problem(source, f"not valid YAML: {str(error).splitlines()[0]}", 0))
    return tuple(documents), tuple(problems)


def document_from_json(body: str | bytes, source: str, version: str) -> tuple[Document | None, tuple[Problem, ...]]:
    """The one resource in the JSON text `body`, or why there is none. For a body that is no text: `document_of`.

    `version` changes whenever the text does (etcd's mod_revision).
    """
    if len(body) > MOST_BYTES:
        return None, (_problem(source, f"the text has {len(body)} bytes; at most {MOST_BYTES} are read", 0),)
    try:
        value = json.loads(body, object_pairs_hook=_pairs, parse_constant=_constant)
    except _Refused as refused:
        return None, (_problem(source, refused.message, refused.line),)
    except (ValueError, RecursionError) as error:
        what = "too deep" if isinstance(error, RecursionError) else str(error)
        return None, (_problem(source, f"not valid JSON: {what}", 0),)
    if not _is_text(value):
        return None, (_problem(source, "a string has half a surrogate pair, which is no character", 0),)
    if _depth(value) > MOST_DEPTH:
        return None, (_problem(source, f"more than {MOST_DEPTH} lists and mappings inside each other", 0),)
    documents: list[Document] = []
    problems: list[Problem] = []
    _take(value, Origin(source), version, documents, problems)
    if len(documents) > 1:
        return None, (_problem(source, "a List, where one resource is expected", 0),)
    return (documents[0] if documents else None), tuple(problems)


def document_of(body: Mapping[str, Any], source: str, version: str = "") -> Document:
    """The resource that a program has made: `body` is plain JSON types. Raises ValueError when it is no resource.

    `source` says who made it; the version is a digest of the body where none is given.
    """
    key = key_of(body)
    if not isinstance(key, Key):
        raise ValueError(str(_at(Origin(source), key.path, key.message)))  # noqa: TRY004 - not the type is wrong but what it says
    return Document(key, body, Origin(source), version or digest_of_body(body))


def digest_of_body(body: Mapping[str, Any]) -> str:
    """A short digest that two bodies share only when they are equal."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _problem(source: str, message: str, line: int, path: FieldPath = ()) -> Problem:
    return Problem(key=None, path=path, message=message, where=f"{source}:{line}" if line else source)


def _take(body: Any, origin: Origin, version: str, documents: list[Document], problems: list[Problem]) -> None:
    if isinstance(body, dict) and body.get("kind") == "List" and body.get("apiVersion") == "v1":
        items = body.get("items")
        if not isinstance(items, list):
            problems.append(_at(origin, ("items",), "a List needs items: a list of resources"))
            return
        inner: list[dict[FieldPath, int]] = [{} for _ in items]
        for path, line in origin.lines.items():
            if len(path) > 1 and path[0] == "items" and isinstance(path[1], int):
                inner[path[1]][path[2:]] = line
        for item, lines in zip(items, inner, strict=True):
            _take(item, Origin(origin.source, lines.get((), origin.line), lines, origin.above), version, documents, problems)
        return
    key = key_of(body)
    if isinstance(key, Key):
        documents.append(Document(key, body, origin, version or digest_of_body(body)))
    elif not is_foreign_group(body):  # others' kinds have other rules for names: a Kustomization has none, a ClusterRole may have colons
        problems.append(_at(origin, key.path, key.message))


def _at(origin: Origin, path: FieldPath, message: str) -> Problem:
    return Problem(key=None, path=path, message=message, where=origin.at(path))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Refused(f"the field {shown(name)} is there twice in one mapping", 0)
            seen.add(name)
    return found


def _constant(name: str) -> float:
    raise _Refused(f"{name} is not a JSON number", 0)


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except RecursionError:
        return True
    return True


def _depth(value: Any) -> int:
    """How deep lists and mappings are nested, counted level by level (never by recursion)."""
    depth = 0
    level = [value]
    while level := [
        item
        for value in level
        if isinstance(value, (dict, list))
        for item in ((*value.values(), None) if isinstance(value, dict) else (*value, None))
    ]:
        depth += 1
        if depth > MOST_DEPTH:
            break
    return depth


class _Reader:
    """Puts values together from events. One for a text; an anchor is known in its own document only."""

    def __init__(self, text: str | bytes, above: int) -> None:
        self.above = above
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self.lines: dict[FieldPath, int] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.count = 0

    def documents(self) -> Iterator[tuple[Any, dict[FieldPath, int]]]:
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                self.lines, self.anchors, self.count = {}, {}, 0
                yield self.value(next(self.events), (), 0), self.lines

    def value(self, event: Any, path: FieldPath, depth: int) -> Any:
        line = event.start_mark.line + 1
        self.lines.setdefault(path, line)
        before = self.count
        self.spend(1, line, path)
        if isinstance(event, yaml.AliasEvent):
            known = self.anchors.get(event.anchor or "")
            if known is None:
                raise _Refused(f"*{event.anchor} refers to an anchor that is not defined before it", line, path)
            self.spend(known[1], line, path)
            return known[0]
        if event.tag is not None and event.tag not in _TAGS and event.tag != "!":
            raise _Refused(f"the tag {shown(event.tag)} is not supported: write plain values", line, path)
        if depth > MOST_DEPTH:
            raise _Refused(f"more than {MOST_DEPTH} lists and mappings inside each other", line, path)
        found: Any
        if isinstance(event, yaml.ScalarEvent):
            found = self.scalar(event, line, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            found = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                found.append(self.value(item, (*path, len(found)), depth + 1))
        else:
            found = self.mapping(path, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = found, self.count - before
        return found

    def spend(self, values: int, line: int, path: FieldPath) -> None:
        self.count += values
        if self.count > MOST_VALUES:
            raise _Refused(f"the document has more than {MOST_VALUES} values (with all that its aliases stand for)", line, path)

    def scalar(self, event: Any, line: int, path: FieldPath) -> Any:
        kind = _TAGS.get(event.tag or "", "")
        if kind == "str" or (not kind and (event.tag == "!" or not event.implicit[0])):
            return event.value
        value = scalar(event.value)
        expected = _TYPES.get(kind)
        if expected is not None and (not isinstance(value, expected) or isinstance(value, bool) != (kind == "bool")):
            raise _Refused(f"{shown(event.value)} does not fit its tag !!{kind}", line, path)
        return value

    def mapping(self, path: FieldPath, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise _Refused("the name of a field must be a string", line, path)
            if event.value == "<<" and event.implicit[0]:
                merged += self.merge(self.value(next(self.events), (*path, "<<"), depth + 1), line, path)
                continue
            # A key is a string as it is written: `on:` and `8080:` mean the field's name (as in JSON, which has no other keys).
            name = event.value
            here = (*path, name)
            if name in found:
                first = self.lines[here] + self.above
                raise _Refused(f"the field {shown(name)} is there twice in one mapping, first in line {first}", line, here)
            self.lines[here] = line
            found[name] = self.value(next(self.events), here, depth + 1)
        for more in merged:
            self.spend(len(more), self.lines[path], path)
            for name, value in more.items():
                found.setdefault(name, value)
        return found

    def merge(self, value: Any, line: int, path: FieldPath) -> list[dict[str, Any]]:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            raise _Refused("<< merges mappings, and this is not one", line, path)
        return parts

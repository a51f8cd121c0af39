"""A small language for what a field may hold, whose errors tell the way out.

A schema is a tree of the classes below, one for each shape of value; each has one method, `check`. It reports what is wrong into a
`Faults` and goes on, so that one reading finds everything. `null` is the same as an absent field, as in Kubernetes.
"""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from mesh.documents import FieldPath
from mesh.formats import Format, decimal_duration, shown
from mesh.formats import duration as duration_format

MOST_FAULTS = 50
"""Faults reported of one document; more help nobody."""


class Faults:
    """What is wrong with one document: pairs of a field's path and a sentence."""

    def __init__(self) -> None:
        self.found: list[tuple[FieldPath, str]] = []
        self.count = 0
        """Of all, also of those beyond the bound."""

    def add(self, path: FieldPath, message: str) -> None:
        """Reports one fault (and no more than `MOST_FAULTS`)."""
        self.count += 1
        if len(self.found) < MOST_FAULTS:
            self.found.append((path, message))


Rule = Callable[[Any, FieldPath, Faults], None]
"""Looks at several fields at once; called when each of them is right by itself."""


class Node(Protocol):
    """The schema of one value."""

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """Reports what is wrong with `value`, which is at `path`."""
        ...


def listed(words: Iterable[str], last: str = "or") -> str:
    """`a, b or c`."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end


def type_name(value: Any) -> str:
    """What a JSON value is, for people."""
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "a mapping", list: "a list", str: "a string", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "something else")


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of `words` that was probably meant; empty if none is near."""
    lower = {candidate.lower(): candidate for candidate in words}
    found = difflib.get_close_matches(word.lower(), list(lower), 1, 0.6)
    return lower[found[0]] if found else ""


def _expected(what: str, value: Any, path: FieldPath, faults: Faults) -> None:
    hint = ""
    plain = isinstance(value, str) and {"a number": value.lstrip("-").isdigit(), "true or false": value in ("true", "false")}.get(what)
    if plain:
        hint = "; write it without quotes"
    elif what == "a string" and isinstance(value, (bool, int, float)):
        hint = "; put it in quotes"
    faults.add(path, f"must be {what}, not {type_name(value)}{hint}")


class Free:
    """Anything."""

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """Nothing is wrong."""


class Text:
    """A string, perhaps of a certain form and length."""

    def __init__(self, form: Format | None = None, *, least: int = 0, most: int = 4096) -> None:
        self.form = form
        self.least = least
        self.most = most

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if not isinstance(value, str):
            _expected("a string", value, path, faults)
        elif len(value) > self.most:
            faults.add(path, f"has {len(value)} characters; at most {self.most} are allowed")
        elif len(value) < self.least:
            faults.add(path, "must not be empty")
        elif self.form and (wrong := self.form(value)):
            faults.add(path, wrong)


class Choice:
    """One of a few words. `unsupported` are words that Gateway API knows and that don't work here, each with the reason."""

    def __init__(self, noun: str, *words: str, unsupported: Mapping[str, str] | None = None) -> None:
        self.noun = noun
        self.words = words
        self.unsupported = dict(unsupported or {})

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if not isinstance(value, str):
            _expected("a string", value, path, faults)
        elif value in self.unsupported:
            faults.add(path, f"{shown(value)} is not supported here: {self.unsupported[value]}; use {listed(self.words)}")
        elif value not in self.words:
            faults.add(path, f"{shown(value)} is not {self.noun}; use {listed(self.words)}")


class Number:
    """A whole number between two bounds."""

    def __init__(self, least: int, most: int, unit: str = "") -> None:
        self.least = least
        self.most = most
        self.unit = unit and " " + unit

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _expected("a number", value, path, faults)
        elif isinstance(value, float):
            faults.add(path, f"must be a whole number, not {value}")
        elif not self.least <= value <= self.most:
            faults.add(path, f"is {value}; it must be between {self.least} and {self.most}{self.unit}")


class Flag:
    """true or false."""

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if not isinstance(value, bool):
            _expected("true or false", value, path, faults)


class Duration:
    """A duration of Gateway API, `500ms`; with `decimal` one of Istio's, `1.5s`."""

    def __init__(self, *, decimal: bool = False) -> None:
        self._format = decimal_duration if decimal else duration_format

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        wrong = self._format(value if isinstance(value, str) else str(value))
        if wrong or not isinstance(value, str):
            faults.add(path, wrong)


class Base64:
    """A string that is base64."""

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`. The value is never shown: it may be a secret."""
        if not isinstance(value, str):
            faults.add(path, f"must be a string (base64), not {type_name(value)}")
            return
        try:
            base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            faults.add(path, "is not base64; put plain text under stringData instead")


class Items:
    """A list. `unique` names the field (or gives the function) whose value no two items may share."""

    def __init__(
        self,
        item: Node,
        *,
        least: int = 0,
        most: int = 1024,
        unique: str | Callable[[Any], Any] | None = None,
    ) -> None:
        self.item = item
        self.least = least
        self.most = most
        self.unique = unique

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if not isinstance(value, list):
            hint = "; put '- ' in front of it" if isinstance(value, (dict, str)) else ""
            faults.add(path, f"must be a list, not {type_name(value)}{hint}")
            return
        if len(value) > self.most:
            faults.add(path, f"has {len(value)} items; at most {self.most} are allowed")
            return
        if len(value) < self.least:
            faults.add(path, f"needs at least {self.least} item{'s' if self.least > 1 else ''}")
        before = faults.count
        for index, item in enumerate(value):
            self.item.check(item, (*path, index), faults)
        if self.unique is not None and faults.count == before:
            self._check_unique(value, path, faults)

    def _check_unique(self, value: list[Any], path: FieldPath, faults: Faults) -> None:
        field = self.unique if isinstance(self.unique, str) else None
        seen: dict[Any, int] = {}
        for index, item in enumerate(value):
            own = item.get(field) if field else self.unique(item)  # type: ignore[operator, misc]
            if own is None:
                continue
            if own in seen:
                here = (*path, index, field) if field else (*path, index)
                what = f"{shown(own)} is there twice, first in item" if isinstance(own, str) else "is the same as item"
                faults.add(here, f"{what} {seen[own]}; each may be there once")
            else:
                seen[own] = index


class Table:
    """A mapping with free keys."""

    def __init__(self, item: Node, *, name: Format | None = None, most: int = 4096) -> None:
        self.item = item
        self.name = name
        self.most = most

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if not isinstance(value, dict):
            _expected("a mapping", value, path, faults)
            return
        if len(value) > self.most:
            faults.add(path, f"has {len(value)} entries; at most {self.most} are allowed")
            return
        for name, item in value.items():
            if self.name and (wrong := self.name(name)):
                faults.add((*path, name), wrong)
            self.item.check(item, (*path, name), faults)


class Fields:
    """A mapping with known fields. What is neither required nor optional is an error; what Gateway API knows and we don't do, too."""

    def __init__(
        self,
        required: Mapping[str, Node] | None = None,
        optional: Mapping[str, Node] | None = None,
        *,
        unsupported: Mapping[str, str] | Sequence[str] = (),
        rule: Rule | None = None,
    ) -> None:
        self.required = dict(required or {})
        self.known = {**self.required, **(optional or {})}
        self.unsupported = dict(unsupported) if isinstance(unsupported, Mapping) else dict.fromkeys(unsupported, "")
        self.rule = rule

    def check(self, value: Any, path: FieldPath, faults: Faults) -> None:
        """See `Node`."""
        if not isinstance(value, dict):
            _expected("a mapping", value, path, faults)
            return
        before = faults.count
        for name, item in value.items():
            if item is None:
                continue
            node = self.known.get(name)
            if node is not None:
                node.check(item, (*path, name), faults)
            elif name in self.unsupported:
                hint = self.unsupported[name]
                faults.add((*path, name), "is not supported here" + (f"; {hint}" if hint else ""))
            else:
                faults.add((*path, name), self.unknown(name))
        for name in self.required:
            if value.get(name) is None:
                faults.add((*path, name), "is missing; it is required")
        if self.rule is not None and faults.count == before:
            self.rule(value, path, faults)

    def unknown(self, name: str) -> str:
        """The sentence about a field that nobody knows."""
        meant = nearest(name, self.known)
        if meant:
            return f"unknown field; did you mean {meant}?"
        return (
            f"unknown field; the fields here are {listed(self.known, 'and')}" if self.known else "unknown field; there are no fields here"
        )

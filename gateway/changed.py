"""What decisions change of a request and of its answer. Pure.

The forms are those of Envoy's `OkHttpResponse`. In one decision: `headers` are set, `changes` are made in their order, and then names are
removed; query parameters are set and then removed. A name of a query is compared decoded, as its reader will: what is taken out must not
come through as `%61`. A value goes into the query as the policy wrote it, but for what no query may have and for `&` and `#`, which would
end it: those are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote_to_bytes

from gateway.headers import FRAMING, PROOF
from mesh.http import Header
from mesh.questions import Decision, FieldChange

_PROTECTED: Final = FRAMING | PROOF
_COOKIE: Final = b"cookie"
_NO_VALUE: Final = re.compile(rb"[^A-Za-z0-9\-._~!$'()*,;:@/?=+%]|%(?![0-9A-Fa-f]{2})")
_NO_NAME: Final = re.compile(rb"[^A-Za-z0-9\-._~!$'()*,;:@/?]")


def changes(decision: Decision) -> bool:
    """Whether the decision has anything to say about heads or the query."""
    return bool(
        decision.headers
        or decision.changes
        or decision.headers_to_remove
        or decision.response_headers
        or decision.response_changes
        or decision.query_set
        or decision.query_remove
    )


def changed_fields(headers: list[Header], made: Iterable[FieldChange], protected: frozenset[bytes]) -> list[Header]:
    """`headers` with the changes made, but for those of `protected` names; another list."""
    headers = list(headers)
    for change in made:
        name, value, action = change.name.lower(), change.value, change.action
        if name in protected:
            continue
        there = [at for at, field in enumerate(headers) if field[0] == name]
        if action == "append":
            if there and value:
                said = headers[there[0]][1]
                between = b"" if not said else b"; " if name == _COOKIE else b","
                headers[there[0]] = (name, said + between + value)
            continue
        if (action == "if_absent" and there) or (action == "if_present" and not there):
            continue
        if action in {"set", "if_present"} and there:
            headers = [field for field in headers if field[0] != name]
        headers.append((name, value))
    return headers


class FieldChanges:
    """A `gateway.plan.Edit`: what a decision changes of an answer's head."""

    __slots__ = ("_made",)

    def __init__(self, made: tuple[FieldChange, ...]) -> None:
        self._made = made

    def apply(self, headers: list[Header]) -> list[Header]:
        """As `Edit.apply`."""
        return changed_fields(headers, self._made, FRAMING)


def changed_request(headers: list[Header], decisions: Iterable[Decision]) -> list[Header]:
    """A request's fields for the upstream, with what the decisions change."""
    headers = list(headers)
    for decision in decisions:
        sets = {lower: value for name, value in decision.headers if (lower := name.lower()) not in _PROTECTED}
        if sets:
            headers = [field for field in headers if field[0] not in sets]
            headers += sets.items()
        if decision.changes:
            headers = changed_fields(headers, decision.changes, _PROTECTED)
        gone = {name.lower() for name in decision.headers_to_remove} - FRAMING
        if gone:
            headers = [field for field in headers if field[0] not in gone]
    return headers


def changed_target(target: bytes, decisions: Iterable[Decision]) -> bytes:
    """A request target with what the decisions change of its query."""
    for decision in decisions:
        if decision.query_set or decision.query_remove:
            path, _, query = target.partition(b"?")
            query = _changed_query(query, dict(decision.query_set), decision.query_remove)
            target = path + b"?" + query if query else path
    return target


def _changed_query(query: bytes, sets: dict[str, str], removes: tuple[str, ...]) -> bytes:
    left = {name.encode("utf-8", "surrogatepass"): value.encode("utf-8", "surrogatepass") for name, value in sets.items()}
    named, gone = frozenset(left), frozenset(name.encode("utf-8", "surrogatepass") for name in removes)
    pairs: list[bytes] = []
    for pair in query.split(b"&") if query else ():
        name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" "))
        if name in gone or (name in named and name not in left):
            continue
        pairs.append(_pair(name, left.pop(name)) if name in left else pair)
    pairs += [_pair(name, value) for name, value in left.items() if name not in gone]
    return b"&".join(pairs)


def _pair(name: bytes, value: bytes) -> bytes:
    return _NO_NAME.sub(_escaped, name) + b"=" + _NO_VALUE.sub(_escaped, value)


def _escaped(found: re.Match[bytes]) -> bytes:
    return b"%%%02X" % found[0][0]

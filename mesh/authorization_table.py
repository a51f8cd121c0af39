"""From rules (`mesh.authorization`) to the table that `conf/istio/authz.rego` goes through.

Matchers of a kind are put together, and rules are found by a value that they demand: of a thousand only those are looked at that may match.
A table's `rules` have `all` (conditions that must all hold) and `any` (lists of groups, of each of which one must hold). `keys` has the
numbers of rules by a fact and one of the values that it must have; `rest` those of all others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

Json = dict[str, Any]

_BEST: Final = ("source.principal", "source.serviceAccount", "path", "host", "source.namespace")
"""Facts to find rules by, the best first; any other is better than none, but for the last."""
_WORST: Final = ("method", "destination.port")


def table_of(rules: Iterable[Json]) -> Json:
    """The table of rules, in their order."""
    made = [_rule(rule) for rule in rules]
    keys: dict[str, dict[str, list[int]]] = {}
    rest = []
    for number, rule in enumerate(made):
        demanded = [condition for condition in rule["all"] if list(condition.get("in", ())) == ["exact"]]
        if not demanded:
            rest.append(number)
            continue
        key = min(demanded, key=_rank)
        for value in key["in"]["exact"]:
            keys.setdefault(key["fact"], {}).setdefault(value, []).append(number)
    return {"rules": made, "keys": keys, "rest": rest}


def _rank(condition: Json) -> tuple[int, int]:
    fact = condition["fact"]
    place = _BEST.index(fact) if fact in _BEST else len(_BEST) + (fact in _WORST)
    return place, len(condition["in"]["exact"])


def _rule(rule: Json) -> Json:
    conditions = list(rule["when"])
    groups = []
    for name in ("from", "to"):
        if len(rule[name]) == 1:
            conditions += rule[name][0]
        elif rule[name] and all(rule[name]):  # a group without conditions holds always
            groups.append([[_condition(each) for each in group] for group in rule[name]])
    return {"policy": rule["policy"], "index": rule["index"], "all": [_condition(each) for each in conditions], "any": groups}


def _condition(condition: Json) -> Json:
    return {name: value if name == "fact" else _together(value) for name, value in condition.items()}


def _together(matchers: Iterable[Json]) -> Json:
    """Matchers of a kind in one."""
    found: Json = {}
    for matcher in matchers:
        if "issuer" in matcher:
            pair = {name: _together([each]) for name, each in matcher.items()}
            found.setdefault("pairs", []).append(pair)
            continue
        ((kind, value),) = matcher.items()
        if kind == "exact":
            found.setdefault("exact", {})[value] = True
        elif kind == "present":
            found["present"] = True
        else:
            found.setdefault(kind, []).append(value)
    return found

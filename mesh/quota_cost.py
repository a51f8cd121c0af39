"""Where a limit's cost comes from (`costFrom` of a QuotaPolicy): what a request says, or what its answer comes to.

What is known after the answer is what users of others write as Envoy Gateway's `cost.response` (from metadata), or Kong's and Kuadrant's
limits of LLM tokens: a request is let through while there are tokens, and what it has cost in the end is charged to those that follow.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from mesh import formats
from mesh.documents import FieldPath
from mesh.schema import Choice, Faults, Fields, Number, Text, listed

MOST_COST: Final = 1_000_000
MOST_DEBT: Final = 10_000_000_000
DEBT_BURSTS: Final = 10
"""Bursts that a bucket may owe when its author does not say."""
BYTES_A_TOKEN: Final = 1024
SOURCES: Final = ("header", "responseHeader", "trailer", "bytes")
AFTER: Final = ("responseHeader", "trailer", "bytes")
"""What is known after the answer, or while it goes on."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What tells, after its answer or while it goes on, how many tokens a request has cost."""

    source: Literal["header", "trailer", "bytes"]
    name: bytes = b""
    """Of the answer's header or trailer, in lower case."""
    request: bool = False
    """Whether the bytes of the request's body are counted."""
    response: bool = False
    """Whether the bytes of the answer's body are counted."""
    per_token: int = 1
    """What is said, or how many bytes, for one token; begun tokens count."""
    most: int = 0
    """The most tokens that a header or trailer may say; 0 for no bound."""
    unsaid: int = 0
    """Tokens of an answer that does not say it."""


def _rule(asked: Any, path: FieldPath, faults: Faults) -> None:
    said = [name for name in SOURCES if asked.get(name) is not None]
    if len(said) != 1:
        faults.add(path, f"must have exactly one of {listed(SOURCES, 'and')}")
        return
    (source,) = said
    if source == "bytes":
        for name in ("most", "unsaid"):
            if asked.get(name) is not None:
                faults.add((*path, name), "is about what somebody says; bytes are counted")
        return
    if asked.get("most") is None:
        faults.add((*path, "most"), f"is missing: the most tokens that a {source} may say")
    if source in AFTER:
        if (asked.get("unsaid") or 0) > (asked.get("most") or MOST_COST):
            faults.add((*path, "unsaid"), f"{asked['unsaid']} is more than the {asked['most']} that an answer may say")
        return
    for name in ("perToken", "unsaid"):
        if asked.get(name) is not None:
            faults.add((*path, name), f"is about what is known after the answer: {listed(AFTER, 'or')}")


COST_FROM: Final = Fields(
    {},
    {
        "header": Text(formats.header_name),
        "responseHeader": Text(formats.header_name),
        "trailer": Text(formats.header_name),
        "bytes": Choice("a direction", "Request", "Response", "Both"),
        "perToken": Number(1, 1_000_000_000, "or bytes"),
        "most": Number(1, MOST_COST, "tokens"),
        "unsaid": Number(0, MOST_COST, "tokens"),
    },
    rule=_rule,
)


def is_after(asked: Any) -> bool:
    """Whether a `costFrom` (or None) is known after the answer."""
    return asked is not None and any(asked.get(name) is not None for name in AFTER)


def check_cost(limit: Any, burst: int, path: FieldPath, faults: Faults) -> int:
    """Reports what is wrong with a limit's costs. Returns the most tokens that a request may need at once."""
    asked, cost = limit.get("costFrom"), limit.get("cost") or 1
    if cost > burst:
        faults.add((*path, "cost"), f"{limit['cost']} is more than the burst of {burst}: no request would ever pass")
    if is_after(asked):
        if (asked.get("most") or MOST_COST) < cost:
            faults.add((*path, "costFrom", "most"), f"{asked['most']} is less than {cost}, which every request takes in advance")
        return int(cost)
    if limit.get("maxDebt") is not None:
        faults.add((*path, "maxDebt"), f"is about costs that are known after the answer: costFrom {listed(AFTER, 'or')}")
    most = asked.get("most") if asked is not None else None
    if most is None:
        return int(cost)
    if most > burst:
        faults.add((*path, "costFrom", "most"), f"{most} is more than the burst of {burst}: such a request would never pass")
    if most < cost:
        faults.add((*path, "costFrom", "most"), f"{most} is less than {cost}, the cost of a request that says nothing")
    return int(max(cost, most))


def usage_of(asked: Any) -> Usage | None:
    """What tells a request's cost after its answer, from a checked `costFrom` (or None)."""
    if not is_after(asked):
        return None
    if asked.get("bytes"):
        both = asked["bytes"] == "Both"
        return Usage(
            source="bytes",
            request=both or asked["bytes"] == "Request",
            response=both or asked["bytes"] == "Response",
            per_token=asked.get("perToken") or BYTES_A_TOKEN,
        )
    header = asked.get("responseHeader")
    return Usage(
        source="header" if header else "trailer",
        name=(header or asked["trailer"]).lower().encode(),
        per_token=asked.get("perToken") or 1,
        most=asked["most"],
        unsaid=asked.get("unsaid") or 0,
    )


def most_debt(limit: Any, burst: int) -> int:
    """The most tokens that a bucket of a checked limit may owe."""
    if not is_after(limit.get("costFrom")):
        return 0
    return int(limit.get("maxDebt") or min(DEBT_BURSTS * burst, MOST_DEBT))

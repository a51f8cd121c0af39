"""How a concurrency limit's slots are shared when there are too few: weights of callers, and a part that is held back for some."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from mesh.documents import FieldPath
from mesh.quota_exempt import Exempt
from mesh.schema import Faults, Fields, Items, Node, Number, Text

MOST_WEIGHT: Final = 1000
_MOST: Final = 1_000_000


class Shares(msgspec.Struct, frozen=True, kw_only=True):
    """As a QuotaPolicy's limit says it in `shares` and `reserve`."""

    kind: str = ""
    """The descriptor that callers are told apart by, as `mesh.model.Descriptor.kind`; empty when nobody has a share of his own."""
    argument: str = ""
    weights: tuple[tuple[str, int], ...] = ()
    """By the descriptor's value; 1 for all others."""
    slots: int = 0
    """Held back; or, of each limit, so many:"""
    percent: int = 0
    important: tuple[Exempt, ...] = ()
    """For whom."""

    def reserve(self, concurrency: int) -> int:
        """How many of `concurrency` slots are held back: never all."""
        wanted = self.slots or math.ceil(concurrency * self.percent / 100)
        return min(wanted, concurrency - 1)


def shares_fields(descriptor: Node) -> Node:
    """The schema of `shares`."""
    weight = Fields({"value": Text(least=1, most=256), "weight": Number(1, MOST_WEIGHT, "shares")}, {})
    return Fields({"by": descriptor}, {"weights": Items(weight, most=256, unique="value")})


def reserve_fields(whom: Node) -> Node:
    """The schema of `reserve`."""
    return Fields({"for": whom}, {"slots": Number(1, _MOST, "slots"), "percent": Number(1, 99, "per cent")}, rule=_reserve_rule)


def _reserve_rule(reserve: Any, path: FieldPath, faults: Faults) -> None:
    if (reserve.get("slots") is None) == (reserve.get("percent") is None):
        faults.add(path, "must have one of slots and percent")
    if not reserve["for"]:
        faults.add((*path, "for"), "must name somebody: what is held back for nobody is lost")


def shares_rule(limit: Any, path: FieldPath, faults: Faults) -> None:
    """What a limit may say of shares."""
    reserve = limit.get("reserve") or {}
    slots, concurrency = reserve.get("slots"), limit.get("concurrency")
    for name in ("shares", "reserve"):
        if limit.get(name) is not None and concurrency is None:
            faults.add((*path, name), "is for limits with concurrency")
    least = min([concurrency or 0, *(each.get("concurrency") or _MOST for each in limit.get("overrides") or [])])
    if slots is not None and concurrency is not None and slots >= least:
        faults.add((*path, "reserve", "slots"), f"{slots} of {least} leave nothing for anybody else; say at most {least - 1}")


def shares_of(limit: Any, descriptor: Any, exempt: Any) -> Shares | None:
    """The shares of a checked limit. `descriptor` and `exempt` read one of these."""
    shares, reserve = limit.get("shares"), limit.get("reserve")
    if not shares and not reserve:
        return None
    by = descriptor(shares["by"]) if shares else None
    return Shares(
        kind=by.kind if by is not None else "",
        argument=by.argument if by is not None else "",
        weights=tuple((each["value"], each["weight"]) for each in (shares or {}).get("weights") or ()),
        slots=(reserve or {}).get("slots") or 0,
        percent=(reserve or {}).get("percent") or 0,
        important=tuple(exempt(each) for each in (reserve or {}).get("for") or ()),
    )

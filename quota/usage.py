"""Who uses what, and who is being refused: what a lessee knows of it, for people."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from mesh.model import QuotaLimit
from quota.lease import Lease

SECRET: Final = ("header", "cookie")
"""Descriptors whose values may be somebody's secret."""
_SHOWN: Final = 4
_MOST: Final = 100


def usage(leases: Iterable[tuple[tuple[str, tuple[str, ...]], Lease]], now: float, most: int = _MOST) -> list[dict[str, Any]]:
    """The `most` buckets of which most is refused, and then of which most is used. `now`: seconds on the lessee's clock."""
    found = sorted(leases, key=lambda each: (each[1].refused, each[1].speed), reverse=True)[:most]
    return [
        {
            "limit": name,
            "key": shown_key(lease.limit, key),
            "tokensPerSecond": round(lease.speed if now - lease.used < 5.0 else 0.0, 1),
            "spent": lease.total + lease.spent - lease.counted,
            "refused": lease.refused,
            "inHand": lease.tokens if now < lease.until else 0,
            "waiting": len(lease.waiting),
            "idle": round(max(0.0, now - lease.used), 1),
            "tokens": lease.limit.tokens,
            "interval": lease.limit.interval,
            "burst": lease.limit.burst,
            **({"calendar": msgspec.to_builtins(lease.limit.calendar)} if lease.limit.calendar is not None else {}),
        }
        for (name, key), lease in found
    ]


def shown_key(limit: QuotaLimit, key: tuple[str, ...]) -> list[str]:
    """A bucket's values as people may read them: of a header's or cookie's the beginning, and a digest that tells one from another."""
    if len(limit.per) != len(key):
        return list(key)
    return [hidden(value) if part.kind in SECRET else value for part, value in zip(limit.per, key, strict=True)]


def hidden(value: str) -> str:
    """A value that may be a secret: what is longer than a name is cut, and its digest put in the place of the rest."""
    if len(value) <= 2 * _SHOWN:
        return value
    return f"{value[:_SHOWN]}...{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"

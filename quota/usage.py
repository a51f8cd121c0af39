"""Who uses what, and who is being refused: what a lessee knows of it, for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from mesh.quota_changes import SECRET, hidden, shown_key
from quota.lease import Lease
from quota.slot_lease import SlotLease

_MOST: Final = 100


RECENT: Final = 10.0
"""Seconds for which a bucket counts as one that refuses."""


def refusing(leases: Iterable[tuple[tuple[str, tuple[str, ...]], Lease]], now: float, most: int = _MOST) -> list[dict[str, Any]]:
    """The buckets of which something was refused lately, the latest first, with what was refused and spent of them in all."""
    found = sorted((each for each in leases if now - each[1].refused_at < RECENT), key=lambda each: each[1].refused_at, reverse=True)
    return [
        {
            "limit": name,
            "key": list(shown_key(lease.limit, key)),
            "refused": lease.refused,
            "spent": lease.total + lease.spent - lease.counted,
            "ago": round(max(0.0, now - lease.refused_at), 3),
        }
        for (name, key), lease in found[:most]
    ]


def usage(leases: Iterable[tuple[tuple[str, tuple[str, ...]], Lease]], now: float, most: int = _MOST) -> list[dict[str, Any]]:
    """The `most` buckets of which most is refused, and then of which most is used. `now`: seconds on the lessee's clock."""
    found = sorted(leases, key=lambda each: (each[1].refused, each[1].speed), reverse=True)[:most]
    return [
        {
            "limit": name,
            "key": list(shown_key(lease.limit, key)),
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


def shown_caller(lease: SlotLease) -> str:
    """Whose share it is, as people may read it."""
    shares = lease.limit.shares
    return hidden(lease.caller) if shares is not None and shares.kind in SECRET else lease.caller


def slots_usage(leases: Iterable[tuple[tuple[str, tuple[str, ...]], SlotLease]], now: float, most: int = _MOST) -> list[dict[str, Any]]:
    """The `most` concurrency limits of which most is refused, and then of which most is in use."""
    found = sorted(leases, key=lambda each: (each[1].refused, len(each[1].slots)), reverse=True)[:most]
    return [
        {
            "limit": name,
            "key": shown_key(lease.limit, lease.key_values),
            **({"caller": shown_caller(lease)} if lease.shared else {}),
            "concurrency": lease.limit.concurrency,
            "inUse": len(lease.slots),
            "inHand": lease.held if now < lease.until else 0,
            "spent": lease.admitted,
            "refused": lease.refused,
            "waiting": len(lease.waiting),
            "idle": 0.0 if lease.slots else round(max(0.0, now - lease.used), 1),
        }
        for (name, _), lease in found
    ]

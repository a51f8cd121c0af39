"""The limits that a configuration has, as commands name them: `NAMESPACE/POLICY/LIMIT`, and values of its descriptors."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from gateway.buckets import LONGEST
from mesh.model import QuotaLimit
from quota.descriptors import PolicyLimits
from tollhouse.output import Complaint

SENT: Final = frozenset(("header", "cookie", "claim", "method"))
"""Descriptors whose values are bytes that a client sends."""


def limit_named(limits: PolicyLimits, name: str) -> QuotaLimit:
    """The limit of that name. Raises `Complaint`."""
    found = limits.get(name)
    if name in limits.elsewhere:
        raise Complaint(
            f"{name} is a limit of the rate-limit service {limits.elsewhere[name]}: its buckets are there, and so are its numbers", 2
        )
    if found is None:
        raise complaint_about(name, limits.names)
    return found


def complaint_about(limit: str, names: Iterable[str]) -> Complaint:
    """There is no limit of that name."""
    known = sorted(names)
    near = difflib.get_close_matches(limit, known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known) or 'none'}"
    return Complaint(f"no QuotaPolicy that is in force has the limit {limit}{hint}")


def key_of(limit: QuotaLimit, values: Sequence[str]) -> tuple[str, ...]:
    """The key of the bucket for `values`, as a gateway makes it of a request. Raises `Complaint`."""
    if len(values) != len(limit.per):
        raise Complaint(
            f"{limit.name} has a bucket for each combination of {len(limit.per)} values ({kinds(limit)}), and {len(values)} are given", 2
        )
    found = []
    for part, value in zip(limit.per, values, strict=True):
        if part.kind == "constant" and part.argument != value:
            raise Complaint(f"{limit.name} has always {part.argument!r} where {value!r} is given", 2)
        raw = value.encode("utf-8", "surrogateescape")
        if part.kind not in SENT:
            found.append(value)
        elif len(raw) > LONGEST:
            found.append("sha256:" + hashlib.sha256(raw).hexdigest())
        else:
            found.append(raw.decode("latin-1"))
    return tuple(found)


def kinds(limit: QuotaLimit) -> str:
    """What a limit is per, for people."""
    return " ".join(f"{part.kind}:{part.argument}" if part.argument else part.kind for part in limit.per) or "none: it is one for all"


def numbers_of(limit: QuotaLimit | None) -> dict[str, Any]:
    """Numbers as JSON has them."""
    if limit is None:
        return {"lifted": True}
    if limit.concurrency:
        return {"concurrency": limit.concurrency}
    if limit.tokens <= 0:
        return {"blocked": True}
    if limit.calendar is not None:
        return {"tokens": limit.tokens, "calendar": limit.calendar.unit}
    return {"tokens": limit.tokens, "interval": limit.interval, "burst": limit.burst}


def numbers_text(numbers: dict[str, Any] | None) -> str:
    """Numbers (`numbers_of`) for people."""
    if not numbers:
        return "nothing"
    if numbers.get("lifted") or numbers.get("blocked"):
        return "lifted" if numbers.get("lifted") else "blocked"
    if "concurrency" in numbers:
        return f"{numbers['concurrency']} at once"
    if "calendar" in numbers:
        return f"{numbers['tokens']} each {numbers['calendar'].lower()} of the calendar"
    return f"{numbers['tokens']} each {seconds_text(numbers['interval'])}, burst {numbers['burst']}"


def seconds_text(seconds: float) -> str:
    """A duration as limits have it: `1s`, `5m`, `36h`."""
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds >= size and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    return f"{seconds:g}s"

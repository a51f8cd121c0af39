"""`QuotaChange`: other numbers for a limit, or for some values of its descriptors, made by hand and perhaps for a time; what each means.

A change is a resource of its own beside its QuotaPolicy, so that whoever has to act in an incident writes nothing into what is somebody
else's, and so that it ends by itself. `tollhouse quota set` and `reset` write it. There is one for a limit, named after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mesh import formats
from mesh.documents import FieldPath
from mesh.kinds_gateway import NAME
from mesh.schema import Duration, Faults, Fields, Flag, Items, Number, Text

if TYPE_CHECKING:
    from mesh.model import QuotaLimit

KIND: Final = "QuotaChange"
MOST: Final = 1000
"""Changes of one limit."""
MOST_TOKENS: Final = 1_000_000_000
MOST_CONCURRENCY: Final = 1_000_000
LONGEST_INTERVAL: Final = 31 * 86_400
"""Seconds."""
NUMBERS: Final = ("tokens", "interval", "burst", "concurrency")
SECRET: Final = ("header", "cookie")
"""Descriptors whose values may be somebody's secret."""
_SHOWN: Final = 4
_DIGITS: Final = 16
_HIDDEN: Final = re.compile(r".{4}\.\.\.[0-9a-f]{16}", re.DOTALL)
_INSTANT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")


def hidden(value: str) -> str:
    """A value that may be a secret: what is longer than a name is cut, and its digest put in the place of the rest."""
    if len(value) <= 2 * _SHOWN:
        return value
    return f"{value[:_SHOWN]}...{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()[:_DIGITS]}"


def is_hidden(value: str) -> bool:
    """Whether a value is what `hidden` made of another. A request's value is hidden before it is compared with one, so nobody passes for
    somebody else by sending what was shown of him."""
    return _HIDDEN.fullmatch(value) is not None


def shown_key(limit: QuotaLimit, key: Sequence[str]) -> tuple[str, ...]:
    """A bucket's values as people may read them: of a header's or cookie's the beginning, and a digest that tells one from another."""
    if len(limit.per) != len(key):
        return tuple(key)
    return tuple([hidden(value) if part.kind in SECRET else value for part, value in zip(limit.per, key, strict=True)])


def named_key(limit: QuotaLimit, values: Sequence[str]) -> tuple[str, ...]:
    """Values as somebody wrote them, of whom a change is about, as `shown_key` has them: what is hidden already stays as it is."""
    shown = zip(limit.per, values, strict=True)
    return tuple([hidden(value) if part.kind in SECRET and not is_hidden(value) else value for part, value in shown])


class LimitChange(msgspec.Struct, frozen=True):
    """A change as it is in force at gateways."""

    values: tuple[str, ...] | None
    """Of the descriptors, as `shown_key` has them; None for the whole limit."""
    limit: QuotaLimit | None
    """With the numbers that hold; None where the limit is lifted."""
    until: float = 0.0
    """Seconds since the epoch; 0 for no end."""


def instant(text: str) -> float:
    """An RFC 3339 date and time as seconds since the epoch. Raises ValueError."""
    if not _INSTANT.fullmatch(text):
        raise ValueError(f"{formats.shown(text)} is not a date and time; write it as in 2026-01-31T12:00:00Z")
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as problem:
        raise ValueError(f"{formats.shown(text)} is not a date and time: {problem}") from None


def instant_text(seconds: float) -> str:
    """Seconds since the epoch in RFC 3339, in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _instant_problem(text: str) -> str:
    try:
        instant(text)
    except ValueError as problem:
        return str(problem)
    return ""


def change_name(policy: str, limit: str) -> str:
    """The name of the QuotaChange of a policy's limit."""
    return f"{policy}.{limit}"


def values_of(change: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Whom an item of `changes` is about; None for everybody."""
    values = change.get("values")
    return None if values is None else tuple(values)


def ended(change: Mapping[str, Any], now: float) -> bool:
    """Whether an item of `changes` means nothing any more at `now` (seconds since the epoch)."""
    return bool(change.get("until")) and instant(change["until"]) <= now


def _change_rule(change: Any, path: FieldPath, faults: Faults) -> None:
    ways = [name for name in ("lift", "block") if change.get(name)]
    numbers = [name for name in NUMBERS if change.get(name) is not None]
    if len(ways) + bool(numbers) > 1:
        faults.add(path, f"has {' and '.join([*ways, *numbers])}; a limit is lifted, or blocked, or has other numbers")
    if not ways and not numbers and not change.get("reset"):
        faults.add(path, "changes nothing; it needs tokens, interval, burst, concurrency, lift, block or reset")
    if change.get("reset") and (ways or numbers):
        faults.add((*path, "reset"), "is an item of its own, without other numbers")
    if change.get("interval") is not None:
        seconds = formats.seconds(change["interval"])
        if not 0 < seconds <= LONGEST_INTERVAL:
            faults.add((*path, "interval"), f"must be longer than nothing, and at most a month ({LONGEST_INTERVAL // 86_400} days)")


def _key(change: Any) -> tuple[Any, ...]:
    return bool(change.get("reset")), values_of(change)


QUOTA_CHANGE: Final = Fields(
    {
        "policy": NAME,
        "limit": Text(formats.label),
        "changes": Items(
            Fields(
                {},
                {
                    "values": Items(Text(most=256), least=1, most=8),
                    "tokens": Number(1, MOST_TOKENS, "tokens"),
                    "interval": Duration(),
                    "burst": Number(1, MOST_TOKENS, "tokens"),
                    "concurrency": Number(1, MOST_CONCURRENCY, "requests"),
                    "lift": Flag(),
                    "block": Flag(),
                    "until": Text(_instant_problem),
                    "reset": Text(_instant_problem),
                    "since": Text(_instant_problem),
                    "by": Text(most=256),
                    "reason": Text(most=1000),
                },
                rule=_change_rule,
            ),
            most=MOST,
            unique=_key,
        ),
    },
)


def document_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """There is one for a limit."""
    wanted = change_name(body["spec"]["policy"], body["spec"]["limit"])
    if body["metadata"]["name"] != wanted:
        faults.add((*path, "metadata", "name"), f"must be {wanted}, after the policy and the limit: there is one QuotaChange for a limit")

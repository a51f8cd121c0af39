"""Which numbers hold for a bucket: the limit's own, its overrides', or what was changed by hand. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.compile_tables import misfit
from mesh.model import QuotaLimit
from mesh.quota_changes import LimitChange, shown_key
from mesh.quota_tables import NO_TABLE, Row, Table

_KEPT = 1024


class Overrides:
    """Other numbers for some: those that the limit has itself, and then those of its table."""

    __slots__ = ("_limit", "_made", "_own", "_table")

    def __init__(self, limit: QuotaLimit, table: Table) -> None:
        self._limit = limit
        self._own = dict(limit.overrides)
        self._table = table
        self._made: dict[tuple[str, ...], QuotaLimit] = {}
        """Limits of rows that were asked for: as many as there are rows, at most."""

    def get(self, key: tuple[str, ...], otherwise: QuotaLimit) -> QuotaLimit | None:
        """The limit with the numbers for a bucket's values, or `otherwise`; None when it is not for them."""
        found = self._own.get(key) or self._made.get(key)
        if found is not None:
            return found
        row = self._table.by_values.get(key)
        if row is None or misfit(self._limit, row):
            return otherwise
        if row.exempt:
            return None
        found = self._made[key] = with_row(self._limit, row)
        return found

    def items(self) -> Iterable[tuple[tuple[str, ...], QuotaLimit]]:
        """All of them but for those whom the limit is not for."""
        rows = (row for row in self._table.rows if not row.exempt and row.values not in self._own and not misfit(self._limit, row))
        return (*self._own.items(), *((row.values, with_row(self._limit, row)) for row in rows))


def with_row(limit: QuotaLimit, row: Row) -> QuotaLimit:
    """What a row does not say is as in the limit; a burst that it does not say is its `tokens`."""
    return msgspec.structs.replace(
        limit,
        tokens=row.tokens or limit.tokens,
        interval=row.interval or limit.interval,
        burst=row.burst or row.tokens or limit.burst,
        overrides=(),
    )


class Numbers:
    """The numbers of one limit. What was changed for some values comes before what was changed for the whole limit."""

    __slots__ = ("_by_values", "_limit", "_made", "_overrides", "_resets", "_whole", "_whole_overrides")

    def __init__(self, limit: QuotaLimit, table: Table = NO_TABLE) -> None:
        """`table`: the one that the limit names."""
        self._limit = msgspec.structs.replace(limit, changes=(), resets=()) if limit.changes or limit.resets else limit
        self._overrides = Overrides(self._limit, table)
        self._by_values = {change.values: change for change in limit.changes if change.values is not None}
        self._whole = next((change for change in limit.changes if change.values is None), None)
        whole = self._whole.limit if self._whole is not None else None
        self._whole_overrides = Overrides(whole, table) if whole is not None else self._overrides
        self._resets = dict(limit.resets)
        self._made: dict[tuple[str, ...], tuple[QuotaLimit, QuotaLimit]] = {}
        """Limits of buckets that were reset, each with the one it was made of."""

    def of(self, key: tuple[str, ...], now: float) -> QuotaLimit | None:
        """The limit with the numbers that hold for a bucket at `now` (seconds since the epoch); None where it is lifted."""
        shown = shown_key(self._limit, key) if self._by_values or self._resets else key
        change = self._change(shown, now)
        if change is None:
            found = self._overrides.get(key, self._limit)
        elif change.limit is None:
            return None
        else:
            found = change.limit if change.values is not None else self._whole_overrides.get(key, change.limit)
        if found is None:
            return None
        reset = self._resets.get(shown)
        return self._reset(key, found, reset) if reset else found

    def shown(self, shown: tuple[str, ...] | None, now: float) -> QuotaLimit | None:
        """The same for values as `mesh.quota_changes.shown_key` has them, or (None) for those of whom nothing else is said."""
        change = self._change(shown or (), now)
        if change is not None and change.limit is None:
            return None
        base = self._limit if change is None or change.limit is None else change.limit
        if change is not None and change.values is not None:
            return base
        overrides = self._overrides if change is None else self._whole_overrides
        return next((made for key, made in overrides.items() if shown and shown_key(self._limit, key) == shown), base)

    def change(self, key: tuple[str, ...], now: float) -> LimitChange | None:
        """What was changed by hand for a bucket, and holds at `now`."""
        return self._change(shown_key(self._limit, key), now)

    def _change(self, shown: tuple[str, ...], now: float) -> LimitChange | None:
        change = self._by_values.get(shown)
        if change is not None and (not change.until or now < change.until):
            return change
        change = self._whole
        return change if change is not None and (not change.until or now < change.until) else None

    def _reset(self, key: tuple[str, ...], limit: QuotaLimit, at: float) -> QuotaLimit:
        made = self._made.get(key)
        if made is None or made[0] is not limit:
            if len(self._made) >= _KEPT:
                self._made.clear()
            made = self._made[key] = limit, msgspec.structs.replace(limit, reset=at)
        return made[1]

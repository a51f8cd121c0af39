"""QuotaOverrides: a table of other numbers for some, which limits of QuotaPolicies name.

A table is a resource of its own, so that it can be large and change often: no route is compiled again when it does. What each field
means is in `docs/configuration.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

import msgspec

from mesh import formats
from mesh.documents import FieldPath
from mesh.schema import Duration, Faults, Fields, Flag, Items, Number, Text

KIND: Final = "QuotaOverrides"
MOST_ROWS: Final = 20_000
_MOST_TOKENS: Final = 1_000_000_000


def _row_rule(row: Any, path: FieldPath, faults: Faults) -> None:
    numbers = [name for name in ("tokens", "interval", "burst") if row.get(name) is not None]
    if row.get("exempt") and numbers:
        faults.add((*path, "exempt"), f"does not go with {numbers[0]}: whom a limit is not for needs no numbers")
    elif not row.get("exempt") and not numbers:
        faults.add(path, "must have tokens, interval, burst, or exempt: true")
    if row.get("interval") is not None and formats.seconds(row["interval"]) <= 0:
        faults.add((*path, "interval"), "must be longer than nothing")


QUOTA_OVERRIDES: Final = Fields(
    {
        "rows": Items(
            Fields(
                {"values": Items(Text(most=256), least=1, most=8)},
                {
                    "tokens": Number(1, _MOST_TOKENS, "tokens"),
                    "interval": Duration(),
                    "burst": Number(1, _MOST_TOKENS, "tokens"),
                    "exempt": Flag(),
                },
                rule=_row_rule,
            ),
            most=MOST_ROWS,
            unique=lambda row: tuple(row["values"]),
        ),
    }
)


class Row(msgspec.Struct, frozen=True, array_like=True):
    """Other numbers; 0 where the limit's own hold."""

    values: tuple[str, ...]
    tokens: int = 0
    interval: float = 0.0
    """Seconds."""
    burst: int = 0
    exempt: bool = False


class Table(msgspec.Struct, frozen=True, dict=True):
    """A table as it is in force."""

    rows: tuple[Row, ...] = ()

    @cached_property
    def by_values(self) -> Mapping[tuple[str, ...], Row]:
        """The rows by whom they are about; made once for all limits that name the table."""
        return {row.values: row for row in self.rows}


NO_TABLE: Final = Table()


def table_of(spec: Any) -> Table:
    """The table of a checked QuotaOverrides."""
    return Table(tuple(_row(row) for row in spec["rows"]))


def _row(row: Any) -> Row:
    interval = formats.seconds(row["interval"]) if row.get("interval") else 0.0
    return Row(tuple(row["values"]), row.get("tokens") or 0, interval, row.get("burst") or 0, bool(row.get("exempt")))

"""An audit log for people: what was changed by other means first, then the entries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from tollhouse.output import emit, printable

if TYPE_CHECKING:
    from discovery.audit import Entry, Unnoted


def show_history(entries: Iterable[Entry], elsewhere: Iterable[Unnoted], told: Callable[[Any], str], form: str) -> None:
    """Prints entries, the newest first, after what was changed without one. `told` words a change."""
    rows, value = [], []
    for each in elsewhere:
        verb = "changed" if each.revision else "deleted"
        name = f"{each.key.namespace}/{each.key.name}" if each.key.namespace else each.key.name
        why = f"by other means than tollhouse{f', at etcd revision {each.revision}' if each.revision else ''}"
        rows.append(["?", "unknown", "unknown", f"{each.key.kind} {name} {verb}", why])
        change = {
            "kind": each.key.kind,
            "namespace": each.key.namespace,
            "name": each.key.name,
            "verb": verb,
            "before": None,
            "after": None,
        }
        value.append({"time": None, "action": "unknown", "who": "", "user": "", "reason": why, "changes": [change]})
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.time))
        text = "; ".join(told(change) for change in entry.changes)
        rows.append([when, entry.action, entry.who, text, entry.reason or "-"])
        value.append({**msgspec.to_builtins(entry), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.time))})
    shown = [[printable(cell) for cell in row] for row in rows]
    emit(form, value, shown, ["when (UTC)", "what", "who", "change", "why"], "nothing has been changed yet")

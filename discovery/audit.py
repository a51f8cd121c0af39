"""Who changed which policy is in force, when and why: kept in etcd beside the policy itself.

An entry is written in the transaction of its change, so that neither is there without the other. The newest `MOST` are kept. Who may
write is etcd's to say; what an entry says of its author is what the author's command said, with the user that etcd knew it by.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from discovery.etcd import MOST_OPERATIONS, Delete, Etcd, Put
from discovery.keys import AUDIT
from mesh.documents import Document, Key

GROUP: Final = "tollhouse.dev"
ACTIVE: Final = "ActivePolicy"
KINDS: Final = frozenset({ACTIVE, "PolicyRevision"})
"""What is audited."""
MOST: Final = 1000
"""Entries that are kept."""
LONGEST: Final = 1000
"""Characters of a reason."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one resource."""

    kind: str
    name: str
    verb: str
    """`created`, `changed` or `deleted`."""
    before: dict[str, Any] | None = None
    """The `spec` of the ActivePolicy before; None for none, and for other kinds."""
    after: dict[str, Any] | None = None


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What is written down of the changes of a command."""

    action: str = "write"
    """`activate`, `rollback`, `publish`, `apply`, ..."""
    reason: str = ""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the audit log."""

    time: float
    """Seconds since the epoch, by the clock of who did it."""
    action: str
    who: str
    reason: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def active(self) -> Change | None:
        """What became of the ActivePolicy; None when the entry is not about it."""
        return next((change for change in self.changes if change.kind == ACTIVE), None)


_decoder = msgspec.json.Decoder(Entry)


def audited(key: Key) -> bool:
    """Whether changes of the resource are written down."""
    return key.group == GROUP and key.kind in KINDS


def change_of(key: Key, verb: str, before: Document | None, after: Document | None) -> Change:
    """A change as it is written down."""
    return Change(kind=key.kind, name=key.name, verb=verb, before=_spec(before), after=_spec(after))


def put_of(audit: Audit, changes: Sequence[Change], user: str, now: float | None = None) -> Put:
    """What writes an entry. `user`: who etcd knows the writer as, if it knows anybody."""
    moment = time.time() if now is None else now
    entry = Entry(time=moment, action=audit.action, who=who(user), reason=audit.reason[:LONGEST], changes=tuple(changes))
    return Put(f"{AUDIT}{int(moment * 1e9):020d}-{os.urandom(4).hex()}".encode(), msgspec.json.encode(entry))


def who(user: str = "") -> str:
    """The person at this machine: `ada@laptop`, with the etcd user when there is one."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}" + (f" (etcd user {user})" if user else "")


async def history(etcd: Etcd) -> tuple[Entry, ...]:
    """All entries, the newest first; what can't be read is left out. Raises EtcdError."""
    found = []
    for entry in (await etcd.list(AUDIT.encode())).entries:
        try:
            found.append((entry.key, _decoder.decode(entry.value)))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return tuple(entry for _, entry in sorted(found, key=lambda item: item[0], reverse=True))


async def trim(etcd: Etcd, most: int = MOST) -> None:
    """Takes away the oldest entries above `most`. Raises EtcdError."""
    keys = sorted(entry.key for entry in (await etcd.list(AUDIT.encode())).entries)
    old = keys[: max(0, len(keys) - most)]
    for start in range(0, len(old), MOST_OPERATIONS):
        await etcd.commit([Delete(key) for key in old[start : start + MOST_OPERATIONS]])


def before_of(entries: Sequence[Entry], current: str) -> str:
    """The revision that was active before `current`, by the newest entries first; empty when the log knows of none."""
    for entry in entries:
        change = entry.active
        for spec in (change.after, change.before) if change is not None else ():
            name = spec.get("revision") if spec else ""
            if isinstance(name, str) and name and name != current:
                return name
    return ""


def _spec(document: Document | None) -> dict[str, Any] | None:
    if document is None or document.key.kind != ACTIVE:
        return None
    spec = document.body.get("spec")
    return dict(spec) if isinstance(spec, Mapping) else None

"""Who changed policy, or limits, when and why: kept in etcd beside them.

An entry is written in the transaction of its change, so that neither is there without the other. There are two logs, one for policy and one
for quota, and the newest `MOST` entries of each are kept. Who may
write is etcd's to say (`discovery.rights`); of its author an entry says whom etcd knew it by (a user, or a client certificate), and
which person at which machine that was by its own account. What was changed by other means than ours has no entry of its etcd revision:
`unnoted` finds it.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID

from discovery.address import EtcdAddress
from discovery.etcd import MOST_OPERATIONS, Delete, Etcd, Put
from discovery.etcd import Entry as Stored
from discovery.keys import AUDIT, AUDIT_QUOTA, config_prefix, read_config_key
from mesh.documents import Document, Key

ACTIVE: Final = "ActivePolicy"
ACTIVE_DATA: Final = "ActiveData"
_OWN: Final = "tollhouse.dev"
_ISTIO: Final = "security.istio.io"
AUDITED: Final = frozenset(
    {
        *((_OWN, kind) for kind in (ACTIVE, "PolicyRevision", ACTIVE_DATA, "DataRevision")),
        *((_OWN, kind) for kind in ("AccessPolicy", "PolicyExemption", "ServiceIdentity", "Mesh")),
        *((_ISTIO, kind) for kind in ("AuthorizationPolicy", "RequestAuthentication")),
    }
)
"""Group and kind of what decides who may call what: its changes are written down."""
CHANGED_LIMIT: Final = "QuotaChange"
LIMITS: Final = frozenset(((_OWN, CHANGED_LIMIT), (_OWN, "QuotaOverrides"), (_OWN, "QuotaPolicy")))
"""Of what decides how much, which has a log of its own."""
Log = Literal["policy", "quota"]
LOGS: Final[Mapping[Log, tuple[str, frozenset[tuple[str, str]]]]] = {"policy": (AUDIT, AUDITED), "quota": (AUDIT_QUOTA, LIMITS)}
"""Where each log is, and what is in it."""
_LARGE: Final = frozenset({"PolicyRevision", "DataRevision"})
"""Kinds whose `spec` is not written down: they never change, and are named by their content."""
MOST_SPEC: Final = 4096
"""Bytes of a `spec` that is written down."""
MOST: Final = 1000
"""Entries that are kept of a log."""
LONGEST: Final = 1000
"""Characters of a reason."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one resource."""

    kind: str
    namespace: str = ""
    name: str
    verb: str
    """`created`, `changed` or `deleted`."""
    before: dict[str, Any] | None = None
    """The `spec` before; None for none, and for one that is too large or that says nothing (of a PolicyRevision or DataRevision)."""
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
    user: str = ""
    """Whom etcd knows the author as: a user, or the common name of a certificate; empty where it knows nobody."""
    reason: str = ""
    changes: tuple[Change, ...] = ()

    @property
    def active(self) -> Change | None:
        """What became of the ActivePolicy; None when the entry is not about it."""
        return next((change for change in self.changes if change.kind == ACTIVE), None)


_decoder = msgspec.json.Decoder(Entry)


class Unnoted(msgspec.Struct, frozen=True):
    """A resource that was changed by other means than ours."""

    key: Key
    revision: int
    """Of etcd, at which it was written; 0 when it was deleted."""


class Author(msgspec.Struct, frozen=True):
    """Who writes."""

    user: str = ""
    """The user that etcd knows."""
    certificate: str = ""
    """The SPIFFE ID, or the common name, of the client certificate."""
    common_name: str = ""
    """Of the client certificate: etcd's user, where none is given."""


def author_of(address: EtcdAddress) -> Author:
    """Who writes to the etcd at `address`. A certificate that can't be read is nobody's: etcd won't take it either."""
    try:
        name, spiffe = _names_in(address.cert) if address.cert is not None else ("", "")
    except (OSError, ValueError):
        name, spiffe = "", ""
    return Author(address.user, spiffe or name, name)


def audited(key: Key) -> bool:
    """Whether changes of the resource are written down."""
    return (key.group, key.kind) in AUDITED or (key.group, key.kind) in LIMITS


def change_of(key: Key, verb: str, before: Document | None, after: Document | None) -> Change:
    """A change as it is written down."""
    said = (_spec(before), _spec(after)) if key.kind != CHANGED_LIMIT else _differences(before, after)
    return Change(kind=key.kind, namespace=key.namespace, name=key.name, verb=verb, before=said[0], after=said[1])


def puts_of(audit: Audit, changes: Sequence[Change], author: Author, now: float | None = None) -> dict[Log, Put]:
    """What writes changes down: an entry for each log that they belong into."""
    sorted_in: dict[Log, list[Change]] = {}
    for change in changes:
        sorted_in.setdefault("quota" if (_OWN, change.kind) in LIMITS else "policy", []).append(change)
    return {log: put_of(audit, own, author, now, log) for log, own in sorted_in.items()}


def put_of(audit: Audit, changes: Sequence[Change], author: Author, now: float | None = None, log: Log = "policy") -> Put:
    """What writes an entry."""
    moment = time.time() if now is None else now
    entry = Entry(
        time=moment,
        action=audit.action,
        who=who(author),
        user=author.user or author.common_name,
        reason=audit.reason[:LONGEST],
        changes=tuple(changes),
    )
    return Put(f"{LOGS[log][0]}{int(moment * 1e9):020d}-{os.urandom(4).hex()}".encode(), msgspec.json.encode(entry))


def who(author: Author) -> str:
    """Whose change it is, for people: `spiffe://shop.example/ns/ops/sa/ada (ada@laptop)` by a certificate, else `ada@laptop`."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    here = f"{name}@{socket.gethostname()}"
    user = f"etcd user {author.user}" if author.user else ""
    if author.certificate:
        return f"{author.certificate} ({', '.join(filter(None, (here, user)))})"
    return here + (f" ({user})" if user else "")


async def history(etcd: Etcd, log: Log = "policy") -> tuple[Entry, ...]:
    """All entries, the newest first; what can't be read is left out. Raises EtcdError."""
    return tuple(entry for _, entry in _read((await etcd.list(LOGS[log][0].encode())).entries))


async def unnoted(etcd: Etcd, log: Log = "policy") -> tuple[Unnoted, ...]:
    """What was last changed by other means: audited resources without an entry of their etcd revision, and those that were deleted without
    one. What may be older than the log goes back is not judged. Raises EtcdError."""
    prefix, kinds = LOGS[log]
    stored = (await etcd.list(prefix.encode())).entries
    there: dict[tuple[str, str, str], Stored] = {}
    keys: dict[tuple[str, str, str], Key] = {}
    for group, kind in sorted(kinds):
        for entry in (await etcd.list(config_prefix(group, kind), keys_only=True)).entries:
            key = read_config_key(entry.key)
            if key is not None:
                there[kind, key.namespace, key.name] = entry
                keys[kind, key.namespace, key.name] = key
    return unnoted_among(stored, there, keys)


def unnoted_among(
    stored: Sequence[Stored], there: Mapping[tuple[str, str, str], Stored], keys: Mapping[tuple[str, str, str], Key]
) -> tuple[Unnoted, ...]:
    """`unnoted`, pure: of the log's entries as they are in etcd, and of the resources by kind, namespace and name."""
    noted = {entry.revision for entry in stored}
    since = min(noted, default=0) if len(stored) >= MOST else 0
    found = [Unnoted(keys[name], entry.revision) for name, entry in there.items() if entry.revision > since and entry.revision not in noted]
    last: dict[tuple[str, str, str], str] = {}
    for _, entry in reversed(_read(stored)):
        last |= {(change.kind, change.namespace, change.name): change.verb for change in entry.changes}
    groups = {kind: group for group, kind in AUDITED | LIMITS}
    found += [
        Unnoted(Key(groups[name[0]], *name), 0)
        for name, verb in last.items()
        if verb != "deleted" and name not in there and name[0] in groups
    ]
    return tuple(sorted(found, key=lambda each: each.key))


async def trim(etcd: Etcd, most: int = MOST, log: Log = "policy") -> None:
    """Takes away the oldest entries of a log above `most`. Raises EtcdError."""
    keys = sorted(entry.key for entry in (await etcd.list(LOGS[log][0].encode())).entries)
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


def _read(stored: Sequence[Stored]) -> list[tuple[bytes, Entry]]:
    """The entries that can be read, the newest first."""
    found = []
    for each in stored:
        try:
            found.append((each.key, _decoder.decode(each.value)))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return sorted(found, key=lambda item: item[0], reverse=True)


def _spec(document: Document | None) -> dict[str, Any] | None:
    if document is None or document.key.kind in _LARGE:
        return None
    spec = document.body.get("spec")
    if not isinstance(spec, Mapping) or len(msgspec.json.encode(spec)) > MOST_SPEC:
        return None
    return dict(spec)


def _differences(before: Document | None, after: Document | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What two versions of a QuotaChange say, without the changes that both have: there may be a thousand."""
    specs = [None if each is None or not isinstance(each.body.get("spec"), Mapping) else each.body["spec"] for each in (before, after)]
    items = [list(spec.get("changes") or ()) if spec is not None else [] for spec in specs]
    found: list[dict[str, Any] | None] = []
    for spec, own, others in ((specs[0], items[0], items[1]), (specs[1], items[1], items[0])):
        said = None if spec is None else {**spec, "changes": [item for item in own if item not in others]}
        found.append(said if said is not None and len(msgspec.json.encode(said)) <= MOST_SPEC else None)
    return found[0], found[1]


def _names_in(path: Path) -> tuple[str, str]:
    """The common name and the SPIFFE ID of a certificate. Raises OSError, ValueError."""
    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        uris: list[str] = []
    else:
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    spiffe = next((uri for uri in uris if uri.startswith("spiffe://")), "")
    return str(common[0].value) if common else "", spiffe

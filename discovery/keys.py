"""The names of things in etcd.

    /tollhouse/config/<apiGroup>/<kind>/<namespace>/<name>        a resource, JSON
    /tollhouse/services/<namespace>/<service>/<instance>          an instance, JSON, under a lease
    /tollhouse/status/gateways/<namespace>/<name>/<instance>      what a gateway has in force, JSON, under a lease
    /tollhouse/audit/policy/<nanoseconds>-<random>                who changed the policy in force, JSON
    /tollhouse/audit/quota/<nanoseconds>-<random>                 who changed a limit, JSON

`config/` and `services/` are watched as one range (`WATCHED`), so that a transaction over both arrives as one; what gateways report
sorts behind it. Who needs which rights is in `discovery.rights`.

No part of a key is empty: the core group is written `core`, and `-` (which is no DNS label) stands for the namespace of a kind that
has none.
"""

from __future__ import annotations

import re

from discovery.source import InstanceName
from mesh.documents import Key

ROOT = "/tollhouse/"
CONFIG = ROOT + "config/"
SERVICES = ROOT + "services/"
GATEWAYS = ROOT + "status/gateways/"
AUDITS = ROOT + "audit/"
AUDIT = AUDITS + "policy/"
AUDIT_QUOTA = AUDITS + "quota/"
CORE = "core"
NO_NAMESPACE = "-"

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]{0,251}[A-Za-z0-9])?")


def _parts(prefix: str, key: bytes, count: int) -> tuple[str, ...] | None:
    try:
        text = key.decode("ascii")
    except UnicodeDecodeError:
        return None
    parts = tuple(text.removeprefix(prefix).split("/"))
    if not text.startswith(prefix) or len(parts) != count:
        return None
    return parts if all(_PART.fullmatch(part) or part == NO_NAMESPACE for part in parts) else None


def _joined(prefix: str, *parts: str) -> bytes:
    for part in parts:
        if not _PART.fullmatch(part) and part != NO_NAMESPACE:
            raise ValueError(
                f"{part!r} can't be in a name: use letters, digits, '-' and '.', at most 253, beginning and ending with a letter or digit"
            )
    return (prefix + "/".join(parts)).encode()


def check_name(name: str) -> None:
    """Raises ValueError, worded for people, unless `name` may be a part of a key (or of a file's name)."""
    if not _PART.fullmatch(name):
        _joined("", name + "/")


def config_key(key: Key) -> bytes:
    """The etcd key of a resource. Raises ValueError for a name that can't be part of one."""
    return _joined(CONFIG, key.group or CORE, key.kind, key.namespace or NO_NAMESPACE, key.name)


def config_prefix(group: str | None = None, kind: str | None = None, namespace: str | None = None) -> bytes:
    """The prefix of the longest leading part of `config_key` that is known (None: any); the caller filters the rest."""
    parts: list[str] = []
    if group is not None:
        parts.append(group or CORE)
        if kind is not None:
            parts.append(kind)
            if namespace is not None:
                parts.append(namespace or NO_NAMESPACE)
    return _joined(CONFIG, *parts) + b"/" if parts else CONFIG.encode()


def read_config_key(key: bytes) -> Key | None:
    """The resource that an etcd key names; None when it isn't of that form."""
    parts = _parts(CONFIG, key, 4)
    if parts is None or NO_NAMESPACE in (parts[0], parts[1], parts[3]):
        return None
    group, kind, namespace, name = parts
    return Key("" if group == CORE else group, kind, "" if namespace == NO_NAMESPACE else namespace, name)


def instance_key(name: InstanceName) -> bytes:
    """The etcd key of an instance. Raises ValueError for a name that can't be part of one."""
    for part in name:
        check_name(part)
    return _joined(SERVICES, *name)


def read_instance_key(key: bytes) -> InstanceName | None:
    """The instance that an etcd key names; None when it isn't of that form."""
    parts = _parts(SERVICES, key, 3)
    return None if parts is None or NO_NAMESPACE in parts else (parts[0], parts[1], parts[2])


def report_key(namespace: str, name: str, instance: str) -> bytes:
    """The etcd key of a gateway's report. Raises ValueError for a name that can't be part of one."""
    for part in (namespace, name, instance):
        check_name(part)
    return _joined(GATEWAYS, namespace, name, instance)


def read_report_key(key: bytes) -> tuple[str, str, str] | None:
    """Namespace, name and instance of a gateway's report; None when the key isn't of that form."""
    parts = _parts(GATEWAYS, key, 3)
    return None if parts is None or NO_NAMESPACE in parts else (parts[0], parts[1], parts[2])


def end_of(prefix: bytes) -> bytes:
    """The first key after all those that begin with `prefix` (etcd's `range_end`)."""
    for index in range(len(prefix) - 1, -1, -1):
        if prefix[index] < 0xFF:
            return prefix[:index] + bytes([prefix[index] + 1])
    return b"\0"


WATCHED = (CONFIG.encode(), end_of(SERVICES.encode()))
"""The range (its first key, and the first one after it) that holds resources and instances and nothing else."""

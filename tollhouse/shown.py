"""What processes show of themselves: the configuration in force without its secrets, and whether it is too old to decide by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from mesh.model import Snapshot
from mesh.policy import Revision, Share
from mesh.policy_data import root_text
from tollhouse.keeper import Keeper


def config_page(snapshot: Snapshot) -> bytes:
    """The snapshot as JSON. Private keys are left out, and so are the modules of policies (`tollhouse get PolicyRevision` shows them)."""
    policy, own = snapshot.policy, snapshot.authorization
    shown: dict[str, Any] = {
        "version": snapshot.version,
        "mesh": plain(snapshot.mesh),
        "gateways": {key: plain(config) for key, config in snapshot.gateways.items()},
        "clusters": {key: plain(cluster) for key, cluster in snapshot.clusters.items()},
        "policies": {key: plain(value) for key, value in snapshot.policies.items()},
        "policy": None
        if policy is None
        else {"digest": policy.policy, "data": dict(policy.parts), "entryPoints": plain(policy.entry_points), "opa": policy.opa},
        "authorization": None if own is None else revision_shown(own),
        "problems": [str(problem) for problem in snapshot.problems],
    }
    return msgspec.json.format(msgspec.json.encode(shown), indent=2) + b"\n"


def revision_shown(revision: Revision) -> dict[str, Any]:
    """A revision without its modules and data."""
    return {"digest": revision.policy, "entryPoints": plain(revision.entry_points), "opa": revision.opa}


SECRET = {"certificates", "client_certificate"}
"""Fields that hold private keys."""
KEY_SET = "inline"
"""The field that holds the keys of tokens, which may be secrets."""


def plain(value: Any, name: str = "") -> Any:
    """Structs as mappings and bytes as text; what is secret is only counted."""
    if name in SECRET and value:
        return f"{len(value)} (not shown)"
    if name == KEY_SET and value:
        return "(not shown)"
    if isinstance(value, msgspec.Struct):
        return {field: plain(getattr(value, field), field) for field in value.__struct_fields__}
    if isinstance(value, dict):
        return {text(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
    return text(value) if isinstance(value, bytes) else value


def text(value: Any) -> str:
    """Bytes as text for people."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def rfc3339() -> str:
    """The present, as conditions have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def data_in(snapshot: Snapshot, waiting: str = "") -> dict[str, str]:
    """Root and digest of the data with revisions of their own that are in force; none when what is to decide is not there yet."""
    if snapshot.policy is not None:
        return dict(snapshot.policy.parts)
    return {} if waiting else {root_text(each.root): each.digest for each in snapshot.data}


def tried_in(snapshot: Snapshot) -> tuple[tuple[str, Share], tuple[str, Share]]:
    """The digests of the shadow and of the canary revision (empty for none), each with its share."""
    return (
        (snapshot.shadow.policy if snapshot.shadow is not None else "", snapshot.shadow_share),
        (snapshot.canary.policy if snapshot.canary is not None else "", snapshot.canary_share),
    )


def trial_shown(revision: Revision | None, share: Share) -> dict[str, Any] | None:
    """A revision that is tried, and on whom, as `/status` shows it."""
    return (
        None
        if revision is None
        else {
            "revision": revision.policy,
            "percent": share.percent,
            "by": "Identity" if share.by_identity else "Request",
            "identities": list(share.identities),
        }
    )


def conditions_text(conditions: Iterable[Mapping[str, Any]]) -> str:
    """Conditions in one line: those that are as one would wish by name, the others with their reason."""
    fine, wrong = [], []
    for each in conditions:
        wished = "False" if each["type"] in NEGATIVE else "True"
        if each["status"] != wished:
            wrong.append(f"{each['type']}={each['status']} ({each['reason']})")
        elif each["type"] not in NEGATIVE:
            fine.append(each["type"])
    return ", ".join([*wrong, *fine])


NEGATIVE = {"Conflicted", "OverlappingTLSConfig", "InsecureFrontendValidationMode", "PartiallyInvalid"}
"""Conditions that one does not wish to hold."""


def staleness(keeper: Keeper, loop: asyncio.AbstractEventLoop) -> Callable[[], bool]:
    """Whether `Mesh.policy.maxStaleness` has passed since the last contact with the configuration source. Looked at once in 100 ms."""
    looked = [0.0, False]
    started = time.monotonic()

    def stale() -> bool:
        most = keeper.snapshot.mesh.max_staleness
        if most is None:
            return False
        now = loop.time()
        if now - looked[0] > 0.1:
            contact = keeper.contact
            looked[0] = now
            looked[1] = time.monotonic() - (contact if contact is not None else started) > most
        return bool(looked[1])

    return stale

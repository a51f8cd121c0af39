"""Kept decisions: each for exactly the inputs that it depends on, and for as long as its policy is the same.

The key is provider, decision, engine, body settings, the entry point's digest (plan, reachable data, read set, `ttl`), and the values at
the read set's paths. *A kept decision equals a fresh one.* Never kept: errors, what read a body, what an unaudited builtin had a say
in (unless the author gave it a `ttl`), and what another provider said (nobody knows what it depends on).
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable
from math import inf
from typing import Final

import msgspec

from mesh.model import DecisionPolicy
from mesh.policy import EntryPoint
from mesh.questions import Asking, Decision, Verdict
from pdp.values import Part, Values, reads_body

Key = tuple[Part, ...]

_OVERHEAD: Final = 600
"""Bytes that an entry costs besides what it holds: key, decision, and their place in the table (measured: 500 to 600)."""
_LARGEST_SHARE: Final = 16
"""No entry may have more than this part of all bytes."""
_KEYERS: Final = 4096


class _Keyer(msgspec.Struct, frozen=True):
    """How the keys of one policy and one entry point are made."""

    policy: DecisionPolicy
    point: EntryPoint
    refused: str
    """Why nothing of it is kept; empty when it is: `volatile`, `body`, `provider`."""
    prefix: str
    values: Values


class _Entry:
    __slots__ = ("decision", "size", "until")

    def __init__(self, decision: Decision, until: float, size: int) -> None:
        self.decision = decision
        self.until = until
        self.size = size


class KeptDecisions:
    """A bounded table of decisions; the one used longest ago goes first. `engine` names who evaluates: answers of two are never mixed.

    Its counters are plain integers, for a collector to read. Times are seconds on a monotonic clock. One owner, no locks.
    """

    def __init__(self, *, max_entries: int = 100_000, max_bytes: int = 64 << 20, engine: str = "opa") -> None:
        if max_entries < 1 or max_bytes < 1:
            raise ValueError("at least one entry and one byte have to be allowed; leave the table away to keep nothing")
        self._most = max_entries
        self._most_bytes = max_bytes
        self._engine = engine
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._keyers: dict[tuple[int, int], _Keyer] = {}
        self.bytes = 0
        """What the entries take, about."""
        self.hits = 0
        self.misses = 0
        """Look-ups that found nothing, those whose entry had run out included."""
        self.expired = 0
        self.evicted = 0
        self.refused_volatile = 0
        """Questions without a key because a builtin is not a function of its arguments, and the author gave no `ttl`."""
        self.refused_body = 0
        """Questions without a key because the policy reads the body."""
        self.refused_provider = 0
        """Questions without a key because somebody else answers them."""
        self.refused_document = 0
        """Questions without a key because the request has no document."""
        self.refused_error = 0
        """Answers that were errors."""
        self.refused_size = 0
        """Answers that were too large."""

    def __len__(self) -> int:
        return len(self._entries)

    def key_for(self, asking: Asking, policy: DecisionPolicy, entry_point: EntryPoint) -> Key | None:
        """The key of a question, or None when its answer must not be kept (which is counted by reason)."""
        keyer = self._keyers.get((id(policy), id(entry_point)))
        if keyer is None:
            keyer = self._keyer(policy, entry_point)
        if keyer.refused:
            self._count(keyer.refused)
            return None
        try:
            return (keyer.prefix, *keyer.values(asking, policy))
        except ValueError:
            self.refused_document += 1
            return None

    def get(self, key: Hashable, now: float) -> Decision | None:
        """The decision that is kept under `key`, with `kept` set."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        if entry.until <= now:
            self._drop(key)
            self.expired += 1
            self.misses += 1
            return None
        self._entries.move_to_end(key)
        self.hits += 1
        return entry.decision

    def put(self, key: Hashable, decision: Decision, now: float, ttl: float | None) -> bool:
        """Keeps `decision` under `key`, for `ttl` seconds (None: for as long as there is room). False when it is not one to keep."""
        if decision.verdict is Verdict.ERROR:
            self.refused_error += 1
            return False
        size = _OVERHEAD + _size_of_key(key) + _size_of(decision)
        if size > self._most_bytes // _LARGEST_SHARE and size > _OVERHEAD * 2:
            self.refused_size += 1
            return False
        self._drop(key)
        self._entries[key] = _Entry(msgspec.structs.replace(decision, kept=True), inf if ttl is None else now + ttl, size)
        self.bytes += size
        while len(self._entries) > self._most or self.bytes > self._most_bytes:
            self._drop(next(iter(self._entries)))
            self.evicted += 1
        return key in self._entries

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._keyers.clear()
        self.bytes = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size

    def _count(self, reason: str) -> None:
        if reason == "volatile":
            self.refused_volatile += 1
        elif reason == "body":
            self.refused_body += 1
        else:
            self.refused_provider += 1

    def _keyer(self, policy: DecisionPolicy, point: EntryPoint) -> _Keyer:
        # The keyer holds on to both, so that their ids stay theirs.
        keyer = _Keyer(policy, point, why_not(policy, point), self._prefix(policy, point), Values(point.reads))
        if len(self._keyers) >= _KEYERS:
            self._keyers.clear()
        self._keyers[id(policy), id(point)] = keyer
        return keyer

    def _prefix(self, policy: DecisionPolicy, point: EntryPoint) -> str:
        body = [policy.body_limit, policy.body_partial] if policy.body_limit > 0 else []
        return msgspec.json.encode([policy.provider, point.path, self._engine, body, point.digest]).decode()


def why_not(policy: DecisionPolicy, point: EntryPoint) -> str:
    """Why answers to `policy` are not kept: `provider`, `volatile` or `body`; empty when they are."""
    if policy.provider:
        return "provider"
    if not point.keepable:
        return "volatile"
    return "body" if policy.body_limit > 0 and reads_body(point.reads) else ""


def _size_of_key(key: Hashable) -> int:
    return sum(sys.getsizeof(part) for part in key) if isinstance(key, tuple) else sys.getsizeof(key)


def _size_of(decision: Decision) -> int:
    size = len(decision.body) + len(decision.reason) + len(decision.rule) + len(decision.metadata)
    for headers in (decision.headers, decision.response_headers, decision.query_set):
        size += sum(len(name) + len(value) + 120 for name, value in headers)
    for changes in (decision.changes, decision.response_changes):
        size += sum(len(change.name) + len(change.value) + 160 for change in changes)
    size += sum(len(name) + 60 for name in decision.query_remove)
    return size + sum(len(name) + 50 for name in decision.headers_to_remove)

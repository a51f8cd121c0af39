"""Where buckets live: one interface, with `quota.memory` and `quota.redis_store` behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from quota.bucket import Ask, Reply
from quota.slots import SlotAsk, SlotReply


class Failure(msgspec.Struct, frozen=True):
    """An ask that got no answer. Whether it was carried out is not known."""

    reason: str
    """One short phrase, for logs and `Grant.error`."""
    kind: str = "other"
    """What it comes under, for metrics: one of a few words."""
    sent: bool = True
    """False when the ask certainly never left, and so was not carried out."""


Done = Callable[[Reply | Failure], None]
SlotsDone = Callable[[SlotReply | Failure], None]


class Store(Protocol):
    """Carries asks out. A holder has at most one ask under way for a bucket."""

    def ask(self, key: str, ask: Ask, done: Done, *, strict: bool = False) -> None:
        """Carries `ask` out on the bucket `key` (`bucket_key`) and gives the answer to `done`, exactly once and within the time budget;
        perhaps before this returns. Never raises. `strict`: only when the known replicas have it too."""
        ...

    def ask_slots(self, key: str, ask: SlotAsk, done: SlotsDone, *, strict: bool = False) -> None:
        """The same, for the slots of a concurrency limit (`slots_key`)."""
        ...

    def state(self) -> dict[str, Any]:
        """How the store is doing, for `status`."""
        ...

    async def close(self) -> None:
        """Answers what is still waiting, if it can within the budget, and ends."""
        ...


def bucket_key(limit: str, values: tuple[str, ...]) -> str:
    """Names a bucket: the limit's name, for people, and a digest of it and of the descriptors' values.

    A digest, because values come from requests: they are of any length, and may be secrets (an API key in a header) that nobody is to read
    in Redis. BLAKE2b, 16 bytes, over the parts with their lengths.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (limit, *values):
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(raw))
        digest.update(raw)
    shown = limit[:100].replace("{", "_").replace("}", "_")
    return f"{shown}:{digest.hexdigest()}"


def slots_key(limit: str, values: tuple[str, ...]) -> str:
    """Names the slots of a concurrency limit, as `bucket_key` does a bucket."""
    return bucket_key(limit, values) + ":slots"

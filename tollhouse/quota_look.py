"""A look at one bucket in Redis."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from mesh.quota_changes import instant_text
from quota.descriptors import PolicyLimits
from quota.redis_store import RedisStore
from quota.slot_lessee import look_ask
from quota.slots import SlotReply
from quota.store import Failure, slots_key
from tollhouse.commands.config import together, with_store
from tollhouse.quota_limits import limit_named, numbers_of
from tollhouse.quota_reset import Bucket, ask_redis, bucket_of, with_redis


def look(name: str, values: tuple[str, ...], config: str, redis: str) -> dict[str, Any]:
    """What is left for these values of a limit's descriptors. Raises `Complaint`."""
    found, _ = with_store(config, lambda store: store.list())
    limits = PolicyLimits.of(together(found).snapshot)
    known = limit_named(limits, name)
    now = time.time()
    bucket = bucket_of(known, values, now)
    numbers = limits.numbers(name)
    change, limit = numbers.change(bucket.key, now), bucket.limit
    changed = None if change is None else {**numbers_of(change.limit), "until": instant_text(change.until) if change.until else None}
    if limit.concurrency:
        slots = ask_for_slots(redis, bucket)
        return {
            "limit": name,
            "key": list(values),
            "concurrency": limit.concurrency,
            "inUse": slots.busy,
            "onLease": slots.elsewhere,
            "left": slots.free,
            "lessees": slots.holders if slots.elsewhere else 0,
            "changed": changed,
        }
    reply = ask_redis(redis, bucket)
    return {
        "limit": name,
        "key": list(values),
        "left": reply.level,
        "burst": limit.burst,
        **({"tokensPerSecond": limit.rate} if limit.calendar is None else {"calendar": msgspec.to_builtins(limit.calendar)}),
        "onLease": reply.elsewhere,
        "lessees": reply.sharers if reply.elsewhere else 0,
        "fullInSeconds": round(reply.full / 1e6, 1),
        "changed": changed,
    }


def ask_for_slots(redis: str, bucket: Bucket) -> SlotReply:
    """Looks at the slots of a concurrency limit. Raises `Complaint`."""

    def look(store: RedisStore) -> asyncio.Future[SlotReply | Failure]:
        answer: asyncio.Future[SlotReply | Failure] = asyncio.get_running_loop().create_future()
        store.ask_slots(slots_key(bucket.limit.name, bucket.key), look_ask("", bucket.limit), answer.set_result)
        return answer

    return with_redis(redis, look)

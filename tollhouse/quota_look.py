"""A look at one bucket in Redis."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from mesh.quota_changes import SECRET, instant_text, is_hidden
from quota.bucket import ASTRAY, Ask, Reply
from quota.calendar import windows
from quota.descriptors import PolicyLimits
from quota.redis_store import RedisStore
from quota.store import Failure, bucket_key
from tollhouse.commands.config import together, with_store
from tollhouse.output import Complaint
from tollhouse.quota_limits import key_of, limit_named, numbers_of


def look(name: str, values: tuple[str, ...], config: str, redis: str) -> dict[str, Any]:
    """What is left for these values of a limit's descriptors. Raises `Complaint`."""
    found, _ = with_store(config, lambda store: store.list())
    limits = PolicyLimits.of(together(found).snapshot)
    known = limit_named(limits, name)
    key = key_of(known, values)
    if any(is_hidden(value) and part.kind in SECRET for part, value in zip(known.per, values, strict=True)):
        raise Complaint(f"{name}: a bucket in Redis is named by the values themselves; what is shown of a secret value does not tell it", 2)
    now = time.time()
    change = limits.numbers(name).change(key, now)
    limit = limits.numbers(name).of(key, now)
    changed = None if change is None else {**numbers_of(change.limit), "until": instant_text(change.until) if change.until else None}
    lifted = limit is None
    if limit is None or limit.tokens <= 0:  # nobody asks for its tokens now; what is there is what its policy makes of it
        limit = msgspec.structs.replace(known, changes=(), resets=())

    async def main() -> Reply | Failure:
        try:
            store = RedisStore(redis, budget=2.0)
        except ValueError as problem:
            raise Complaint(f"--redis: {problem}", 2) from None

        async def peek(now: int) -> Reply | Failure:
            answer: asyncio.Future[Reply | Failure] = asyncio.get_running_loop().create_future()
            at = windows(limit.calendar, now) if limit.calendar is not None else ()
            ask = Ask("", 0, 0, 0, 0, 0, (), (), 0, 1, 3_000_000, limit.rate, limit.burst, True, windows=at)
            store.ask(bucket_key(name, key), ask, answer.set_result)
            return await answer

        try:
            found = await peek(time.time_ns() // 1000)
            if isinstance(found, Reply) and found.ends == ASTRAY:
                found = await peek(found.now)  # Redis' clock and this machine's show different windows of the calendar
            return found
        finally:
            await store.close()

    reply = asyncio.run(main())
    if isinstance(reply, Failure):
        raise Complaint(f"Redis can't be asked: {reply.reason}")
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
        "lifted": lifted,
    }

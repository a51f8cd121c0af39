"""One bucket refilled or emptied by hand: in Redis at once, and at the gateways, which forget what they knew of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from discovery.address import EtcdAddress
from discovery.audit import author_of, who
from mesh.model import QuotaLimit
from mesh.quota_changes import SECRET, instant_text, is_hidden, shown_key, values_of
from quota.bucket import ASTRAY, Ask, Reply
from quota.calendar import windows
from quota.changes import Numbers
from quota.descriptors import PolicyLimits
from quota.redis_store import RedisStore
from quota.store import Failure, bucket_key
from tollhouse.commands.config import together, with_store
from tollhouse.output import Complaint
from tollhouse.parts import is_etcd, open_etcd
from tollhouse.quota_limits import key_of, limit_named
from tollhouse.quota_switch import Done, Item, write_change

T = TypeVar("T")
BUDGET = 2.0
"""Seconds that Redis has for an answer."""


class Bucket(msgspec.Struct, frozen=True):
    """One bucket, and the numbers that hold for it now."""

    limit: QuotaLimit
    key: tuple[str, ...]


def bucket_of(limit: QuotaLimit, values: Sequence[str], now: float) -> Bucket:
    """The bucket for values of a limit's descriptors. Raises `Complaint`."""
    key = key_of(limit, values)
    if any(is_hidden(value) and part.kind in SECRET for part, value in zip(limit.per, values, strict=True)):
        raise Complaint(
            f"{limit.name}: a bucket in Redis is named by the values themselves; what is shown of a secret value does not tell it", 2
        )
    found = Numbers(limit).of(key, now)
    if found is None or (
        found.tokens <= 0 and found.concurrency <= 0
    ):  # nobody asks for its tokens now; what is there is what its policy makes of it
        found = msgspec.structs.replace(limit, changes=(), resets=())
    return Bucket(found, key)


def ask_redis(redis: str, bucket: Bucket, target: int = -1) -> Reply:
    """Looks at a bucket, or makes it hold `target` tokens. Raises `Complaint`."""
    limit = bucket.limit

    async def look(store: RedisStore) -> Reply | Failure:
        async def once(now: int) -> Reply | Failure:
            answer: asyncio.Future[Reply | Failure] = asyncio.get_running_loop().create_future()
            at = windows(limit.calendar, now) if limit.calendar is not None else ()
            peek = target < 0
            rate = limit.rate if limit.calendar is None else 0.0
            ask = Ask("", 0, 0, 0, 0, 0, (), (), 0, 1, 3_000_000, rate, limit.burst, peek, windows=at, target=target)
            store.ask(bucket_key(limit.name, bucket.key), ask, answer.set_result)
            return await answer

        found = await once(time.time_ns() // 1000)
        if isinstance(found, Reply) and found.ends == ASTRAY:
            found = await once(found.now)  # Redis' clock and this machine's show different windows of the calendar
        return found

    return with_redis(redis, look)


def with_redis(redis: str, work: Callable[[RedisStore], Awaitable[T | Failure]]) -> T:
    """Asks Redis something, on a connection for that. Raises `Complaint`."""

    async def main() -> T | Failure:
        try:
            store = RedisStore(redis, budget=BUDGET)
        except ValueError as problem:
            raise Complaint(f"--redis: {problem}", 2) from None
        try:
            return await work(store)
        finally:
            await store.close()

    reply = asyncio.run(main())
    if isinstance(reply, Failure):
        raise Complaint(f"Redis can't be asked: {reply.reason}")
    return reply


class Refilled(msgspec.Struct, frozen=True):
    """What became of a bucket."""

    done: Done
    before: int
    """Tokens that it held."""
    after: int
    out: int
    """Tokens that gateways have on lease: those stay with them."""
    burst: int


def reset_bucket(config: str, redis: str, name: str, values: Sequence[str], *, empty: bool, reason: str) -> Refilled:
    """Refills or empties a bucket. Raises `Complaint`; then the bucket is as it was, or holds again what it held."""
    by = who(author_of(open_etcd(config).address if is_etcd(config) else EtcdAddress(endpoints=())))
    documents, _ = with_store(config, lambda store: store.list())
    bucket = bucket_of(limit_named(PolicyLimits.of(together(documents).snapshot), name), values, time.time())
    if bucket.limit.concurrency:
        raise Complaint(f"{name} counts requests in progress: there is no bucket to fill or empty; use quota set", 2)
    reply = ask_redis(redis, bucket, 0 if empty else bucket.limit.burst)
    action = "quota empty" if empty else "quota refill"

    def make(limit: QuotaLimit, items: list[Item], now: float) -> tuple[list[Item], Done]:
        key = shown_key(limit, bucket.key)
        others = [item for item in items if not (item.get("reset") and (values_of(item) or ()) == key)]
        whom: dict[str, Any] = {"values": list(key)} if key else {}
        item = {**whom, "reset": instant_text(now), "since": instant_text(now), "by": by[:256], "reason": reason}
        return [*others, item], Done(limit=limit, values=key or None, before={}, after={}, until=0.0, written=0)

    try:
        done = write_change(config, name, action, reason, make)
    except Complaint as problem:
        ask_redis(redis, bucket, max(0, reply.granted))
        raise Complaint(f"{problem.message}; nobody could be told, and so the bucket holds again what it held", problem.code) from None
    return Refilled(done, reply.granted, reply.level, reply.elsewhere, bucket.limit.burst)

"""The load of `bench.quota`, in a process of its own: asks one contender N times, and says what it took.

It prints `ready`, waits for a line, asks, and prints one line of JSON. Where the contender is a library, the process that asks is the one
that decides: its CPU is the contender's, with the few instructions of the load.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from array import array
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc
from limits import RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from quota.lessee import QuotaLessee
from quota.redis_store import RedisStore

DOMAIN = "bench"
LIMIT = 1_000_000
"""Tokens a second, and the burst: nobody is refused, since a refusal would be cheaper than what is to be measured."""
Decide = Callable[[str], bool | Awaitable[bool]]


async def lessee(stack: AsyncExitStack, url: str) -> Decide:
    """What a gateway does: tokens in hand, asks in the background."""
    store = RedisStore(url + "?start=full", budget=5.0)
    stack.push_async_callback(store.close)
    asker = QuotaLessee(store, holder="bench")
    stack.push_async_callback(asker.close)
    limit = QuotaLimit(name="bench", level="mesh", per=(), tokens=LIMIT, interval=1.0, burst=LIMIT, timeout=5.0)
    clock = time.monotonic
    loop = asyncio.get_running_loop()

    def decide(key: str) -> bool | Awaitable[bool]:
        question = TokenQuestion(limit, (key,))
        grant = asker.take(question, clock())
        if grant is not None:
            return grant.admitted
        answer: asyncio.Future[bool] = loop.create_future()

        def done(found: Grant) -> None:
            if not answer.done():
                answer.set_result(found.admitted and not found.error)

        asker.ask(question, done)
        return answer

    return decide


async def library(stack: AsyncExitStack, url: str) -> Decide:
    """`limits` over its asyncio Redis storage, with its cheapest strategy."""
    storage = RedisStorage("async+" + url, implementation="redispy")
    limiter, item = FixedWindowRateLimiter(storage), RateLimitItemPerSecond(LIMIT)
    return lambda key: limiter.hit(item, key)


async def service(stack: AsyncExitStack, url: str) -> Decide:
    """A rate-limit service over gRPC."""
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(url))
    call = rls_pb2_grpc.RateLimitServiceStub(channel).ShouldRateLimit

    async def decide(key: str) -> bool:
        entry = ratelimit_pb2.RateLimitDescriptor.Entry(key="user", value=key)
        request = rls_pb2.RateLimitRequest(domain=DOMAIN, descriptors=[ratelimit_pb2.RateLimitDescriptor(entries=[entry])])
        answer = await call(request, timeout=10)
        return bool(answer.overall_code == rls_pb2.RateLimitResponse.OK)

    return decide


KINDS: dict[str, Callable[[AsyncExitStack, str], Awaitable[Decide]]] = {"lessee": lessee, "limits": library, "service": service}


async def load(decide: Decide, names: list[str], took: array[float], inflight: int) -> dict[str, Any]:
    """As many decisions as `took` has places, over `names` in turn, `inflight` at once. `took` gets how many seconds each took."""
    refused = 0
    keys, requests = len(names), len(took)
    numbers = iter(range(requests))
    clock = time.perf_counter

    async def one() -> None:
        nonlocal refused
        for number in numbers:
            start = clock()
            found = decide(names[number % keys])
            if not isinstance(found, bool):
                found = await found
            took[number] = clock() - start
            refused += not found
            if number % 64 == 0:
                await asyncio.sleep(0)

    start = clock()
    await asyncio.gather(*(one() for _ in range(inflight)))
    seconds = clock() - start
    ordered = sorted(took[:: max(1, requests // 100_000)])
    quantile = {name: ordered[int(len(ordered) * share)] * 1e6 for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {"requests": requests, "seconds": seconds, "refused": refused, **quantile}


async def main(kind: str, url: str, keys: int, requests: int, inflight: int) -> None:
    """Sets up, says so, waits to be told, and asks."""
    async with AsyncExitStack() as stack:
        # Made beforehand, so that what memory grows by is the contender's.
        names, took = [f"key-{number}" for number in range(keys)], array("d", bytes(8 * requests))
        decide = await KINDS[kind](stack, url)
        warm = decide("warm")
        if not isinstance(warm, bool):
            await warm
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        print(json.dumps(await load(decide, names, took, inflight)), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:6])))

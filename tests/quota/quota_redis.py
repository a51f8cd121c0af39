"""Questions to a lessee over a real Redis, and waiting for what comes about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from quota_world import limit

from mesh.questions import Grant, TokenQuestion
from quota.breaker import Breaker
from quota.lessee import QuotaLessee


def q(burst: int = 20, tokens: int = 10, key: str = "x", cost: int = 1, **more: Any) -> TokenQuestion:
    return TokenQuestion(limit(burst=burst, tokens=tokens, **{"timeout": 2.0, **more}), (key,), cost)


async def get(lessee: QuotaLessee, question: TokenQuestion) -> Grant:
    grant = lessee.take(question, 0.0)
    if grant is None:
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        lessee.ask(question, future.set_result)
        grant = await future
    return grant


async def until(what: Callable[[], Any], seconds: float = 15.0) -> Any:
    """Polls until `what` (perhaps awaitable) is true."""
    end = time.monotonic() + seconds
    while True:
        result = what()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.02)


def quick() -> Breaker:
    return Breaker(base=0.02, longest=0.2)


async def errs(lessee: QuotaLessee, question: TokenQuestion) -> bool:
    return bool((await get(lessee, question)).error)


async def admits(lessee: QuotaLessee, question: TokenQuestion) -> bool:
    return (await get(lessee, question)).admitted

"""Links to Redis: a single server, a master that Sentinels name, or a cluster. They carry batches of asks out and decide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from redis.exceptions import ResponseError

from quota.redis_address import Address
from quota.redis_cluster import Cluster
from quota.redis_server import Call, Master, Server, single


class Link(Protocol):
    """Carries out batches."""

    def lane(self, call: Call) -> str:
        """Which server a call is for, as far as is known. Calls of one lane go out together, and fail together."""
        ...

    async def run(self, lane: str, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """The answers, in order. Raises `RedisError` or `OSError` when the server could not be asked. Cancelling it is safe."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...


def link(address: Address, budget: float) -> Link:
    """The connections to `address`; an ask may take `budget` seconds."""
    return Cluster(address, budget) if address.kind == "cluster" else One(address, budget)


class One:
    """A single server, or the master of several."""

    def __init__(self, address: Address, budget: float) -> None:
        self._master = Master(address) if address.kind == "sentinel" else None
        self._server = Server(self._master.make if self._master else single(address), address.start, budget)

    def lane(self, call: Call) -> str:
        """See `Link`."""
        return ""

    async def run(self, lane: str, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """See `Link`."""
        return await self._server.run(calls)

    async def close(self) -> None:
        """See `Link`."""
        await self._server.close()
        if self._master is not None:
            await self._master.close()

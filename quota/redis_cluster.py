"""A cluster of Redis: each ask goes to the node that has the bucket's slot. Decides nothing.

Buckets are spread over `SHARDS` hash tags, so only those slots are looked at. Which node has which is learned in the background: at the
first ask, when a node says that a slot has moved, and when one can't be asked; all nodes are asked at once and the first that knows is
believed, since a wrong answer is put right by the next MOVED. What a node is asked is a lane of its own: a node that is dead or slow
holds up nobody but the buckets that it has.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError

from quota.redis_address import Address
from quota.redis_server import PATIENCE, Call, Host, Server, at

SHARDS: Final = 256
"""Into how many slots a cluster's buckets are spread."""
TAGS: Final = tuple(b"%02x" % shard for shard in range(SHARDS))
_SHARD_OF: Final = {tag: shard for shard, tag in enumerate(TAGS)}
_SLOTS: Final = tuple(key_slot(tag) for tag in TAGS)


def tag_of(name: bytes) -> bytes:
    """The hash tag of the bucket `name`."""
    return TAGS[zlib.crc32(name) % SHARDS]


class Cluster:
    """A `quota.redis_link.Link` to a cluster."""

    def __init__(self, address: Address, budget: float) -> None:
        self._address = address
        self._budget = budget
        self._nodes: dict[str, Server] = {}
        self._hosts: dict[str, Host] = {}
        self._owners: list[str] = [""] * SHARDS
        """The node of each shard; "" as long as none is known."""
        self._learning: asyncio.Task[None] | None = None

    def lane(self, call: Call) -> str:
        """See `quota.redis_link.Link`: the node that has the bucket."""
        return self._owners[_shard(call)]

    async def run(self, lane: str, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """See `quota.redis_link.Link`."""
        if not lane:
            await self._learn()
            return await self._anywhere(calls)
        try:
            answers = await self._node(lane).run(calls)
        except BaseException:
            self._learn_later()
            raise
        return await self._follow(calls, answers)

    async def _anywhere(self, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """Asks that were made before it was known which node they are for. A node that can't be asked fails its own."""
        parts: dict[str, list[int]] = {}
        for place, call in enumerate(calls):
            parts.setdefault(self.lane(call), []).append(place)
        nobody = parts.pop("", [])
        results = await asyncio.gather(
            *(self._node(node).run([calls[place] for place in places]) for node, places in parts.items()), return_exceptions=True
        )
        answers: list[Any] = [ClusterDownError("no node has the slot")] * len(calls)
        problems: list[BaseException] = []
        for places, result in zip(parts.values(), results, strict=True):
            if isinstance(result, RedisError | OSError):
                problems.append(result)
            elif isinstance(result, BaseException):
                raise result
            for number, place in enumerate(places):
                answers[place] = ResponseError(str(result)) if isinstance(result, BaseException) else result[number]
        if problems and len(problems) == len(parts) and not nobody:
            raise problems[0]
        return await self._follow(calls, answers)

    async def _follow(self, calls: Sequence[Call], answers: list[bytes | ResponseError]) -> list[bytes | ResponseError]:
        """Asks again, once, where the answer says that the slot is."""
        moved: dict[tuple[str, bool], list[int]] = {}
        for place, answer in enumerate(answers):
            if isinstance(answer, AskError):
                node = self._meet((answer.host or self._host_of(calls[place]), answer.port))
                asking = not isinstance(answer, MovedError)
                if not asking:
                    self._owners[_shard(calls[place])] = node
                moved.setdefault((node, asking), []).append(place)
        if moved or any(isinstance(answer, ClusterDownError) for answer in answers):
            self._learn_later()
        for (node, asking), places in moved.items():
            again = await self._node(node).run([calls[place] for place in places], asking=asking)
            for place, answer in zip(places, again, strict=True):
                answers[place] = answer
        return answers

    def _host_of(self, call: Call) -> str:
        """A node that names no host means its own."""
        return self._hosts[self.lane(call)][0]

    def _meet(self, host: Host) -> str:
        name = f"{host[0]}:{host[1]}"
        self._hosts[name] = host
        return name

    def _node(self, name: str) -> Server:
        server = self._nodes.get(name)
        if server is None:
            server = self._nodes[name] = Server(partial(self._make, self._hosts[name]), self._address.start, self._budget)
        return server

    async def _make(self, host: Host) -> AbstractConnection:
        return at(self._address, host)

    def _learn_later(self) -> None:
        if self._learning is None:
            self._learning = asyncio.get_running_loop().create_task(self._look())
            self._learning.add_done_callback(self._learned)

    async def _learn(self) -> None:
        self._learn_later()
        assert self._learning is not None
        await asyncio.shield(self._learning)

    def _learned(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; perhaps nobody does any more

    async def _look(self) -> None:
        """Learns from the first node that knows which nodes have the slots."""
        names = list(dict.fromkeys([*self._nodes, *(self._meet(host) for host in self._address.hosts)]))
        tasks = [asyncio.ensure_future(self._ask(name)) for name in names]
        problems = []
        try:
            async with asyncio.timeout(PATIENCE):
                for soonest in asyncio.as_completed(tasks):
                    try:
                        owners = await soonest
                    except (RedisError, OSError) as problem:
                        problems.append(str(problem) or type(problem).__name__)
                        continue
                    await self._know(owners)
                    return
        except TimeoutError:
            problems.append(f"no answer within {PATIENCE:g} s")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise aioredis.ConnectionError(f"no node of the cluster tells where its slots are: {'; '.join(problems)}")

    async def _ask(self, name: str) -> list[Host | None]:
        """The node of each shard, as one node has it."""
        ranges = await self._node(name).look(b"CLUSTER", b"SLOTS")
        owners: list[Host | None] = [None] * SHARDS
        for first, last, master, *_ in ranges:
            host = (bytes(master[0] or b"").decode() or self._hosts[name][0], int(master[1]))
            for shard, slot in enumerate(_SLOTS):
                if first <= slot <= last:
                    owners[shard] = host
        if not any(owners):
            raise ClusterDownError(f"{name} knows of no slots")
        return owners

    async def _know(self, owners: Sequence[Host | None]) -> None:
        self._owners = [self._meet(host) if host else "" for host in owners]
        wanted = {*self._owners, *(f"{host}:{port}" for host, port in self._address.hosts)}
        for name in [name for name in self._nodes if name not in wanted]:
            await self._nodes.pop(name).close()
            del self._hosts[name]

    async def close(self) -> None:
        """See `quota.redis_link.Link`."""
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.gather(self._learning, return_exceptions=True)
        for server in self._nodes.values():
            await server.close()


def _shard(call: Call) -> int:
    return _SHARD_OF[call.record.partition(b"{")[2].partition(b"}")[0]]

"""Buckets in a real Redis Cluster: of three masters, and with a replica each."""

from __future__ import annotations

import asyncio
import signal
import time
import zlib
from collections.abc import Iterator

import pytest
import redis
from quota_redis import admits, get, q, quick, until
from redis.crc import key_slot

from quota.lessee import QuotaLessee
from quota.redis_cluster import SHARDS
from quota.redis_store import RedisStore
from quota.store import bucket_key
from tests.redis_cluster import Cluster, cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(3) as made:
        yield made


def tag(key: str) -> bytes:
    name = bucket_key(q().limit.name, (key,)).encode()
    return b"%02x" % (zlib.crc32(name) % SHARDS)


def keys_of(nodes: Cluster, master: int, prefix: str, count: int = 5) -> list[str]:
    """Keys whose buckets were given to a master."""
    named = (f"{prefix}{at}" for at in range(10_000))
    found = (key for key in named if nodes.master_of(key_slot(tag(key))) == master)
    return [next(found) for _ in range(count)]


def stored(url: str, budget: float = 1.0) -> RedisStore:
    return RedisStore(url + "?start=full", budget=budget, breaker=quick)


def test_each_bucket_is_kept_by_its_node_and_replicas_are_waited_for_where_asked(nodes: Cluster) -> None:
    async def main() -> None:
        store = stored(nodes.url)
        lessee = QuotaLessee(store, holder="one")
        grants = await asyncio.gather(*(get(lessee, q(3, 1, key=str(at))) for at in range(50)))
        assert all(grant.admitted and grant.remaining == 2 for grant in grants)
        assert (await get(lessee, q(3, 1, key="strict", strict=True))).admitted
        replica = nodes.nodes[3 + nodes.master_of(key_slot(tag("strict")))]
        assert any(b"@born" in name for name in nodes.say(replica, "KEYS", "*"))
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_a_node_that_hangs_holds_up_nobody_but_its_own_buckets(nodes: Cluster) -> None:
    async def main() -> None:
        store = stored(nodes.url, budget=0.2)
        lessee = QuotaLessee(store, holder="one")
        hanging, fine = keys_of(nodes, 0, "h"), keys_of(nodes, 1, "f")
        assert all([await admits(lessee, q(9, 1, key=key)) for key in (*hanging, *fine)])
        nodes.nodes[0].signal(signal.SIGSTOP)
        try:
            waits = []
            for _ in range(4):
                asked = [get(lessee, q(1, 1, key=f"{key}x")) for key in keys_of(nodes, 0, "n")]
                began = time.monotonic()
                grants = await asyncio.gather(*(get(lessee, q(9, 1, key=key)) for key in fine))
                waits.append(time.monotonic() - began)
                assert all(not grant.error for grant in grants)
                await asyncio.gather(*asked)
            assert min(waits) < 0.2, "they are not behind those that hang"
        finally:
            nodes.nodes[0].signal(signal.SIGCONT)
        await until(lambda: _answers(lessee, hanging[0]))
        await lessee.close()
        await store.close()

    asyncio.run(main())


async def _answers(lessee: QuotaLessee, key: str) -> bool:
    return not (await get(lessee, q(9, 1, key=key))).error


def test_a_slot_that_moves_is_followed_and_its_buckets_begin_empty(nodes: Cluster) -> None:
    async def main() -> None:
        store = stored(nodes.url)
        lessee = QuotaLessee(store, holder="one")
        (key,) = keys_of(nodes, 1, "m", 1)
        slot = key_slot(tag(key))
        assert await admits(lessee, q(5, 1, key=key))
        source, target = nodes.nodes[1], nodes.nodes[2]
        for node, *state in ((target, "IMPORTING", nodes.name(source)), (source, "MIGRATING", nodes.name(target))):
            nodes.say(node, "CLUSTER", "SETSLOT", slot, *state)
        moved = nodes.say(source, "CLUSTER", "GETKEYSINSLOT", slot, 100)
        assert moved
        nodes.say(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *moved)
        # All of it is at the other node, which is not its owner yet: the first says ASK. There it is another beginning.
        during = await get(lessee, q(5, 1, key=key))
        assert not during.error and not during.admitted
        for node in nodes.nodes[:3]:
            nodes.say(node, "CLUSTER", "SETSLOT", slot, "NODE", nodes.name(target))
        asked = store.asks
        after = await get(lessee, q(5, 1, key=key, cost=5))
        assert not after.error and store.asks >= asked  # MOVED, followed
        await until(lambda: admits(lessee, q(5, 1, key=key)))
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_a_master_that_dies_is_replaced_by_its_replica_with_empty_buckets(nodes: Cluster) -> None:
    async def main() -> None:
        store = stored(nodes.url, budget=0.3)
        lessee = QuotaLessee(store, holder="one")
        (key,) = keys_of(nodes, 0, "d", 1)
        (other,) = keys_of(nodes, 2, "o", 1)
        assert await admits(lessee, q(5, 1, key=key))
        nodes.nodes[0].kill()
        assert (await get(lessee, q(5, 1, key=key))).error
        assert await admits(lessee, q(5, 1, key=other))
        first = await until(lambda: _first_answer(lessee, key), 30)
        assert first == "refused", "its replica may not know what was spent last"
        await until(lambda: admits(lessee, q(5, 1, key=key)))
        await lessee.close()
        await store.close()

    asyncio.run(main())


async def _first_answer(lessee: QuotaLessee, key: str) -> str:
    grant = await get(lessee, q(5, 1, key=key))
    return "" if grant.error else "admitted" if grant.admitted else "refused"


def test_a_server_that_is_no_cluster_is_told_of() -> None:
    from tests import servers

    async def main(url: str) -> None:
        store = RedisStore(url.replace("redis://", "redis+cluster://").removesuffix("/0"), budget=1.0)
        lessee = QuotaLessee(store, holder="one")
        assert "cluster support disabled" in (await get(lessee, q())).error
        await lessee.close()
        await store.close()

    with servers.redis() as server:
        assert redis.Redis.from_url(server.url).ping()
        asyncio.run(main(server.url))

from __future__ import annotations

import asyncio

import redis
from quota_redis import admits, get, q, quick, until

from mesh.questions import Grant
from quota.lessee import QuotaLessee
from quota.redis_store import RedisStore
from tests import servers


def test_strict_limits_are_granted_only_when_the_replica_has_them() -> None:
    async def main(first: servers.Server, second: servers.Server) -> None:
        import signal

        admin = redis.Redis.from_url(second.url)
        admin.replicaof("127.0.0.1", first.port)
        await until(lambda: admin.info("replication")["master_link_status"] == "up")
        store = RedisStore(first.url + "?start=full", budget=1.0)
        lessee = QuotaLessee(store, holder="one")
        assert (await get(lessee, q(5, 1, strict=True))).admitted
        second.signal(signal.SIGSTOP)
        try:
            assert "replicas acknowledged" in (await get(lessee, q(5, 1, strict=True))).error
            assert (await get(lessee, q(5, 1, key="y"))).admitted
        finally:
            second.signal(signal.SIGCONT)
        await until(lambda: admits(lessee, q(5, 1, strict=True)))
        await lessee.close()
        await store.close()

    with servers.redis() as first, servers.redis() as second:
        asyncio.run(main(first, second))


def _is_master(admin: redis.Redis) -> bool:
    try:
        return bool(admin.info("replication")["role"] == "master")
    except redis.ConnectionError:  # a Sentinel ends the connections of a server that it turns round
        return False


def test_a_failover_by_sentinels_empties_the_buckets() -> None:
    async def main(first: servers.Server, second: servers.Server, port: int) -> None:
        admin = redis.Redis.from_url(second.url)
        admin.replicaof("127.0.0.1", first.port)
        await until(lambda: admin.info("replication")["master_link_status"] == "up")
        watcher = redis.Redis(port=port)
        await until(lambda: watcher.sentinel_master("main")["num-slaves"] == 1, 30)
        store = RedisStore(f"redis+sentinel://127.0.0.1:{port}/main?start=full", budget=0.5, breaker=quick)
        lessee = QuotaLessee(store, holder="one")
        assert (await get(lessee, q(5, 1))).admitted
        await until(lambda: admin.exists("tollhouse:quota:{quota}@born"))
        first.kill()
        await until(lambda: _is_master(admin), 30)
        grants: list[Grant] = []

        async def answered() -> bool:
            grants.append(await get(lessee, q(5, 1)))
            return not grants[-1].error

        await until(answered, 30)
        assert not grants[-1].admitted
        await lessee.close()
        await store.close()

    port = servers.free_port()
    with servers.redis() as first, servers.redis() as second:
        config = first.folder / "sentinel.conf"
        config.write_text(
            f"port {port}\nsentinel monitor main 127.0.0.1 {first.port} 1\nsentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 3000\n"
        )
        watch = servers.Server("sentinel", port, [servers.redis_program(), str(config), "--sentinel"], "")
        with servers.running(watch):
            asyncio.run(main(first, second, port))

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import redis
from quota_redis import admits, errs, get, q, quick, until

from mesh.questions import Grant
from quota.lessee import QuotaLessee
from quota.redis_address import read_url
from quota.redis_store import RedisStore
from quota.store import bucket_key
from tests import servers


@pytest.fixture
def server() -> Iterator[servers.Server]:
    with servers.redis() as one:
        yield one


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("redis://u:geheim@h:1/2", "single", "redis://h:1/2"),
        ("unix:///run/redis.sock?db=1", "single", "unix:///run/redis.sock"),
        ("rediss://h", "single", "rediss://h"),
        ("redis+sentinel://:geheim@a:1,b,[::1]:3/main/4?sentinel_password=geheim", "sentinel", "redis+sentinel://a:1,b:26379,::1:3/main/4"),
        ("rediss+cluster://u:geheim@a,b:2", "cluster", "rediss+cluster://a:6379,b:2"),
    ],
)
def test_addresses(url: str, kind: str, shown: str) -> None:
    address = read_url(url)
    assert (address.kind, address.shown) == (kind, shown)
    assert "geheim" not in repr(address)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h", "not a Redis address"),
        ("redis://h?start=half", "use empty or full"),
        ("redis://h?socket_timeout=x", "redis://"),
        ("redis+sentinel://h:1", "service's name"),
        ("redis+cluster://h/3", "no databases"),
        ("redis+cluster://h:1,:2", "not a host"),
        ("redis+cluster://h?x=1", "not an option"),
    ],
)
def test_addresses_that_are_wrong(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_url(url)


def test_bucket_keys_are_of_bounded_length_tell_no_secrets_and_are_all_different() -> None:
    parts = [
        ("a", ()),
        ("a", ("",)),
        ("a", ("b", "c")),
        ("a", ("b,c",)),
        ("a", ("bc", "")),
        ("a", ("", "bc")),
        ("ab", ("c",)),
        ("{a}", ("\udcff" * 9999,)),
    ]
    keys = [bucket_key(name, values) for name, values in parts]
    assert len(set(keys)) == len(keys) and all(len(key) < 140 for key in keys)
    assert "}" not in keys[-1] and "secret" not in bucket_key("a", ("secret",))


def test_several_gateways_never_admit_more_than_the_limit(server: servers.Server) -> None:
    async def main() -> None:
        stores = [RedisStore(server.url + "?start=full") for _ in range(4)]
        lessees = [QuotaLessee(store, holder=f"gateway-{at}", sharers=4) for at, store in enumerate(stores)]
        admitted: dict[int, list[float]] = {8: [], 400: []}

        async def client(lessee: QuotaLessee, burst: int, tokens: int) -> None:
            while time.monotonic() < end:
                grant = await get(lessee, q(burst, tokens, key=str(burst)))
                assert not grant.error
                if grant.admitted:
                    admitted[burst].append(time.monotonic())
                await asyncio.sleep(0)

        began = time.monotonic()
        end = began + 3.0
        await asyncio.gather(
            *(client(lessee, burst, tokens) for lessee in lessees for burst, tokens in ((8, 4), (400, 200)) for _ in range(3))
        )
        took = time.monotonic() - began
        for burst, rate in ((8, 4), (400, 200)):
            assert 0.5 * burst + 0.9 * rate * 3 <= len(admitted[burst]) <= burst + rate * took + 1
        assert sum(lessee.asks for lessee in lessees) < 3000
        for lessee, store in zip(lessees, stores, strict=True):
            await lessee.close()
            await store.close()

    asyncio.run(main())


def test_closing_gives_the_tokens_back_to_redis(server: servers.Server) -> None:
    async def main() -> None:
        store = RedisStore(server.url + "?start=full")
        first = QuotaLessee(store, holder="one")
        for _ in range(20):
            assert (await get(first, q(100, 1))).admitted
            await asyncio.sleep(0.01)
        assert first.state()["tokens"] > 0
        await first.close()
        second = QuotaLessee(store, holder="two")
        assert (await get(second, q(100, 1, cost=79))).admitted
        await second.close()
        await store.close()

    asyncio.run(main())


def test_after_an_empty_restart_buckets_are_empty_and_fill(server: servers.Server) -> None:
    async def main() -> None:
        store = RedisStore(server.url, breaker=quick)
        other = RedisStore(server.url + "?start=full", breaker=quick)
        lessee, newcomer = QuotaLessee(store, holder="one"), QuotaLessee(other, holder="two")
        assert (await get(newcomer, q(5, 50))).admitted
        server.kill()
        await until(lambda: errs(lessee, q(5, 50)))
        server.start()
        grants: list[Grant] = []

        async def answered() -> bool:
            grants.append(await get(lessee, q(5, 50)))
            return not grants[-1].error

        await until(answered)
        assert not grants[-1].admitted
        began = time.monotonic()
        await until(lambda: admits(lessee, q(5, 50)))
        assert time.monotonic() - began > 2.0  # tokens of before may still be spent for the time of a lease
        for part in (lessee, newcomer, store, other):
            await part.close()

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_may_evict_is_refused(policy: str) -> None:
    async def main(url: str) -> None:
        store = RedisStore(url + "?start=full")
        lessee = QuotaLessee(store, holder="one")
        grant = await get(lessee, q())
        assert not grant.admitted
        assert f"maxmemory-policy {policy}" in grant.error and "set it to noeviction" in grant.error
        assert policy in store.state()["lastError"]
        await lessee.close()
        await store.close()

    with servers.redis("--maxmemory-policy", policy) as server:
        asyncio.run(main(server.url))


@pytest.mark.parametrize(("mode", "admitted", "error"), [("Allow", 12, True), ("Deny", 0, True), ("Local", 10, False)])
def test_redis_gone(mode: str, admitted: int, error: bool) -> None:
    async def main() -> None:
        store = RedisStore(f"redis://127.0.0.1:{servers.free_port()}", budget=0.2)
        lessee = QuotaLessee(store, holder="one")
        began = time.monotonic()
        grants = [await get(lessee, q(10, 1, failure_mode=mode)) for _ in range(12)]
        assert time.monotonic() - began < 1.5
        assert sum(grant.admitted for grant in grants) == admitted
        assert all(bool(grant.error) is error for grant in grants)
        assert store.state()["breaker"] == "open"
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_a_frozen_redis_holds_nobody_longer_than_the_budget(server: servers.Server) -> None:
    async def main() -> None:
        import signal

        store = RedisStore(server.url + "?start=full", budget=0.2, breaker=quick)
        lessee = QuotaLessee(store, holder="one")
        assert (await get(lessee, q(5, 1))).admitted
        server.signal(signal.SIGSTOP)
        try:
            for _ in range(8):
                began = time.monotonic()
                grant = await get(lessee, q(5, 1))
                assert grant.error and time.monotonic() - began < 0.6
        finally:
            server.signal(signal.SIGCONT)
        await until(lambda: admits(lessee, q(5, 1)))
        looked: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        lessee.peek(q(5, 1), looked.set_result)
        assert (await looked).remaining <= 3  # what frozen asks did is undone, and not more than that
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_the_script_is_loaded_again_when_redis_has_forgotten_it(server: servers.Server) -> None:
    async def main() -> None:
        store = RedisStore(server.url + "?start=full")
        lessee = QuotaLessee(store, holder="one")
        assert (await get(lessee, q(5, 1))).admitted
        redis.Redis.from_url(server.url).script_flush()
        assert (await get(lessee, q(5, 1))).remaining == 3
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_a_flushed_redis_does_not_hand_out_full_buckets(server: servers.Server) -> None:
    async def main() -> None:
        store = RedisStore(server.url)
        redis.Redis.from_url(server.url).flushall()
        lessee = QuotaLessee(store, holder="one")
        grants = [await get(lessee, q(5, 1, key=str(at))) for at in range(5)]
        assert not any(grant.admitted or grant.error for grant in grants)
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_the_number_of_pending_asks_is_bounded(server: servers.Server) -> None:
    async def main() -> None:
        store = RedisStore(server.url + "?start=full", max_pending=10)
        lessee = QuotaLessee(store, holder="one")
        grants = await asyncio.gather(*(get(lessee, q(key=str(at))) for at in range(30)))
        assert sum("too many asks" in grant.error for grant in grants) == 20
        assert sum(grant.admitted for grant in grants) == 10
        assert store.state()["batches"] == 1  # what is asked in one turn goes out together
        await lessee.close()
        await store.close()

    asyncio.run(main())

"""A real Redis that is there and can't, or won't: that becomes clear words, a metric and one line in the log, and admits nobody."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import redis
from quota_redis import admits, get, q, quick, until

from mesh.questions import Grant
from quota.lessee import QuotaLessee
from quota.redis_errors import trouble
from quota.redis_store import RedisStore
from quota.store import bucket_key
from telemetry.record import Telemetry
from tests import servers

LAST = q().limit.name
SERVERS = ("redis-server", "redis-server-8.2", "valkey-server-9.1")
"""Before Redis 7 scripts word their errors otherwise."""


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    with servers.redis(program=request.param) as one:
        yield one


@pytest.fixture
def client(server: servers.Server) -> Iterator[redis.Redis]:
    made = redis.Redis.from_url(server.url)
    made.flushall()
    yield made
    made.config_set("maxmemory", 0)
    made.close()


def bucket(key: str) -> str:
    return "tollhouse:quota:{quota}:" + bucket_key(LAST, (key,))


Steps = Callable[[QuotaLessee, RedisStore], Any]


def story(url: str, steps: Steps, **more: Any) -> None:
    async def main() -> None:
        telemetry = Telemetry()
        store = RedisStore(url, breaker=quick, **more)
        lessee = QuotaLessee(store, holder="one", telemetry=telemetry)
        try:
            await steps(lessee, store)
        finally:
            await lessee.close()
            await store.close()

    asyncio.run(main())


async def refused(lessee: QuotaLessee, key: str, *words: str) -> Grant:
    grant = await get(lessee, q(5, 1, key=key))
    assert not grant.admitted
    assert all(word in grant.error for word in words), grant.error
    return grant


@pytest.mark.parametrize("what", ["list", "text", "array"])
def test_something_else_under_the_key_of_a_bucket(server: servers.Server, client: redis.Redis, what: str, caplog: Any) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        key = bucket("x")
        if what == "list":
            client.rpush(key, "a")
        else:
            client.set(key, b"\xc1not msgpack" if what == "text" else msgspec.msgpack.encode([1, "two", 3, "four", 5]))
        for _ in range(5):
            await refused(lessee, "x", key, "no bucket", "delete it")
        assert await admits(lessee, q(5, 1, key="y")), "others are not touched by it"
        assert store.state()["breaker"] == "closed"
        assert lessee.unanswered == {"wrong-type": 5}
        client.delete(key)
        assert not (await get(lessee, q(5, 1, key="x"))).error

    with caplog.at_level(logging.WARNING):
        story(server.url + "?start=full", steps)
    assert caplog.text.count("cannot be asked") == 1


def test_out_of_memory(server: servers.Server, client: redis.Redis, caplog: Any) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        assert await admits(lessee, q(5, 1, key="x"))
        client.config_set("maxmemory", 1)
        for _ in range(5):
            await refused(lessee, "x", "Redis")
        assert "out of memory" in store.state()["lastError"] and store.state()["breaker"] == "open"
        assert lessee.unanswered["out-of-memory"] == 5
        client.config_set("maxmemory", 0)
        await until(lambda: admits(lessee, q(5, 1, key="x", cost=4)))
        assert not await admits(lessee, q(5, 1, key="x", cost=5)), "nothing was made good that was not spent"

    with caplog.at_level(logging.WARNING):
        story(server.url + "?start=full", steps)
    assert caplog.text.count("cannot be asked") == 1


def test_too_few_replicas(server: servers.Server, client: redis.Redis) -> None:
    if client.info("server")["redis_version"].startswith("6."):
        assert client.config_set("min-replicas-to-write", 1) and client.eval("return redis.call('SET', 'a', 'b')", 0)
        client.config_set("min-replicas-to-write", 0)
        return  # scripts may write there all the same, as docs/quota.md says

    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        client.config_set("min-replicas-to-write", 1)
        try:
            await refused(lessee, "x", "min-replicas-to-write")
            assert lessee.unanswered == {"replicas": 1}
        finally:
            client.config_set("min-replicas-to-write", 0)
        await until(lambda: admits(lessee, q(5, 1)))

    story(server.url + "?start=full", steps)


def test_a_replica(server: servers.Server, client: redis.Redis) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        assert await admits(lessee, q(5, 1, key="x"))
        client.replicaof("127.0.0.1", servers.free_port())
        try:
            for _ in range(4):
                await refused(lessee, "x", "replica", "name the master")
            assert store.state()["breaker"] == "open"
        finally:
            client.replicaof("NO", "ONE")
        await until(lambda: admits(lessee, q(5, 1, key="x")))

    story(server.url + "?start=full", steps)


def _spin(server: servers.Server) -> None:
    connection = redis.Connection(port=server.port, socket_timeout=60, protocol=2)
    connection.send_command("EVAL", "while true do end", 0)
    with pytest.raises(redis.ResponseError, match="killed"):
        connection.read_response()
    connection.disconnect()


def _killed(client: redis.Redis) -> bool:
    try:
        return bool(client.script_kill())
    except redis.ResponseError:  # it has not begun
        return False


def test_somebodys_script_that_does_not_end(server: servers.Server, client: redis.Redis) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        assert await admits(lessee, q(5, 1, key="x"))
        client.config_set("lua-time-limit", 30)
        busy = threading.Thread(target=_spin, args=(server,))
        busy.start()
        try:

            async def told() -> bool:
                began = time.monotonic()
                grant = await get(lessee, q(5, 1, key="x", timeout=0.02))
                assert time.monotonic() - began < 0.5
                return "SCRIPT KILL" in grant.error

            await until(told)
        finally:
            await until(lambda: _killed(client))
            busy.join()
        await until(lambda: admits(lessee, q(5, 1, key="x")))

    story(server.url + "?start=full", steps)


def test_a_redis_that_can_not_save(server: servers.Server, client: redis.Redis) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        (server.folder / "dump.rdb").mkdir(exist_ok=True)  # where it would save
        client.config_set("save", "900 1")
        try:
            client.bgsave()
            await until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            await refused(lessee, "x", "MISCONF", "its log says why")
        finally:
            client.config_set("save", "")
        await until(lambda: admits(lessee, q(5, 1, key="x")))

    story(server.url + "?start=full", steps)


def test_a_redis_that_loads_its_data(tmp_path: Any) -> None:
    async def steps(server: servers.Server, lessee: QuotaLessee) -> None:
        client = redis.Redis.from_url(server.url)
        assert await admits(lessee, q(5, 1, key="x"))
        for at in range(200):
            client.set(f"filler{at}", secrets.token_bytes(1000))  # it looks up between them
        client.save()
        server.kill()
        server.command += ["--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024"]
        server.start()
        await until(lambda: _loads(lessee))
        del server.command[-4:]
        grants: list[Grant] = []

        async def answered() -> bool:
            grants.append(await get(lessee, q(5, 1, key="x")))
            return not grants[-1].error

        await until(answered, 30)
        assert not grants[-1].admitted, "it began anew"

    with servers.redis("--dir", str(tmp_path), program="redis-server-8.2") as server:
        story(server.url + "?start=full", lambda lessee, store: steps(server, lessee))


async def _loads(lessee: QuotaLessee) -> bool:
    grant = await get(lessee, q(5, 1, key="x"))
    assert not grant.admitted
    return "loading" in grant.error


@pytest.mark.parametrize(
    ("rights", "login", "told"),
    [
        (("~tollhouse:quota:*", "+get", "+set", "+time", "+info", "+client", "+hello", "+select", "+ping"), "gate:secret", "denies"),
        (("~other:*", "+@all"), "gate:secret", "denies"),
        (("~tollhouse:quota:*", "+evalsha", "+eval", "+get", "+set", "+info", "+client", "+select"), "gate:secret", "denies"),
        (("+@all", "~*"), "gate:wrong", "denies"),
    ],
)
def test_a_user_without_the_rights(
    server: servers.Server, client: redis.Redis, rights: tuple[str, ...], login: str, told: str, caplog: Any
) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        await refused(lessee, "x", told, "docs/quota.md")
        assert lessee.unanswered == {"denied": 1}

    client.execute_command("ACL", "SETUSER", "gate", "reset", "on", ">secret", *rights)
    with caplog.at_level(logging.WARNING):
        story(server.url.replace("redis://", f"redis://{login}@"), steps)
    assert "wrong" not in caplog.text.replace("went wrong", "") and "secret" not in caplog.text


def test_the_rights_that_the_documentation_gives_are_enough(server: servers.Server, client: redis.Redis) -> None:
    async def steps(lessee: QuotaLessee, store: RedisStore) -> None:
        assert await admits(lessee, q(5, 1, key="x"))
        assert await admits(lessee, q(5, 1, key="y", strict=True))

    from pathlib import Path

    page = (Path(__file__).resolve().parents[2] / "docs" / "quota.md").read_text()
    command = page.split("`ACL SETUSER tollhouse on >… ")[1].split("`")[0].split()
    client.execute_command("ACL", "SETUSER", "gate", "reset", "on", ">secret", *command)
    story(server.url.replace("redis://", "redis://gate:secret@") + "?start=full", steps)


def test_what_is_no_error_of_redis_is_told_as_it_is() -> None:
    assert trouble(ValueError("odd")).reason == "ValueError: odd"
    assert trouble(OSError("refused")).kind == "connection"
    assert trouble(redis.ResponseError("ERR unknown command 'FOO'")) == trouble(redis.ResponseError("ERR unknown command 'FOO'"))
    assert not trouble(redis.exceptions.TryAgainError("TRYAGAIN Multiple keys"), b"k").everyone

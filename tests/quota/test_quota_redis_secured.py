"""Redis behind TLS: a single server, and a cluster whose nodes are found by their names. And Sentinels that hang."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from quota_redis import admits, get, q, quick, until

from identity.ca import Authority, write_identity
from quota.lessee import QuotaLessee
from quota.redis_address import read_url
from quota.redis_store import RedisStore
from tests import servers
from tests.redis_cluster import cluster_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    authority = Authority.create("mesh.example")
    for name in ("server", "client"):
        identity = authority.issue(f"spiffe://mesh.example/ns/redis/sa/{name}", dns=["localhost"], ip=["127.0.0.1"])
        write_identity(identity, tmp_path_factory.getbasetemp() / "tls" / name)
    return tmp_path_factory.getbasetemp() / "tls"


def tls(folder: Path, port: int) -> list[str]:
    """Redis' arguments: TLS only, and who has no certificate of ours is sent away."""
    own = folder / "server"
    files = [f"--tls-{kind}-file={own / name}" for kind, name in (("cert", "cert.pem"), ("key", "key.pem"), ("ca-cert", "ca.pem"))]
    pairs = [part for each in files for part in each.split("=", 1)]
    return [*pairs, "--tls-port", str(port), "--port", "0", "--tls-cluster", "yes"]


def query(folder: Path, own: bool = True) -> str:
    client = folder / "client"
    mine = f"&ssl_certfile={client / 'cert.pem'}&ssl_keyfile={client / 'key.pem'}" if own else ""
    return f"?start=full&ssl_ca_certs={client / 'ca.pem'}{mine}"


@pytest.fixture(scope="module")
def secured(folder: Path) -> Iterator[int]:
    port = cluster_port()
    more = ["--cluster-enabled", "yes", "--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname"]
    with servers.redis(*tls(folder, port), *more, port=port, program="redis-server-7.0"):
        client = folder / "client"
        files = {"ssl_ca_certs": client / "ca.pem", "ssl_certfile": client / "cert.pem", "ssl_keyfile": client / "key.pem"}
        admin = redis.Redis(port=port, ssl=True, **{name: str(path) for name, path in files.items()})
        admin.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        servers.wait_for("the cluster", lambda: b"cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"))
        yield port


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
@pytest.mark.parametrize("own", [True, False])
def test_tls(secured: int, folder: Path, scheme: str, own: bool) -> None:
    async def main() -> None:
        store = RedisStore(f"{scheme}://localhost:{secured}{query(folder, own)}", budget=1.0)
        lessee = QuotaLessee(store, holder="one")
        # A single server's keys are of one slot: a cluster of one has it, too.
        grant = await get(lessee, q(5, 1, key=scheme))
        assert grant.admitted is own, grant.error
        assert own or "certificate required" in grant.error.lower() or "connection" in grant.error.lower(), grant.error
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_a_certificate_of_somebody_else_is_not_believed(secured: int, folder: Path, tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "ca.pem").write_bytes(Authority.create("other.example").bundle)
        store = RedisStore(f"rediss+cluster://localhost:{secured}?ssl_ca_certs={tmp_path / 'ca.pem'}", budget=1.0)
        lessee = QuotaLessee(store, holder="one")
        assert "certificate verify failed" in (await get(lessee, q(5, 1))).error
        await lessee.close()
        await store.close()

    asyncio.run(main())


def test_files_of_tls_are_for_tls_only() -> None:
    assert read_url("rediss+sentinel://h/main?ssl_ca_certs=/ca.pem").files == {"ssl_ca_certs": "/ca.pem"}
    with pytest.raises(ValueError, match="ssl_ca_certs: not an option of a sentinel address"):
        read_url("redis+sentinel://h/main?ssl_ca_certs=/ca.pem")


def test_sentinels_that_hang_are_not_waited_for() -> None:
    async def main(master: servers.Server, port: int, deaf: int) -> None:
        watcher = redis.Redis(port=port)
        await until(lambda: watcher.sentinel_master("main")["num-slaves"] == 0)
        url = f"redis+sentinel://127.0.0.1:{deaf},127.0.0.1:{port}/main?start=full"
        store = RedisStore(url, budget=0.1, breaker=quick)
        lessee = QuotaLessee(store, holder="one")
        await until(lambda: admits(lessee, q(5, 1)))
        await lessee.close()
        await store.close()

    port = servers.free_port()
    with servers.redis() as master, socket.create_server(("127.0.0.1", 0)) as deaf:
        config = master.folder / "sentinel.conf"
        config.write_text(f"port {port}\nsentinel monitor main 127.0.0.1 {master.port} 1\n")
        with servers.running(servers.Server("sentinel", port, [servers.redis_program(), str(config), "--sentinel"], "")):
            asyncio.run(main(master, port, deaf.getsockname()[1]))

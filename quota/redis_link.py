"""Connections to Redis: a single server, a master that Sentinels name, or a cluster. Carries batches of asks out; decides nothing.

Addresses: `redis://[user:password@]host:port/db`, `rediss://` (TLS), `unix:///path?db=0`,
`redis+sentinel://[user:password@]host:port,host:port/service[/db][?sentinel_password=...]` (`rediss+sentinel://`: TLS to the master and the
Sentinels) and `redis+cluster://[user:password@]host:port,host:port` (`rediss+cluster://`). Any of them may say `?start=full` (see
`quota.redis_store`). Each new connection first makes sure that the server doesn't evict keys.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import msgspec
import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from quota.script import DIGEST, SCRIPT

SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


class Refused(RedisError):
    """The server is set up in a way that a quota can't be kept in."""


class Call(msgspec.Struct, frozen=True):
    """One ask, on its way."""

    key: bytes
    """The bucket."""
    record: bytes
    """The store's beginning, in the bucket's slot."""
    ask: bytes
    """`Ask` as msgpack."""
    strict: bool = False


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """A Redis URL, read."""

    kind: Literal["single", "sentinel", "cluster"]
    url: str = ""
    """For redis-py, of a single server."""
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None
    tls: bool = False
    start: Literal["empty", "full"] = "empty"

    def __repr__(self) -> str:
        return f"<Address {self.kind} {self.shown}>"

    @property
    def shown(self) -> str:
        """For people: without secrets."""
        if self.kind == "single":
            parts = urlsplit(self.url)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        scheme = ("rediss+" if self.tls else "redis+") + self.kind
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{scheme}://{hosts}" + (f"/{self.service}/{self.db}" if self.service else "")


def read_url(url: str) -> Address:
    """Reads a Redis URL (see the module). Raises ValueError that says what is wrong; never with the password in it."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise ValueError(f"{parts.scheme or 'nothing'}:// is not a Redis address; write for example redis://127.0.0.1:6379/0 ({known})")
    options = dict(parse_qsl(parts.query))
    start = options.pop("start", "empty")
    if start not in {"empty", "full"}:
        raise ValueError(f"start={start}: use empty or full")
    begin = cast(Literal["empty", "full"], start)
    tls = parts.scheme.startswith("rediss")
    if "+" not in parts.scheme:
        clean = f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{urlencode(options)}" if options else "")
        try:
            aioredis.connection.parse_url(clean)
        except ValueError as problem:
            raise ValueError(f"{parts.scheme}:// address: {problem}") from None
        return Address(kind="single", url=clean, tls=tls, start=begin)
    login, _, where = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    kind: Literal["sentinel", "cluster"] = "sentinel" if parts.scheme.endswith("sentinel") else "cluster"
    path = [part for part in parts.path.split("/") if part]
    if kind == "sentinel" and not (len(path) == 1 or (len(path) == 2 and path[1].isdigit())):
        raise ValueError("a Sentinel address ends with the service's name, and perhaps a database: redis+sentinel://host:26379/service/0")
    if kind == "cluster" and path not in ([], ["0"]):
        raise ValueError("a cluster has no databases: redis+cluster://host:6379")
    secret = options.pop("sentinel_password", None)
    if options:
        raise ValueError(f"{', '.join(options)}: not an option of a {kind} address")
    return Address(
        kind=kind,
        hosts=tuple(_host(item, 26379 if kind == "sentinel" else 6379) for item in where.split(",")),
        service=unquote(path[0]) if kind == "sentinel" else "",
        db=int(path[1]) if len(path) == 2 else 0,
        username=unquote(username) or None,
        password=unquote(password) or None,
        sentinel_password=secret,
        tls=tls,
        start=begin,
    )


def _host(text: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?", text)
    if not found:
        raise ValueError(f"{text or 'nothing'}: not a host or host:port")
    return found[1].strip("[]"), int(found[2] or port)


class Link(Protocol):
    """Carries out batches."""

    async def run(self, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """The answers, in order. Raises `RedisError` or `OSError` when the server could not be asked. Cancelling it is safe."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...


def link(address: Address, budget: float) -> Link:
    """The connections to `address`; connecting and each answer may take `budget` seconds."""
    if address.kind == "cluster":
        return ClusterLink(address, budget)
    return ServerLink(address, budget)


class ServerLink:
    """One server, or the master that Sentinels name."""

    def __init__(self, address: Address, budget: float) -> None:
        self._start = address.start.encode()
        self._budget = budget
        self._replicas: dict[AbstractConnection, int] = {}
        """The most replicas that were seen on a connection: strict asks wait for as many."""
        options: dict[str, Any] = {
            "socket_timeout": None,
            "socket_connect_timeout": budget,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "redis_connect_func": self._connected,
        }
        self._sentinel: Sentinel | None = None
        self._pool: ConnectionPool
        if address.kind == "single":
            self._pool = ConnectionPool.from_url(address.url, **options)
        else:
            secured: dict[str, Any] = {"ssl": True} if address.tls else {}
            asking = {"socket_timeout": budget, "socket_connect_timeout": budget, "password": address.sentinel_password, **secured}
            self._sentinel = Sentinel(list(address.hosts), sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
            login: dict[str, Any] = {"db": address.db, "username": address.username, "password": address.password}
            self._pool = self._sentinel.master_for(address.service, **options, **login, **secured).connection_pool

    async def _connected(self, connection: AbstractConnection) -> None:
        await connection.on_connect()
        await connection.send_command("INFO", "memory")
        check_policy(await connection.read_response())
        self._replicas[connection] = 0

    async def run(self, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """See `Link`. A connection that turns out to be dead is replaced once: asks may be repeated."""
        try:
            return await self._attempt(calls)
        except (aioredis.ConnectionError, OSError):
            return await self._attempt(calls)

    async def _attempt(self, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        connection: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            answers = await self._exchange(connection, [_command(b"EVALSHA", DIGEST, call, self._start) for call in calls])
            missing = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            if missing:
                again = await self._exchange(connection, [_command(b"EVAL", SCRIPT, calls[at], self._start) for at in missing])
                for at, answer in zip(missing, again, strict=True):
                    answers[at] = answer
            if any(call.strict for call in calls):
                await self._acknowledge(connection, calls, answers)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        else:
            return answers
        finally:
            await self._pool.release(connection)

    async def _acknowledge(self, connection: AbstractConnection, calls: Sequence[Call], answers: list[bytes | ResponseError]) -> None:
        """Waits until the replicas that are known have what was done; strict asks fail when they do not in time."""
        (info,) = await self._exchange(connection, [(b"INFO", b"replication")])
        if isinstance(info, ResponseError):
            raise info
        known = max(self._replicas.get(connection, 0), int(_field(info, b"connected_slaves") or 0))
        self._replicas[connection] = known
        if not known:
            return
        patience = str(max(1, int(self._budget * 500))).encode()
        (acknowledged,) = await self._exchange(connection, [(b"WAIT", str(known).encode(), patience)])
        if isinstance(acknowledged, ResponseError):
            raise acknowledged
        if int(acknowledged) < known:
            for at, call in enumerate(calls):
                if call.strict:
                    answers[at] = ResponseError(f"only {int(acknowledged)} of {known} replicas acknowledged")

    async def _exchange(self, connection: AbstractConnection, commands: Sequence[tuple[bytes, ...]]) -> list[bytes | ResponseError]:
        await connection.send_packed_command(connection.pack_commands(commands))
        answers: list[bytes | ResponseError] = []
        for _ in commands:
            try:
                answers.append(await connection.read_response())
            except ResponseError as problem:
                answers.append(problem)
        return answers

    async def close(self) -> None:
        """See `Link`."""
        await self._pool.disconnect()
        if self._sentinel is not None:
            for sentinel in self._sentinel.sentinels:
                await sentinel.aclose()


class ClusterLink:
    """A cluster: each ask goes to the node that has the bucket."""

    def __init__(self, address: Address, budget: float) -> None:
        self._start = address.start.encode()
        nodes = [aioredis.cluster.ClusterNode(host, port) for host, port in address.hosts]
        self._client = aioredis.RedisCluster(
            startup_nodes=nodes,
            username=address.username,
            password=address.password,
            ssl=address.tls,
            socket_timeout=budget,
            socket_connect_timeout=budget,
            protocol=2,
        )
        self._checked: frozenset[str] = frozenset()

    async def run(self, calls: Sequence[Call]) -> list[bytes | ResponseError]:
        """See `Link`."""
        await self._client.initialize()
        nodes = frozenset(node.name for node in self._client.get_primaries())
        if nodes != self._checked:
            for node in self._client.get_primaries():
                policy = await self._client.execute_command("INFO", "memory", target_nodes=node)
                text = policy if isinstance(policy, dict) else next(iter(policy.values()), {})
                _check_policy(str(text.get("maxmemory_policy", "")))
            self._checked = nodes
        results = await asyncio.gather(*(self._one(call) for call in calls), return_exceptions=True)
        answers: list[bytes | ResponseError] = []
        for result in results:
            if isinstance(result, bytes | ResponseError):
                answers.append(result)
            elif isinstance(result, RedisError | OSError):
                answers.append(ResponseError(str(result)))
            else:
                raise result
        if answers and all(isinstance(answer, ResponseError) for answer in answers):
            raise cast(ResponseError, answers[0])
        return answers

    async def _one(self, call: Call) -> bytes:
        if call.strict:
            raise ResponseError("strict limits need a single Redis or Sentinel: WAIT is not available over a cluster")
        rest = (call.key, call.record, call.ask, self._start)
        try:
            return cast(bytes, await self._client.execute_command("EVALSHA", DIGEST.decode(), 2, *rest))
        except NoScriptError:
            return cast(bytes, await self._client.execute_command("EVAL", SCRIPT, 2, *rest))

    async def close(self) -> None:
        """See `Link`."""
        await self._client.aclose()


def _command(name: bytes, script: bytes, call: Call, start: bytes) -> tuple[bytes, ...]:
    return (name, script, b"2", call.key, call.record, call.ask, start)


def check_policy(info: bytes) -> None:
    """Raises `Refused` when a server with this `INFO memory` may evict keys: a bucket that is gone is a full one."""
    _check_policy(_field(info, b"maxmemory_policy").decode())


def _check_policy(policy: str) -> None:
    if policy != "noeviction":
        raise Refused(
            f"Redis has maxmemory-policy {policy or 'unknown'}: it may drop buckets, and a bucket that was dropped is full again; "
            "set it to noeviction"
        )


def _field(info: bytes, name: bytes) -> bytes:
    for line in info.splitlines():
        key, _, value = line.partition(b":")
        if key == name:
            return value.strip()
    return b""

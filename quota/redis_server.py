"""One Redis server: its connections, and batches of asks over them. Decides nothing.

Connections are made in the background, with a patience of their own: an ask waits for one no longer than it may, but a server that is some
way off, behind TLS, or found by way of Sentinels of which some are dead, is reached all the same. A connection on which an answer did not
come in time is thrown away: what comes over it later belongs to nobody. Each new one first makes sure that the server doesn't evict keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, Connection, ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, NoScriptError, ReadOnlyError, RedisError, ResponseError

from quota.redis_address import Address
from quota.script import DIGEST, SCRIPT

PATIENCE: Final = 2.0
"""Seconds that making a connection may take, and asking where to."""
Host = tuple[str, int]
_ELSEWHERE: Final = (ReadOnlyError, ClusterDownError)
"""Answers after which the address is looked up anew: another server may be the master."""


class Refused(RedisError):
    """The server is set up in a way that a quota can't be kept in."""


class NotAcknowledged(ResponseError):
    """A strict ask that the replicas do not have yet."""


class Call(msgspec.Struct, frozen=True):
    """One ask, on its way."""

    key: bytes
    """The bucket."""
    record: bytes
    """The store's beginning, in the bucket's slot."""
    ask: bytes
    """`Ask` or `SlotAsk` as msgpack."""
    strict: bool = False
    slots: bool = False
    """Whether it is for slots: the answer is a `SlotReply`."""


class Line:
    """A connection that is ready."""

    __slots__ = ("connection", "replicas")

    def __init__(self, connection: AbstractConnection) -> None:
        self.connection = connection
        self.replicas = 0
        """The most that were seen on it: strict asks wait for as many."""

    async def exchange(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any]:
        """Sends commands and reads their answers, in order; an error that the server gives is one."""
        await self.connection.send_packed_command(self.connection.pack_commands(commands))
        answers: list[Any] = []
        for _ in commands:
            try:
                answers.append(await self.connection.read_response())
            except ResponseError as problem:
                answers.append(problem)
        return answers

    async def usable(self) -> bool:
        """Whether the other end has neither closed it nor said what nobody asked for."""
        try:
            return self.connection.is_connected and not await self.connection.can_read()
        except (RedisError, OSError):
            return False

    async def close(self) -> None:
        """Ends it without a word."""
        with contextlib.suppress(RedisError, OSError):
            await self.connection.disconnect(nowait=True)


class Server:
    """Carries batches of asks out on one server. It belongs to one event loop."""

    def __init__(self, make: Callable[[], Awaitable[AbstractConnection]], start: str, budget: float) -> None:
        """`make` gives a connection that is not connected yet; `start` as in `Address`; `budget`: seconds that an ask may take."""
        self._make = make
        self._start = start.encode()
        self._budget = budget
        self._idle: list[Line] = []
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, calls: Sequence[Call], *, asking: bool = False) -> list[bytes | ResponseError]:
        """The answers, in order. Raises `RedisError` or `OSError` when the server could not be asked. Cancelling it is safe.

        A connection that turns out to be dead is replaced once: asks may be repeated. `asking`: what this node of a cluster is about to be
        given by another counts as its own."""
        try:
            return await self._attempt(calls, asking)
        except (aioredis.ConnectionError, OSError):
            return await self._attempt(calls, asking)

    async def look(self, *command: bytes) -> Any:
        """The answer to one command that changes nothing. Raises as `run` does, and what the server gives as an error."""
        line = await self._take()
        try:
            (answer,) = await line.exchange([command])
        except BaseException:
            await line.close()
            raise
        self._idle.append(line)
        if isinstance(answer, ResponseError):
            raise answer
        return answer

    async def _attempt(self, calls: Sequence[Call], asking: bool) -> list[bytes | ResponseError]:
        line = await self._take()
        try:
            answers = await self._evaluate(line, calls, asking)
            if any(call.strict for call in calls):
                await self._acknowledge(line, calls, answers)
        except BaseException:
            await line.close()
            raise
        if self._closed or any(isinstance(answer, _ELSEWHERE) for answer in answers):
            await line.close()
        else:
            self._idle.append(line)
        return answers

    async def _evaluate(self, line: Line, calls: Sequence[Call], asking: bool) -> list[bytes | ResponseError]:
        answers = await self._send(line, [(b"EVALSHA", DIGEST, call) for call in calls], asking)
        missing = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if missing:  # the first brings the script along, and the others find it there
            again = [(b"EVALSHA", DIGEST, calls[at]) if place else (b"EVAL", SCRIPT, calls[at]) for place, at in enumerate(missing)]
            for at, answer in zip(missing, await self._send(line, again, asking), strict=True):
                answers[at] = answer
        return answers

    async def _send(self, line: Line, commands: Sequence[tuple[bytes, bytes, Call]], asking: bool) -> list[bytes | ResponseError]:
        packed = [(name, script, b"2", call.key, call.record, call.ask, self._start) for name, script, call in commands]
        if not asking:
            return await line.exchange(packed)
        return (await line.exchange([command for each in packed for command in ((b"ASKING",), each)]))[1::2]

    async def _acknowledge(self, line: Line, calls: Sequence[Call], answers: list[bytes | ResponseError]) -> None:
        """Waits until the replicas that are known have what was done; strict asks fail when they do not in time."""
        (info,) = await line.exchange([(b"INFO", b"replication")])
        if isinstance(info, ResponseError):
            raise info
        line.replicas = known = max(line.replicas, int(_field(info, b"connected_slaves") or 0))
        if not known:
            return
        patience = str(max(1, int(self._budget * 500))).encode()
        (acknowledged,) = await line.exchange([(b"WAIT", str(known).encode(), patience)])
        if isinstance(acknowledged, ResponseError):
            raise acknowledged
        if int(acknowledged) < known:
            for at, call in enumerate(calls):
                if call.strict:
                    answers[at] = NotAcknowledged(f"only {int(acknowledged)} of {known} replicas acknowledged")

    async def _take(self) -> Line:
        """A connection that is ready; waits for one that is being made."""
        while True:
            while self._idle:
                line = self._idle.pop()
                if await line.usable():
                    return line
                await line.close()
            if self._connecting is None:
                self._connecting = asyncio.get_running_loop().create_task(self._connect())
                self._connecting.add_done_callback(self._connected)
            await asyncio.shield(self._connecting)

    async def _connect(self) -> None:
        line: Line | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                connection = await self._make()
                line = Line(connection)
                await connection.connect()  # type: ignore[no-untyped-call]
                check_policy((await line.exchange([(b"INFO", b"memory")]))[0])
        except BaseException as problem:
            if line is not None:
                await line.close()
            if isinstance(problem, TimeoutError):
                raise aioredis.ConnectionError(f"no connection within {PATIENCE:g} s") from None
            raise
        self._idle.append(line)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; perhaps nobody does any more

    async def close(self) -> None:
        """Ends all connections."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        while self._idle:
            await self._idle.pop().close()


def single(address: Address) -> Callable[[], Awaitable[AbstractConnection]]:
    """Makes connections to the server that a URL names."""
    pool = ConnectionPool.from_url(address.url, **_OPTIONS)

    async def make() -> AbstractConnection:
        return pool.make_connection()  # type: ignore[no-untyped-call, no-any-return]

    return make


def at(address: Address, host: Host) -> AbstractConnection:
    """A connection to one host, with the address' user and TLS."""
    kind: type[Connection] = SSLConnection if address.tls else Connection
    more: dict[str, Any] = {**address.files, **_OPTIONS, "db": address.db, "username": address.username, "password": address.password}
    return kind(host=host[0], port=host[1], **more)


class Master:
    """Finds the master that Sentinels name: all are asked at once, and the first that knows it is believed."""

    def __init__(self, address: Address) -> None:
        self._address = address
        secured: dict[str, Any] = {"ssl": True, **address.files} if address.tls else {}
        asking = {"socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE, "password": address.sentinel_password, **secured}
        self._sentinels = Sentinel(list(address.hosts), sentinel_kwargs=asking)  # type: ignore[no-untyped-call]

    async def make(self) -> AbstractConnection:
        """A connection to it, to be connected. Raises `RedisError` when no Sentinel knows it."""
        return at(self._address, await self._find())

    async def _find(self) -> Host:
        tasks = [asyncio.ensure_future(self._ask(sentinel)) for sentinel in self._sentinels.sentinels]
        problems = []
        try:
            for soonest in asyncio.as_completed(tasks):
                try:
                    return await soonest
                except (RedisError, OSError) as problem:
                    problems.append(str(problem) or type(problem).__name__)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise MasterNotFoundError(f"no Sentinel knows a master of {self._address.service}: {'; '.join(problems)}")

    async def _ask(self, sentinel: Any) -> Host:
        state = (await sentinel.sentinel_masters()).get(self._address.service)
        if state is None:
            raise MasterNotFoundError("a Sentinel does not watch it")
        if not self._sentinels.check_master_state(state, self._address.service):
            raise MasterNotFoundError("a Sentinel has it as down")
        return str(state["ip"]), int(state["port"])

    async def close(self) -> None:
        """Ends the connections to the Sentinels."""
        for sentinel in self._sentinels.sentinels:
            await sentinel.aclose()


def check_policy(info: bytes | ResponseError) -> None:
    """Raises `Refused` when a server with this `INFO memory` may evict keys: a bucket that is gone is a full one."""
    if isinstance(info, ResponseError):
        raise info
    policy = _field(info, b"maxmemory_policy").decode()
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


_OPTIONS: Final[dict[str, Any]] = {
    "socket_timeout": None,
    "socket_connect_timeout": PATIENCE,
    "retry": Retry(NoBackoff(), 0),
    "protocol": 2,
}

"""A thin etcd v3 client on grpc.aio: just what the mesh needs of it, with nothing lost on the way.

Several endpoints (one is used at a time; a failing one is left for the next), TLS, user and password with the token renewed when it
ends, reads in pages at one revision, transactions, leases. Watching is in `discovery.watch`. Message types are those of
`aetcd.rpc` (etcd's own .proto files, api/etcdserverpb/rpc.proto, say what the fields mean).

Every call has a time budget. Reads are tried once at each endpoint. A write is tried elsewhere only when it was surely not
done: otherwise the caller is told that nobody knows, and compares before writing again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec
from aetcd import rpc
from grpc.aio import AioRpcError, Channel, insecure_channel, secure_channel

from discovery.address import EtcdAddress
from discovery.keys import end_of

T = TypeVar("T")
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
"""What a stream's `read` returns when the other side has ended it."""
Metadata = tuple[tuple[str, str], ...]

PAGE = 500
MOST_ENTRIES = 200_000
MOST_BYTES = 512 << 20
MESSAGE_LIMIT = 64 << 20
"""Bytes that one message may have; etcd's own limit on a request is 1.5 MiB."""
MOST_OPERATIONS = 128
"""Operations in a transaction (etcd's `--max-txn-ops`)."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class EtcdError(Exception):
    """etcd said no, or nothing."""


class EtcdUnavailable(EtcdError):
    """No endpoint answered in time. What was to be written may or may not have been."""


class EtcdDenied(EtcdError):
    """The user may not do this, or is not who it says it is."""


class EtcdCompacted(EtcdError):
    """The revision asked for is no longer there: list again."""


class EtcdOtherHistory(EtcdError):
    """This is not the etcd that it was (another cluster, or one restored from a backup): list again."""


class EtcdTooLarge(EtcdError):
    """The answer is larger than a message may be."""


class Entry(msgspec.Struct, frozen=True):
    """One key and its value."""

    key: bytes
    value: bytes
    revision: int
    """The revision that last changed it (`mod_revision`); 0 for one that isn't there."""
    lease: int = 0


class Listing(msgspec.Struct, frozen=True):
    """All keys of a range as they were at one revision."""

    revision: int
    cluster: int
    """The cluster's id: another one is another history."""
    entries: tuple[Entry, ...]
    term: int = 0
    """The raft term: it never falls, unless the cluster was restored from a backup."""


class Put(msgspec.Struct, frozen=True):
    """Write a key."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Delete a key."""

    key: bytes


class Unchanged(msgspec.Struct, frozen=True):
    """A condition: the key was last changed at `revision`; 0: it isn't there."""

    key: bytes
    revision: int


def describe(error: AioRpcError) -> str:
    """What went wrong, without gRPC's own decoration."""
    details = error.details() or ""
    return f"{details.removeprefix('etcdserver: ')} ({error.code().name})" if details else error.code().name


def translated(error: AioRpcError, where: str) -> EtcdError:
    """Our error for one of gRPC's."""
    code, text = error.code(), f"etcd {where}: {describe(error)}"
    details = error.details() or ""
    if code in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED} or "authentication failed" in details:
        return EtcdDenied(text)
    if "user name is empty" in details:
        return EtcdDenied(f"etcd {where}: it wants a user; write etcd://USER@HOST:PORT?password-file=FILE")
    if "compacted" in details:
        return EtcdCompacted(text)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return EtcdTooLarge(text)
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}:
        return EtcdUnavailable(text)
    return EtcdError(text)


def token_ended(error: AioRpcError) -> bool:
    """Whether a call was refused because of its token's age."""
    details = error.details() or ""
    return "invalid auth token" in details or "revision of auth store is old" in details


class _Endpoint:
    """One endpoint's channel, and the token that it gave us."""

    __slots__ = ("auth", "channel", "host", "kv", "lease", "token", "watch")

    def __init__(self, host: str, channel: Channel) -> None:
        self.host = host
        self.channel = channel
        self.token = ""
        self.kv = rpc.KVStub(channel)
        self.lease = rpc.LeaseStub(channel)
        self.watch = rpc.WatchStub(channel)
        self.auth = rpc.AuthStub(channel)


class Etcd:
    """A connection to an etcd cluster. Made anywhere; used and closed within one event loop, which owns it.

    `timeout` is the budget of one attempt, in seconds.
    """

    def __init__(self, address: EtcdAddress, *, timeout: float = 3.0) -> None:
        self.address = address
        self.timeout = timeout
        self._at = 0
        self._endpoint: _Endpoint | None = None
        self._signing_in = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def where(self) -> str:
        """The endpoint in use, for people."""
        return self.address.endpoints[self._at]

    async def close(self) -> None:
        """Ends the connection; calls in flight fail."""
        self._drop()
        if self._closing:
            await asyncio.wait(self._closing, timeout=2)

    # -- endpoints -----------------------------------------------------------------------------------------------------------------

    def endpoint(self) -> _Endpoint:
        """The endpoint in use, with a channel. Raises EtcdError when a certificate file can't be read."""
        if self._endpoint is None:
            host = self.where
            self._endpoint = _Endpoint(host, self._channel(host))
        return self._endpoint

    def leave(self, endpoint: _Endpoint) -> None:
        """`endpoint` failed: the next one is used from now on (unless somebody else has left it already)."""
        if endpoint is self._endpoint:
            self._drop()
            self._at = (self._at + 1) % len(self.address.endpoints)

    def _drop(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            task = asyncio.get_running_loop().create_task(endpoint.channel.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _channel(self, host: str) -> Channel:
        if not self.address.tls:
            return insecure_channel(host, options=_OPTIONS)
        try:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=_contents(self.address.ca),
                private_key=_contents(self.address.key),
                certificate_chain=_contents(self.address.cert),
            )
        except OSError as error:
            raise EtcdError(f"etcd {host}: {error.filename}: {error.strerror}") from error
        return secure_channel(host, credentials, options=_OPTIONS)

    async def metadata(self, endpoint: _Endpoint, stale_token: str | None = None) -> Metadata:
        """What to send along with a call: the token, got anew when there is none or when it is `stale_token`."""
        if not self.address.user:
            return ()
        async with self._signing_in:
            if not endpoint.token or endpoint.token == stale_token:
                try:
                    request = rpc.AuthenticateRequest(name=self.address.user, password=self.address.password())
                except OSError as error:
                    raise EtcdError(f"etcd password file {error.filename}: {error.strerror}") from error
                answer = await endpoint.auth.Authenticate(request, timeout=self.timeout)
                endpoint.token = answer.token
            return (("token", endpoint.token),)

    async def call(self, method: Callable[[_Endpoint], Any], request: object, *, again: bool) -> Any:
        """One unary call: `method(endpoint)(request)`. `again` says whether doing it twice does no harm.

        Raises EtcdError or one of its kinds.
        """
        failed: EtcdError | None = None
        for _ in range(max(2, len(self.address.endpoints))):
            endpoint = self.endpoint()
            sent = False
            try:
                metadata = await self.metadata(endpoint)
                try:
                    sent = True
                    return await method(endpoint)(request, timeout=self.timeout, metadata=metadata)
                except AioRpcError as error:
                    if not (metadata and token_ended(error)):
                        raise
                    metadata = await self.metadata(endpoint, metadata[0][1])
                    return await method(endpoint)(request, timeout=self.timeout, metadata=metadata)
            except AioRpcError as error:
                failed = translated(error, endpoint.host)
                if not isinstance(failed, EtcdUnavailable):
                    raise failed from error
                self.leave(endpoint)
                if sent and not again and not _never_left(error):
                    raise failed from error
            except asyncio.CancelledError:
                failed = left_alone(endpoint.host)
                if sent and not again:
                    raise failed from None
        assert failed is not None
        raise failed

    # -- keys ----------------------------------------------------------------------------------------------------------------------

    async def list(self, start: bytes, end: bytes | None = None, *, keys_only: bool = False) -> Listing:
        """Everything from `start` up to `end` (None: all that begins with `start`), as it was at one revision; `keys_only`: without values.

        Raises EtcdError; EtcdTooLarge beyond our bounds.
        """
        for _ in range(3):
            try:
                return await self._list(start, end_of(start) if end is None else end, keys_only)
            except EtcdCompacted:  # between two pages: take a newer revision
                continue
        raise EtcdUnavailable(f"etcd {self.where}: it is compacted faster than it can be listed")

    async def _list(self, start: bytes, end: bytes, keys_only: bool) -> Listing:
        entries: list[Entry] = []
        first, revision, cluster, term, size, page = start, 0, 0, 0, 0, PAGE
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=page, revision=revision, keys_only=keys_only)
            try:
                answer = await self.call(lambda endpoint: endpoint.kv.Range, request, again=True)
            except EtcdTooLarge:
                if page == 1:
                    raise
                page = max(1, page // 4)
                continue
            revision, cluster = revision or answer.header.revision, answer.header.cluster_id
            term = term or answer.header.raft_term
            for kv in answer.kvs:
                size += len(kv.key) + len(kv.value)
                entries.append(Entry(kv.key, kv.value, kv.mod_revision, kv.lease))
            if len(entries) > MOST_ENTRIES or size > MOST_BYTES:
                raise EtcdTooLarge(f"etcd {self.where}: more than {MOST_ENTRIES} keys or {MOST_BYTES >> 20} MiB from {first.decode()}")
            if not answer.more or not answer.kvs:
                return Listing(revision, cluster, tuple(entries), term)
            start = answer.kvs[-1].key + b"\0"

    async def now(self, key: bytes) -> Listing:
        """Where the cluster is now, agreed on by its majority (a linearizable read of `key`, whose value is not fetched)."""
        request = rpc.RangeRequest(key=key, limit=1, count_only=True)
        answer = await self.call(lambda endpoint: endpoint.kv.Range, request, again=True)
        return Listing(int(answer.header.revision), int(answer.header.cluster_id), (), int(answer.header.raft_term))

    async def get(self, key: bytes) -> Entry | None:
        """One key, or None."""
        answer = await self.call(lambda endpoint: endpoint.kv.Range, rpc.RangeRequest(key=key), again=True)
        for kv in answer.kvs:
            return Entry(kv.key, kv.value, kv.mod_revision, kv.lease)
        return None

    async def commit(self, operations: Sequence[Put | Delete], conditions: Sequence[Unchanged] = ()) -> int | None:
        """Does all `operations` at one revision if all `conditions` hold. Returns that revision, or None when they don't.

        Raises EtcdUnavailable when it is not known whether it was done, ValueError for more than `MOST_OPERATIONS`.
        """
        if max(len(operations), len(conditions)) > MOST_OPERATIONS:
            raise ValueError(f"{len(operations)} operations in one transaction; at most {MOST_OPERATIONS} go into one")
        request = rpc.TxnRequest(
            compare=[
                rpc.Compare(key=each.key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=each.revision)
                for each in conditions
            ],
            success=[
                rpc.RequestOp(request_put=rpc.PutRequest(key=each.key, value=each.value, lease=each.lease))
                if isinstance(each, Put)
                else rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=each.key))
                for each in operations
            ],
        )
        answer = await self.call(lambda endpoint: endpoint.kv.Txn, request, again=False)
        return int(answer.header.revision) if answer.succeeded else None

    # -- leases --------------------------------------------------------------------------------------------------------------------

    async def grant(self, ttl: int) -> int:
        """A new lease of `ttl` seconds: its id."""
        answer = await self.call(lambda endpoint: endpoint.lease.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl), again=True)
        return int(answer.ID)

    async def revoke(self, lease: int) -> None:
        """Ends a lease and deletes its keys; one that has ended already is fine."""
        try:
            await self.call(lambda endpoint: endpoint.lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease), again=True)
        except EtcdError as error:
            if "lease not found" not in str(error):
                raise

    async def keep_alive(self, lease: int) -> int:
        """Prolongs a lease. Returns the seconds it now has; 0 when it has ended. Raises EtcdError."""
        endpoint = self.endpoint()
        call = None
        try:
            metadata = await self.metadata(endpoint)
            call = endpoint.lease.LeaseKeepAlive(timeout=self.timeout, metadata=metadata)
            await call.write(rpc.LeaseKeepAliveRequest(ID=lease))
            answer = await call.read()
            if answer is EOF:
                raise EtcdUnavailable(f"etcd {endpoint.host}: ended the stream")
            return max(0, int(answer.TTL))
        except AioRpcError as error:
            if token_ended(error):
                endpoint.token = ""
            else:
                self.leave(endpoint)
            raise translated(error, endpoint.host) from error
        except asyncio.InvalidStateError as error:  # grpc.aio: written to a call that has ended
            self.leave(endpoint)
            raise EtcdUnavailable(f"etcd {endpoint.host}: ended the stream") from error
        except asyncio.CancelledError:
            raise left_alone(endpoint.host) from None
        finally:
            if call is not None:
                call.cancel()


def _contents(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None


def left_alone(host: str) -> EtcdUnavailable:
    """The error for a call that was cancelled because its channel was closed when another call found the endpoint failing.

    Raises CancelledError instead when it is the running task that is cancelled.
    """
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError
    return EtcdUnavailable(f"etcd {host}: the connection was given up")


def _never_left(error: AioRpcError) -> bool:
    """Whether a call failed before anything of it was sent."""
    details = error.details() or ""
    return error.code() == grpc.StatusCode.UNAVAILABLE and ("failed to connect" in details or "Connection refused" in details)


async def within(seconds: float, what: Awaitable[T], name: str) -> T:
    """Waits for `what`, at most `seconds`; raises EtcdUnavailable that names it after that."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(seconds):  # not wait_for, which can swallow a cancellation
            return await what
    except TimeoutError as error:
        raise EtcdUnavailable(f"{name}: no answer for {time.monotonic() - started:.1f} s") from error

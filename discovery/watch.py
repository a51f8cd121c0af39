"""Watching a range of etcd's keys from one revision on: nothing lost, nothing twice, and never silently behind.

`Stream` (pure) says what the answers on a watch's stream mean; `watch` does the talking. Two things are not taken on trust. The
revision to resume from is that of the last event, never that of a header. And how fresh the watch is comes from probes: a
linearizable read says which revision the majority is at, and the watch has caught up with the moment at which that read was *sent*
once its stream has reached that revision. A member that was cut off from the others, frozen or lagging therefore does not look alive.

etcd.io, "API guarantees", and api/etcdserverpb/rpc.proto (`WatchResponse`) say what is relied on.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
from aetcd import rpc
from grpc.aio import AioRpcError

from discovery.etcd import (
    EOF,
    MOST_BYTES,
    Etcd,
    EtcdCompacted,
    EtcdDenied,
    EtcdError,
    EtcdOtherHistory,
    EtcdTooLarge,
    EtcdUnavailable,
    Listing,
    left_alone,
    token_ended,
    translated,
)

PROBE_EVERY = 1.0
"""Seconds between two probes."""
SILENCE = 5.0
"""Seconds without any answer on the stream after which it is given up."""
_DELETED = 1
"""mvccpb.Event.DELETE"""
_NEEDS_LEADER = (("hasleader", "true"),)
"""etcd ends the stream of a member that has lost the majority."""


class Event(msgspec.Struct, frozen=True):
    """One change of one key. `value` is None for one that was deleted."""

    key: bytes
    value: bytes | None
    revision: int


class Batch(msgspec.Struct, frozen=True):
    """All changes of one or more whole revisions, in order."""

    revision: int
    """The last of them."""
    events: tuple[Event, ...]


class Stream:
    """What the answers on one watch's stream add up to. Owned by one `watch`."""

    __slots__ = ("_parts", "_size", "reached", "revision", "where")

    def __init__(self, revision: int, where: str = "") -> None:
        self.revision = revision
        """The last revision whose events were handed out: resume behind it."""
        self.reached = revision
        """Everything up to this revision has been handed out."""
        self.where = where
        self._parts: list[Event] = []
        self._size = 0

    def take(self, answer: Any) -> Batch | None:
        """Takes one `WatchResponse`. Returns what it completes, if anything.

        Raises EtcdCompacted, EtcdDenied, EtcdUnavailable (the stream has ended), EtcdTooLarge.
        """
        if answer.compact_revision:
            raise EtcdCompacted(f"etcd {self.where}: compacted up to revision {answer.compact_revision}")
        if answer.canceled:
            reason = answer.cancel_reason or "the watch was cancelled"
            denied = "permission denied" in reason
            raise (EtcdDenied if denied else EtcdUnavailable)(f"etcd {self.where}: {reason}")
        for each in answer.events:
            kv = each.kv
            if kv.mod_revision > self.revision:
                self._parts.append(Event(kv.key, None if each.type == _DELETED else kv.value, kv.mod_revision))
                self._size += len(kv.key) + len(kv.value)
        if self._size > MOST_BYTES:
            raise EtcdTooLarge(f"etcd {self.where}: more than {MOST_BYTES >> 20} MiB changed at once")
        if answer.fragment:
            return None
        if self._parts:
            batch = Batch(self._parts[-1].revision, tuple(self._parts))
            self._parts, self._size = [], 0
            self.revision = batch.revision
            self.reached = max(self.reached, batch.revision)
            return batch
        if not answer.created and not answer.events:
            self.reached = max(self.reached, int(answer.header.revision))
        return None


def check_history(last: Listing, now: Listing, revision: int, where: str = "") -> None:
    """Raises EtcdOtherHistory when `now`, agreed on by the majority, can't follow `last`, of which all up to `revision` is known."""
    if now.cluster != last.cluster:
        raise EtcdOtherHistory(f"etcd {where}: it is another cluster ({now.cluster:x}, was {last.cluster:x})")
    if now.revision < revision:
        raise EtcdOtherHistory(f"etcd {where}: its revision went back from {revision} to {now.revision}")
    if now.term < last.term:
        raise EtcdOtherHistory(f"etcd {where}: its term went back from {last.term} to {now.term}: it was restored from a backup")


class _Watch:
    """One stream at one endpoint. Its owner is `watch`."""

    def __init__(self, etcd: Etcd, last: Listing, stream: Stream, on_contact: Callable[[float], None], probe_every: float) -> None:
        self.etcd = etcd
        self.last = last
        self.stream = stream
        self.on_contact = on_contact
        self.probe_every = probe_every
        self.probes: deque[tuple[float, int]] = deque(maxlen=64)

    async def read(self, call: Any, on_batch: Callable[[Batch], None]) -> NoReturn:
        while True:
            async with asyncio.timeout(SILENCE):
                answer = await call.read()
            if answer is EOF:
                raise EtcdUnavailable(f"etcd {self.stream.where}: ended the watch")
            batch = self.stream.take(answer)
            if batch is not None:
                on_batch(batch)
            self.settle()

    async def probe(self, call: Any, key: bytes) -> NoReturn:
        progress = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())
        while True:
            sent, reached = time.monotonic(), self.stream.reached
            now = await self.etcd.now(key)
            check_history(self.last, now, reached, self.stream.where)  # what the stream brought meanwhile may be newer than `now`
            self.last = now
            self.probes.append((sent, now.revision))
            self.settle()
            await call.write(progress)
            await asyncio.sleep(self.probe_every)

    def settle(self) -> None:
        """Tells of the youngest probe that the stream has caught up with."""
        contact = None
        while self.probes and self.probes[0][1] <= self.stream.reached:
            contact = self.probes.popleft()[0]
        if contact is not None:
            self.on_contact(contact)


async def watch(
    etcd: Etcd,
    span: tuple[bytes, bytes],
    last: Listing,
    stream: Stream,
    on_batch: Callable[[Batch], None],
    on_contact: Callable[[float], None],
    *,
    probe_every: float = PROBE_EVERY,
) -> NoReturn:
    """Watches the keys of `span` (first, end) behind `stream.revision`, until it fails; `stream` then says from where to go on.

    `last` is the newest listing. `on_contact` is given the monotonic time (seconds) at which the youngest probe that the watch has
    caught up with was sent. Raises EtcdCompacted or EtcdOtherHistory when it takes a new listing to go on, EtcdDenied, and
    EtcdUnavailable for anything that is worth another try.
    """
    endpoint = etcd.endpoint()
    stream.where = endpoint.host
    tasks: list[asyncio.Task[NoReturn]] = []
    call: Any = None
    try:
        metadata = await etcd.metadata(endpoint)
        call = endpoint.watch.Watch(metadata=(*metadata, *_NEEDS_LEADER))
        # From the last revision that is known, not from the one behind it: a member answers no request for progress to a watch that begins
        # in the future (etcd, server/storage/mvcc, `progressIfSync`). `Stream.take` drops what comes a second time.
        create = rpc.WatchCreateRequest(
            key=span[0], range_end=span[1], start_revision=max(1, stream.revision), progress_notify=True, fragment=True
        )
        async with asyncio.timeout(etcd.timeout):
            await call.write(rpc.WatchRequest(create_request=create))
        one = _Watch(etcd, last, stream, on_contact, probe_every)
        tasks = [asyncio.create_task(one.read(call, on_batch)), asyncio.create_task(one.probe(call, span[0]))]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await done.pop()
        raise AssertionError("unreachable")
    except AioRpcError as error:
        if token_ended(error):
            endpoint.token = ""
        else:
            etcd.leave(endpoint)
        raise translated(error, endpoint.host) from error
    except TimeoutError as error:
        etcd.leave(endpoint)
        raise EtcdUnavailable(f"etcd {endpoint.host}: silent for {SILENCE:g} s") from error
    except asyncio.InvalidStateError as error:  # grpc.aio: written to a call that has ended
        raise EtcdUnavailable(f"etcd {endpoint.host}: ended the watch") from error
    except asyncio.CancelledError:
        raise left_alone(endpoint.host) from None
    except EtcdUnavailable as error:
        if "auth token" in str(error) or "auth store" in str(error):
            endpoint.token = ""
        else:
            etcd.leave(endpoint)
        raise
    except EtcdError:
        raise
    finally:
        for task in tasks:
            task.cancel()
        if call is not None:
            call.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

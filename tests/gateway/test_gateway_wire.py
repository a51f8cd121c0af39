"""A wire over real sockets, with TLS and without: bytes both ways, back-pressure, good ends and bad ones."""

from __future__ import annotations

import asyncio
import enum
import itertools
import random
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable

import pytest
from door_world import MUTUAL, gateway_identity, until, web_identity

from gateway.gathering import GatheringWire
from gateway.poller import Poller
from gateway.timers import Sweeper
from gateway.wire import FIRST_READ, LEAST_READ, LONG, Wire
from identity.tls import client_context, server_context
from mesh.model import UpstreamTls


class Owner:
    def __init__(self) -> None:
        self.data = b""
        self.clean: bool | None = None
        self.reason: str | None = None
        self.drains = 0

    def received(self, data: bytes) -> None:
        assert data
        self.data += data

    def ended(self, clean: bool) -> None:
        assert self.clean is None
        self.clean = clean

    def lost(self, reason: str) -> None:
        assert self.reason is None
        self.reason = reason

    def drained(self) -> None:
        self.drains += 1


class Kind(enum.Enum):
    """What is between the two."""

    PLAIN = enum.auto()
    TLS = enum.auto()
    GATHERED = enum.auto()
    """TLS, and a wire that reads many records together."""


class Pair:
    """A wire and the blocking socket at its other end."""

    def __init__(self, kind: Kind) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        far = socket.create_connection(listening.getsockname())
        near, _ = listening.accept()
        listening.close()
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kind is not Kind.PLAIN:
            identity = gateway_identity()
            wrapped: list[ssl.SSLSocket] = []
            context = client_context(UpstreamTls(mode="mesh"), web_identity(), ())
            shaking = threading.Thread(target=lambda: wrapped.append(context.wrap_socket(far, suppress_ragged_eofs=False)))
            shaking.start()
            near = server_context(MUTUAL, identity).wrap_socket(near, server_side=True, suppress_ragged_eofs=False)
            shaking.join()
            far = wrapped[0]
        near.setblocking(False)
        far.settimeout(10)
        self.far, self.owner = far, Owner()
        self.wire = (GatheringWire if kind is Kind.GATHERED else Wire)(Poller(asyncio.get_running_loop()), near, self.owner)
        self.closes = 0
        self.wire.when_closed = self.closed
        self.wire.start()

    def closed(self) -> None:
        self.closes += 1

    async def far_reads(self, size: int = 1 << 30) -> bytes:
        """What the far end reads until the end (or so many bytes)."""

        def read() -> bytes:
            pieces = []
            left = size
            while left > 0 and (data := self.far.recv(min(left, 65536))):
                pieces.append(data)
                left -= len(data)
            return b"".join(pieces)

        return await asyncio.to_thread(read)


def run(kind: Kind, test: Callable[[Pair], Awaitable[None]]) -> None:
    async def whole() -> None:
        pair = Pair(kind)
        try:
            await test(pair)
        finally:
            pair.wire.abort()
            pair.far.close()
            assert pair.closes == 1

    asyncio.run(whole())


each = pytest.mark.parametrize("kind", Kind)
tls = pytest.mark.parametrize("kind", [Kind.TLS, Kind.GATHERED])


@each
def test_bytes_go_both_ways_whole(kind: Kind) -> None:
    up, down = random.Random(1).randbytes(3_000_000), random.Random(2).randbytes(24_000_000)

    async def test(pair: Pair) -> None:
        await asyncio.to_thread(pair.far.sendall, up)
        await until(lambda: len(pair.owner.data) == len(up))
        assert pair.owner.data == up
        at = 0
        while at < len(down):
            size = random.Random(at).randint(1, 1_000_000)
            pair.wire.write(down[at : at + size])
            at += size
        assert pair.wire.backlog > 0
        assert await pair.far_reads(len(down)) == down
        await until(lambda: pair.owner.drains == 1)
        assert pair.wire.backlog == 0

    run(kind, test)


@each
def test_what_makes_much_work_is_read_in_small_pieces(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        sizes: list[int] = []
        seconds = 0.01

        def received(data: bytes) -> None:
            sizes.append(len(data))
            time.sleep(seconds)

        pair.owner.received = received  # type: ignore[method-assign]
        await asyncio.to_thread(pair.far.sendall, bytes(16_000))
        await until(lambda: sum(sizes) == 16_000)
        assert sizes[2:6] == [LEAST_READ] * 4
        seconds = 0.0
        for _ in range(100):
            await asyncio.to_thread(pair.far.sendall, bytes(32_000))
            if max(sizes) > 8 * FIRST_READ - 1:
                break
        await until(lambda: max(sizes) >= 8 * FIRST_READ)

    run(kind, test)


@each
def test_nothing_is_read_while_it_is_paused(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.wire.pause()
        await asyncio.to_thread(pair.far.sendall, b"a" * 40_000)
        await asyncio.sleep(0.05)
        assert pair.owner.data == b""
        pair.wire.resume()
        await until(lambda: len(pair.owner.data) == 40_000)

    run(kind, test)


@each
def test_a_pause_within_a_callback_loses_nothing(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        owner = pair.owner
        sizes: list[int] = []

        def received(data: bytes) -> None:
            owner.data += data
            sizes.append(len(data))
            pair.wire.pause()

        owner.received = received  # type: ignore[method-assign]
        await asyncio.to_thread(pair.far.sendall, b"a" * 100_000)
        while len(owner.data) < 100_000:
            seen = len(sizes)
            pair.wire.resume()
            await until(lambda seen=seen: len(sizes) > seen)  # type: ignore[misc]

    run(kind, test)


@each
def test_a_good_end_of_ours(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        size = 8_000_000
        pair.wire.write(b"x" * size)
        assert pair.wire.backlog > 0
        pair.wire.end(0.5)
        pair.wire.write(b"too late")
        assert len(await pair.far_reads()) == size, "a clean end after everything that was written"
        assert not pair.wire.closed
        pair.far.close()
        await until(lambda: pair.wire.closed)
        assert (pair.owner.clean, pair.owner.reason) == (None, None)

    run(kind, test)


@each
def test_a_peer_that_takes_nothing_is_not_waited_for(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.wire.write(b"x" * 20_000_000)
        pair.wire.end(0.1)
        await until(lambda: pair.wire.closed)

    run(kind, test)


@each
def test_what_comes_after_our_end_is_thrown_away(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.wire.write(b"answer")
        pair.wire.end(0.5)
        for _ in range(10):
            await asyncio.to_thread(pair.far.sendall, b"late" * 10_000)
        assert await pair.far_reads() == b"answer"
        assert pair.owner.data == b""
        await until(lambda: pair.wire.closed)

    run(kind, test)


@each
def test_a_good_end_of_the_peers(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.far.sendall(b"bye")
        if isinstance(pair.far, ssl.SSLSocket):
            pair.far.settimeout(0.05)
            with pytest.raises((TimeoutError, ssl.SSLError)):
                pair.far.unwrap()
        else:
            pair.far.shutdown(socket.SHUT_WR)
        await until(lambda: pair.owner.clean is not None)
        assert pair.owner.clean
        assert pair.owner.data == b"bye"

    run(kind, test)


@tls
def test_a_truncation_is_not_a_good_end(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.far.sendall(b"half")
        pair.far.shutdown(socket.SHUT_WR)
        await until(lambda: pair.owner.clean is not None)
        assert pair.owner.clean is False

    run(kind, test)


@each
def test_a_reset(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        pair.far.close()
        await until(lambda: pair.owner.reason is not None or pair.owner.clean is not None)
        if kind is not Kind.PLAIN:  # OpenSSL takes a reset for an end without close_notify
            assert pair.owner.clean is False
        else:
            assert pair.owner.reason == "connection reset by peer"
            assert pair.wire.closed
        pair.wire.write(b"nobody hears this")

    run(kind, test)


@each
def test_a_cut_is_told_from_a_good_end(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        pair.wire.write(b"half")
        pair.wire.cut()
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            await pair.far_reads()

    run(kind, test)


@tls
def test_garbage_in_tls_is_lost_with_its_name(kind: Kind) -> None:
    async def test(pair: Pair) -> None:
        assert isinstance(pair.far, ssl.SSLSocket)
        socket.socket.sendall(pair.far, b"\x17\x03\x03\x00\x20" + b"z" * 32)
        await until(lambda: pair.owner.reason is not None)
        assert str(pair.owner.reason).startswith("tls: ")

    run(kind, test)


def test_what_came_in_many_records_is_told_together() -> None:
    async def test(pair: Pair) -> None:
        sizes: list[int] = []
        pair.owner.received = lambda data: sizes.append(len(data))  # type: ignore[method-assign]
        for _ in range(20):
            pair.far.sendall(b"x" * 50)
        await until(lambda: sum(sizes) == 1000)
        assert sizes == [1000]

    run(Kind.GATHERED, test)


def test_others_get_their_turn_between_reads_that_make_much_work() -> None:
    async def test(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        seen: list[str] = []
        count = 0

        def received(data: bytes) -> None:
            nonlocal count
            count += len(data)
            seen.append("read")
            time.sleep(2 * LONG)

        def other() -> None:
            seen.append("other")
            if count < 40_000:
                loop.call_soon(other)

        pair.owner.received = received  # type: ignore[method-assign]
        loop.call_soon(other)
        await asyncio.to_thread(pair.far.sendall, bytes(40_000))
        await until(lambda: count == 40_000)
        longest = max(len(list(group)) for what, group in itertools.groupby(seen) if what == "read")
        assert longest <= 2, "one because it is ready, one for what TLS holds"

    run(Kind.GATHERED, test)


def test_the_end_comes_after_all_that_came_before_it() -> None:
    async def test(pair: Pair) -> None:
        for _ in range(20):
            pair.far.sendall(b"x" * 50)
        pair.far.shutdown(socket.SHUT_WR)
        await until(lambda: pair.owner.clean is not None)
        assert (pair.owner.clean, len(pair.owner.data)) == (False, 1000)

    run(Kind.GATHERED, test)


def test_writes_of_one_callback_are_flushed_once() -> None:
    class Marked:
        def __init__(self, poller: Poller) -> None:
            self.poller, self.count, self.again = poller, 0, False

        def flush(self) -> None:
            self.count += 1
            if self.again:
                self.again = False
                self.poller.mark(self)
            if self.count == 100:
                raise RuntimeError("a defect")

    async def test() -> None:
        poller = Poller(asyncio.get_running_loop())
        first, second = Marked(poller), Marked(poller)
        second.again = True
        poller.mark(first)
        poller.mark(second)
        assert (first.count, second.count) == (0, 0)
        await asyncio.sleep(0)
        assert (first.count, second.count) == (1, 2)
        first.count = 99
        poller.mark(first)
        poller.mark(second)
        await asyncio.sleep(0)
        assert second.count == 3, "one that fails does not keep the others from it"

    asyncio.run(test())


def test_a_sweep_tells_those_whose_time_is_over() -> None:
    class Thing:
        def __init__(self, deadline: float) -> None:
            self.deadline = deadline
            self.told: list[float] = []

        def expired(self, now: float) -> None:
            self.told.append(now)
            self.deadline = float("inf")
            if len(self.told) > 1:
                raise RuntimeError("a defect")

    async def test() -> None:
        sweeper = Sweeper(asyncio.get_running_loop())
        things = [Thing(deadline) for deadline in (1.0, 2.0, 3.0)]
        sweeper.watched.update(things)
        seen: list[float] = []
        sweeper.each(seen.append)
        sweeper.sweep(2.0)
        assert [thing.told for thing in things] == [[2.0], [2.0], []]
        assert (sweeper.now, seen) == (2.0, [2.0])
        for thing in things:
            thing.deadline = 3.0
        sweeper.sweep(3.0)
        assert things[2].told == [3.0]
        assert seen == [2.0, 3.0]
        assert sweeper.soon(things[0], 5.0) is None
        loop = asyncio.get_running_loop()
        things[2].deadline, things[2].told = loop.time() + 0.05, []
        assert sweeper.soon(things[2], 0.05) is not None
        await until(lambda: bool(things[2].told))

    asyncio.run(test())

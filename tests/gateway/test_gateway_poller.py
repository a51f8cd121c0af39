"""The poller: sockets of one epoll, turn by turn."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from door_world import until

from gateway.poller import MOST_EVENTS, Poller


class Pairs:
    """Pairs of sockets whose near ends are watched."""

    def __init__(self, poller: Poller, count: int) -> None:
        self.poller = poller
        self.pairs = [socket.socketpair() for _ in range(count)]
        for near, _ in self.pairs:
            near.setblocking(False)
        self.read: list[int] = []

    def watch(self, at: int, then: Callable[[], object] = lambda: None) -> None:
        near = self.pairs[at][0]

        def readable() -> None:
            near.recv(100)
            self.read.append(at)
            then()

        self.poller.add_reader(near.fileno(), readable)

    def wake(self, *which: int) -> None:
        for at in which:
            self.pairs[at][1].send(b"x")

    def close(self) -> None:
        for near, far in self.pairs:
            if near.fileno() >= 0:
                self.poller.remove_reader(near.fileno())
                self.poller.remove_writer(near.fileno())
            near.close()
            far.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def run(count: int, test: Callable[[Pairs], Awaitable[None]]) -> None:
    async def whole() -> None:
        pairs = Pairs(Poller(asyncio.get_running_loop()), count)
        try:
            await test(pairs)
        finally:
            pairs.close()

    asyncio.run(whole())


def test_one_that_fails_does_not_keep_the_others_from_being_served(caplog: pytest.LogCaptureFixture) -> None:
    async def test(pairs: Pairs) -> None:
        def fail() -> None:
            raise RuntimeError("a defect")

        for at in range(3):
            pairs.watch(at, fail if at == 1 else lambda: None)
        pairs.wake(0, 1, 2)
        await until(lambda: len(pairs.read) == 3)
        pairs.wake(2)
        await until(lambda: len(pairs.read) == 4)

    run(3, test)
    assert [record.message for record in caplog.records] == ["a connection could not be served"]


def test_one_that_another_removed_in_the_same_turn_is_not_called() -> None:
    async def test(pairs: Pairs) -> None:
        def remove(other: int) -> None:
            near = pairs.pairs[other][0]
            pairs.poller.remove_reader(near.fileno())
            near.close()

        pairs.watch(0, lambda: remove(1))
        pairs.watch(1, lambda: remove(0))
        pairs.wake(0, 1)
        await until(lambda: len(pairs.read) == 1)
        await asyncio.sleep(0)
        assert len(pairs.read) == 1

    run(2, test)


def test_a_number_that_is_used_again_belongs_to_the_new_socket() -> None:
    async def test(pairs: Pairs) -> None:
        pairs.watch(0)
        near, far = pairs.pairs[0]
        number = near.fileno()
        pairs.poller.remove_reader(number)
        near.close()
        again, other = socket.socketpair()
        again.setblocking(False)
        if again.fileno() != number:
            os.dup2(again.fileno(), number)
            again.close()
            again = socket.socket(fileno=number)
        pairs.pairs.append((again, other))
        pairs.watch(1)
        pairs.wake(1)
        await until(lambda: pairs.read == [1])
        far.close()

    run(1, test)


def test_what_is_written_in_a_turn_goes_out_at_its_end_once() -> None:
    async def test(pairs: Pairs) -> None:
        order: list[str] = []

        class Marked:
            def flush(self) -> None:
                order.append("flush")

        marked = Marked()
        pairs.watch(0, lambda: (order.append("first"), pairs.poller.mark(marked)))
        pairs.watch(1, lambda: order.append("second"))
        pairs.wake(0, 1)
        await until(lambda: len(order) == 3)
        assert order[2] == "flush"
        pairs.poller.mark(marked)
        assert len(order) == 3, "outside of a turn it has time until the next one"
        await until(lambda: len(order) == 4)

    run(2, test)


def test_reading_and_writing_are_watched_each_by_itself() -> None:
    async def test(pairs: Pairs) -> None:
        near, far = pairs.pairs[0]
        writable: list[int] = []
        pairs.watch(0)
        pairs.poller.add_writer(near.fileno(), lambda: writable.append(1))
        await until(lambda: len(writable) > 1)
        pairs.poller.remove_writer(near.fileno())
        pairs.poller.remove_writer(near.fileno())
        seen = len(writable)
        pairs.wake(0)
        await until(lambda: pairs.read == [0])
        assert len(writable) == seen
        pairs.poller.add_writer(near.fileno(), lambda: writable.append(1))
        pairs.poller.remove_reader(near.fileno())
        pairs.wake(0)
        await until(lambda: len(writable) > seen + 1)
        assert pairs.read == [0]
        far.close()  # whoever waits only to write is told of the hang-up as well
        seen = len(writable)
        await until(lambda: len(writable) > seen)

    run(1, test)


def test_more_than_a_turn_takes_is_served_in_the_next_one() -> None:
    async def test(pairs: Pairs) -> None:
        everything = range(MOST_EVENTS + 10)
        for at in everything:
            pairs.watch(at)
        pairs.wake(*everything)
        await until(lambda: len(pairs.read) == len(everything))
        assert sorted(pairs.read) == list(everything)

    run(MOST_EVENTS + 10, test)


def test_nothing_is_held_open_when_nothing_is_watched() -> None:
    async def test(pairs: Pairs) -> None:
        before = open_files()
        for _ in range(3):
            pairs.watch(0)
            pairs.wake(0)
            seen = len(pairs.read)
            await until(lambda seen=seen: len(pairs.read) > seen)
            assert open_files() == before + 1
            pairs.poller.remove_reader(pairs.pairs[0][0].fileno())
            assert open_files() == before

    run(1, test)

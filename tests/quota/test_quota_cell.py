"""Our bucket beside redis-cell, a limiter of other people's: both in one Redis, with one clock, which the test sets.

redis-cell keeps its buckets by GCRA, which in exact arithmetic is a token bucket that is refilled all the time: what one admits, the
other admits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import msgspec
import pytest
import redis
from test_quota_redis_clock import Clock

from quota.bucket import Ask, Reply
from quota.script import SCRIPT
from tests import install, servers

BEGIN = 1_800_000_000


class OnTheVerge(Exception):
    """Ours refused for want of a microsecond, where floating-point numbers sum up to a hair less than the whole."""


class Pair:
    """One Redis with the two limiters, and its clock, in whole seconds."""

    def __init__(self, client: redis.Redis, clock: Clock) -> None:
        self.client = client
        self.clock = clock
        self.at = 0

    def wait(self, seconds: int) -> None:
        self.at += seconds
        self.clock.stop(BEGIN + self.at)
        assert self.client.time()[0] == BEGIN + self.at

    def theirs(self, key: str, burst: int, tokens: int, interval: int, cost: int) -> tuple[bool, int, int]:
        """Whether it is admitted, the tokens left, and the whole seconds to wait."""
        limited, _, left, wait, _ = self.client.execute_command("CL.THROTTLE", f"cell:{key}", burst - 1, tokens, interval, cost)
        return not limited, left, wait

    def ours(self, key: str, seq: int, burst: int, tokens: int, interval: int, cost: int) -> tuple[bool, int, int]:
        """As `theirs`, but the microseconds to wait."""
        ask = Ask("one", seq, seq - 1, 0, 0, 0, (), ((cost, 1),), 0, 1, 3_000_000, tokens / interval, burst)
        reply = msgspec.msgpack.decode(self.client.eval(SCRIPT, 2, f"b:{key}", "b@born", msgspec.msgpack.encode(ask), "full"), type=Reply)
        # Ours rounds times up to a microsecond, so that a token may be there that much later.
        left = math.floor(burst - max(0, reply.full - 1) * (tokens / interval) / 1e6 + 1e-9)
        if reply.granted < cost and reply.wait == 1:
            raise OnTheVerge
        return reply.granted == cost, left, reply.wait


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    clock = Clock(tmp_path_factory.mktemp("clock") / "clock")
    clock.stop(BEGIN)
    module = str(install.install("redis-cell"))
    with servers.redis("--loadmodule", module, wrapper=clock.wrapper, program="redis-server") as server:
        yield Pair(redis.Redis.from_url(server.url, protocol=2), clock)


@pytest.mark.parametrize("seed", range(25))
def test_redis_cell_admits_what_our_bucket_admits(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    # The time for one token is a whole number of nanoseconds, or would be rounded down by redis-cell.
    tokens, interval = rng.choice([(1, 1), (10, 60), (5, 1), (1, 7), (100, 1), (1, 60), (8, 3600), (25, 2), (1000, 8)])
    burst = rng.choice([1, 2, 5, 30, 400])
    key, seq, verges = 0, 0, 0
    answers = []
    for step in range(120):
        pair.wait(rng.choice([0, 0, 0, 1, 1, 2, 7, max(1, interval // tokens), 2 * burst * interval // tokens]))
        cost = rng.randint(1, min(burst, rng.choice([1, 1, 3, 30])))
        seq += 1
        theirs = pair.theirs(f"{seed}/{key}", burst, tokens, interval, cost)
        try:
            ours = pair.ours(f"{seed}/{key}", seq, burst, tokens, interval, cost)
        except OnTheVerge:
            key, verges = key + 1, verges + 1  # from here on their levels differ
            continue
        assert ours[:2] == theirs[:2], f"step {step}: {cost} of {burst}, {tokens} in {interval} s, at {pair.at} s"
        assert ours[0] or theirs[2] in {(ours[2] - 1) // 1_000_000, ours[2] // 1_000_000}
        answers.append(ours[0])
    assert True in answers
    assert False in answers or burst > 100
    assert verges < 12, "nearly everything was compared"

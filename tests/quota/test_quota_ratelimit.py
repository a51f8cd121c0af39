"""The same files and the same questions, for envoyproxy/ratelimit and for the quota service: the same answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import yaml
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc
from google.protobuf import json_format

from bench import peer_ratelimit
from quota.descriptors import Descriptors
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.service import QuotaService
from tests import servers

KEYS = ("user", "path", "tier")
VALUES = ("a", "ab", "abc", "b", "ba")
SEEDS = range(4)


def descriptors(draw: random.Random, depth: int = 0) -> list[dict[str, Any]]:
    """Some descriptors of one level. Limits are small, and none of them gets a token back while the test runs."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(draw.randint(2, 4) if depth else 9):
        key, value = draw.choice(KEYS), draw.choice(("", *VALUES, "a*", "b*", "ab*"))
        node: dict[str, Any] = {"key": key, "value": value} if value else {"key": key}
        if value.endswith("*") and draw.random() < 0.5:
            node["share_threshold"] = True
        if draw.random() < 0.3:
            node["value_to_metric"] = True
        if draw.random() < 0.8:
            unit, requests = draw.choice(("day", "MONTH", "Year")), draw.randint(0, 4)
            node["rate_limit"] = draw.choice(({"unlimited": True}, *[{"unit": unit, "requests_per_unit": requests}] * 5))
            if draw.random() < 0.3:
                node[draw.choice(("shadow_mode", "quota_mode"))] = True
            if draw.random() < 0.3:
                node["detailed_metric"] = True
        if depth < 2 and draw.random() < 0.5:
            node["descriptors"] = descriptors(draw, depth + 1)
        made[key, value] = node
    return list(made.values())


def questions(draw: random.Random) -> list[list[tuple[str, str]]]:
    """Descriptors to ask about, one a request: what is charged when one of several is over differs, on purpose."""
    return [[(draw.choice(KEYS), draw.choice(VALUES)) for _ in range(draw.choice((1, 1, 2, 3)))] for _ in range(400)]


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """envoyproxy/ratelimit over Redis, with a domain for each seed; its gRPC port."""
    files = {f"d{seed}.yaml": text(seed) for seed in SEEDS}
    with servers.redis() as redis:
        folder = tmp_path_factory.mktemp("ratelimit")
        with servers.running(peer_ratelimit.ratelimit(folder, redis.port, files, RESPONSE_DYNAMIC_METADATA="true")) as server:
            yield server.port


def text(seed: int) -> str:
    """The file of a seed."""
    return yaml.safe_dump({"domain": f"d{seed}", "descriptors": descriptors(random.Random(seed))}, sort_keys=False)


def told(answer: Any, quota: bool) -> Any:
    """What both are to say alike. Metadata only where there is a limit in quota mode: only then do we give some."""
    found = json_format.MessageToDict(answer)
    for status in found.get("statuses", ()):
        status.pop("durationUntilReset", None)
    if not quota:
        found.pop("dynamicMetadata", None)
    return found


async def asked(port: int, seed: int) -> list[Any]:
    """The answers to a seed's questions."""
    answers = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = rls_pb2_grpc.RateLimitServiceStub(channel)
        for entries in questions(random.Random(seed)):
            made = [ratelimit_pb2.RateLimitDescriptor.Entry(key=key, value=value) for key, value in entries]
            request = rls_pb2.RateLimitRequest(domain=f"d{seed}", descriptors=[ratelimit_pb2.RateLimitDescriptor(entries=made)])
            answers.append(await stub.ShouldRateLimit(request, timeout=20))
    return answers


async def ours(seed: int) -> list[Any]:
    """What the quota service answers over the same file."""
    store = MemoryStore()
    lessee = QuotaLessee(store, holder="rls")
    service = QuotaService(lessee, Descriptors({"file.yaml": text(seed)}), headers=False)
    try:
        return await asked(await service.start("127.0.0.1:0"), seed)
    finally:
        await service.stop(0)
        await lessee.close()
        await store.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_file_gives_the_same_answers(peer: int, seed: int) -> None:
    theirs, own = asyncio.run(asked(peer, seed)), asyncio.run(ours(seed))
    quota = [answer.dynamic_metadata.fields["quotaModeEnabled"].bool_value for answer in theirs]
    for entries, their, our, mode in zip(questions(random.Random(seed)), theirs, own, quota, strict=True):
        assert told(our, mode) == told(their, mode), (entries, text(seed))
    codes = {answer.overall_code for answer in theirs}
    assert len(codes) == 2

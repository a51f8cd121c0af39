from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc
from quota_world import limit

from mesh.questions import TokenQuestion
from quota.descriptors import Both, Descriptors, PolicyLimits
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.redis_store import RedisStore
from quota.service import QuotaService
from quota.store import Store
from telemetry.record import Telemetry
from tests import servers

FILE = """
domain: shop
descriptors:
  - key: user
    rate_limit: {name: per-user, unit: hour, requests_per_unit: 3}
  - key: all
    rate_limit: {unit: hour, requests_per_unit: 5}
  - key: free
    rate_limit: {unlimited: true}
  - key: watched
    rate_limit: {unit: hour, requests_per_unit: 1}
    shadow_mode: true
  - key: counted
    rate_limit: {unit: hour, requests_per_unit: 1}
    quota_mode: true
  - key: special
    rate_limit: {unit: hour, requests_per_unit: 100, replaces: [{name: per-user}]}
"""
OK, OVER = rls_pb2.RateLimitResponse.OK, rls_pb2.RateLimitResponse.OVER_LIMIT
HOUR = rls_pb2.RateLimitResponse.RateLimit.HOUR
Ask = Callable[..., Awaitable[Any]]


def run(body: Callable[[Ask, QuotaLessee, Telemetry], Awaitable[None]], store: Store | str | None = None) -> None:
    """Calls `body` with a real client of a real server."""

    async def main() -> None:
        telemetry = Telemetry()
        buckets = RedisStore(store) if isinstance(store, str) else store or MemoryStore()
        lessee = QuotaLessee(buckets, holder="rls", telemetry=telemetry)
        policies = PolicyLimits([limit(f"shop/orders/{mode}", 1, 1.0, 2, failure_mode=mode) for mode in ("Allow", "Deny", "Local")])
        service = QuotaService(lessee, Both(policies, Descriptors({"shop.yaml": FILE})), telemetry=telemetry)
        port = await service.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rls_pb2_grpc.RateLimitServiceStub(channel)

            async def ask(*descriptors: list[tuple[str, str]], domain: str = "shop", hits: int = 0, **fields: Any) -> Any:
                made = [
                    ratelimit_pb2.RateLimitDescriptor(
                        entries=[ratelimit_pb2.RateLimitDescriptor.Entry(key=key, value=value) for key, value in entries], **fields
                    )
                    for entries in descriptors
                ]
                return await stub.ShouldRateLimit(rls_pb2.RateLimitRequest(domain=domain, descriptors=made, hits_addend=hits), timeout=5)

            await body(ask, lessee, telemetry)
        await service.stop(1.0)
        await lessee.close()
        await buckets.close()

    asyncio.run(main())


def test_a_limit_is_counted_down_and_then_over() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        answers = [await ask([("user", "eve")]) for _ in range(4)]
        assert [answer.overall_code for answer in answers] == [OK, OK, OK, OVER]
        first, last = answers[0].statuses[0], answers[3].statuses[0]
        assert (first.current_limit.requests_per_unit, first.current_limit.unit, first.current_limit.name) == (3, HOUR, "per-user")
        assert (first.code, first.limit_remaining, last.code, last.limit_remaining) == (OK, 2, OVER, 0)
        assert 1100 < last.duration_until_reset.seconds <= 1200
        headers = {header.key: header.value for header in answers[3].response_headers_to_add}
        assert headers["ratelimit-policy"] == '"shop.user";q=3;w=3600'
        assert headers["retry-after"] == "1200"
        assert (await ask([("user", "bob")])).overall_code == OK
        assert b'tollhouse_ratelimit_answers_total{rule="shop.user",result="refused"} 1' in telemetry.page()
        lines = telemetry.page().decode().splitlines()
        for name, value in (("asks_total", lessee.asks), ("buckets", 2), ("tokens", 0), ("waiting", 0), ("store_open", 0)):
            assert any(line.split()[0] == f"tollhouse_quota_{name}" and float(line.split()[1]) == value for line in lines), name

    run(body)


def test_descriptors_without_a_limit_and_unlimited_ones_are_ok() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        answer = await ask([("nothing", "x")], [("free", "x")])
        assert answer.overall_code == OK and [status.code for status in answer.statuses] == [OK, OK]
        assert not any(status.HasField("current_limit") for status in answer.statuses)
        assert (await ask([("user", "x")], domain="unknown")).overall_code == OK

    run(body)


def test_several_descriptors_give_back_what_one_refuses() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        for _ in range(3):
            await ask([("user", "eve")])
        answer = await ask([("all", "x")], [("user", "eve")])
        assert answer.overall_code == OVER and [status.code for status in answer.statuses] == [OK, OVER]
        assert (await ask([("all", "x")], hits=5)).overall_code == OK

    run(body)


def test_hits_shadow_and_replaced_limits() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        assert (await ask([("user", "eve")], hits=2)).statuses[0].limit_remaining == 1
        assert (await ask([("user", "eve")], hits=2)).overall_code == OVER
        assert (await ask([("user", "eve")], hits_addend={"value": 0})).statuses[0].limit_remaining == 1
        assert (await ask([("user", "eve")], hits_addend={"value": 1})).overall_code == OK
        assert (await ask([("user", "eve")], hits_addend={"value": 0})).overall_code == OK
        assert [(await ask([("watched", "x")])).overall_code for _ in range(3)] == [OK] * 3
        assert b'tollhouse_ratelimit_answers_total{rule="shop.watched",result="shadow"} 2' in telemetry.page()
        answer = await ask([("special", "x")], [("user", "eve")])
        assert answer.overall_code == OK and not answer.statuses[1].HasField("current_limit")

    run(body)


def test_in_quota_mode_the_metadata_say_what_is_over_and_nobody_is_refused() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        first, second = [await ask([("all", "x")], [("counted", "eve")]) for _ in range(2)]
        assert "quotaModeViolations" not in first.dynamic_metadata.fields and first.dynamic_metadata["quotaModeEnabled"] is True
        assert second.overall_code == OK and [status.code for status in second.statuses] == [OK, OK]
        assert list(second.dynamic_metadata["quotaModeViolations"]) == [1] and second.dynamic_metadata["domain"] == "shop"
        assert not any(header.key == "retry-after" for header in second.response_headers_to_add)
        assert not (await ask([("all", "x")])).HasField("dynamic_metadata")
        assert b'tollhouse_ratelimit_answers_total{rule="shop.counted",result="quota"} 1' in telemetry.page()

    run(body)


def test_a_limit_that_the_asker_sends_along() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        own = {"requests_per_unit": 2, "unit": "HOUR"}
        assert [(await ask([("user", "eve")], limit=own)).overall_code for _ in range(3)] == [OK, OK, OVER]
        assert (await ask([("user", "eve")])).statuses[0].limit_remaining == 2

    run(body)


@pytest.mark.parametrize(
    ("descriptors", "fields"),
    [
        ([[("user", "x")]], {"domain": ""}),
        ([], {}),
        ([[]], {}),
        ([[("user", "x")]] * 65, {}),
        ([[("user", "x")]], {"limit": {"requests_per_unit": 1}}),
    ],
)
def test_requests_that_can_not_be_answered(descriptors: list[list[tuple[str, str]]], fields: dict[str, Any]) -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(*descriptors, **fields)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(body)


@pytest.mark.parametrize("mode", ["Allow", "Deny", "Local"])
def test_limits_of_quota_policies_share_the_gateways_buckets_and_have_their_failure_mode(mode: str) -> None:
    question = TokenQuestion(limit(f"shop/orders/{mode}", 1, 1.0, 2, failure_mode=mode), ())

    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        lessee.ask(question, lambda grant: None)
        answers = [await ask([("limit", question.limit.name)], domain="tollhouse") for _ in range(2)]
        assert [answer.overall_code for answer in answers] == [OK, OVER]

    run(body)

    async def gone(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        answers = [(await ask([("limit", question.limit.name)], domain="tollhouse")).overall_code for _ in range(3)]
        assert answers == {"Allow": [OK] * 3, "Deny": [OVER] * 3, "Local": [OK, OK, OVER]}[mode]

    run(gone, f"redis://127.0.0.1:{servers.free_port()}")


def test_without_a_store_the_asker_decides() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask([("user", "eve")])
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    run(body, f"redis://127.0.0.1:{servers.free_port()}")


def test_many_at_once_over_redis() -> None:
    async def body(ask: Ask, lessee: QuotaLessee, telemetry: Telemetry) -> None:
        answers = await asyncio.gather(*(ask([("all", str(at % 20))]) for at in range(300)))
        assert sum(answer.overall_code == OK for answer in answers) == 100
        assert sum(len(answer.statuses) for answer in answers) == 300

    with servers.redis() as server:
        run(body, server.url + "?start=full")


def test_an_address_that_is_taken() -> None:
    async def main() -> None:
        lessee = QuotaLessee(MemoryStore(), holder="rls")
        one, two = (QuotaService(lessee, Descriptors({"shop.yaml": FILE})) for _ in range(2))
        port = await one.start("127.0.0.1:0")
        with pytest.raises(OSError, match=str(port)):
            await two.start(f"127.0.0.1:{port}")
        await one.stop(0)

    asyncio.run(main())

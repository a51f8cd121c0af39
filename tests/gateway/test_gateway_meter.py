from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from gateway.meter import Charging, Meter, told
from mesh.model import QuotaLimit
from mesh.questions import TokenQuestion
from mesh.quota_cost import Usage
from mesh.refusals import NoEndpoint

HEADER = Usage(source="header", name=b"x-tokens", most=500, unsaid=7)


class Plan(msgspec.Struct, frozen=True):
    edits: tuple[Any, ...] = ()


class Permit(msgspec.Struct, frozen=True):
    metered: tuple[TokenQuestion, ...]
    plan: Plan = Plan()


class Side:
    """Both of a request's sides: takes whatever it is told."""

    outcome = SimpleNamespace()

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append(name)


class World:
    def __init__(self, usage: Usage, cost: int = 1) -> None:
        limit = QuotaLimit(name="shop/models/tokens", level="route", per=(), tokens=10, usage=usage)
        self.charged: list[int] = []
        self.counted: list[str] = []
        charging = Charging(lambda question, tokens: self.charged.append(tokens), lambda labels: self.counted.append(labels[1]))
        self.client, self.upstream = Side(), Side()
        self.meter = Meter(self.client, Permit((TokenQuestion(limit, ("a",), cost),)), charging)  # type: ignore[arg-type]
        self.meter.forwarding = self.upstream  # type: ignore[assignment]

    def answer(self, *headers: tuple[bytes, bytes], ended: bool = False) -> None:
        (first, *_) = self.meter.permit.plan.edits
        assert first.apply(list(headers)) == list(headers)
        self.meter.answer(200, [], ended)


@pytest.mark.parametrize(
    ("values", "cost", "how"),
    [
        ([], 7, "unsaid"),
        ([b"12"], 12, "said"),
        ([b" 12 "], 12, "said"),
        ([b"0"], 0, "said"),
        ([b"501"], 500, "capped"),
        ([b"9" * 40], 500, "capped"),
        ([b"-1"], 500, "invalid"),
        ([b"1.5"], 500, "invalid"),
        ([b"many"], 500, "invalid"),
        ([b""], 500, "invalid"),
        ([b"1, 2"], 500, "invalid"),
        ([b"1", b"2"], 500, "invalid"),
        (["\u0661".encode()], 500, "invalid"),
    ],
)
def test_what_a_header_may_say(values: list[bytes], cost: int, how: str) -> None:
    assert told(HEADER, values) == (cost, how)


def test_begun_tokens_count() -> None:
    assert told(msgspec.structs.replace(HEADER, per_token=100), [b"101"]) == (2, "said")


def test_a_header_is_charged_with_the_head_less_what_was_taken() -> None:
    world = World(HEADER, cost=2)
    world.answer((b"x-tokens", b"30"))
    assert world.charged == [28]
    world.meter.answer_body(b"x" * 100)
    world.meter.answer_end(None)
    assert (world.charged, world.counted) == ([28], ["said"])
    assert world.client.told == ["answer", "answer_body", "answer_end"]


def test_a_trailer_is_charged_at_the_end_and_of_an_answer_of_trailers_only_with_its_head() -> None:
    trailer = msgspec.structs.replace(HEADER, source="trailer")
    world = World(trailer)
    world.answer((b"x-tokens", b"99"))
    assert world.charged == []
    world.meter.answer_end([(b"x-tokens", b"30")])
    assert world.charged == [29]
    world = World(trailer)
    world.answer((b"x-tokens", b"30"), ended=True)
    assert world.charged == [29]


@pytest.mark.parametrize("source", ["header", "trailer"])
def test_who_leaves_before_it_is_said_pays_as_for_an_answer_that_does_not_say_it(source: Any) -> None:
    world = World(msgspec.structs.replace(HEADER, source=source))
    world.meter.cancel()
    world.meter.cancel()
    assert (world.charged, world.counted, world.upstream.told) == ([6], ["unsaid"], ["cancel", "cancel"])


def test_what_no_upstream_answers_costs_nothing_more() -> None:
    world = World(HEADER)
    world.meter.refuse(NoEndpoint(reason="none"))
    assert (world.charged, world.counted, world.client.told) == ([], [], ["refuse"])


@pytest.mark.parametrize(("request_", "response"), [(True, False), (False, True), (True, True)])
def test_bytes_are_charged_as_they_pass(request_: bool, response: bool) -> None:
    world = World(Usage(source="bytes", request=request_, response=response, per_token=10))
    world.meter.body(b"x" * 25)  # 2 whole tokens, 1 of them taken in advance
    passed = sum(world.charged)
    assert passed == (1 if request_ else 0)
    world.answer()
    world.meter.answer_body(b"y" * 20)
    world.meter.answer_body(b"y" * 28)
    whole = (25 if request_ else 0) + (48 if response else 0)
    assert sum(world.charged) == whole // 10 - 1
    world.meter.answer_end(None)
    assert sum(world.charged) == -(-whole // 10) - 1

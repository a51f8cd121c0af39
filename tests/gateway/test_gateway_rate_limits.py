"""What is asked of rate-limit services, and what their answers mean."""

from __future__ import annotations

import pytest
from envoy.service.ratelimit.v3 import rls_pb2
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from gateway.rate_limits import grant_of, request_of
from mesh.model import Descriptor, QuotaLimit
from mesh.questions import Grant, TokenQuestion
from mesh.quota_services import RateLimitService
from quota.headers import rate_limit_headers

LIMIT = {"name": "shop/users/each", "level": "route", "per": (Descriptor("header", "x-user"), Descriptor("method")), "tokens": 0}


def limit_of(service: RateLimitService, **more: object) -> QuotaLimit:
    return QuotaLimit(service=service, **{**LIMIT, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("service", "cost", "expected"),
    [
        (
            RateLimitService(cluster="a", domain="d", keys=("user", "verb")),
            1,
            {"domain": "d", "descriptors": [{"entries": [{"key": "user", "value": "ann"}, {"key": "verb", "value": "GET"}]}]},
        ),
        (
            RateLimitService(cluster="a", requests=5, unit=2),
            3,
            {
                "domain": "tollhouse",
                "hitsAddend": 3,
                "descriptors": [
                    {
                        "entries": [
                            {"key": "limit", "value": "shop/users/each"},
                            {"key": "header", "value": "ann"},
                            {"key": "method", "value": "GET"},
                        ],
                        "limit": {"requestsPerUnit": 5, "unit": "MINUTE"},
                        "hitsAddend": "3",
                    }
                ],
            },
        ),
    ],
)
def test_what_is_asked(service: RateLimitService, cost: int, expected: object) -> None:
    question = TokenQuestion(limit_of(service), ("ann", "GET"), cost)
    assert json_format.MessageToDict(rls_pb2.RateLimitRequest.FromString(request_of(question, service, cost))) == expected


def answer(code: int, headers: dict[str, str] | None = None, **status: object) -> bytes:
    added = [{"key": name, "value": text} for name, text in (headers or {}).items()]
    made = json_format.ParseDict({"statuses": [status] if status else [], "responseHeadersToAdd": added}, rls_pb2.RateLimitResponse())
    made.overall_code = code
    return bytes(made.SerializeToString())


KNOWN = {"currentLimit": {"requestsPerUnit": 5, "unit": "MINUTE"}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (answer(1, limitRemaining=4, **KNOWN), Grant(True, 4)),
        (answer(1), Grant(True, limited=False)),
        (answer(2, durationUntilReset="1.2s", **KNOWN), Grant(False, 0, 1.2, 1.2, headers=((b"retry-after", b"2"),))),
        (answer(2, {"Retry-After": "9"}, durationUntilReset="1s", **KNOWN), Grant(False, 0, 1.0, 1.0, headers=((b"retry-after", b"9"),))),
        (answer(0), "the service answered with the code 0"),
        (answer(7), "the service answered with the code 7"),
        (answer(1, {"content-length": "5"}), "the service's answer has headers that can't go to a client"),
        (answer(1, {"x": "a\r\nb"}), "the service's answer has headers that can't go to a client"),
        (b"\xff\xff", "the service's answer is not one of the rate-limit service"),
    ],
)
def test_what_an_answer_means(message: bytes, expected: Grant | str) -> None:
    assert grant_of(message) == expected


@given(st.binary(max_size=60))
def test_noise_is_no_error_of_ours(message: bytes) -> None:
    found = grant_of(message)
    if isinstance(found, Grant):
        assert rls_pb2.RateLimitResponse.FromString(message).overall_code == (1 if found.admitted else 2)


def test_clients_are_told_what_the_service_says_and_what_we_say_of_our_own() -> None:
    theirs = TokenQuestion(limit_of(RateLimitService(cluster="a")), ("ann", "GET"))
    own = TokenQuestion(QuotaLimit(name="shop/own/each", level="route", per=(), tokens=1), ())
    said = ((b"x-ratelimit-limit", b"5"),)
    assert rate_limit_headers([(theirs, Grant(True, 4, headers=said))]) == said
    both = rate_limit_headers([(own, Grant(True, 0, 1.0)), (theirs, Grant(False, 0, 1.0, 1.0, headers=said))])
    assert both == ((b"ratelimit-policy", b'"each";q=1;w=1'), (b"ratelimit", b'"each";r=0;t=1'), *said)

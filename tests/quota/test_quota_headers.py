from __future__ import annotations

import pytest

from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from quota.headers import rate_limit_headers


def question(
    name: str = "shop/orders/per-caller", tokens: int = 10, interval: float = 1.0, burst: int = 20, shadow: bool = False
) -> TokenQuestion:
    return TokenQuestion(QuotaLimit(name=name, level="route", per=(), tokens=tokens, interval=interval, burst=burst, shadow=shadow), ("x",))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], {}),
        ([(question(), Grant(True, 19, 0.1))], {b"ratelimit-policy": b'"per-caller";q=20;w=2', b"ratelimit": b'"per-caller";r=19;t=1'}),
        (
            [(question(), Grant(False, 0, 2.0, 0.05))],
            {b"ratelimit-policy": b'"per-caller";q=20;w=2', b"ratelimit": b'"per-caller";r=0;t=2', b"retry-after": b"1"},
        ),
        (
            [(question(tokens=1, interval=60.0, burst=1), Grant(False, 0, 59.2, 59.2))],
            {b"ratelimit-policy": b'"per-caller";q=1;w=60', b"ratelimit": b'"per-caller";r=0;t=60', b"retry-after": b"60"},
        ),
        ([(question(shadow=True), Grant(False, 0, 2.0, 5.0))], {}),
        ([(question(), Grant(False, error="the store is gone"))], {}),
        (
            [(question(), Grant(True, 19, 0.1)), (question("shop/orders/all", 1000, 1.0, 500), Grant(False, 3, 0.4, 7.5))],
            {
                b"ratelimit-policy": b'"per-caller";q=20;w=2, "all";q=500;w=1',
                b"ratelimit": b'"per-caller";r=19;t=1, "all";r=3;t=1',
                b"retry-after": b"8",
            },
        ),
        (
            [(question("a/b/x"), Grant(True, 1)), (question("a/c/x"), Grant(True, 2))],
            {b"ratelimit-policy": b'"a/b/x";q=20;w=2, "a/c/x";q=20;w=2', b"ratelimit": b'"a/b/x";r=1;t=0, "a/c/x";r=2;t=0'},
        ),
        ([(question(shadow=True), Grant(False)), (question('a/b/sa"y\\é'), Grant(True, 1))],
         {b"ratelimit-policy": b'"sa\\"y\\\\?";q=20;w=2', b"ratelimit": b'"sa\\"y\\\\?";r=1;t=0'}),
    ],
)  # fmt: skip
def test_headers(pairs: list[tuple[TokenQuestion, Grant]], expected: dict[bytes, bytes]) -> None:
    assert dict(rate_limit_headers(pairs)) == expected


def test_a_changed_limit_of_the_same_name_is_not_told_by_the_old_numbers() -> None:
    assert rate_limit_headers([(question(), Grant(True))])[0][1] == b'"per-caller";q=20;w=2'
    assert rate_limit_headers([(question(burst=40), Grant(True))])[0][1] == b'"per-caller";q=40;w=4'

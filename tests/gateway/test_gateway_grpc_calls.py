"""What gRPC's documents say, as tables."""

from __future__ import annotations

import pytest

from gateway.grpc_calls import percent_encoded, speaks_grpc, status_of, timeout_of
from mesh.http import HTTP2, RequestHead
from mesh.refusals import BrokenBackend, Denied, NoHost, OverQuota, Refusal, UpstreamReset, UpstreamTimeout


def head(timeout: bytes) -> RequestHead:
    return RequestHead(b"POST", b"https", b"shop", b"/", [(b"grpc-timeout", timeout)], HTTP2, -1)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"250m", 0.25), (b"5u", 5e-6), (b"7n", 7e-9), (b"99999999S", 99999999), (b"0S", 0)],
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert timeout_of(head(value)) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"S", b"1", b"1s", b"1.5S", b"-1S", b"100000000S", b" 1S", b"1S ", b"\xb2S"])
def test_what_is_no_timeout(value: bytes) -> None:
    assert timeout_of(head(value)) is None


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (Denied(), b"7"),
        (Denied(code=401), b"16"),
        (NoHost(), b"12"),
        (OverQuota(), b"8"),
        (UpstreamTimeout(), b"4"),
        (BrokenBackend(), b"14"),
        (UpstreamReset(), b"14"),
        (UpstreamReset(reset=8), b"1"),
        (UpstreamReset(reset=7), b"14"),
        (UpstreamReset(reset=11), b"8"),
        (UpstreamReset(reset=12), b"7"),
        (UpstreamReset(reset=2), b"13"),
        (UpstreamReset(reset=5), b"2"),
        (Refusal(code=418), b"2"),
    ],
)
def test_statuses(refusal: Refusal, status: bytes) -> None:
    assert status_of(refusal) == status


@pytest.mark.parametrize(
    ("content", "grpc"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc;charset=x", True),
        (b"application/grpc-web", False),
        (b"application/grpc-web-text+proto", False),
        (b"text/plain", False),
    ],
)
def test_who_speaks_grpc(content: bytes, grpc: bool) -> None:
    assert speaks_grpc([(b"content-type", content)]) is grpc


def test_messages() -> None:
    assert percent_encoded("100 % \u00e9\n") == b"100 %25 %C3%A9%0A"

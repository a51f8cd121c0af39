"""How a refusal by a limit is told: headers, a body of its author's own, gRPC's details, and what the log says of it."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import grpc
import msgspec
import pytest
from gateway_world import LIMIT, YES, a_head, a_rule, pending_of, place_of
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st
from through_world import through

from gateway.plan import Answers
from gateway.replies import note, refusal_answer
from gateway.settle import settle
from mesh.model import Descriptor, QuotaLimit
from mesh.outcome import Outcome
from mesh.questions import Grant
from mesh.quota_answers import OPERATORS, QuotaAnswer, answer_of, template
from mesh.refusals import OverQuota, QuotaError
from telemetry.access_log import fields_of

EMPTY = Grant(False, remaining=2, reset=30.0, retry_after=6.2)
GRPC = [(b"content-type", b"application/grpc+proto"), (b"te", b"trailers")]


def limit(**response: Any) -> QuotaLimit:
    return msgspec.structs.replace(LIMIT, answer=answer_of(response) if response else None)


def refused(*limits: QuotaLimit, grants: tuple[Grant, ...] = (EMPTY,), **head: Any) -> OverQuota:
    pending = pending_of(place_of(a_rule(limits=limits)), a_head(headers=[(b"a", b"1")], **head))
    settled = settle(pending, Answers(grants=grants))
    assert isinstance(settled, OverQuota)
    return settled


def told(refusal: OverQuota, request_id: bytes = b"7f3a", **head: Any) -> tuple[int, dict[bytes, bytes], bytes]:
    status, headers, body = refusal_answer(refusal, a_head(**head), b"now", request_id)
    assert len(headers) == len({name for name, _ in headers})
    return status, dict(headers), body


def test_what_goes_without_saying() -> None:
    status, headers, body = told(refused(limit()))
    assert (status, body) == (429, b"Too many requests: slow down.\n")
    assert headers[b"retry-after"] == b"7" and headers[b"content-type"].startswith(b"text/plain")


def test_an_answer_of_its_authors_own() -> None:
    text = '{"limit":"%LIMIT%","policy":"%POLICY%","again":%RETRY_AFTER%,"left":%REMAINING%,"of":%QUOTA%,"in":%WINDOW%,'
    text += '"id":"%REQUEST_ID%","status":%RESPONSE_CODE%,"sure":"100 %%"}'
    made = limit(status=503, contentType="application/json", body=text, headers=[{"name": "X-Limit", "value": "%LIMIT%; %QUOTA%"}])
    status, headers, body = told(refused(made))
    assert status == 503
    assert json.loads(body) == {
        "limit": "caller",
        "policy": "shop/orders",
        "again": 7,
        "left": 2,
        "of": 20,
        "in": 2,
        "id": "7f3a",
        "status": 503,
        "sure": "100 %",
    }
    assert headers[b"content-type"] == b"application/json" and headers[b"content-length"] == b"%d" % len(body)
    assert headers[b"x-limit"] == b"caller; 20" and headers[b"retry-after"] == b"7"


def test_nothing_that_a_client_sends_gets_into_an_answer() -> None:
    made = refused(limit(contentType="text/html", body="<p>%REQUEST_ID%</p>"))
    body = told(made, b'"><script>alert(1)</script>\r\n\0' + b"x" * 5000)[2]
    assert body.startswith(b"<p>___script_alert_1___script____x") and len(body) == 128 + len(b"<p></p>")


@pytest.mark.parametrize(("body", "wanted"), [("", b""), ("%%REQUEST_ID%%", b"%REQUEST_ID%"), ("a%REQUEST_ID%%REQUEST_ID%", b"a11")])
def test_templates(body: str, wanted: bytes) -> None:
    assert told(refused(limit(body=body)), b"1")[2] == wanted


@given(st.lists(st.sampled_from([*(f"%{name}%" for name in OPERATORS), "%%", "a", "é", "{", '"']), max_size=40))
def test_whatever_a_template_is_made_of_it_is_told_whole(parts: list[str]) -> None:
    body = told(refused(limit(body="".join(parts))), b"id")[2].decode()
    values = {"LIMIT": "caller", "POLICY": "shop/orders", "RETRY_AFTER": "7", "REMAINING": "2", "QUOTA": "20", "WINDOW": "2"}
    values |= {"REQUEST_ID": "id", "RESPONSE_CODE": "429"}
    assert body == "".join("%" if part == "%%" else values.get(part.strip("%"), part) for part in parts)


@given(st.floats(0, 1e10), st.integers(0, 65535), st.floats(0, 3600))
def test_jitter_only_ever_puts_off(received: float, port: int, jitter: float) -> None:
    made = msgspec.structs.replace(LIMIT, answer=QuotaAnswer(jitter=jitter))
    pending = pending_of(place_of(a_rule(limits=(made,))), a_head())
    pending.asking.received = received
    pending.asking.peer = msgspec.structs.replace(pending.asking.peer, port=port)
    settled = settle(pending, Answers(grants=(EMPTY,)))
    assert isinstance(settled, OverQuota)
    assert 6.2 <= settled.retry_after <= 6.2 + jitter + 1e-6
    assert 7 <= int(dict(settled.headers)[b"retry-after"]) <= 6.2 + jitter + 1
    again = settle(pending, Answers(grants=(EMPTY,)))
    assert again == settled, "settle is a function of its arguments"


def test_jitter_spreads() -> None:
    pending = pending_of(place_of(a_rule(limits=(limit(retryAfterJitter="1000s"),))), a_head())
    found = []
    for at in range(200):
        pending.asking.received = 1_800_000_000 + at / 1000
        settled = settle(pending, Answers(grants=(EMPTY,)))
        assert isinstance(settled, OverQuota)
        found.append(settled.retry_after - 6.2)
    found.sort()
    assert found[0] < 150 and found[-1] > 850 and 300 < found[100] < 700


def test_a_policy_that_only_spreads_says_the_same_else() -> None:
    status, headers, body = told(refused(limit(retryAfterJitter="1ns")))
    assert (status, headers[b"retry-after"], body) == (429, b"7", b"Too many requests: slow down.\n")


def test_who_refuses_decides_how_it_is_told() -> None:
    other = msgspec.structs.replace(limit(status=418, body="other"), name="shop/orders/other")
    shadow = msgspec.structs.replace(limit(status=500), name="shop/orders/shadow", shadow=True)
    never = Grant(False, retry_after=86_400.0)
    made = refused(shadow, limit(status=429, body="first"), other, grants=(never, YES, EMPTY))
    assert told(made)[0::2] == (418, b"other")
    assert made.limit == "shop/orders/other" and made.retry_after == pytest.approx(6.2)


@pytest.mark.parametrize("response", [{}, {"status": 503, "body": "%LIMIT%", "contentType": "text/html"}])
def test_grpc_is_told_by_rich_status(response: dict[str, Any]) -> None:
    made = refused(limit(**response))
    status, headers, body = told(made, method=b"POST", headers=GRPC)
    assert (status, headers[b"grpc-status"], headers[b"content-type"], body) == (200, b"8", b"application/grpc", b"")
    raw = headers[b"grpc-status-details-bin"]
    rich = status_pb2.Status.FromString(base64.b64decode(raw + b"=" * (-len(raw) % 4)))
    assert (rich.code, rich.message) == (8, OverQuota.sentence)
    retry, failure = error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure()
    assert rich.details[0].Unpack(retry) and rich.details[1].Unpack(failure)
    assert retry.retry_delay.ToMilliseconds() == 6200
    assert [each.subject for each in failure.violations] == ["limit:caller"]


@given(st.floats(0.0001, 86_400), st.text(max_size=300))
def test_details_can_be_read_whatever_they_say(wait: float, name: str) -> None:
    name = name.encode("utf-8", "replace").decode()
    made = OverQuota(retry_after=wait, limit=name, told="x" * 200)
    raw = told(made, method=b"POST", headers=GRPC)[1][b"grpc-status-details-bin"]
    rich = status_pb2.Status.FromString(base64.b64decode(raw + b"=" * (-len(raw) % 4)))
    retry = error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(retry)
    assert wait - 1e-6 <= retry.retry_delay.ToNanoseconds() / 1e9 <= wait + 0.002


def test_a_store_that_is_away_is_no_exhausted_quota() -> None:
    pending = pending_of(place_of(a_rule(limits=(limit(status=418),))), a_head())
    settled = settle(pending, Answers(grants=(Grant(False, error="gone"),)))
    assert isinstance(settled, QuotaError) and settled.answer_status == 503
    headers = dict(refusal_answer(settled, a_head(method=b"POST", headers=GRPC), b"now")[1])
    assert headers[b"grpc-status"] == b"14" and b"grpc-status-details-bin" not in headers


def test_which_limit_refused_is_logged_and_no_secret() -> None:
    per = (Descriptor("header", "x-key"), Descriptor("method"))
    pending = pending_of(
        place_of(a_rule(limits=(msgspec.structs.replace(LIMIT, per=per),))), a_head(headers=[(b"x-key", b"a-long-secret-api-key")])
    )
    settled = settle(pending, Answers(grants=(EMPTY,)))
    assert isinstance(settled, OverQuota)
    outcome = Outcome(pending.asking.head, pending.asking.peer, "edge/gw", "http", 0.0)
    note(outcome, settled, False)
    fields = fields_of(outcome)
    assert fields["refused_by_limit"] == "shop/orders/caller" and fields["response_flags"] == "RL"
    assert fields["reason"].startswith("no token left of shop/orders/caller for a-lo...") and "secret" not in fields["reason"]


def test_a_real_grpc_client_reads_when_to_try_again() -> None:
    async def go() -> None:
        made_limit = msgspec.structs.replace(LIMIT, answer=answer_of({"status": 503, "body": "x", "retryAfterJitter": "1ms"}))
        async with asyncio.timeout(40), through(1, quota=(made_limit,)) as made:
            made.answers.grant = EMPTY
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{made.port}", (("grpc.default_authority", "shop.example"),))
            async with channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/shop.Orders/unary")(b"hello")
            problem = caught.value
            assert problem.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and problem.details() == OverQuota.sentence
            rich = status_pb2.Status.FromString(dict(problem.trailing_metadata() or ())["grpc-status-details-bin"])  # type: ignore[arg-type]
            retry = error_details_pb2.RetryInfo()
            assert rich.details[0].Unpack(retry) and 6200 <= retry.retry_delay.ToMilliseconds() <= 6202
            (outcome,) = made.outcomes
            assert (outcome.status, outcome.grpc_status, outcome.flag, outcome.limit) == (200, "8", "RL", made_limit.name)

    asyncio.run(go())


def test_what_templates_are_made_of() -> None:
    assert template("a%LIMIT%%%") == (b"a", b"LIMIT", b"%")

"""Asks rate-limit services for the tokens of limits that QuotaPolicies leave to them (`extensionProvider`), over the gateway's own upstream
side, as Envoy's rate limit filter does (envoy.service.ratelimit.v3). All other limits are the lessee's, at no cost.

A service counts for itself: what it has charged can't be given back when another limit refuses, and nothing is kept here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from envoy.service.ratelimit.v3 import rls_pb2
from google.protobuf.message import DecodeError

from gateway.exchange import Forwarder
from gateway.headers import FRAMING
from gateway.inquiry import grpc_call, grpc_message, plan_of, send
from mesh.http import NO_HEAD, Header
from mesh.peer import Caller, Peer
from mesh.questions import Asking, Grant, Lessee, TokenQuestion
from mesh.quota_services import RateLimitService
from pdp.fields import MOST_FIELDS, field_problem
from telemetry.metrics import Counter
from telemetry.record import Telemetry

ASK: Final = b"/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
_OK: Final = rls_pb2.RateLimitResponse.OK
_OVER: Final = rls_pb2.RateLimitResponse.OVER_LIMIT
_RETRY: Final = b"retry-after"
Done = Callable[[Grant], None]


def answers_of(telemetry: Telemetry) -> Counter:
    """What counts the answers of rate-limit services; one for a process."""
    return telemetry.counter(
        "tollhouse_quota_service_answers_total",
        "Answers of rate-limit services, by limit; `unlimited`: the service knows no such limit.",
        ("limit", "result"),
        max_series=4096,
    )


class Services:
    """A `mesh.questions.Lessee`: `own`, and the services for the limits that are theirs."""

    def __init__(self, own: Lessee, forwarder: Forwarder, gateway: str, answers: Counter) -> None:
        """`answers` counts what services answer: `answers_of`, one for a process."""
        self.take = own.take
        """Has never anything in hand of a limit of a service."""
        self._own = own
        self._forwarder = forwarder
        self._asking = Asking(NO_HEAD, Peer(), Caller(""), gateway, "", "", "", "", time.time())
        self._answers = answers

    def ask(self, question: TokenQuestion, done: Done) -> None:
        """See `mesh.questions.Lessee`."""
        service = question.limit.service
        if service is None:
            self._own.ask(question, done)
        else:
            self._ask(question, service, question.cost, done)

    def give_back(self, question: TokenQuestion) -> None:
        """See `mesh.questions.Lessee`. Services take nothing back."""
        if question.limit.service is None:
            self._own.give_back(question)

    def charge(self, question: TokenQuestion, tokens: int) -> None:
        """As `mesh.questions.Lessee`: only our own buckets are charged after the answer."""
        self._own.charge(question, tokens)

    def peek(self, question: TokenQuestion, done: Done) -> None:
        """See `mesh.questions.Lessee`."""
        service = question.limit.service
        if service is None:
            self._own.peek(question, done)
        else:
            self._ask(question, service, 0, done)

    def _ask(self, question: TokenQuestion, service: RateLimitService, cost: int, done: Done) -> None:
        limit = question.limit
        if not service.cluster:
            _Hearer(question, self._count, done).failed("unavailable", "the Mesh has no such rate-limit service")
            return
        head, body = grpc_call(service.cluster, ASK, request_of(question, service, cost))
        plan = plan_of(limit.name, service.cluster, self._asking, head, limit.timeout)
        send(self._forwarder, plan, body, _Hearer(question, self._count, done))

    def _count(self, limit: str, result: str) -> None:
        self._answers.inc((limit, result))


class _Hearer:
    """Makes a grant of what came of a question."""

    __slots__ = ("_count", "_done", "_question")

    def __init__(self, question: TokenQuestion, count: Callable[[str, str], None], done: Done) -> None:
        self._question = question
        self._count = count
        self._done = done

    def answered(self, status: int, headers: list[Header], trailers: list[Header], body: bytes) -> None:
        """As `gateway.inquiry.Hearer.answered`."""
        message = grpc_message(status, [*headers, *trailers], body)
        grant = message if isinstance(message, str) else grant_of(message)
        if isinstance(grant, str):
            self.failed("provider", grant)
            return
        known = not grant.admitted or grant.limited
        self._count(self._question.limit.name, ("admitted" if grant.admitted else "refused") if known else "unlimited")
        self._done(grant)

    def failed(self, cause: str, reason: str) -> None:
        """As `gateway.inquiry.Hearer.failed`: the failure mode is the answer."""
        limit = self._question.limit
        self._count(limit.name, "error")
        self._done(Grant(limit.failure_mode == "Allow", error=f"rate-limit service: {cause}: {reason}"))


def request_of(question: TokenQuestion, service: RateLimitService, cost: int) -> bytes:
    """The `RateLimitRequest`, with one descriptor. A `cost` of 0 looks and takes nothing."""
    limit, key = question.limit, question.key
    request = rls_pb2.RateLimitRequest(domain=service.domain)
    descriptor = request.descriptors.add()
    if service.keys:
        names: tuple[str, ...] = service.keys
    else:
        descriptor.entries.add(key="limit", value=limit.name)
        names = tuple([part.kind for part in limit.per])
    for name, value in zip(names, key, strict=True):
        descriptor.entries.add(key=name, value=value)
    if service.requests:
        descriptor.limit.requests_per_unit = service.requests
        descriptor.limit.unit = service.unit
    if cost != 1:
        descriptor.hits_addend.value = cost
        request.hits_addend = cost
    return bytes(request.SerializeToString())


def grant_of(message: bytes) -> Grant | str:
    """What a `RateLimitResponse` means, or why it can't be used."""
    try:
        answer = rls_pb2.RateLimitResponse.FromString(message)
    except DecodeError:
        return "the service's answer is not one of the rate-limit service"
    if answer.overall_code not in {_OK, _OVER}:
        return f"the service answered with the code {answer.overall_code}"
    admitted = answer.overall_code == _OK
    status = answer.statuses[0] if answer.statuses else rls_pb2.RateLimitResponse.DescriptorStatus()
    reset = status.duration_until_reset.seconds + status.duration_until_reset.nanos / 1e9
    headers = [(item.key.lower().encode(), item.value.encode()) for item in answer.response_headers_to_add]
    if len(headers) > MOST_FIELDS or any(name in FRAMING or field_problem(name, value) for name, value in headers):
        return "the service's answer has headers that can't go to a client"
    if not admitted and reset > 0 and all(name != _RETRY for name, _ in headers):
        headers.append((_RETRY, b"%d" % max(1, -(-int(reset * 1000) // 1000))))
    return Grant(
        admitted,
        status.limit_remaining,
        max(0.0, reset),
        0.0 if admitted else max(0.0, reset),
        headers=tuple(headers),
        limited=status.HasField("current_limit"),
    )

"""The rate-limit service v3 (`envoy.service.ratelimit.v3.RateLimitService`) over a lessee: for Envoy, Istio and others.

What a descriptor means is looked up in `quota.descriptors.Limits`. A descriptor without a limit is OK. Tokens are taken for all descriptors
of a request; when one is over its limit, the others get theirs back. When the store does not answer, a QuotaPolicy's failure mode is the
answer; for a limit of envoyproxy/ratelimit's files the call ends with UNAVAILABLE, and the asker's `failure_mode_deny` decides. A limit in
quota mode refuses nobody: the answer's dynamic metadata name the descriptors that are over (`quotaModeViolations`), as there.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import grpc
import msgspec
from envoy.config.core.v3 import base_pb2
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc

from mesh.questions import Grant, Lessee, TokenQuestion
from quota.descriptor_file import UNITS
from quota.descriptors import Found, Limits
from quota.headers import rate_limit_headers
from telemetry.record import Telemetry

_OK: Final = rls_pb2.RateLimitResponse.OK
_OVER: Final = rls_pb2.RateLimitResponse.OVER_LIMIT
_UNIT_NAMES: Final = {number: name.lower() for name, number in rls_pb2.RateLimitResponse.RateLimit.Unit.items() if name.lower() in UNITS}
_UNIT_NUMBERS: Final = {name: number for number, name in _UNIT_NAMES.items()}
_MOST: Final = 64
"""Descriptors in a request, and entries in a descriptor."""


class QuotaService:
    """The gRPC server. Its owner is the wiring; it belongs to one event loop."""

    def __init__(
        self, lessee: Lessee, limits: Limits, *, telemetry: Telemetry | None = None, headers: bool = True, max_calls: int = 900
    ) -> None:
        """`headers`: add `RateLimit` and `RateLimit-Policy` to what the asker answers its client. `max_calls`: how many calls may be under
        way; more are refused with RESOURCE_EXHAUSTED."""
        self._lessee = lessee
        self._limits = limits
        self._headers = headers
        self._max = max_calls
        self._server: Any = None
        self._answers = (
            telemetry.counter("tollhouse_ratelimit_answers_total", "Descriptors answered, by limit.", ("rule", "result"), max_series=4096)
            if telemetry is not None
            else None
        )

    def use(self, limits: Limits) -> None:
        """Looks limits up in `limits` from the next request on."""
        self._limits = limits

    async def start(self, listen: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serves at `listen` (`host:port`, `unix:path`); without credentials in plaintext. Returns the port; raises OSError."""
        server = grpc.aio.server(maximum_concurrent_rpcs=self._max, options=[("grpc.so_reuseport", 0)])
        rls_pb2_grpc.add_RateLimitServiceServicer_to_server(_Servicer(self), server)
        try:
            port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
        except RuntimeError as problem:
            raise OSError(f"{listen}: {problem}") from None
        if port == 0:
            raise OSError(f"{listen}: this address can't be listened at")
        await server.start()
        self._server = server
        return int(port)

    async def stop(self, grace: float = 5.0) -> None:
        """Takes no more calls, and gives those under way `grace` seconds."""
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None

    async def answer(self, request: Any) -> Any:
        """The `RateLimitResponse` for a `RateLimitRequest`. Raises `ValueError` (the request is unusable) and `ConnectionError` (the store
        is gone and the asker is to decide)."""
        found = self._find(request)
        grants: list[Grant | None] = []
        waiting: list[tuple[int, asyncio.Future[Grant]]] = []
        now = time.monotonic()
        for at, (_, question) in enumerate(found):
            grant = None if question is None or question.cost == 0 else self._lessee.take(question, now)
            if grant is None and question is not None:
                waiting.append((at, self._asked(question)))
            grants.append(grant)
        for at, future in waiting:
            grants[at] = await future
        return self._settle(request, found, grants)

    def _find(self, request: Any) -> list[tuple[Found | None, TokenQuestion | None]]:
        if not request.domain:
            raise ValueError("the request has no domain")
        if not request.descriptors:
            raise ValueError("the request has no descriptors")
        if len(request.descriptors) > _MOST:
            raise ValueError(f"the request has more than {_MOST} descriptors")
        found: list[tuple[Found | None, TokenQuestion | None]] = []
        for descriptor in request.descriptors:
            if not descriptor.entries or len(descriptor.entries) > _MOST:
                raise ValueError(f"a descriptor needs from 1 to {_MOST} entries")
            override = None
            if descriptor.HasField("limit"):
                unit = _UNIT_NAMES.get(descriptor.limit.unit)
                if unit is None:
                    raise ValueError("a descriptor's limit has no unit")
                override = (descriptor.limit.requests_per_unit, unit)
            limit = self._limits.find(request.domain, [(entry.key, entry.value) for entry in descriptor.entries], override)
            hits = descriptor.hits_addend.value if descriptor.HasField("hits_addend") else request.hits_addend or 1
            found.append((limit, _asked_for(limit, hits)))
        replaced = frozenset[str]().union(*(limit.replaces for limit, _ in found if limit is not None))
        return [
            (None, None) if limit is not None and limit.name and limit.name in replaced else (limit, question) for limit, question in found
        ]

    def _asked(self, question: TokenQuestion) -> asyncio.Future[Grant]:
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()

        def done(grant: Grant) -> None:
            if not future.done():
                future.set_result(grant)
            elif grant.admitted and not grant.error and question.cost:
                self._lessee.give_back(question)

        if question.cost == 0:
            self._lessee.peek(msgspec.structs.replace(question, cost=1), lambda grant: done(_looked(grant)))
        else:
            self._lessee.ask(question, done)
        return future

    def _settle(self, request: Any, found: Sequence[tuple[Found | None, TokenQuestion | None]], grants: Sequence[Grant | None]) -> Any:
        response = rls_pb2.RateLimitResponse(overall_code=_OK)
        shown: list[tuple[TokenQuestion, Grant]] = []
        failed = ""
        over = False
        used_up: list[int] = []
        for at, ((limit, question), grant) in enumerate(zip(found, grants, strict=True)):
            status = response.statuses.add(code=_OK)
            if limit is None:
                continue
            if question is None or grant is None:
                status.limit_remaining = 2**32 - 1
                self._count(limit, "unlimited")
                continue
            if grant.error and not limit.ours and not limit.softness:
                failed = grant.error
            refused = not grant.admitted and not limit.softness
            over = over or refused
            if limit.quota and not grant.admitted:
                used_up.append(at)
            status.code = _OVER if refused else _OK
            status.current_limit.requests_per_unit = min(limit.requests, 2**32 - 1)
            status.current_limit.unit = _UNIT_NUMBERS[limit.unit]
            status.current_limit.name = limit.name
            status.limit_remaining = max(0, min(grant.remaining, 2**32 - 1))
            status.duration_until_reset.FromMilliseconds(math.ceil((grant.reset if grant.admitted else grant.retry_after) * 1000))
            shown.append((question, grant))
            self._count(limit, "error" if grant.error else "admitted" if grant.admitted else limit.softness or "refused")
        if failed or over:
            for question, grant in shown:
                if grant.admitted and not grant.error and question.cost:
                    self._lessee.give_back(question)
        if failed:
            raise ConnectionError(failed)
        if over:
            response.overall_code = _OVER
        if any(limit is not None and limit.quota for limit, _ in found):
            response.dynamic_metadata.update(_metadata(request, used_up))
        if self._headers:
            for name, value in rate_limit_headers(shown):
                response.response_headers_to_add.append(base_pb2.HeaderValue(key=name.decode(), value=value.decode()))
        return response

    def _count(self, limit: Found, result: str) -> None:
        if self._answers is not None:
            self._answers.inc((limit.rule, result))


def _asked_for(limit: Found | None, hits: int) -> TokenQuestion | None:
    if limit is None or limit.question is None:
        return None
    return limit.question if hits == 1 else TokenQuestion(limit.question.limit, limit.question.key, hits * limit.question.cost)


def _metadata(request: Any, used_up: Sequence[int]) -> dict[str, Any]:
    """What envoyproxy/ratelimit says in quota mode: the question, and which descriptors (by their place) are over their limits."""
    descriptors = [{"entries": [f"{entry.key}={entry.value}" for entry in descriptor.entries]} for descriptor in request.descriptors]
    said: dict[str, Any] = {"domain": request.domain, "descriptors": descriptors, "quotaModeEnabled": True}
    if request.hits_addend:
        said["hitsAddend"] = request.hits_addend
    if used_up:
        said["quotaModeViolations"] = list(used_up)
    return said


def _looked(grant: Grant) -> Grant:
    """The answer to a question that costs nothing: how things are, and never a refusal."""
    return msgspec.structs.replace(grant, admitted=True, retry_after=0.0)


class _Servicer(rls_pb2_grpc.RateLimitServiceServicer):  # type: ignore[misc]
    """The wire."""

    def __init__(self, service: QuotaService) -> None:
        self._service = service

    async def ShouldRateLimit(self, request: Any, context: Any) -> Any:
        """Answers one request."""
        try:
            return await self._service.answer(request)
        except ValueError as problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(problem))
        except ConnectionError as problem:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(problem))

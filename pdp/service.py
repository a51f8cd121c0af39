"""The decision point's face: `envoy.service.auth.v3.Authorization/Check` over gRPC, for our gateways, Envoy and Istio.

Which decision: the metadata `tollhouse-decision` (our gateways), else the context extension `decision` (an Envoy's configuration), else the
default. Which revision: the metadata `tollhouse-revision`, else the active one; one that is not held here is answered with
FAILED_PRECONDITION, so that the asker tries another replica. With entry points in the revision, only those may be asked for. How long it
may take: the metadata `tollhouse-timeout` in seconds, else a little less than the call's deadline.

An allow or a denial is an answer; an error is a gRPC status: DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED and UNAVAILABLE are the
replica's trouble, INTERNAL and INVALID_ARGUMENT are the policy's or the question's own and would be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc import aio

from identity.files import IdentitySource
from mesh.questions import Decision, Verdict
from pdp.check import check_response
from pdp.input import REVISION
from pdp.point import REVISION_CAUSE, DecisionPoint
from pdp.rpc import CAUSE, DECISION, SERVICE, TIMEOUT

MAX_MESSAGE: Final = 16 << 20
"""Bytes of one request."""
_PINGS: Final = (("grpc.http2.min_recv_ping_interval_without_data_ms", 5000), ("grpc.keepalive_permit_without_calls", 1))
"""Our gateways ask every ten seconds whether we are still there."""
_LONGEST: Final = 60.0
"""Seconds that a check may take, whatever its caller says."""
_PATIENCE: Final = 5.0
"""Seconds for a caller that sets no deadline."""
_SERVING: Final = b"\x08\x01"
_NOT_SERVING: Final = b"\x08\x02"

_STATUS: Final = {
    "timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "input": grpc.StatusCode.INVALID_ARGUMENT,
    "caller": grpc.StatusCode.PERMISSION_DENIED,
    REVISION_CAUSE: grpc.StatusCode.FAILED_PRECONDITION,
}
"""By the error's cause; INTERNAL for all others."""

Context = aio.ServicerContext[Any, Any]


class PolicyService:
    """Answers checks by an engine. Owned by one event loop; started and stopped by the wiring."""

    def __init__(self, point: DecisionPoint, *, callers: Callable[[], frozenset[str]] | None = None, max_calls: int = 950) -> None:
        """`callers`, under mTLS, gives the SPIFFE IDs that may ask; None lets everybody whose certificate is good. `max_calls` at a time,
        which is more than the point decides: for health checks, and for saying no in words."""
        self.point = point
        self._callers = callers
        self._max_calls = max_calls
        self._server: aio.Server | None = None
        self._stopping = False

    async def start(self, listen: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serves at `host:port` (port 0: any) and returns the port; in plaintext without `credentials`. Raises OSError when it can't."""
        server = aio.server(
            maximum_concurrent_rpcs=self._max_calls,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", 1000),
                *_PINGS,
            ],
        )
        check = grpc.unary_unary_rpc_method_handler(
            self._check, request_deserializer=CheckRequest.FromString, response_serializer=CheckResponse.SerializeToString
        )
        health = grpc.unary_unary_rpc_method_handler(self._health)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, {"Check": check}),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": health}),
            )
        )
        try:
            port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
        except RuntimeError as problem:
            raise OSError(f"the decision point can't listen at {listen}: {problem}") from problem
        if port == 0:
            raise OSError(f"the decision point can't listen at {listen}")
        await server.start()
        self._server = server
        return port

    async def stop(self, grace: float = 5.0) -> None:
        """Takes no more checks, and returns when those on their way are answered, `grace` seconds later at most."""
        self._stopping = True
        if self._server is not None:
            await self._server.stop(grace)
            self._server = None

    async def _check(self, request: CheckRequest, context: Context) -> CheckResponse:
        if self._callers is not None and not self._welcome(context, self._callers()):
            await self._refuse(context, self.point.refused("caller", "the caller may not ask here"))
        metadata = dict(context.invocation_metadata() or ())
        left: float | None = context.time_remaining()
        # A little less than the caller's time, so that it hears what took so long.
        seconds = _PATIENCE if left is None else min(left * 0.95, _LONGEST)
        told = metadata.get(TIMEOUT)
        if told is not None:
            try:
                seconds = max(min(seconds, float(told)), 0.0)
            except ValueError:
                await self._refuse(context, self.point.refused("input", f"{TIMEOUT} is to be a number of seconds"))
        decision = await self.point.decide(
            request, revision=str(metadata.get(REVISION) or ""), decision=str(metadata.get(DECISION) or ""), seconds=seconds
        )
        if decision.verdict is Verdict.ERROR:
            await self._refuse(context, decision)
        try:
            return check_response(decision)
        except ValueError as problem:
            await self._refuse(context, self.point.refused("answer", str(problem)))
            raise

    async def _refuse(self, context: Context, decision: Decision) -> None:
        """Ends the call; always raises."""
        code = _STATUS.get(decision.cause, grpc.StatusCode.INTERNAL)
        await context.abort(code, decision.reason[:2000], ((CAUSE, decision.cause),))

    @staticmethod
    def _welcome(context: Context, callers: frozenset[str]) -> bool:
        names = (context.auth_context() or {}).get("x509_subject_alternative_name", ())
        return any(name.decode("utf-8", "replace") in callers for name in names)

    async def _health(self, request: bytes, context: Context) -> bytes:
        """`grpc.health.v1.Health/Check`: a message with one string in, one with one enumeration out."""
        if request not in {b"", b"\x0a\x00", b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()}:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _NOT_SERVING if self._stopping or not self.point.ready else _SERVING


def server_credentials(source: IdentitySource) -> grpc.ServerCredentials:
    """mTLS for the port: our own certificate, clients must show one that the trust bundle signed; follows renewals."""
    last = _configuration(source)
    seen = source.current

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        if source.current is seen:
            return None
        seen = source.current
        return _configuration(source)

    return grpc.dynamic_ssl_server_credentials(last, fetch, require_client_authentication=True)  # type: ignore[arg-type] # None is for: no change


def _configuration(source: IdentitySource) -> grpc.ServerCertificateConfiguration:
    identity = source.current
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.chain)], root_certificates=identity.bundle)

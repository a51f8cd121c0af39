"""The decision point's face: `envoy.service.auth.v3.Authorization/Check` over gRPC, for our gateways, Envoy and Istio.

Which decision: the metadata `tollhouse-decision` (our gateways), else the context extension `decision` (an Envoy's configuration), else the
default. Which revision: the metadata `tollhouse-revision`, else the active one; one that is not held here is answered with
FAILED_PRECONDITION, so that the asker tries another replica. With entry points in the revision, only those may be asked for. How long it
may take: the metadata `tollhouse-timeout` in seconds, else a little less than the call's deadline.

An allow or a denial is an answer; an error is a gRPC status: DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED and UNAVAILABLE are the
replica's trouble, INTERNAL and INVALID_ARGUMENT are the policy's or the question's own and would be the same everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc import aio

from identity.files import IdentitySource
from mesh.policy import Revision
from mesh.questions import Verdict
from pdp.answer import decision_of
from pdp.check import check_response
from pdp.engines.engine import Engine, Evaluation
from pdp.input import REVISION, document_of_check
from telemetry.record import Telemetry

DECISION: Final = "tollhouse-decision"
"""gRPC metadata that names the decision to make."""
TIMEOUT: Final = "tollhouse-timeout"
"""gRPC metadata that says how many seconds the decision may take; the call itself may last longer, to hear that it took too long."""
CAUSE: Final = "tollhouse-cause"
"""Trailing gRPC metadata that says what kind of error ended a call (`Decision.cause`)."""
REVISION_CAUSE: Final = "revision"
"""The cause when the revision that was asked for is not held."""
EXTENSION: Final = "decision"
"""Context extension that does so for an Envoy."""
SERVICE: Final = "envoy.service.auth.v3.Authorization"
MAX_PENDING: Final = 900
"""Calls at a time: from about 1,000 on grpcio's server cancels some at random."""
MAX_MESSAGE: Final = 16 << 20
"""Bytes of one request."""
_PINGS: Final = (("grpc.http2.min_recv_ping_interval_without_data_ms", 5000), ("grpc.keepalive_permit_without_calls", 1))
"""Our gateways ask every ten seconds whether we are still there."""
_LONGEST: Final = 60.0
"""Seconds that a check may take, whatever its caller says."""
_PATIENCE: Final = 5.0
"""Seconds for a caller that sets no deadline."""
_BOUNDS: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SERVING: Final = b"\x08\x01"
_NOT_SERVING: Final = b"\x08\x02"

_STATUS: Final = {
    "timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
    "input": grpc.StatusCode.INVALID_ARGUMENT,
}
"""By the error's cause; INTERNAL for all others."""

Context = aio.ServicerContext[Any, Any]


class PolicyService:
    """Answers checks by an engine. Owned by one event loop; started and stopped by the wiring."""

    def __init__(
        self,
        engine: Engine,
        *,
        active: Callable[[], Revision | None],
        held: Callable[[str], Revision | None] | None = None,
        decision: str = "",
        callers: Callable[[], frozenset[str]] | None = None,
        max_pending: int = MAX_PENDING,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`active` gives the revision for those who name none, `held` one by its digest (by default the active one only). `decision` is
        the default entry point. `callers`, under mTLS, gives the SPIFFE IDs that may ask; None lets everybody whose certificate is good."""
        self._engine = engine
        self._active = active
        self._held = held
        self._decision = decision
        self._callers = callers
        self._max_pending = max_pending
        self._server: aio.Server | None = None
        self._stopping = False
        self.pending = 0
        """Checks that have no answer yet."""
        self._checks = self._seconds = None
        if telemetry is not None:
            self._checks = telemetry.counter("tollhouse_pdp_checks_total", "Checks that were answered, by answer.", ("verdict", "cause"))
            self._seconds = telemetry.histogram("tollhouse_pdp_check_seconds", "Time that a check took.", _BOUNDS)
            telemetry.gauge_function("tollhouse_pdp_checks_pending", "Checks without an answer yet.", lambda: self.pending)

    async def start(self, listen: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Serves at `host:port` (port 0: any) and returns the port; in plaintext without `credentials`. Raises OSError when it can't."""
        server = aio.server(
            maximum_concurrent_rpcs=self._max_pending + 50,  # room for health checks and for saying no in words
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
        loop = asyncio.get_running_loop()
        started = loop.time()
        self.pending += 1
        try:
            return await self._answer(request, context)
        finally:
            self.pending -= 1
            if self._seconds is not None:
                self._seconds.observe(loop.time() - started)

    async def _answer(self, request: CheckRequest, context: Context) -> CheckResponse:
        if self.pending > self._max_pending:
            await self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded", "too many checks wait here")
        if self._callers is not None and not self._welcome(context, self._callers()):
            await self._refuse(context, grpc.StatusCode.PERMISSION_DENIED, "caller", "the caller may not ask here")
        metadata = dict(context.invocation_metadata() or ())
        revision = await self._revision(metadata.get(REVISION), context)
        path = str(metadata.get(DECISION) or request.attributes.context_extensions.get(EXTENSION) or self._decision)
        if not path:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "input", "the check names no decision, and there is no default")
        if revision.entry_points and path not in revision.entry_points:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "input", f"{path[:200]} is no entry point of {revision.digest}")
        try:
            document = document_of_check(request)
        except ValueError as problem:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "input", str(problem))
        left: float | None = context.time_remaining()
        told = metadata.get(TIMEOUT)
        answered: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()

        def done(evaluation: Evaluation) -> None:
            if not answered.done():  # else the caller has gone
                answered.set_result(evaluation)

        # A little less than the caller's time, so that it hears what took so long.
        seconds = _PATIENCE if left is None else min(left * 0.95, _LONGEST)
        if told is not None:
            try:
                seconds = max(min(seconds, float(told)), 0.0)
            except ValueError:
                await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "input", f"{TIMEOUT} is to be a number of seconds")
        self._engine.evaluate(revision, path, document, seconds, done)
        decision = decision_of(await answered, path, revision.digest)
        if decision.verdict is Verdict.ERROR:
            code = _STATUS.get(decision.cause, grpc.StatusCode.INTERNAL)
            await self._refuse(context, code, decision.cause, decision.reason)
        try:
            response = check_response(decision)
        except ValueError as problem:
            await self._refuse(context, grpc.StatusCode.INTERNAL, "answer", str(problem))
        if self._checks is not None:
            self._checks.inc((decision.verdict.value, ""))
        return response

    async def _revision(self, digest: str | bytes | None, context: Context) -> Revision:
        active = self._active()
        if not digest:
            if active is None:
                await self._refuse(context, grpc.StatusCode.UNAVAILABLE, "unavailable", "no policy revision is active here")
            assert active is not None
            return active
        named = str(digest)
        if active is not None and active.digest == named:
            return active
        revision = self._held(named) if self._held is not None else None
        if revision is None:
            await self._refuse(context, grpc.StatusCode.FAILED_PRECONDITION, REVISION_CAUSE, f"the revision {named[:100]} is not held here")
        assert revision is not None
        return revision

    async def _refuse(self, context: Context, code: grpc.StatusCode, cause: str, reason: str) -> None:
        """Ends the call; always raises."""
        if self._checks is not None:
            self._checks.inc((Verdict.ERROR.value, cause))
        await context.abort(code, reason[:2000], ((CAUSE, cause),))

    @staticmethod
    def _welcome(context: Context, callers: frozenset[str]) -> bool:
        names = (context.auth_context() or {}).get("x509_subject_alternative_name", ())
        return any(name.decode("utf-8", "replace") in callers for name in names)

    async def _health(self, request: bytes, context: Context) -> bytes:
        """`grpc.health.v1.Health/Check`: a message with one string in, one with one enumeration out."""
        if request not in {b"", b"\x0a\x00", b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()}:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _NOT_SERVING if self._stopping or self._active() is None else _SERVING


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

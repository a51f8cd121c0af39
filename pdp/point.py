"""What becomes of a check, however it came here: the revision, the decision, the evaluation, and what is counted.

`pdp.service` (gRPC) and `pdp.http_service` are its faces: they read questions and write answers, each in its protocol. What can't be
decided is a `Decision` that is an error, with one word for its cause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest

from mesh.policy import Revision
from mesh.questions import Decision, Verdict
from pdp.answer import decision_of, error
from pdp.engines.engine import Engine, Evaluation
from pdp.input import document_of_check
from telemetry.record import Telemetry

log = logging.getLogger(__name__)

EXTENSION: Final = "decision"
"""Context extension by which an Envoy names the decision."""
REVISION_CAUSE: Final = "revision"
"""The cause when the revision that was asked for is not held."""
MAX_PENDING: Final = 900
"""Checks at a time: from about 1,000 on grpcio's server cancels some at random."""
LONGEST: Final = 60.0
"""Seconds that a check may take, whatever its caller says."""
_BOUNDS: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class DecisionPoint:
    """Decides checks by an engine. Owned by one event loop."""

    def __init__(
        self,
        engine: Engine,
        *,
        active: Callable[[], Revision | None],
        held: Callable[[str], Revision | None] | None = None,
        decision: str = "",
        dry_run: bool = False,
        max_pending: int = MAX_PENDING,
        telemetry: Telemetry | None = None,
    ) -> None:
        """`active` gives the revision for those who name none, `held` one by its digest (by default the active one only). `decision` is
        the default entry point. With `dry_run` everything is allowed, and what would have been is counted and logged."""
        self._engine = engine
        self._active = active
        self._held = held
        self._decision = decision
        self._dry_run = dry_run
        self._max_pending = max_pending
        self.pending = 0
        """Checks that have no answer yet."""
        self._checks = self._seconds = None
        if telemetry is not None:
            self._checks = telemetry.counter("tollhouse_pdp_checks_total", "Checks that were answered, by answer.", ("verdict", "cause"))
            self._seconds = telemetry.histogram("tollhouse_pdp_check_seconds", "Time that a check took.", _BOUNDS)
            telemetry.gauge_function("tollhouse_pdp_checks_pending", "Checks without an answer yet.", lambda: self.pending)

    @property
    def ready(self) -> bool:
        """Whether there is a revision to decide by."""
        return self._active() is not None

    async def decide(self, request: CheckRequest, *, revision: str = "", decision: str = "", seconds: float) -> Decision:
        """Decides a check within about `seconds`; never raises. `revision` and `decision` name what is to decide it: without them the
        active revision does, by the decision that the request's context extensions name, or the default."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        self.pending += 1
        try:
            found = await self._decide(request, revision, decision, seconds)
        finally:
            self.pending -= 1
            if self._seconds is not None:
                self._seconds.observe(loop.time() - started)
        self._count(found)
        if self._dry_run and found.verdict is not Verdict.ALLOW:
            log.info("dry run: this would be %s: %s", found.verdict.value, found.reason or "the policy gave no reason")
            metadata = msgspec.json.encode({"dry_run": {"verdict": found.verdict.value, "reason": found.reason}})
            return Decision(verdict=Verdict.ALLOW, metadata=metadata, revision=found.revision)
        return found

    def refused(self, cause: str, reason: str) -> Decision:
        """The answer to a check that is not even looked at; counted."""
        found = error(cause, reason)
        self._count(found)
        return found

    def _count(self, decision: Decision) -> None:
        if self._checks is not None:
            self._checks.inc((decision.verdict.value, decision.cause))

    async def _decide(self, request: CheckRequest, digest: str, path: str, seconds: float) -> Decision:
        if self.pending > self._max_pending:
            return error("overloaded", "too many checks wait here")
        revision = self._revision(digest)
        if revision is None:
            if digest:
                return error(REVISION_CAUSE, f"the revision {digest[:100]} is not held here")
            return error("unavailable", "no policy revision is active here")
        path = path or request.attributes.context_extensions.get(EXTENSION) or self._decision
        if not path:
            return error("input", "the check names no decision, and there is no default")
        if revision.entry_points and path not in revision.entry_points:
            return error("input", f"{path[:200]} is no entry point of {revision.digest}")
        try:
            document = document_of_check(request)
        except ValueError as problem:
            return error("input", str(problem))
        answered: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()

        def done(evaluation: Evaluation) -> None:
            if not answered.done():  # else the caller has gone
                answered.set_result(evaluation)

        self._engine.evaluate(revision, path, document, min(seconds, LONGEST), done)
        return decision_of(await answered, path, revision.digest)

    def _revision(self, digest: str) -> Revision | None:
        active = self._active()
        if not digest or (active is not None and active.digest == digest):
            return active
        return self._held(digest) if self._held is not None else None

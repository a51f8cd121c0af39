"""Asking decision points over gRPC: our own (`tollhouse pdp`), and any ext_authz server that a policy names as its provider.

Several replicas are asked in turn. One that can't answer (away, overloaded, without the revision) is followed by the next at once; one
that says nothing for half of the question's time is given company by the next, and the first answer counts. A replica that keeps
failing is left alone for a while (`pdp.breaker`). What a policy itself does wrong is nobody's failure and is not asked twice.

Our own decision points are told the revision, the decision and the time it may take in metadata, say in every answer which revision gave
it (an answer for another is thrown away), and name the cause of an error in the trailing metadata `tollhouse-cause`. Their calls may last
a little longer than the question: a word that comes late answers nobody, but shows that the policy was slow and not the replica dead.
Other servers know none of that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, cast

import grpc
import msgspec
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from grpc import aio

from identity.svid import Identity
from mesh.backoff import Backoff
from mesh.questions import Decision, DecisionQuestion, Verdict
from pdp.answer import error
from pdp.breaker import Breaker
from pdp.check import decision_of_check
from pdp.input import REVISION, check_request
from pdp.point import REVISION_CAUSE
from pdp.service import CAUSE, DECISION, MAX_MESSAGE, SERVICE, TIMEOUT

_log = logging.getLogger(__name__)
_METHOD: Final = f"/{SERVICE}/Check"
_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_ELSEWHERE: Final = frozenset(("overloaded", "unavailable", REVISION_CAUSE, "caller"))
"""Causes that are one replica's: another may answer."""
_AGAIN: Final = 0.02
"""Seconds until replicas that hold other revisions are asked again: a new one reaches gateways and decision points not quite together."""
_PROBE: Final = 0.5
"""Seconds for one decision point to say whether it holds a revision."""
_NOT_HELD: Final = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_SHARE: Final = 0.95
"""Of the time that a question has, for the decision: what took so long is to be heard in time."""
_LATE: Final = 0.5
"""Seconds after a question's end in which one of our decision points can still show that it is there."""
_DRAIN: Final = 5.0
"""Seconds that calls on a channel which is replaced have left."""

_Check = aio.UnaryUnaryMultiCallable[CheckRequest, CheckResponse]
_Metadata = tuple[tuple[str, str], ...]


class _Elsewhere(msgspec.Struct, frozen=True):
    """A replica has no answer; another may."""

    why: str
    timeout: bool = False
    later: bool = False
    """It holds other revisions: it may have the right one in a moment."""


class _Replica:
    """One server: its channel and how it is doing. Owned by the client."""

    __slots__ = ("breaker", "channel", "check", "target")

    def __init__(self, target: str, failures: int) -> None:
        self.target = target
        self.breaker = Breaker(failures, Backoff(0.1, 2.0))
        self.channel: aio.Channel | None = None
        self.check: _Check | None = None

    def connect(self, credentials: grpc.ChannelCredentials | None, options: Sequence[tuple[str, object]]) -> None:
        if credentials is None:
            self.channel = aio.insecure_channel(self.target, options=options)
        else:
            self.channel = aio.secure_channel(self.target, credentials, options=options)
        self.check = self.channel.unary_unary(
            _METHOD, request_serializer=CheckRequest.SerializeToString, response_deserializer=CheckResponse.FromString
        )


class ReplicaState(msgspec.Struct, frozen=True):
    """One replica, as `tollhouse status` shows it."""

    target: str
    well: bool
    """False while its breaker is open."""
    opened: int
    """Times that its breaker opened, ever."""


def _none(said: Sequence[_Elsewhere], digest: str, *, late: bool) -> Decision:
    """The answer when no replica gave one: they said `said` in its place; `late` if the time is over."""
    why = "; ".join(each.why for each in said)
    if any(each.timeout for each in said) or (late and not said):
        return error("timeout", f"no decision point answered in time ({why or 'none said anything'})", digest)
    return error("unavailable", f"no decision point can answer ({why or 'all have failed just now'})", digest)


class PdpClient:
    """A `pdp.asker.Asker` over one or more servers that give the same answers. Owned by one event loop."""

    def __init__(
        self,
        targets: Sequence[str],
        *,
        ours: bool = True,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
        max_pending: int = 500,
        failures: int = 3,
    ) -> None:
        """`targets` are `host:port`; `ours` is False for somebody else's ext_authz servers. In plaintext without `credentials`;
        `server_name` is what a server's certificate must be for, if not the target's host. `failures` in a row open a replica's breaker."""
        if not targets:
            raise ValueError("there is no decision point to ask: name at least one HOST:PORT")
        self._ours = ours
        self._late = _LATE if ours else 0.0
        self._options: list[tuple[str, object]] = list(_OPTIONS)
        if server_name:
            self._options.append(("grpc.ssl_target_name_override", server_name))
        if ours:  # others may take pings for an attack
            self._options += [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000)]
        self._credentials = credentials
        self._max_pending = max_pending
        self._replicas = [_Replica(target, failures) for target in targets]
        self._turn = 0
        self._tasks: set[asyncio.Task[object]] = set()
        self._closed = False
        self.pending = 0
        """Questions without an answer."""

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        """As `Asker.ask`."""
        policy, revision = question.policy, question.revision
        if self._closed:
            done(error("unavailable", "the decision points are not asked any more"))
            return
        if self.pending >= self._max_pending or len(self._tasks) >= 2 * self._max_pending:
            done(error("overloaded", f"{self.pending} questions wait for the decision points"))
            return
        metadata: _Metadata = ()
        digest = ""
        if self._ours:
            if revision is None:
                done(error("unavailable", "no policy revision is active"))
                return
            digest = revision.digest
            metadata = ((REVISION, digest), (DECISION, policy.decision))
        try:
            request = check_request(question.asking, policy)
        except ValueError as problem:
            done(error("input", str(problem), digest))
            return
        self.pending += 1
        task: asyncio.Task[object] = asyncio.get_running_loop().create_task(self._answer(request, metadata, digest, policy.timeout, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def holds(self, digest: str, seconds: float) -> bool:
        """Whether a decision point holds the revision `digest`; asks until one does, for at most `seconds`.

        The question has nothing in it: one that holds the revision finds fault with that, one that does not says so first.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            for replica in self._replicas:
                if replica.check is None:
                    replica.connect(self._credentials, self._options)
                assert replica.check is not None
                try:
                    await replica.check(CheckRequest(), timeout=_PROBE, metadata=((REVISION, digest),))
                except aio.AioRpcError as problem:
                    if problem.code() in _NOT_HELD:
                        continue
                return True
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(_AGAIN)

    def renew(self, credentials: grpc.ChannelCredentials) -> None:
        """Uses new credentials (after a renewal) for every connection from now on; calls on the old ones may end."""
        self._credentials = credentials
        for replica in self._replicas:
            channel, replica.channel, replica.check = replica.channel, None, None
            if channel is not None:
                self._later(channel.close(_DRAIN))

    def state(self) -> tuple[ReplicaState, ...]:
        """How the replicas are doing."""
        return tuple(ReplicaState(each.target, each.breaker.closed, each.breaker.opened) for each in self._replicas)

    async def close(self) -> None:
        """Ends the connections; open questions are answered with an error."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self._replicas:
            if replica.channel is not None:
                await replica.channel.close(0)
                replica.channel = replica.check = None

    async def _answer(
        self, request: CheckRequest, metadata: _Metadata, digest: str, seconds: float, done: Callable[[Decision], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        waiting = True

        def finish(decision: Decision) -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                self.pending -= 1
                done(decision)

        said: list[_Elsewhere] = []
        timer = loop.call_at(deadline, lambda: finish(_none(said, digest, late=True))) if self._late else None
        decision = error("unavailable", "the decision points are not asked any more", digest)
        try:
            decision = await self._first(request, metadata, digest, deadline, said)
        except Exception as problem:
            _log.exception("a question to the decision points failed")
            decision = error("internal", f"the question failed: {problem}", digest)
        finally:
            if timer is not None:
                timer.cancel()
            finish(decision)

    async def _first(self, request: CheckRequest, metadata: _Metadata, digest: str, deadline: float, said: list[_Elsewhere]) -> Decision:
        """The first answer that any replica gives until `deadline`; learns for a little longer how the replicas are. `said` is what they
        said last in place of an answer."""
        loop = asyncio.get_running_loop()
        while True:
            found = await self._round(request, metadata, digest, deadline)
            if isinstance(found, Decision):
                return found
            said[:] = found
            late = loop.time() >= deadline
            if late or not any(problem.later for problem in found) or deadline - loop.time() <= _AGAIN:
                return _none(found, digest, late=late)
            await asyncio.sleep(_AGAIN)

    async def _round(self, request: CheckRequest, metadata: _Metadata, digest: str, deadline: float) -> Decision | list[_Elsewhere]:
        """Asks the replicas, one after the other or side by side; an answer, or why there is none."""
        loop = asyncio.get_running_loop()
        half = (deadline - loop.time()) / 2
        candidates = self._candidates(loop.time())
        problems: list[_Elsewhere] = []
        slow = False
        asked: dict[asyncio.Task[Decision | _Elsewhere], tuple[_Replica, float]] = {}
        try:
            while candidates or asked:
                if candidates:
                    replica, now = candidates.pop(0), loop.time()
                    replica.breaker.begin(now, deadline - now)
                    work = self._one(replica, request, metadata, digest, deadline - now)
                    if not candidates and not asked:  # the only one, or the last: no company to wait for
                        outcome = await work
                        return outcome if isinstance(outcome, Decision) else [*problems, outcome]
                    asked[loop.create_task(work)] = (replica, now)
                left = max(deadline - loop.time(), 0.0)
                finished, _ = await asyncio.wait(
                    asked, timeout=min(left, half) if candidates else left + self._late, return_when=asyncio.FIRST_COMPLETED
                )
                if loop.time() >= deadline:
                    candidates.clear()
                for task in finished:
                    del asked[task]
                    outcome = task.result()
                    if isinstance(outcome, Decision):
                        slow = outcome.verdict is Verdict.ERROR  # of the policy's doing: whoever is silent may be at it too
                        return outcome
                    problems.append(outcome)
                if not finished and not candidates:
                    break
            return problems
        finally:
            now = loop.time()
            for task, (replica, since) in asked.items():  # somebody was faster, or nobody was fast enough
                task.cancel()
                if now - since >= half * 0.9 and not slow:
                    replica.breaker.failed(now)

    def _candidates(self, now: float) -> list[_Replica]:
        """Those that may be asked now, each first in its turn."""
        self._turn += 1
        start = self._turn % len(self._replicas)
        return [replica for replica in self._replicas[start:] + self._replicas[:start] if replica.breaker.ready(now)]

    async def _one(
        self, replica: _Replica, request: CheckRequest, metadata: _Metadata, digest: str, seconds: float
    ) -> Decision | _Elsewhere:
        loop = asyncio.get_running_loop()
        if replica.check is None:
            replica.connect(self._credentials, self._options)
        assert replica.check is not None
        try:
            if self._ours:
                metadata = (*metadata, (TIMEOUT, f"{max(seconds, 0.001) * _SHARE:.4f}"))
            response = await replica.check(request, timeout=max(seconds, 0.001) + self._late, metadata=metadata)
        except aio.AioRpcError as problem:
            return self._failed(replica, problem, digest, loop.time())
        replica.breaker.succeeded()
        decision = decision_of_check(response)
        if self._ours and decision.revision != digest:
            return _Elsewhere(f"{replica.target} answered for the revision {decision.revision or '(none)'}", later=True)
        return decision

    def _failed(self, replica: _Replica, problem: aio.AioRpcError, digest: str, now: float) -> Decision | _Elsewhere:
        """What a call's failure means."""
        code = problem.code()
        said = f"{replica.target}: {problem.details() or code.name}"
        trailing = cast("Iterable[tuple[str, str]]", problem.trailing_metadata() or ())
        cause = dict(trailing).get(CAUSE, "") if self._ours else ""
        if cause:
            replica.breaker.succeeded()
            return (
                _Elsewhere(said, later=cause == REVISION_CAUSE) if cause in _ELSEWHERE else error(cause, problem.details() or cause, digest)
            )
        if code in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}:
            replica.breaker.failed(now)
            return _Elsewhere(said, timeout=code is grpc.StatusCode.DEADLINE_EXCEEDED)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _Elsewhere(said)
        replica.breaker.succeeded()
        return error("provider", f"{replica.target} answered with {code.name}: {problem.details()}", digest)

    def _later(self, work: object) -> None:
        assert asyncio.iscoroutine(work)
        task: asyncio.Task[object] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Providers:
    """The clients of other ext_authz servers, one for each that a policy names. Owned by the decider."""

    def __init__(self, make: Callable[[str], PdpClient] | None = None) -> None:
        """`make` gives the client for a `host:port`; by default one in plaintext."""
        self._make = make or (lambda target: PdpClient((target,), ours=False))
        self._clients: dict[str, PdpClient] = {}

    def asker(self, target: str) -> PdpClient:
        """The client for a `host:port`."""
        client = self._clients.get(target)
        if client is None:
            client = self._clients[target] = self._make(target)
        return client

    async def keep(self, targets: Iterable[str]) -> None:
        """Ends the clients of all others."""
        wanted = set(targets)
        for target in [target for target in self._clients if target not in wanted]:
            await self._clients.pop(target).close()

    async def close(self) -> None:
        """Ends all."""
        await self.keep(())


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """mTLS to a decision point: our own certificate, and the trust bundle for its. Its certificate must name `server_name` (DNS)."""
    return grpc.ssl_channel_credentials(identity.bundle, identity.key, identity.chain)

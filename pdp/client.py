"""Asking decision points over gRPC: our own (`tollhouse pdp`), and any ext_authz server that a policy names as its provider.

Several replicas are asked in turn (`pdp.inquiry`). One that can't answer (away, overloaded, without the revision) is followed by the next
at once; one that says nothing for half of the question's time is given company by the next, and the first answer counts. A replica that
keeps failing is left alone for a while (`pdp.breaker`). What a policy itself does wrong is nobody's failure and is not asked twice.

Our own decision points are told the revision, the decision and the time it may take in metadata, say in every answer which revision gave
it (an answer for another is thrown away), and name the cause of an error in the trailing metadata `tollhouse-cause`. Their calls may last
a little longer than the question: a word that comes late answers nobody, but shows that the policy was slow and not the replica dead.
Other servers know none of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.protobuf.message import DecodeError

from mesh.backoff import Backoff
from mesh.http import Header
from mesh.questions import Decision, DecisionQuestion
from pdp.answer import error
from pdp.breaker import Breaker
from pdp.check import decision_of_check
from pdp.input import REVISION, check_request
from pdp.inquiry import AGAIN, Elsewhere, Inquiry
from pdp.point import REVISION_CAUSE
from pdp.rpc import CAUSE, CHECK, DECISION, TIMEOUT, Call, Channels, Code, Result

_ELSEWHERE: Final = frozenset(("overloaded", "unavailable", REVISION_CAUSE, "caller"))
"""Causes that are one replica's: another may answer."""
_PROBE: Final = 0.5
"""Seconds for one decision point to say whether it holds a revision."""
_NOT_HELD: Final = frozenset(
    (Code.FAILED_PRECONDITION, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.RESOURCE_EXHAUSTED, Code.UNKNOWN)
)
_FAILED: Final = frozenset((Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE, Code.CANCELLED, Code.UNKNOWN))
"""What says that a replica is not well."""
_SHARE: Final = 0.95
"""Of the time that a question has, for the decision: what took so long is to be heard in time."""
_LATE: Final = 0.5
"""Seconds after a question's end in which one of our decision points can still show that it is there."""
_CAUSE: Final = CAUSE.encode()
_TIMEOUT: Final = TIMEOUT.encode()


class Replica:
    """One server: the channel to it and how it is doing. Owned by the client."""

    __slots__ = ("breaker", "channel", "target")

    def __init__(self, target: str, channels: Channels, failures: int, *, pings: bool) -> None:
        self.target = target
        self.breaker = Breaker(failures, Backoff(0.1, 2.0))
        self.channel = channels.open(target, pings=pings)


class ReplicaState(msgspec.Struct, frozen=True):
    """One replica, as `tollhouse status` shows it."""

    target: str
    well: bool
    """False while its breaker is open."""
    opened: int
    """Times that its breaker opened, ever."""


class PdpClient:
    """A `pdp.asker.Asker` over one or more servers that give the same answers. Owned by one event loop."""

    def __init__(self, targets: Sequence[str], channels: Channels, *, ours: bool = True, max_pending: int = 500, failures: int = 3) -> None:
        """`targets` are `host:port`; `ours` is False for somebody else's ext_authz servers. `failures` in a row open a replica's breaker.
        Raises ValueError for targets that are none."""
        if not targets:
            raise ValueError("there is no decision point to ask: name at least one HOST:PORT")
        self._ours = ours
        self.late = _LATE if ours else 0.0
        """As `_LATE`; 0 for servers that know nothing of it."""
        self._max_pending = max_pending
        # Others may take pings for an attack.
        self._replicas = [Replica(target, channels, failures, pings=ours) for target in targets]
        self._turn = 0
        self._open: set[Inquiry] = set()
        self._probing: set[asyncio.Future[Result]] = set()
        self._closed = False
        self.pending = 0
        """Questions without an answer."""

    def ask(self, question: DecisionQuestion, done: Callable[[Decision], None]) -> None:
        """As `Asker.ask`."""
        policy, revision = question.policy, question.revision
        if self._closed:
            done(error("unavailable", "the decision points are not asked any more"))
            return
        if self.pending >= self._max_pending or len(self._open) >= 2 * self._max_pending:
            done(error("overloaded", f"{self.pending} questions wait for the decision points"))
            return
        metadata: tuple[Header, ...] = ()
        digest = ""
        if self._ours:
            if revision is None:
                done(error("unavailable", "no policy revision is active"))
                return
            digest = revision.digest
            metadata = ((REVISION.encode(), digest.encode()), (DECISION.encode(), policy.decision.encode()))
        try:
            message = check_request(question.asking, policy).SerializeToString()
        except ValueError as problem:
            done(error("input", str(problem), digest))
            return
        self.pending += 1
        inquiry = Inquiry(self, asyncio.get_running_loop(), message, metadata, digest, policy.timeout, done)
        self._open.add(inquiry)
        inquiry.begin()

    async def holds(self, digest: str, seconds: float) -> bool:
        """Whether a decision point holds the revision `digest`; asks until one does, for at most `seconds`.

        The question has nothing in it: one that holds the revision finds fault with that, one that does not says so first.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not self._closed:
            for replica in self._replicas:
                if (await self._probe(replica, digest)).code not in _NOT_HELD:
                    return True
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(AGAIN)
        return False

    async def _probe(self, replica: Replica, digest: str) -> Result:
        """What a replica says to a question with nothing in it."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._probing.add(result)
        call = replica.channel.start(CHECK, ((REVISION.encode(), digest.encode()),), b"", _PROBE, result.set_result)
        try:
            async with asyncio.timeout(_PROBE):
                return await result
        except TimeoutError:
            return Result(Code.DEADLINE_EXCEEDED, "it said nothing in time")
        finally:
            call.cancel()
            self._probing.discard(result)

    def state(self) -> tuple[ReplicaState, ...]:
        """How the replicas are doing."""
        return tuple(ReplicaState(each.target, each.breaker.closed, each.breaker.opened) for each in self._replicas)

    async def close(self) -> None:
        """Ends the connections; open questions are answered with an error."""
        self._closed = True
        for inquiry in list(self._open):
            inquiry.close()
        for replica in self._replicas:
            replica.channel.close()

    # For inquiries

    def candidates(self, now: float) -> list[Replica]:
        """Those that may be asked now, each first in its turn."""
        self._turn += 1
        start = self._turn % len(self._replicas)
        return [replica for replica in self._replicas[start:] + self._replicas[:start] if replica.breaker.ready(now)]

    def call(self, replica: Replica, message: bytes, metadata: tuple[Header, ...], seconds: float, done: Callable[[Result], None]) -> Call:
        """Asks a replica that has `seconds` to decide."""
        seconds = max(seconds, 0.001)
        if self._ours:
            metadata = (*metadata, (_TIMEOUT, b"%.4f" % (seconds * _SHARE)))
        return replica.channel.start(CHECK, metadata, message, seconds + self.late, done)

    def outcome(self, replica: Replica, result: Result, digest: str, now: float) -> Decision | Elsewhere:
        """What the end of a call means."""
        if result.code is not Code.OK:
            return self._failed(replica, result, digest, now)
        replica.breaker.succeeded()
        try:
            decision = decision_of_check(CheckResponse.FromString(result.message))
        except DecodeError:
            return error("provider", f"{replica.target} gave an answer that is not one of ext_authz", digest)
        if self._ours and decision.revision != digest:
            return Elsewhere(f"{replica.target} answered for the revision {decision.revision or '(none)'}", later=True)
        return decision

    def _failed(self, replica: Replica, result: Result, digest: str, now: float) -> Decision | Elsewhere:
        code = result.code
        said = f"{replica.target}: {result.details or code.name}"
        cause = result.trailer(_CAUSE) if self._ours else ""
        if cause:
            replica.breaker.succeeded()
            return Elsewhere(said, later=cause == REVISION_CAUSE) if cause in _ELSEWHERE else error(cause, result.details or cause, digest)
        if code in _FAILED:
            replica.breaker.failed(now)
            return Elsewhere(said, timeout=code is Code.DEADLINE_EXCEEDED)
        if code is Code.RESOURCE_EXHAUSTED:
            return Elsewhere(said)
        replica.breaker.succeeded()
        return error("provider", f"{replica.target} answered with {code.name}: {result.details}", digest)

    def forget(self, inquiry: Inquiry) -> None:
        """It is over."""
        self._open.discard(inquiry)


class Providers:
    """The clients of other ext_authz servers, one for each that a policy names. Owned by the decider."""

    def __init__(self, channels: Channels | None = None) -> None:
        """Without `channels` nobody can be asked."""
        self._channels = channels
        self._clients: dict[str, PdpClient] = {}

    def asker(self, target: str) -> PdpClient:
        """The client for a `host:port`. Raises ValueError when there can be none."""
        client = self._clients.get(target)
        if client is None:
            if self._channels is None:
                raise ValueError("no provider can be asked here")
            client = self._clients[target] = PdpClient((target,), self._channels, ours=False)
        return client

    async def keep(self, targets: Iterable[str]) -> None:
        """Ends the clients of all others."""
        wanted = set(targets)
        for target in [target for target in self._clients if target not in wanted]:
            await self._clients.pop(target).close()

    async def close(self) -> None:
        """Ends all."""
        await self.keep(())

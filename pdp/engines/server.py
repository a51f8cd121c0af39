"""`OpaServer`: the user's own OPA servers, asked over their REST API (openpolicyagent.org, "REST API").

**Which revision answered.** OPA has one namespace for all policy, and its API writes it a piece at a time: pushing modules with `PUT
/v1/policies` would have servers answer from half of one revision and half of another while it lasts, and two decision points that push to
one OPA would undo each other's work for good. So nothing is pushed here (`pdp.engines.written` does so, in another form). OPA fetches the
revision as a *bundle* (`pdp.engines.bundle`, or a bundle server of the user's own), which it activates in one transaction, and every
question asks for the *provenance* of its answer (`?provenance=true`), which OPA reads in the same transaction: it names the revision of
the bundle. An answer of another revision than the question's is thrown away, and the question is asked again, of another server or of the
same a moment later, while its time lasts.

An OPA holds one revision at a time, so this engine does too: the one that was loaded last. A shadow revision needs workers.

Servers are asked in turn; one that fails is left alone for a while, and the next one is asked at once. HTTP is aiohttp's: keep-alive
connections, bounded, with their own time budget. Besides, each is looked at every `EVERY` seconds, asked or not: what it holds, and
whether that is what it should, is in `state`, and in the log when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import aiohttp
import msgspec

from mesh.backoff import Backoff
from mesh.policy import Revision
from pdp.breaker import Breaker
from pdp.engines.bundle import BundleServer
from pdp.engines.engine import UNDEFINED, Done, EngineUnavailable, Evaluation, Reason, failure, segments

_log = logging.getLogger(__name__)
_MOST: Final = 16 << 20
"""Bytes of one answer."""
_PROBE: Final = "/v1/data/tollhouse?provenance=true"
"""A question about nothing: only its provenance matters."""
_AGAIN: Final = 0.02
"""Seconds until a server that holds another revision is asked again."""
EVERY: Final = 2.0
"""Seconds between two looks at a server."""
_PATIENCE: Final = 2
"""Looks in a row that find a server behind before it is said: one is what every change of policy takes."""


class _Bundle(msgspec.Struct):
    revision: str = ""


class _Provenance(msgspec.Struct):
    version: str = ""
    bundles: dict[str, _Bundle] = {}


class _Answer(msgspec.Struct):
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    provenance: _Provenance = msgspec.field(default_factory=_Provenance)


class _Fault(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Failure(msgspec.Struct):
    code: str = ""
    message: str = ""
    errors: list[_Fault] = []


_answers = msgspec.json.Decoder(_Answer)
_failures = msgspec.json.Decoder(_Failure)


class ServerState(msgspec.Struct, frozen=True):
    """One OPA server, as `tollhouse status` shows it."""

    url: str
    well: bool
    revisions: tuple[str, ...]
    """That it holds, as it said last."""
    problem: str = ""
    """What is not as it should be; empty when all is."""
    drifts: int = 0
    """Times that it was found to hold something else than it should."""


class Opa:
    """One server. Owned by the engine."""

    __slots__ = ("behind", "breaker", "drifts", "look", "old", "problem", "revisions", "url")

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.breaker = Breaker(3, Backoff(0.1, 2.0))
        self.revisions: tuple[str, ...] = ()
        self.problem = ""
        self.drifts = 0
        self.behind = 0
        """Looks in a row that found it behind."""
        self.old: set[str] = set()
        """Ids of modules that were written to it and are not needed any more."""
        self.look = asyncio.Event()
        """Set to have it looked at at once."""

    def drifted(self, what: str) -> None:
        """It holds something else than it should."""
        self.drifts += 1
        _log.warning("OPA server %s: %s", self.url, what)

    def found(self, problem: str) -> None:
        """What a look at it came to; empty for well."""
        if problem != self.problem:
            if problem:
                _log.error("OPA server %s is not asked: %s", self.url, problem)
            else:
                _log.info("OPA server %s is as it should be", self.url)
        self.problem = problem


class Elsewhere(msgspec.Struct, frozen=True):
    """A server has no answer; another may, or the same later."""

    why: str
    later: bool = False
    """It holds another revision: it may have the right one in a moment."""


class OpaServer:
    """A `pdp.engines.Engine` over OPA servers. Owned by one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        bundles: BundleServer | None = None,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        max_pending: int = 1000,
        patience: float = 30.0,
    ) -> None:
        """`urls` as `http://HOST:PORT`. `bundles` is where the servers fetch revisions, if from us. `token` is sent as a bearer token,
        `tls` used for `https`. `load` waits `patience` seconds for a server to hold a revision."""
        if not urls:
            raise ValueError("there is no OPA server to ask: give at least one URL")
        self._servers = [Opa(url) for url in urls]
        self._wanted = ""
        """The digest of the revision that they are to hold: the one that was loaded last."""
        self._looking: list[asyncio.Task[None]] = []
        self._bundles = bundles
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._tls = tls
        self._max_pending = max_pending
        self._patience = patience
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = 0
        self.pending = 0
        """Questions without an answer."""

    def _open(self) -> aiohttp.ClientSession:
        """The connections, from the first use on: they belong to the event loop that runs then."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=256, limit_per_host=64, ssl=self._tls if self._tls is not None else True)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers=self._headers)
        return self._session

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        """As `Engine.evaluate`."""
        if self._closed:
            done(failure("unavailable", "the OPA servers are not asked any more"))
            return
        if self.pending >= self._max_pending:
            done(failure("overloaded", f"{self.pending} questions wait for the OPA servers"))
            return
        where = self._where(revision, path)
        if isinstance(where, Evaluation):
            done(where)
            return
        self.pending += 1
        work = self._answer(self._open(), revision.digest, where, b'{"input":' + document + b"}", timeout, done)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def load(self, revision: Revision) -> None:
        """As `Engine.load`: offers the bundle, and waits until a server holds it. Raises `EngineUnavailable`, which says what they hold."""
        if self._closed:
            raise EngineUnavailable("the OPA servers are not asked any more")
        if self._bundles is not None:
            await self._bundles.publish(revision)
        self._wanted = revision.digest
        self._look()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience
        while not self._closed:
            said = await asyncio.gather(*(self._ask(self._open(), opa, revision.digest, _PROBE, b"{}", 2.0) for opa in self._servers))
            if any(isinstance(answer, Evaluation) and answer.kind != "error" for answer in said):
                return
            if loop.time() >= end:
                why = "; ".join(answer.why if isinstance(answer, Elsewhere) else answer.message for answer in said)
                raise EngineUnavailable(f"no OPA server holds {revision.digest} after {self._patience:g} s ({why})")
            await asyncio.sleep(0.05)
        raise EngineUnavailable("the OPA servers are not asked any more")

    def state(self) -> tuple[ServerState, ...]:
        """How the servers are doing."""
        return tuple(ServerState(opa.url, opa.breaker.closed, opa.revisions, opa.problem, opa.drifts) for opa in self._servers)

    async def close(self) -> None:
        """As `Engine.close`."""
        self._closed = True
        session, self._session = self._session, None
        going = [*self._tasks, *self._looking]
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)
        if session is not None:
            await session.close()

    async def _answer(self, session: aiohttp.ClientSession, digest: str, where: str, body: bytes, seconds: float, done: Done) -> None:
        answer = failure("unavailable", "the OPA servers are not asked any more")
        try:
            answer = await self._first(session, digest, where, body, seconds)
        except Exception as problem:
            _log.exception("a question to the OPA servers failed")
            answer = failure("internal", f"the question failed: {problem}")
        finally:
            self.pending -= 1
            done(answer)

    async def _first(self, session: aiohttp.ClientSession, digest: str, where: str, body: bytes, seconds: float) -> Evaluation:
        """Asks one server after the other while there is time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            problems: list[Elsewhere] = []
            ready = self._ready(loop.time(), digest)
            for number, opa in enumerate(ready):
                left = deadline - loop.time()
                if left <= 0:
                    break
                # A server that says nothing must leave time for the next one.
                share = left if number + 1 == len(ready) else left / 2
                answer = await self._ask(session, opa, digest, where, body, share)
                if isinstance(answer, Evaluation):
                    return answer
                problems.append(answer)
            why = "; ".join(problem.why for problem in problems) or self._nobody(digest)
            if loop.time() >= deadline:
                return failure("timeout", f"no OPA server answered in time ({why})")
            if not (any(problem.later for problem in problems) or self._soon(digest)) or deadline - loop.time() <= _AGAIN:
                return failure("unavailable", f"no OPA server can answer ({why})")
            await asyncio.sleep(_AGAIN)

    def _where(self, revision: Revision, path: str) -> str | Evaluation:
        """The path of a question, or what can be said without asking."""
        try:
            return "/v1/data/" + "/".join(quote(part, safe="") for part in segments(path)) + "?provenance=true"
        except ValueError as problem:
            return failure("eval", str(problem))

    def _nobody(self, digest: str) -> str:
        """Why no server may be asked for a revision."""
        return "all have failed just now"

    def _soon(self, digest: str) -> bool:
        """Whether a server that can't be asked for a revision may hold it in a moment."""
        return False

    def _look(self) -> None:
        """Looks at every server now, and from now on every `EVERY` seconds."""
        if not self._looking and not self._closed:
            loop = asyncio.get_running_loop()
            self._looking = [loop.create_task(self._keep_looking(opa)) for opa in self._servers]
        for opa in self._servers:
            opa.look.set()

    async def _keep_looking(self, opa: Opa) -> None:
        while True:
            opa.look.clear()
            try:
                await self._look_at(opa)
            except Exception:
                _log.exception("OPA server %s could not be looked at", opa.url)
                opa.found("it could not be looked at")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(opa.look.wait(), EVERY)

    async def _look_at(self, opa: Opa) -> None:
        """Finds out what a server holds, and says so when that changes."""
        wanted = self._wanted
        answer = await self._ask(self._open(), opa, wanted, _PROBE, b"{}", EVERY)
        if isinstance(answer, Elsewhere):
            opa.behind += 1
            if opa.behind == _PATIENCE:
                opa.drifts += answer.later
            if opa.behind >= _PATIENCE and wanted == self._wanted:
                opa.found(f"{answer.why}, not {wanted}" if answer.later else answer.why)
        else:
            opa.behind = 0
            opa.found("")

    def _ready(self, now: float, digest: str) -> list[Opa]:
        """Those that may be asked for a revision now, each first in its turn."""
        self._turn += 1
        start = self._turn % len(self._servers)
        return [opa for opa in self._servers[start:] + self._servers[:start] if opa.breaker.ready(now)]

    async def _ask(
        self, session: aiohttp.ClientSession, opa: Opa, digest: str, where: str, body: bytes, seconds: float
    ) -> Evaluation | Elsewhere:
        """What one server says."""
        loop = asyncio.get_running_loop()
        opa.breaker.begin(loop.time(), seconds)
        try:
            async with asyncio.timeout(seconds), session.post(opa.url + where, data=body, allow_redirects=False) as response:
                status = response.status
                text = await _read(response.content)
        except TimeoutError:
            opa.breaker.failed(loop.time())
            return Elsewhere(f"{opa.url} said nothing for {seconds:.2f} s")
        except (aiohttp.ClientError, OSError) as problem:
            opa.breaker.failed(loop.time())
            return Elsewhere(f"{opa.url}: {problem}")
        if text is None:
            return failure("eval", f"the answer of {opa.url} has more than {_MOST} bytes")
        if status in {429, 502, 503, 504}:
            opa.breaker.failed(loop.time())
            return Elsewhere(f"{opa.url} answered with {status}")
        opa.breaker.succeeded()
        if status in {401, 403}:
            return Elsewhere(f"{opa.url} does not let us ask ({status}): give it a token, or allow it in system.authz")
        if status != 200:
            return _failed(status, text, opa.url)
        try:
            return self._judged(opa, digest, text)
        except msgspec.DecodeError as problem:
            return failure("internal", f"the answer of {opa.url} can't be read: {problem}")

    def _judged(self, opa: Opa, digest: str, text: bytes) -> Evaluation | Elsewhere:
        """What an answer says, if it proves to be of the revision. Raises `msgspec.DecodeError`."""
        answer = _answers.decode(text)
        opa.revisions = tuple(bundle.revision for bundle in answer.provenance.bundles.values())
        if digest not in opa.revisions:
            return Elsewhere(f"{opa.url} holds {', '.join(opa.revisions) or 'no bundle'}", later=True)
        return UNDEFINED if isinstance(answer.result, msgspec.UnsetType) else Evaluation("result", bytes(answer.result))


async def _read(content: aiohttp.StreamReader) -> bytes | None:
    """All of an answer, or None when it is too long."""
    chunks = bytearray()
    async for chunk in content.iter_any():
        chunks += chunk
        if len(chunks) > _MOST:
            return None
    return bytes(chunks)


def _failed(status: int, text: bytes, url: str) -> Evaluation:
    """What OPA's own error answer means. It does not say which revision failed; no answer was given by any."""
    try:
        said = _failures.decode(text)
    except msgspec.DecodeError:
        return failure("internal", f"{url} answered with {status}")
    codes = {fault.code for fault in said.errors}
    message = "; ".join(fault.message for fault in said.errors) or said.message or f"{url} answered with {status}"
    reason: Reason = "internal"
    if "eval_conflict_error" in codes:
        reason = "conflict"
    elif "eval_cancel_error" in codes:
        reason = "timeout"
    elif codes & {"eval_internal_error", "eval_builtin_error", "eval_type_error"} or status == 500:
        reason = "eval"
    elif status == 400:
        reason = "input"
    return failure(reason, message)

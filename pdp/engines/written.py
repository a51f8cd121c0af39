"""`WrittenOpaServers`: the user's own OPA servers, to which revisions are written over their REST API, and which are kept in step.

For OPAs that can't fetch bundles from us. Writing policy a module at a time into a namespace that all share would let them answer from
half of a revision, so each revision is written as *one module*, in one request that OPA does in one transaction, data included, below a
package of its own name (`pdp/opa/relocate.go`). Several revisions stand side by side, and whoever else writes the same ones writes the
same text. The module itself says which revision an answer is of: an OPA that was started anew, that lacks the module, or holds another
one, has no such answer, and nothing it says is taken.

**Drift.** Every `EVERY` seconds, and at once when an answer lacks its proof, each server's policies are read and compared with what was
written. Of a module that is not there, or is not the same to the letter, the server is not asked until it is written again; modules of
others in our package, and data below it, are taken away. `state` counts what was found. So an answer of a module that somebody with the
right to write to the OPA has changed under its own name may be taken for as long as `EVERY` seconds, and no longer.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec

from mesh.policy import Revision
from pdp.engines.engine import UNDEFINED, EngineUnavailable, Evaluation, PolicyError, PolicyProblem, failure, segments
from pdp.engines.server import Elsewhere, Opa, OpaServer
from pdp.publish import Checker

_log = logging.getLogger(__name__)
PLACE: Final = "tollhouse"
"""The package, and the first part of the modules' ids, that are ours in an OPA."""
KEEP: Final = 4
"""Revisions that a server is to hold: the active one, those that are tried, and the one before."""
_SECONDS: Final = 20.0
"""For one request of the kind that compiles policy."""
_MOST: Final = 256 << 20
"""Bytes of a list of policies: OPA adds to each its syntax tree."""


class _Result(msgspec.Struct):
    revision: str = ""
    result: tuple[msgspec.Raw, ...] = ()


class _Answer(msgspec.Struct):
    result: _Result | None = None


class _Term(msgspec.Struct):
    value: Any = None


class _Package(msgspec.Struct):
    path: list[_Term] = []


class _Head(msgspec.Struct):
    ref: list[_Term] = []
    name: str = ""


class _Rule(msgspec.Struct):
    head: _Head = msgspec.field(default_factory=_Head)


class _Tree(msgspec.Struct):
    package: _Package = msgspec.field(default_factory=_Package)
    rules: list[_Rule] | None = None


class _Policy(msgspec.Struct):
    id: str
    raw: str = ""
    ast: _Tree = msgspec.field(default_factory=_Tree)


class _Policies(msgspec.Struct):
    result: list[_Policy] = []


_answers = msgspec.json.Decoder(_Answer)
_policies = msgspec.json.Decoder(_Policies)


class Written(msgspec.Struct, frozen=True):
    """A revision as it is written to a server."""

    name: str
    text: str
    decisions: frozenset[str]

    @property
    def id(self) -> str:
        """Of the module."""
        return f"{PLACE}/{self.name}"


class Found(msgspec.Struct, frozen=True):
    """What a server holds that is not as it should be."""

    missing: tuple[str, ...] = ()
    """Digests of revisions that it does not hold at all."""
    changed: tuple[str, ...] = ()
    """Digests of revisions whose module is another."""
    strange: tuple[str, ...] = ()
    """Ids of modules that are not ours, in our package."""


def compared(policies: Sequence[_Policy], wanted: Mapping[str, Written]) -> Found:
    """What is not as it should be among a server's policies. Pure. `wanted` by digest."""
    there = {policy.id: policy for policy in policies}
    missing = tuple(digest for digest, each in wanted.items() if each.id not in there)
    changed = tuple(digest for digest, each in wanted.items() if each.id in there and there[each.id].raw != each.text)
    ids = {each.id for each in wanted.values()}
    strange = tuple(policy.id for policy in policies if policy.id not in ids and _in_our_place(policy) and not _one_of_ours(policy))
    return Found(missing, changed, strange)


def _in_our_place(policy: _Policy) -> bool:
    path = policy.ast.package.path
    return len(path) > 1 and path[1].value == PLACE


def _one_of_ours(policy: _Policy) -> bool:
    """Whether a module that we don't know can be another process's: it is named and built as one, and says nothing in the name of
    another."""
    name = policy.id.removeprefix(f"{PLACE}/")
    if policy.id != f"{PLACE}/{name}" or len(policy.ast.package.path) != 2:
        return False
    roots = {rule.head.ref[0].value if rule.head.ref else rule.head.name for rule in policy.ast.rules or ()}
    return roots <= {f"r_{name}", f"a_{name}"}


class WrittenOpaServers(OpaServer):
    """A `pdp.engines.Engine` over OPA servers that revisions are written to. Owned by one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        checker: Checker,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        max_pending: int = 1000,
        patience: float = 30.0,
        keep: int = KEEP,
    ) -> None:
        """As `OpaServer`; `checker` writes revisions as modules."""
        super().__init__(urls, token=token, tls=tls, max_pending=max_pending, patience=patience)
        self._checker = checker
        self._keep = keep
        self._written: OrderedDict[str, Written] = OrderedDict()

    async def load(self, revision: Revision) -> None:
        """As `Engine.load`: has it written to every server, and waits until one holds it. Raises `PolicyError` for what can't be written
        as one module, `EngineUnavailable`."""
        if self._closed:
            raise EngineUnavailable("the OPA servers are not asked any more")
        if revision.digest not in self._written:
            self._written[revision.digest] = await written(self._checker, revision)
        self._written.move_to_end(revision.digest)
        while len(self._written) > self._keep:
            _, old = self._written.popitem(last=False)
            for opa in self._servers:
                opa.old.add(old.id)
        self._wanted = revision.digest
        self._look()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience
        while not self._closed:
            if self._soon(revision.digest, now=True):
                return
            if loop.time() >= end:
                raise EngineUnavailable(f"after {self._patience:g} s {self._nobody(revision.digest)}")
            await asyncio.sleep(0.02)
        raise EngineUnavailable("the OPA servers are not asked any more")

    def _where(self, revision: Revision, path: str) -> str | Evaluation:
        known = self._written.get(revision.digest)
        if known is None:
            return failure("unavailable", f"{revision.digest} was not written to the OPA servers")
        try:
            name = ".".join(segments(path))
        except ValueError as problem:
            return failure("eval", str(problem))
        if name not in known.decisions:
            return UNDEFINED
        return f"/v1/data/{PLACE}/a_{known.name}/{name}"

    def _nobody(self, digest: str) -> str:
        why = "; ".join(f"{opa.url}: {opa.problem or 'it is being written'}" for opa in self._servers if digest not in opa.revisions)
        return f"no OPA server holds {digest} ({why})" if why else "all have failed just now"

    def _soon(self, digest: str, *, now: bool = False) -> bool:
        """Whether a server holds a revision, or (without `now`) is to."""
        if any(digest in opa.revisions for opa in self._servers):
            return now
        return not now and digest in self._written and any(not opa.problem for opa in self._servers)

    def _ready(self, now: float, digest: str) -> list[Opa]:
        return [opa for opa in super()._ready(now, digest) if digest in opa.revisions]

    def _judged(self, opa: Opa, digest: str, text: bytes) -> Evaluation | Elsewhere:
        result = _answers.decode(text).result
        if result is None or result.revision != digest:
            # A restart, a deletion, another module: it is looked at again before it is asked again.
            if digest in opa.revisions:
                opa.revisions = tuple(each for each in opa.revisions if each != digest)
                opa.drifted(f"{digest} is gone, as an answer shows; it is written again")
                opa.look.set()
            return Elsewhere(f"{opa.url} does not hold {digest} any more", later=True)
        return Evaluation("result", bytes(result.result[0])) if result.result else UNDEFINED

    async def _look_at(self, opa: Opa) -> None:
        """Finds out what a server holds, and mends it."""
        wanted = dict(self._written)
        try:
            await self._put_right(opa, wanted)
        except (TimeoutError, aiohttp.ClientError, OSError, _Refused, msgspec.DecodeError) as problem:
            opa.revisions = ()
            opa.found(str(problem) or "it said nothing in time")
        else:
            opa.found("")

    async def _put_right(self, opa: Opa, wanted: Mapping[str, Written]) -> None:
        # Data first: it is deleted or not there, and nothing of ours is.
        if await self._call(opa, "DELETE", f"/v1/data/{PLACE}", none=404) is not None:
            opa.drifted(f"there was data below data.{PLACE}, which is not a revision's; it is taken away")
        text = await self._call(opa, "GET", "/v1/policies", most=_MOST)
        found = compared(_policies.decode(text or b"{}").result, wanted)
        wrong = {*found.missing, *found.changed}
        held = opa.revisions
        # Nothing is decided by what is wrong, from here until it is mended.
        opa.revisions = () if found.strange else tuple(digest for digest in wanted if digest not in wrong)
        for digest in found.changed:
            opa.drifted(f"policy {wanted[digest].id} is not what was written there; it is written again")
        for digest in found.missing:
            if digest in held:
                opa.drifted(f"policy {wanted[digest].id} is gone; it is written again")
        for each in found.strange:
            opa.drifted(f"policy {each} is in the package {PLACE}, and is not a revision; it is taken away")
            await self._call(opa, "DELETE", f"/v1/policies/{quote(each, safe='/')}", none=404)
        for digest in wanted:
            if digest in wrong:
                body = wanted[digest].text.encode()
                await self._call(opa, "PUT", f"/v1/policies/{wanted[digest].id}", body=body)
        for each in opa.old - {one.id for one in wanted.values()}:
            await self._call(opa, "DELETE", f"/v1/policies/{each}", none=404)
            opa.old.discard(each)
        opa.revisions = tuple(wanted)
        if wrong or found.strange:
            opa.look.set()  # what was written is read again

    async def _call(
        self, opa: Opa, method: str, path: str, *, body: bytes | None = None, none: int = 0, most: int = 1 << 20
    ) -> bytes | None:
        """One request; None for the status `none`. Raises `_Refused`, aiohttp's errors, OSError, TimeoutError."""
        headers = {"Content-Type": "text/plain"}
        async with (
            asyncio.timeout(_SECONDS),
            self._open().request(method, opa.url + path, data=body, headers=headers, allow_redirects=False) as response,
        ):
            text = bytearray()
            async for chunk in response.content.iter_any():
                text += chunk
                if len(text) > most:
                    raise _Refused(f"{method} {path}: the answer has more than {most} bytes")
            if response.status == none:
                return None
            if response.status in {401, 403}:
                raise _Refused(f"it does not let us {method} {path} ({response.status}): give a token that may, or allow it there")
            if response.status not in {200, 204}:
                raise _Refused(f"{method} {path}: {response.status}: {bytes(text[:300]).decode('utf-8', 'replace')}")
            return bytes(text)


class _Refused(Exception):
    """An OPA did not do what it was asked."""


async def written(checker: Checker, revision: Revision) -> Written:
    """A revision as one module. Raises `PolicyError`, `EngineUnavailable`."""
    name = revision.digest.partition(":")[2]
    request = {
        "op": "relocate",
        "modules": revision.modules,
        "data": msgspec.Raw(revision.data or b"{}"),
        "revision": revision.digest,
        "name": name,
    }
    reply = await checker.command(request)
    if problems := reply.get("problems"):
        raise PolicyError(tuple(msgspec.convert(each, PolicyProblem) for each in problems))
    return Written(name, reply["modules"][""], frozenset(reply["rules"]))

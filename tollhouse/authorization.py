"""The AuthorizationPolicies of a snapshot, compiled: its `program` and the library that ships in `conf/istio`, as one revision.

The same policies make the same revision everywhere, named by its digest; it is compiled anew only when they change.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Awaitable, Callable, Collection, Mapping

import msgspec

from mesh.model import Program, Snapshot
from mesh.policy import ReadSet, Revision, digest_of

Compile = Callable[[Mapping[str, str], bytes, Collection[str]], Awaitable[Revision]]
"""Modules, data and the decisions that are asked for; raises `PolicyError` or `EngineUnavailable`."""
LIBRARY = "istio/authz.rego"


@functools.cache
def library() -> str:
    """The Rego that evaluates AuthorizationPolicies."""
    return (importlib.resources.files("conf") / LIBRARY).read_text()


class Authorizer:
    """Fills in `Snapshot.authorization`. Remembers the last revision that it made."""

    def __init__(self, compile_policy: Compile) -> None:
        self._compile = compile_policy
        self._program: Program | None = None
        self._revision: Revision | None = None

    async def fill(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot` with its AuthorizationPolicies ready to be asked. Raises `PolicyError` or `EngineUnavailable`."""
        program = snapshot.program
        if program is None:
            return snapshot
        if self._revision is None or program != self._program:
            self._revision = await self._made(program)
            self._program = program
        return msgspec.structs.replace(snapshot, authorization=self._revision)

    async def _made(self, program: Program) -> Revision:
        """The revision of a program. Modules that pick the same facts differ in their names alone, and what can be said of one (what it
        reads) holds for all: one of each kind is compiled, which keeps the time in proportion."""
        alike: dict[str, list[str]] = {}
        for decision in program.decisions:
            alike.setdefault(_without_name(program, decision), []).append(decision)
        chosen = {_file(decisions[0]): program.modules[_file(decisions[0])] for decisions in alike.values()}
        samples = [decisions[0] for decisions in alike.values()]
        compiled = await self._compile({LIBRARY: library(), **chosen}, program.data, samples)
        tables = msgspec.json.decode(program.data)["istio_authz"]
        points = {}
        for decisions in alike.values():
            sample = compiled.entry_points[decisions[0]]
            for decision in decisions:
                digest = _digest(compiled.opa, program.modules[_file(decision)], tables[_name(decision)], sample.reads)
                points[decision] = msgspec.structs.replace(sample, path=decision, digest=digest)
        modules = {LIBRARY: library(), **program.modules}
        return msgspec.structs.replace(compiled, digest=digest_of(modules, program.data), modules=modules, entry_points=points)


def _name(decision: str) -> str:
    """The last but one part of a decision's name, which is the name of its module and of its table, too."""
    return decision.split(".")[-2]


def _file(decision: str) -> str:
    return f"istio/authz/at/{_name(decision)}.rego"


def _without_name(program: Program, decision: str) -> str:
    return program.modules[_file(decision)].replace(_name(decision), "")


def _digest(opa: str, module: str, table: object, reads: ReadSet) -> str:
    """SHA-256 over what an answer is made of: OPA, the library, the module and its table; and over how it may be kept."""
    told = [opa, library(), module, table, reads]
    return hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()

"""The AuthorizationPolicies of a snapshot, compiled: its `program` and the library that ships in `conf/istio`, as one revision.

The same policies make the same revision everywhere, named by its digest; it is compiled anew only when they change.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Awaitable, Callable, Collection, Mapping

import msgspec

from mesh.model import Program, Snapshot
from mesh.policy import Revision

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
            self._revision = await self._compile({LIBRARY: library(), **program.modules}, program.data, program.decisions)
            self._program = program
        return msgspec.structs.replace(snapshot, authorization=self._revision)

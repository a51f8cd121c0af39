"""The interface that every Rego engine has, and what its answers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from mesh.policy import Revision

Reason = Literal[
    "",
    "timeout",
    "crashed",
    "quarantined",
    "overloaded",
    "unavailable",
    "conflict",
    "eval",
    "input",
    "internal",
]
"""Why an evaluation has no result.

`timeout`: its time was over. `crashed`: the policy ended the worker, twice. `quarantined`: it did so before, and is not asked for now.
`overloaded`: too many questions wait. `unavailable`: no engine holds the revision. `conflict`: rules disagree about a value.
`eval`: the policy failed otherwise. `input`: the document is not JSON. `internal`: the engine is at fault.
"""


class Evaluation(msgspec.Struct, frozen=True, gc=False):
    """What came of one question."""

    kind: Literal["result", "undefined", "error"]
    value: bytes = b""
    """The result as JSON; empty unless `kind` is `result`."""
    message: str = ""
    """For people: what went wrong."""
    reason: Reason = ""
    """Set with `error` only."""


UNDEFINED = Evaluation("undefined")


def failure(reason: Reason, message: str) -> Evaluation:
    """An evaluation that ended in an error."""
    return Evaluation("error", b"", message, reason)


Done = Callable[[Evaluation], None]


class PolicyProblem(msgspec.Struct, frozen=True):
    """One thing wrong in a policy, in OPA's words."""

    file: str = ""
    row: int = 0
    column: int = 0
    code: str = ""
    """OPA's error code (`rego_parse_error`, `rego_type_error`, ...)."""
    message: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.row}:{self.column}: " if self.file and self.row else f"{self.file}: " if self.file else ""
        return where + self.message


class PolicyError(Exception):
    """A policy that can't be used, with everything that is wrong in it."""

    def __init__(self, problems: tuple[PolicyProblem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class EngineUnavailable(Exception):
    """The engine can't do what was asked now; the message says why."""


class Engine(Protocol):
    """Answers questions about revisions of policy."""

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        """Evaluates the entry point `path` (`shop.authz.decision`) of `revision` with `document` (JSON) as input.

        `done` gets the answer, exactly once, within about `timeout` seconds; perhaps before this returns. Never raises.
        """
        ...

    async def load(self, revision: Revision) -> None:
        """Makes `revision` ready, so that its first question is as quick as any. Raises `PolicyError`, `EngineUnavailable`."""
        ...

    async def close(self) -> None:
        """Ends the engine. Open questions are answered with `unavailable`."""
        ...


def segments(path: str) -> tuple[str, ...]:
    """The parts of a decision's path below `data`: `shop.authz.decision`, `data.shop.authz.decision` and `shop/authz/decision` are one.

    Raises ValueError for a path with an empty part.
    """
    parts = tuple(path.strip("/").split("/")) if "/" in path else tuple(path.split("."))
    if len(parts) > 1 and parts[0] == "data":
        parts = parts[1:]
    if not all(parts):
        raise ValueError(f"{path!r} is not the path of a decision: write it as in shop.authz.decision")
    return parts

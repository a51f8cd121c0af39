"""How commands have an OPA worker do something with a folder of policy, and how they show what is wrong with it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from pdp.engines.engine import EngineUnavailable, PolicyError, PolicyProblem
from tollhouse.output import Complaint, emit

T = TypeVar("T")
_FILE = re.compile(r"\bpolicy/(\S+?\.rego)\b")

FOLDER = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
DECISIONS = click.option("--decision", "decisions", multiple=True, help="A decision to serve (shop.authz.decision); may be given again.")
ALLOW_BUILTIN = click.option(
    "--allow-builtin", "allow", multiple=True, metavar="NAME", help="Allow a builtin that is forbidden, as the PDP may; may be given again."
)

FORBID_BUILTIN = click.option(
    "--forbid-builtin", "forbid", multiple=True, metavar="NAME", help="Forbid a builtin as well, as the PDP may; may be given again."
)


def with_pool(
    folder: Path,
    work: Callable[[Any], Awaitable[T]],
    *,
    form: str = "table",
    workers: int = 0,
    allow: Sequence[str] = (),
    forbid: Sequence[str] = (),
) -> T:
    """Does `work` with OPA workers (`workers` of them for evaluations; commands have one of their own).

    Problems of the policy in `folder` are shown, all of them, to standard error, and with a `form` that programs read also to standard
    output. Raises `Complaint`.
    """
    from tollhouse.parts import LazyPool

    # What a worker says when a policy ends it comes with its end; a trace of Go's is nothing to an author.
    logging.getLogger("pdp.engines").setLevel(logging.CRITICAL)

    async def run() -> T:
        pool = LazyPool(workers, allow=allow, forbid=forbid)
        try:
            return await work(pool)
        finally:
            await pool.close()

    try:
        return asyncio.run(run())
    except PolicyError as problem:
        found = [relabelled(each, folder) for each in problem.problems]
        if form != "table":
            emit(form, {"problems": [as_value(each) for each in found]}, (), ())
        *others, last = found
        for each in others:
            Complaint(text(each)).show()
        raise Complaint(text(last)) from None
    except EngineUnavailable as problem:
        hint = "; is there a great deal of data, or a rule that goes through it again and again?" if "MiB" in str(problem) else ""
        raise Complaint(f"{problem}{hint}") from None


def relabelled(problem: PolicyProblem, folder: Path) -> PolicyProblem:
    """`problem` with its file named as the user finds it."""
    below = problem.file.removeprefix("policy/")
    file = str(folder / below) if below != problem.file else problem.file
    return PolicyProblem(file=file, row=problem.row, column=problem.column, code=problem.code, message=with_paths(problem.message, folder))


def with_paths(message: str, folder: Path) -> str:
    """`message` with the files of the folder named as the user finds them."""
    return _FILE.sub(lambda found: str(folder / found[1]), message)


def as_value(problem: PolicyProblem) -> dict[str, Any]:
    """For programs."""
    first, *_ = problem.message.splitlines() or [""]
    return {"file": problem.file, "row": problem.row, "column": problem.column, "code": problem.code, "message": first}


def text(problem: PolicyProblem) -> str:
    """For people: the line in question, and a mark below it, come on lines of their own."""
    first, *lines = problem.message.splitlines() or [""]
    place = f"{problem.file}:{problem.row}" + (f":{problem.column}" if problem.column else "") if problem.row else problem.file
    return "\n    ".join([f"{place}: {first}" if place else first, *(line.expandtabs(1) for line in lines if line.strip())])

"""Brings revisions into workers, each once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from mesh.policy import Revision
from pdp.engines.child import Child
from pdp.engines.clerk import encoded, problems_in
from pdp.engines.engine import EngineUnavailable, PolicyError, PolicyProblem


class Loader:
    """Owned by the pool, which is told when a worker has a revision, and when a revision can't be used at all."""

    def __init__(
        self, loaded: Callable[[Child, str], None], refused: Callable[[str, str], None], held: Callable[[], Iterable[Revision]] = tuple
    ) -> None:
        """`held` gives the revisions that workers may hold."""
        self._held = held
        self._loaded = loaded
        self._refused = refused
        self._tasks: set[asyncio.Task[None]] = set()

    def bring(self, child: Child, revision: Revision) -> asyncio.Task[None]:
        """Loads a revision into a worker, unless it holds it or is being given it. What is returned raises `PolicyError`,
        `EngineUnavailable` when it is awaited."""
        task = child.loading.get(revision.digest)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(child, revision))
            if revision.digest not in child.loaded:
                child.loading[revision.digest] = task
            self._tasks.add(task)
            task.add_done_callback(self._done)
        return task

    def close(self) -> None:
        """Gives up whatever is on its way."""
        for task in self._tasks:
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waits for it; the pool knows the rest

    async def _load(self, child: Child, revision: Revision) -> None:
        digest = revision.digest
        if digest in child.loaded:
            return
        try:
            if not revision.modules and revision.bundle:
                message = f"the modules of {digest} are in a bundle that has not been fetched"
                self._refused(digest, message)
                raise EngineUnavailable(message)
            problems = await self._command(child, revision)
        except ConnectionError as problem:
            raise EngineUnavailable(str(problem)) from problem
        finally:
            child.loading.pop(digest, None)
        if problems:
            error = PolicyError(problems)
            self._refused(digest, f"{digest} can't be used: {error}")
            raise error
        self._loaded(child, digest)

    async def _command(self, child: Child, revision: Revision) -> tuple[PolicyProblem, ...]:
        """Gives a worker a revision. With the modules of one that it holds, only the data: it is not compiled again."""
        whole = {"op": "load", "revision": revision.digest, "modules": revision.modules, "data": revision.data}
        for other in self._held():
            if other.digest in child.loaded and other.digest != revision.digest and other.modules == revision.modules:
                part = {"op": "load", "revision": revision.digest, "base": other.digest, "data": revision.data}
                problems = problems_in(await child.command(encoded(part)))
                if not any(problem.code == "no_base" for problem in problems):
                    return problems
                break  # it was told to forget that one meanwhile
        return problems_in(await child.command(encoded(whole)))

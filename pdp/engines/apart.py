"""Revisions that are only tried are evaluated apart: one that loops or eats memory must hold up nothing that is enforced."""

from __future__ import annotations

from mesh.model import Snapshot
from mesh.policy import Revision
from pdp.engines.engine import Done, Engine


class Apart:
    """An `Engine` of two: `main`, and `aside` for what is in shadow. `close` ends `aside`; `main` is its owner's to close."""

    def __init__(self, main: Engine, aside: Engine | None) -> None:
        """Without `aside`, `main` holds one revision at a time (an OPA server of the user's), and nothing can be tried."""
        self._main = main
        self._aside = aside
        self._shadow = ""

    def follow(self, snapshot: Snapshot) -> tuple[Revision, ...]:
        """Takes the shadow revision of `snapshot` for what is evaluated apart, unless it decides, too. Returns what is to be loaded, the
        active revision last."""
        policy, shadow, canary = snapshot.policy, snapshot.shadow, snapshot.canary
        deciding = {revision.digest for revision in (policy, canary) if revision is not None}
        tried = shadow is not None and self._aside is not None and shadow.digest not in deciding
        self._shadow = shadow.digest if tried and shadow is not None else ""
        found = (policy,) if self._aside is None else (shadow, canary, policy)
        return tuple(revision for revision in found if revision is not None)

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        """As `Engine.evaluate`."""
        self._of(revision).evaluate(revision, path, document, timeout, done)

    async def load(self, revision: Revision) -> None:
        """As `Engine.load`."""
        await self._of(revision).load(revision)

    async def close(self) -> None:
        """As `Engine.close`."""
        if self._aside is not None:
            await self._aside.close()

    def _of(self, revision: Revision) -> Engine:
        return self._aside if self._aside is not None and revision.digest == self._shadow else self._main

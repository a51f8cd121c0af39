"""Which revisions a pool's workers are to hold, and which can't be held. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from mesh.policy import Revision
from pdp.engines.quarantine import Quarantine

_REFUSED: Final = 32


class HeldRevisions:
    """The `keep` revisions that were loaded or asked for last. Owned by the pool."""

    def __init__(self, keep: int) -> None:
        self._keep = max(1, keep)
        self._held: OrderedDict[str, Revision] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._deaths = Quarantine(deaths=3)  # one more than a question is allowed: it concerns every question of the revision
        self._newest = ""

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def digests(self) -> tuple[str, ...]:
        """Of all that are held, the one used last at the end."""
        return tuple(self._held)

    def revisions(self) -> tuple[Revision, ...]:
        """All that are held."""
        return tuple(self._held.values())

    def use(self, digest: str) -> None:
        """A held revision is asked for."""
        if digest != self._newest:
            self._held.move_to_end(digest)
            self._newest = digest

    def hold(self, revision: Revision) -> list[str]:
        """Holds a revision from now on; the digests of those that are let go for it."""
        self._held[revision.digest] = revision
        self._held.move_to_end(revision.digest)
        self._newest = revision.digest
        gone = []
        while len(self._held) > self._keep:
            gone.append(self._held.popitem(last=False)[0])
        return gone

    def refusal(self, digest: str, now: float) -> str:
        """Why a revision can't be held at `now` (monotonic seconds); empty when nothing is known against it."""
        if left := self._deaths.remaining((digest, ""), now):
            return f"loading {digest} keeps ending the workers; it is tried again in {left:.0f} s"
        return self._refused.get(digest, "")

    def refuse(self, digest: str, why: str) -> None:
        """Lets go of a revision that can't be used, and remembers why."""
        self._held.pop(digest, None)
        self._refused[digest] = why
        while len(self._refused) > _REFUSED:
            self._refused.popitem(last=False)

    def pardon(self, digest: str) -> None:
        """Forgets what was said against a revision: somebody asks for it anew."""
        self._refused.pop(digest, None)

    def death(self, digest: str, now: float) -> bool:
        """A worker ended while it loaded a revision; True when it is let go for a while, because that keeps happening."""
        if not self._deaths.blame((digest, ""), now):
            return False
        self._held.pop(digest, None)
        return True

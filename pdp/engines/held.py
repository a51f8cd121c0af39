"""Which revisions a pool's workers are to hold, and which can't be held. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from mesh.policy import Revision

_REFUSED: Final = 32


class HeldRevisions:
    """The `keep` revisions that were loaded or asked for last. Owned by the pool."""

    def __init__(self, keep: int) -> None:
        self._keep = max(1, keep)
        self._held: OrderedDict[str, Revision] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._deaths: dict[str, int] = {}
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

    def refusal(self, digest: str) -> str:
        """Why a revision can't be held; empty when nothing is known against it."""
        return self._refused.get(digest, "")

    def refuse(self, digest: str, why: str) -> None:
        """Lets go of a revision that can't be used, and remembers why."""
        self._held.pop(digest, None)
        self._deaths.pop(digest, None)
        self._refused[digest] = why
        while len(self._refused) > _REFUSED:
            self._refused.popitem(last=False)

    def pardon(self, digest: str) -> None:
        """Forgets what is known against a revision: somebody asks for it anew."""
        self._refused.pop(digest, None)
        self._deaths.pop(digest, None)

    def loaded(self, digest: str) -> None:
        """A worker has loaded a revision."""
        self._deaths.pop(digest, None)

    def death(self, digest: str) -> bool:
        """A worker ended while it loaded a revision; True when that makes two in a row."""
        self._deaths[digest] = self._deaths.get(digest, 0) + 1
        return self._deaths[digest] > 1

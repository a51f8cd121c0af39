"""What is tried is evaluated apart from what decides."""

from __future__ import annotations

import asyncio

import pytest

from mesh.model import Snapshot
from mesh.policy import Revision
from pdp.engines.apart import Apart
from pdp.engines.engine import UNDEFINED, Done

A, B, C = (Revision(digest=f"sha256:{name}") for name in "abc")


class Engine:
    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.asked: list[str] = []
        self.closed = False

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        self.asked.append(revision.digest[-1])
        done(UNDEFINED)

    async def load(self, revision: Revision) -> None:
        self.loaded.append(revision.digest[-1])

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("policy", "shadow", "canary", "main", "aside"),
    [
        (A, None, None, "a", ""),
        (A, B, None, "a", "b"),
        (A, B, C, "ca", "b"),
        (A, A, None, "aa", ""),
        (A, B, B, "bba", ""),
        (None, B, None, "", "b"),
    ],
)
def test_the_shadow_is_apart_unless_it_decides(
    policy: Revision | None, shadow: Revision | None, canary: Revision | None, main: str, aside: str
) -> None:
    one, other = Engine(), Engine()
    apart = Apart(one, other)

    async def run() -> None:
        for revision in apart.follow(Snapshot(version="1", policy=policy, shadow=shadow, canary=canary)):
            await apart.load(revision)
            apart.evaluate(revision, "a.b", b"{}", 1.0, lambda _: None)
        await apart.close()

    asyncio.run(run())
    assert ("".join(one.loaded), "".join(one.asked)) == (main, main)
    assert ("".join(other.loaded), "".join(other.asked)) == (aside, aside)
    assert (one.closed, other.closed) == (False, True)


def test_an_engine_that_holds_one_revision_is_given_the_active_one_alone() -> None:
    found = Apart(Engine(), None).follow(Snapshot(version="1", policy=A, shadow=B, canary=C))
    assert found == (A,)

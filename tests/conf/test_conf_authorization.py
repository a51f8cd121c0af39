"""Policies above, requests and what becomes of them below: one file in `cases/` for each thing that AuthorizationPolicy can say.

Written after Istio's documentation ("Authorization Policy", "Authorization Policy Conditions", "Security"), and evaluated by real workers.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from authorization_world import BASE, CASES, MESH, Judge, compiled, lines

FILES = sorted(CASES.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_policies_say_this_about_requests(path: Path) -> None:
    policies, _, table = path.read_text().partition("=>\n")
    snapshot = compiled(BASE, MESH, policies)
    assert [str(problem) for problem in snapshot.problems if problem.severity == "error"] == []

    async def play() -> list[str]:
        wrong = []
        async with Judge() as judge:
            ready = await judge.ready(snapshot)
            for expected, request, line in lines(table):
                verdict, dry, marks = await judge.judge(ready, request)
                got = verdict + (f" dry {dry}" if dry else "") + (f" marks {marks}" if marks else "")
                short = re.sub(r" by .*?(?=$| asks)", "", got)
                if expected not in (got, short):
                    wrong.append(f"{line}\n  got: {got}")
        return wrong

    assert asyncio.run(play()) == []


def test_there_are_cases() -> None:
    assert len(FILES) > 10

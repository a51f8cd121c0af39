"""Decision logs decided again: by one revision against what was decided, or by two against each other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import msgspec

from mesh.policy import Revision
from mesh.questions import Decision
from pdp.answer import decision_of
from pdp.engines.engine import Engine, Evaluation
from pdp.replay import Change, Recorded, Tally, change_of, missing, recorded, told, told_of

AT_ONCE = 128
PATIENCE = 5.0
"""Seconds that one decision may take."""

_encode = msgspec.json.Encoder(decimal_format="number").encode


class Replayed(msgspec.Struct):
    """What came of it."""

    tally: Tally
    events: int = 0
    skipped: dict[str, int] = {}
    """Events that were not decided anew, by why."""
    notes: dict[str, None] = {}
    """What is worth knowing about the answers."""

    @property
    def decided(self) -> int:
        """How many were."""
        return sum(self.tally.counts.values())

    def skip(self, why: str) -> None:
        """Counts an event that is left out."""
        self.skipped[why] = self.skipped.get(why, 0) + 1


def paths_in(events: Iterable[dict[str, Any]]) -> frozenset[str]:
    """The decisions that a log has events of."""
    found = set()
    for event in events:
        one = recorded(event)
        if one is not None and not one.provider:
            found.add(one.path)
    return frozenset(found)


async def replay(engine: Engine, events: Iterable[dict[str, Any]], after: Revision, before: Revision | None = None) -> Replayed:
    """Decides `events` by `after`, and compares with `before`; with what was decided when it is None. Raises as `Engine.load`."""
    found = Replayed(Tally())
    for revision in (before, after):
        if revision is not None:
            await engine.load(revision)
            for point in revision.entry_points.values():
                if point.reads.volatile:
                    found.notes[f"{point.path} asks {', '.join(point.reads.volatile)}: what it said then is not known"] = None
    source = iter(events)
    while chunk := list(islice(source, AT_ONCE)):
        for event, change, said, now in await asyncio.gather(*(_one(engine, event, after, before) for event in _to_decide(chunk, found))):
            found.tally.add(event, change, said, now)
    return found


def _to_decide(chunk: list[dict[str, Any]], found: Replayed) -> Iterator[Recorded]:
    for event in chunk:
        found.events += 1
        one = recorded(event)
        if one is None:
            found.skip("without path or input")
        elif one.provider:
            found.skip("decided by another provider")
        elif not one.enforced:
            found.skip("not enforced (shadow)")
        else:
            yield one


async def _one(engine: Engine, event: Recorded, after: Revision, before: Revision | None) -> tuple[Recorded, Change, str, str]:
    gone: dict[str, None] = {}
    for revision in (before, after):
        point = revision.entry_points.get(event.path) if revision is not None else None
        if point is not None:
            gone |= dict.fromkeys(missing(event, point.reads))
    new = await _decide(engine, after, event)
    if before is None:
        verdict, said = event.verdict, told(event.verdict, event.rule, event.reason)
    else:
        old = await _decide(engine, before, event)
        verdict, said = old.verdict.value, told_of(old)
    change = change_of(verdict, new.verdict.value)
    if gone:
        return event, "unsure", said, f"not known: it reads {', '.join(gone)}, which the log does not have"
    return event, change, said, told_of(new)


async def _decide(engine: Engine, revision: Revision, event: Recorded) -> Decision:
    answer: asyncio.Future[Evaluation] = asyncio.get_running_loop().create_future()

    def done(evaluation: Evaluation) -> None:
        if not answer.done():
            answer.set_result(evaluation)

    engine.evaluate(revision, event.path, _encode(event.document), PATIENCE, done)
    return decision_of(await answer, event.path, revision.digest)

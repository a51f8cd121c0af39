"""The active policy's own say about the decision log: `system.log.drop` and `system.log.mask`, as OPA asks them.

They are evaluated by a worker of their own, so that a mask that loops or eats memory holds no request's decision up. What they could not be
asked about is not written.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from mesh.model import Snapshot
from mesh.policy import Revision
from pdp.engines.engine import Engine, EngineUnavailable, Evaluation, PolicyError
from telemetry.decision_event import event_json
from telemetry.masks import Event, apply, masks_of
from telemetry.record import Telemetry
from tollhouse.keeper import Keeper
from tollhouse.parts import LazyPool

DROP: Final = "system.log.drop"
MASK: Final = "system.log.mask"
PATIENCE: Final = 1.0
"""Seconds that one question may take."""
LOAD: Final = 10.0
"""Seconds that a new configuration waits at most for its masks."""
_PACKAGE: Final = re.compile(r"\bpackage\s+system\b")
_decode = msgspec.json.Decoder().decode


class PolicyMasks:
    """A `telemetry.decision_log.Masker`. Made, applied and closed in the event loop; called in the log's thread."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._revision: Revision | None = None
        self._asked: tuple[str, ...] = ()

    async def apply(self, snapshot: Snapshot) -> None:
        """Follows the active policy, before `snapshot` is in force. Never raises: what can't be masked is not written."""
        revision = snapshot.policy
        if revision is not None and self._revision is not None and revision.digest == self._revision.digest:
            return
        asked = rules_of(revision) if revision is not None else ()
        if asked and revision is not None:
            try:
                async with asyncio.timeout(LOAD):
                    await self._engine.load(revision)
            except (PolicyError, EngineUnavailable, TimeoutError):
                pass  # each question brings it in, and says what is wrong
        self._revision, self._asked = revision, asked

    def __call__(self, events: list[Event]) -> Sequence[Event | Exception | None]:
        """As `Masker`. Raises TimeoutError when nobody answers."""
        revision, asked = self._revision, self._asked
        if revision is None or not asked or not events:
            return events
        texts = [event_json(event) for event in events]
        future = asyncio.run_coroutine_threadsafe(self._ask(revision, asked, texts), self._loop)
        try:
            said = future.result(PATIENCE * 4)
        except TimeoutError:
            future.cancel()
            raise
        return [self._masked(event, answers) for event, answers in zip(events, said, strict=True)]

    async def _ask(self, revision: Revision, asked: tuple[str, ...], texts: list[bytes]) -> list[dict[str, Evaluation]]:
        async def one(path: str, text: bytes) -> Evaluation:
            answer: asyncio.Future[Evaluation] = self._loop.create_future()

            def done(evaluation: Evaluation) -> None:
                if not answer.done():
                    answer.set_result(evaluation)

            self._engine.evaluate(revision, path, text, PATIENCE, done)
            return await answer

        found = await asyncio.gather(*(one(path, text) for text in texts for path in asked))
        return [dict(zip(asked, found[at : at + len(asked)], strict=True)) for at in range(0, len(found), len(asked))]

    def _masked(self, event: Event, answers: dict[str, Evaluation]) -> Event | Exception | None:
        try:
            if DROP in answers and value_of(DROP, answers[DROP]) is True:
                return None
            if MASK in answers and answers[MASK].kind != "undefined":
                apply(masks_of(value_of(MASK, answers[MASK])), event)
        except (RuntimeError, ValueError) as problem:
            return problem
        return event


def follow_masks(telemetry: Telemetry, keeper: Keeper, loop: asyncio.AbstractEventLoop, opa: Engine | None = None) -> LazyPool | None:
    """Has the decision log, if there is one, follow the masks of the active policy. They are asked of `opa`, the user's own servers, or of
    the pool that is returned, which is the caller's to close once the log is."""
    decisions = telemetry.decision_log
    if decisions is None:
        return None
    pool = LazyPool(1, threads=1)
    masks = PolicyMasks(opa or pool, loop)
    decisions.masker = masks
    keeper.add(masks.apply)
    return pool


def value_of(path: str, evaluation: Evaluation) -> Any:
    """What a rule says; None when it is undefined. Raises RuntimeError when it could not be asked."""
    if evaluation.kind == "error":
        raise RuntimeError(f"{path}: {evaluation.message}")
    return _decode(evaluation.value) if evaluation.kind == "result" else None


def rules_of(revision: Revision) -> tuple[str, ...]:
    """Which of the two rules a revision may have: asking one that is not there costs time and nothing else."""
    texts = [source for source in revision.modules.values() if _PACKAGE.search(source)]
    inside = b'"system"' in revision.data or (bool(revision.bundle) and not revision.modules)
    return tuple(path for path in (DROP, MASK) if inside or any(path.rpartition(".")[2] in text for text in texts))

"""The slots of concurrency limits that a request, a connection or a flow holds: from its grants until it is recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mesh.outcome import Outcome
from mesh.questions import SlotGrant
from mesh.refusals import QuotaError, Refusal


def release_slots(outcome: Outcome) -> None:
    """It has ended. What was released before, since it was refused, stays released."""
    for _, grant in outcome.grants:
        if type(grant) is SlotGrant:
            grant.slot.release()


def guard_slots(outcome: Outcome, refuse: Callable[[Refusal], object]) -> None:
    """It goes on: has `refuse` end it if a slot of a `strict` limit lapses."""
    for question, grant in outcome.grants:
        if type(grant) is SlotGrant and question.limit.strict:
            name = question.limit.name
            grant.slot.on_cut(
                partial(refuse, QuotaError(reason=f"{name}: the slot lapsed, for its lease could not be renewed", limit=name))
            )

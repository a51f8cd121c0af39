"""Stories of limits by the calendar."""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec

from mesh.quota_windows import Calendar
from tests.sim.story import Shape, shape_of, wrong_with


def calendar_shape_of(rng: random.Random) -> Shape:
    """The same of a limit by the calendar. Minutes begin 20 seconds into a story, when the bad times are over; seconds and their leases end
    all the time."""
    shape = shape_of(rng)
    unit: Literal["Second", "Minute"] = rng.choice(("Second", "Minute"))
    length = 1.0 if unit == "Second" else 60.0
    tokens = min(shape.limit.burst, 60)
    shape.limit = msgspec.structs.replace(shape.limit, tokens=tokens, burst=tokens, interval=length, calendar=Calendar(unit))
    shape.costs = (1,) if tokens < 3 else shape.costs
    shape.skew = rng.choice((0.0, 0.2, 5.0))
    if {"forward", "back"} & set(shape.faults):  # what gateways knew of a clock that was set is lost with the record of it
        shape.faults = tuple(name for name in shape.faults if name not in ("failover", "emptied"))
    if rng.random() < 0.5:  # when a minute ends: what is in hand by then is not to be spent
        shape.floods = (*shape.floods, 19.9, 20.02, 20.5)
    return shape


def wrong_with_calendar(seed: int, **more: Any) -> str:
    """As `wrong_with`, of a limit by the calendar."""
    return wrong_with(seed, shape=calendar_shape_of(random.Random(seed)), words=" --calendar", **more)

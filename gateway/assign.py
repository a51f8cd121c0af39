"""Who gets which connection: the pool's policy, as two pure functions. `gateway.pool` does what they say.

A request waits in the lane (endpoint and protocol) that was chosen for it. Connections are counted over the whole cluster
(`Cluster.max_connections`), those that are still being made included.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Assignment(msgspec.Struct, frozen=True):
    """What is to be done in one lane."""

    grants: tuple[int, ...]
    """How many of the requests that wait go to each free connection, in the order that these were given in."""
    dials: int
    """Connections to begin to make."""
    evictions: int
    """Idle connections of other lanes to close first, to make room for these."""


def assign(waiting: int, free: Sequence[int], dialing: int, slots: int, room: int, idle: int) -> Assignment:
    """Decides for one lane.

    `waiting` requests; `free` slots of each open connection; `dialing` connections being made, of which each will take `slots` requests;
    `room` for more connections in the cluster (negative when the limit was lowered); `idle` connections of other lanes could be closed.

    1. A free connection takes what waits, as far as it has slots.
    2. For what still waits and is not expected by a connection in the making, new ones are begun, as far as there is room.
    3. Where there is no room, idle connections of other lanes make way: a quiet endpoint must not starve a busy one.
    What is left waits for the next connection that ends or becomes free.
    """
    grants = []
    for slots_of_one in free:
        granted = min(waiting, max(0, slots_of_one))
        grants.append(granted)
        waiting -= granted
    short = max(0, waiting - dialing * slots)
    wanted = -(-short // slots)
    if wanted <= room:
        return Assignment(tuple(grants), wanted, 0)
    evictions = min(idle, wanted - room)
    dials = max(0, room + evictions)
    return Assignment(tuple(grants), dials, evictions if dials else 0)


def casualties(waiting: int, dialing: int, slots: int, opened: int) -> int:
    """How many of those that wait, longest first, fail with a connection that could not be made.

    Those whom the other `dialing` connections will take are spared. Of the rest, where no connection is `opened` that could
    become free all fail, since the next dial would most likely fail as this one did; else as many as the connection would have taken.
    """
    short = max(0, waiting - dialing * slots)
    return min(short, slots) if opened else short

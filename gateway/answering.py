"""The header changes of an answer on its way to the client, in the one order that they are made in."""

from __future__ import annotations

import functools

from gateway.headers import Changes
from gateway.plan import Permit
from mesh.http import Header
from mesh.model import HeaderChange


def answer_headers(headers: list[Header], permit: Permit) -> list[Header]:
    """The answer's header fields for the client. `headers` is the upstream's and is not changed."""
    plan = permit.plan
    changes = (
        plan.rule.response_headers,  # 1. what the route's rule says (Gateway API ResponseHeaderModifier)
        plan.backend.response_headers,  # 2. what its backend says: the more special one has the later word
    )
    for change in changes:
        if change is not None:
            headers = _prepared(change).apply(headers)
    if permit.response_headers:  # 3. what the decisions and the quota add: nothing takes these away again
        headers = [*headers, *permit.response_headers]
    return headers


@functools.lru_cache(maxsize=1024)
def _prepared(change: HeaderChange) -> Changes:
    return Changes(change)

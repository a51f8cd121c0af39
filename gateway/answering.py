"""The header changes of an answer on its way to the client, in the one order that they are made in."""

from __future__ import annotations

from gateway.plan import Permit
from mesh.http import Header


def answer_headers(headers: list[Header], permit: Permit) -> list[Header]:
    """The answer's header fields for the client. `headers` is the upstream's and is not changed."""
    for edit in permit.plan.edits:  # 1. what the route's rule says, then its backend (Gateway API ResponseHeaderModifier)
        headers = edit.apply(headers)
    if permit.response_headers:  # 2. what the decisions and the quota add: nothing takes these away again
        headers = [*headers, *permit.response_headers]
    return headers

"""The newest requests that a limit refused, in memory: what the admin page shows of them."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import msgspec

from mesh.outcome import Outcome
from mesh.questions import Grant, TokenQuestion
from mesh.quota_changes import shown_key
from telemetry.text import moment, shown

MOST: Final = 500
LONGEST: Final = 256
"""Bytes of a path that are kept."""


class _Refused:
    """What is kept of an outcome: no more than a kilobyte or two, whatever the client sent."""

    __slots__ = (
        "caller",
        "flag",
        "gateway",
        "grants",
        "limit",
        "method",
        "path",
        "reason",
        "request_id",
        "route",
        "started",
        "status",
        "trace",
    )

    def __init__(self, outcome: Outcome) -> None:
        head, caller = outcome.head, outcome.caller
        self.started = outcome.started
        self.request_id = outcome.request_id[:128]
        self.trace = outcome.trace[:128]
        self.gateway = outcome.gateway
        self.route = outcome.route
        self.limit = outcome.limit
        self.status = outcome.status
        self.flag = outcome.flag
        self.reason = outcome.reason[:1024]
        self.caller = caller.principal if caller is not None else outcome.peer.principal
        self.method = head.method[:32] if head is not None else b""
        self.path = (head.path or head.target.partition(b"?")[0])[:LONGEST] if head is not None else b""
        self.grants: tuple[tuple[TokenQuestion, Grant], ...] = tuple(outcome.grants)


class QuotaRefusals:
    """Keeps the newest. Its owner is `Telemetry`."""

    __slots__ = ("_kept",)

    def __init__(self, most: int = MOST) -> None:
        self._kept: deque[_Refused] = deque(maxlen=most)

    def add(self, outcome: Outcome) -> None:
        """Takes the outcome of a request that `outcome.limit` refused."""
        self._kept.append(_Refused(outcome))

    def page(self) -> bytes:
        """The refusals as JSON, the oldest first."""
        return msgspec.json.encode({"refusals": [_fields(each) for each in tuple(self._kept)]})


def _fields(kept: _Refused) -> dict[str, Any]:
    return {
        "time": moment(kept.started),
        "at": kept.started,
        "requestId": shown(kept.request_id),
        "traceparent": shown(kept.trace),
        "gateway": kept.gateway,
        "route": kept.route,
        "method": shown(kept.method),
        "path": shown(kept.path),
        "caller": kept.caller,
        "limit": kept.limit,
        "status": kept.status,
        "flag": kept.flag,
        "reason": kept.reason,
        "limits": [
            {
                "limit": asked.limit.name,
                "level": asked.limit.level,
                "per": [f"{part.kind} {part.argument}".strip() for part in asked.limit.per],
                "key": list(shown_key(asked.limit, asked.key)),
                "cost": asked.cost,
                "tokens": asked.limit.tokens,
                "interval": asked.limit.interval,
                "burst": asked.limit.burst,
                "concurrency": asked.limit.concurrency,
                "shadow": asked.limit.shadow,
                "admitted": grant.admitted,
                "remaining": grant.remaining,
                "retryAfter": round(grant.retry_after, 3),
                "error": grant.error,
            }
            for asked, grant in kept.grants
        ],
    }

"""What the client of a request is told that a limit refuses. Pure."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Final

from gateway.plan import Pending, Plan
from mesh.http import Header
from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion
from mesh.quota_answers import Template
from mesh.quota_changes import shown_key
from mesh.refusals import OverQuota, QuotaError, Refusal
from quota.headers import rate_limit_headers

REQUEST_ID: Final = b"REQUEST_ID"


def over_quota(pending: Pending, question: TokenQuestion, grant: Grant, pairs: Sequence[tuple[TokenQuestion, Grant]]) -> Refusal:
    """The refusal by `question`'s limit, which is answered by `grant`. `pairs`: all questions that were answered, with it."""
    limit = question.limit
    if grant.error:
        return QuotaError(reason=f"{limit.name}: {grant.error}", limit=limit.name)
    reason = f"no {'slot' if limit.concurrency else 'token'} left of {limit.name} for {'/'.join(shown_key(limit, question.key))}"
    wanted = limit.answer
    later = wanted.jitter * _chance(pending) if wanted is not None and wanted.jitter else 0.0
    headers = rate_limit_headers(pairs, later)
    wait = max(each.retry_after for asked, each in pairs if not (each.admitted or each.error or asked.limit.shadow)) + later
    if wanted is None:
        return OverQuota(reason=reason, headers=headers, limit=limit.name, retry_after=wait)
    value = _values(limit, grant, max(1, math.ceil(wait)), wanted.status)
    own: list[Header] = [(name, b"".join(_filled(said, value))) for name, said in wanted.headers]
    if wanted.content_type:
        own.append((b"content-type", wanted.content_type))
    return OverQuota(
        reason=reason,
        code=wanted.status,
        headers=(*headers, *own),
        limit=limit.name,
        retry_after=wait,
        parts=() if wanted.body is None else tuple(_filled(wanted.body, value)),
    )


def _values(limit: QuotaLimit, grant: Grant, wait: int, status: int) -> Callable[[bytes], bytes]:
    policy, _, name = limit.name.rpartition("/")

    def value(operator: bytes) -> bytes:
        """What an operator of `mesh.quota_answers` stands for."""
        match operator:
            case b"LIMIT":
                return name.encode()
            case b"POLICY":
                return policy.encode()
            case b"RETRY_AFTER":
                return b"%d" % wait
            case b"REMAINING":
                return b"%d" % grant.remaining
            case b"QUOTA":
                return b"%d" % (limit.concurrency or limit.burst)
            case b"WINDOW":
                return b"%d" % max(1, math.ceil(limit.burst / limit.rate)) if limit.rate else b"0"
            case _:
                return b"%d" % status

    return value


def _filled(template: Template, value: Callable[[bytes], bytes]) -> list[bytes]:
    """A template with its values, in parts: the request's id, which is not known yet, comes between each two."""
    parts = [template[0]]
    for operator, text in zip(template[1::2], template[2::2], strict=True):
        if operator == REQUEST_ID:
            parts.append(text)
        else:
            parts[-1] += value(operator) + text
    return parts


def _chance(pending: Pending) -> float:
    """A number from 0 to 1, another for each request: drawn from what is its alone, so that `settle` stays a function of its arguments."""
    asking, plan = pending.asking, pending.plan
    own = plan.request_id if type(plan) is Plan else b""
    seed = b"%b %r %d" % (own, asking.received, asking.peer.port)
    return zlib.crc32(seed) / 0xFFFFFFFF

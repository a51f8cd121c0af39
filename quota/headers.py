"""What a client is told about its limits: `RateLimit-Policy`, `RateLimit` and `Retry-After`.

The fields follow draft-ietf-httpapi-ratelimit-headers (revisions 08 to 11): both are lists of structured-field strings, the limit's name,
with parameters: the quota `q` in tokens and its window `w` in seconds; what remains, `r`, and the seconds `t` until all of it is there
again. A token bucket maps to `q` = burst and `w` = how long an empty bucket takes to fill; a concurrency limit has the quota unit
`qu="concurrent-requests"` and no window. `Retry-After` is RFC 9110 section 10.2.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from mesh.http import Header
from mesh.model import QuotaLimit
from mesh.questions import Grant, TokenQuestion

_POLICY: Final = b"ratelimit-policy"
_STATE: Final = b"ratelimit"
_RETRY: Final = b"retry-after"
_BOUND: Final = 4096

_Parts = tuple[QuotaLimit, Header, bytes]
_cache: dict[str, _Parts] = {}


def rate_limit_headers(pairs: Sequence[tuple[TokenQuestion, Grant]], later: float = 0.0) -> tuple[Header, ...]:
    """The headers for a request's token questions and their answers.

    Limits in shadow mode, and questions that could not be answered, are left out. `retry-after` (whole seconds, at least 1) is there when
    an enforced limit refused the request, and `later` by so many seconds than would do. A rate-limit service's headers are as it says.
    """
    if len(pairs) == 1:
        question, grant = pairs[0]
        limit = question.limit
        if limit.shadow or grant.error:
            return ()
        if limit.service is not None:
            return grant.headers
        parts = _cache.get(limit.name)
        if parts is None or parts[0] is not limit:
            parts = _prepare(limit)
        state = (_STATE, _left(parts[2], limit, grant))
        if grant.admitted:
            return (parts[1], state)
        return (parts[1], state, (_RETRY, b"%d" % max(1, math.ceil(grant.retry_after + later))))
    return _several(pairs, later)


def _several(pairs: Sequence[tuple[TokenQuestion, Grant]], later: float) -> tuple[Header, ...]:
    told = [(question.limit, grant) for question, grant in pairs if not question.limit.shadow and not grant.error]
    shown = [(limit, grant) for limit, grant in told if limit.service is None]
    theirs = tuple([header for limit, grant in told if limit.service is not None for header in grant.headers])
    if not shown:
        return theirs
    names = [_short(limit) for limit, _ in shown]
    policies: list[bytes] = []
    states: list[bytes] = []
    for (limit, grant), name in zip(shown, names, strict=True):
        text = _quoted(name if names.count(name) == 1 else limit.name)
        policies.append(text + _window(limit))
        states.append(_left(text, limit, grant))
    headers = ((_POLICY, b", ".join(policies)), (_STATE, b", ".join(states)), *theirs)
    waits = [grant.retry_after for _, grant in shown if not grant.admitted]
    return (*headers, (_RETRY, b"%d" % max(1, math.ceil(max(waits) + later)))) if waits else headers


def _left(name: bytes, limit: QuotaLimit, grant: Grant) -> bytes:
    """What remains. Nobody knows when requests in progress end, so that a concurrency limit has no time."""
    if limit.concurrency:
        return b"%b;r=%d" % (name, grant.remaining)
    return b"%b;r=%d;t=%d" % (name, grant.remaining, math.ceil(grant.reset))


def _prepare(limit: QuotaLimit) -> _Parts:
    """The part that is the same for every request of `limit`, kept for the next one."""
    if len(_cache) >= _BOUND:
        _cache.clear()
    text = _quoted(_short(limit))
    parts = _cache[limit.name] = (limit, (_POLICY, text + _window(limit)), text)
    return parts


def _short(limit: QuotaLimit) -> str:
    parts = limit.name.split("/")
    return parts[2] if len(parts) == 3 else limit.name


def _quoted(name: str) -> bytes:
    """A structured-field string (RFC 9651 section 3.3.3): printable ASCII; what is not becomes `?`."""
    text = "".join(letter if " " <= letter <= "~" else "?" for letter in name)
    return b'"' + text.replace("\\", "\\\\").replace('"', '\\"').encode("ascii") + b'"'


def _window(limit: QuotaLimit) -> bytes:
    if limit.concurrency:
        return b';q=%d;qu="concurrent-requests"' % limit.concurrency
    if limit.tokens <= 0:
        return b";q=%d" % limit.burst
    return b";q=%d;w=%d" % (limit.burst, max(1, math.ceil(limit.burst * limit.interval / limit.tokens)))

"""What a rule does with a request besides sending it on: the compiled filters, and how a try is repeated.

What each of them means is Gateway API's (HTTPRoute, "HTTPRouteFilter"); the bytes are ready to be written.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mesh.http import Header


class HeaderChange(msgspec.Struct, frozen=True, kw_only=True):
    """Set, then add, then remove; names are lower-case."""

    set: tuple[Header, ...] = ()
    add: tuple[Header, ...] = ()
    remove: tuple[bytes, ...] = ()


class Rewrite(msgspec.Struct, frozen=True, kw_only=True):
    """URLRewrite."""

    hostname: bytes = b""
    """Empty keeps the authority."""
    path_mode: Literal["", "full", "prefix"] = ""
    path: bytes = b""
    """The full path, or what replaces the matched prefix."""


class Redirect(msgspec.Struct, frozen=True, kw_only=True):
    """RequestRedirect."""

    scheme: bytes = b""
    hostname: bytes = b""
    port: int = 0
    """0: the scheme's well-known port if the scheme is given, else the listener's."""
    path_mode: Literal["", "full", "prefix"] = ""
    path: bytes = b""
    status: int = 302


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a request may be tried again."""

    attempts: int = 2
    """Retries after the first try. Only failures to connect, and resets of a kept connection before any byte of an answer
    to a request that may be repeated, unless `statuses` says more."""
    statuses: tuple[int, ...] = ()
    backoff: float = 0.025
    """Seconds, doubled each time and jittered."""


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """RequestMirror: where copies of requests go."""

    cluster: str
    """Name of a cluster of the snapshot; empty when the reference is missing or forbidden: then nothing is copied."""
    service: str
    """`namespace/name`."""
    numerator: int = 100
    denominator: int = 100
    """Of how many requests how many are copied."""

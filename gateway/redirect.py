"""Other addresses: where a redirect sends the client, and what a rewrite asks the upstream for (Gateway API, HTTPRoute filters).

Pure text. A `Location` is always an absolute URI, so that no path can be read as another host.
"""

from __future__ import annotations

from typing import Final, Literal

from gateway.plan import Answer, Edit
from mesh.filters import Redirect, Rewrite
from mesh.http import Header, RequestHead, host_of
from mesh.model import Match

PORTS: Final = {b"http": 80, b"https": 443}
"""Well-known ports: left out of a `Location`."""


def new_path(path: bytes, matched: bytes | None, mode: Literal["", "full", "prefix"], replacement: bytes) -> bytes:
    """`path` with the whole of it or the `matched` prefix (without a trailing slash; None when no prefix was matched) replaced.

    The table in Gateway API's `HTTPPathModifier` is followed: `/foo/bar` with `/foo` replaced by `/xyz` or `/xyz/` is `/xyz/bar`; `/foo/`
    with `/foo` replaced by nothing is `/`.
    """
    if mode == "full":
        return replacement if replacement[:1] == b"/" else b"/" + replacement
    if mode == "prefix" and matched is not None:
        base = replacement.rstrip(b"/")
        if base and base[:1] != b"/":
            base = b"/" + base
        return base + path[len(matched) :] or b"/"
    return path


def _prefix(match: Match) -> bytes | None:
    return match.path if match.path_kind == "prefix" else None


def with_query(path: bytes, query: bytes | None) -> bytes:
    """Path and query as a request target."""
    return path if query is None else path + b"?" + query


def rewritten(head: RequestHead, match: Match, rewrite: Rewrite | None) -> tuple[bytes, bytes]:
    """Target and authority for the upstream: the normalised path, with the rule's rewrite."""
    query = head.query
    if rewrite is None:
        return head.path if query is None else head.path + b"?" + query, head.authority
    path = new_path(head.path, _prefix(match), rewrite.path_mode, rewrite.path)
    return with_query(path, query), rewrite.hostname or head.authority


def redirected(head: RequestHead, match: Match, redirect: Redirect, port: int, edits: tuple[Edit, ...]) -> Answer:
    """The answer of a `redirect` on a listener at `port`, with `edits` of its headers.

    The port is the redirect's; else that of the scheme, when the redirect names one; else the listener's. One that goes without saying is
    left out (Gateway API, `HTTPRequestRedirectFilter.port`).
    """
    scheme = redirect.scheme or head.scheme
    number = redirect.port or (PORTS.get(redirect.scheme, port) if redirect.scheme else port)
    host = redirect.hostname or host_of(head.authority)
    where = b"" if PORTS.get(scheme) == number else b":%d" % number
    path = new_path(head.path, _prefix(match), redirect.path_mode, redirect.path)
    location = scheme + b"://" + host + where + with_query(path, head.query)
    headers: list[Header] = [(b"location", location)]
    for edit in edits:
        headers = edit.apply(headers)
    return Answer(status=redirect.status, headers=tuple(headers), details="redirect")

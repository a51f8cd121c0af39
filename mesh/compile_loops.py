"""Redirects that send clients back to where they came from: what a browser calls too many redirects, said when the routes are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from mesh.compile_attach import covers
from mesh.compile_routes import Binding, RoutePart
from mesh.compile_world import Trouble
from mesh.documents import Document, Problem
from mesh.filters import Redirect
from mesh.model import Listener, Match, VirtualHost

_PORTS: Final = {b"http": 80, b"https": 443}
_KEPT: Final = (307, 308)
"""Statuses with which a client asks again with the same method, and not with GET (RFC 9110, section 15.4)."""


def redirect_loops(routes: Iterable[tuple[Document, RoutePart]], listeners: Mapping[tuple[str, str], Listener]) -> list[Problem]:
    """A warning for each rule that redirects a client to a request which comes to the same rule again.

    `listeners`: by Gateway (`namespace/name`) and name, with their hosts. What other rules would take instead is looked at; what can't be
    said for certain (expressions, conditions on headers) is not called a loop.
    """
    found: list[Problem] = []
    for document, part in routes:
        told: set[str] = set()
        for binding in part.bindings:
            for ranked in binding.matches:
                match = ranked.match
                rule = match.rule
                if rule.redirect is None or rule.name in told:
                    continue
                listener = listeners.get((binding.gateway, binding.section))
                if listener is not None and _returns(match, rule.redirect, listener, binding):
                    told.add(rule.name)
                    found += _problem(document, ranked.rank[-2], listener, binding)
    return found


def _problem(document: Document, index: int, listener: Listener, binding: Binding) -> list[Problem]:
    filters = document.body["spec"]["rules"][index]["filters"]
    number = next(number for number, item in enumerate(filters) if item["type"] == "RequestRedirect")
    trouble = Trouble(document)
    trouble.warn(
        ("spec", "rules", index, "filters", number, "requestRedirect"),
        f"at the listener {binding.own_section} of {binding.owner} ({listener.protocol}, port {listener.port}) it sends clients back to "
        "this same rule, again and again; change the scheme, host, port or path, or name another listener in the parentRef (sectionName)",
        "RedirectLoop",
    )
    return trouble.found


def _returns(match: Match, redirect: Redirect, listener: Listener, binding: Binding) -> bool:
    """Whether a request of `match` is answered with a `Location` at the same listener that leads to `match` again."""
    scheme = b"https" if listener.protocol == "HTTPS" else b"http"
    port = redirect.port or (_PORTS[redirect.scheme] if redirect.scheme else listener.port)
    if (redirect.scheme or scheme) != scheme or port != listener.port:
        return False
    if match.method not in (b"", b"GET", b"HEAD") and redirect.status not in _KEPT:
        return False
    if not redirect.hostname:
        if not redirect.path_mode:
            return True
        return any(_leads_to(listener.hosts.get(name), match, redirect) for name in binding.hostnames)
    name = redirect.hostname.decode("ascii")
    fitting = [pattern for pattern in listener.hosts if covers(pattern, name)]
    best = max(fitting, key=lambda pattern: (pattern[:1] != "*", len(pattern)), default=None)
    return best in binding.hostnames and _leads_to(listener.hosts.get(best), match, redirect)


def _leads_to(host: VirtualHost | None, match: Match, redirect: Redirect) -> bool:
    """Whether the new path of a request of `match` is one for `match` in `host`, before any other."""
    if host is None or host.regex:
        return False
    path = match.path
    if redirect.path_mode == "full":
        path = redirect.path if redirect.path[:1] == b"/" else b"/" + redirect.path
    elif redirect.path_mode == "prefix":
        # Where the new prefix lies below the old one, each turn makes the path longer, and it stays below.
        path = redirect.path
    exact = host.exact.get(path, ()) if redirect.path_mode != "prefix" else ()
    ways = exact or next((host.prefix[prefix] for prefix in _prefixes(path) if prefix in host.prefix), ())
    first = ways[0] if ways else None
    return first is not None and first.rule.name == match.rule.name and _asks_no_more(first, match)


def _prefixes(path: bytes) -> Iterable[bytes]:
    """The path and what is above it, by segments, the longest first; the root is empty."""
    path = path.rstrip(b"/")
    while path:
        yield path
        path = path[: path.rfind(b"/")]
    yield b""


def _asks_no_more(one: Match, other: Match) -> bool:
    """Whether a request that `other` was for has what `one` asks for besides its path."""
    return one.method in (b"", other.method or b"GET") and set(one.headers) <= set(other.headers) and set(one.queries) <= set(other.queries)

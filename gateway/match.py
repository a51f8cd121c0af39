"""Which rule a request falls under: exact paths, then regular expressions, then the longest prefix, segment by segment.

The order among the ways of one path (method, number of headers, number of query parameters, age) was settled when the snapshot was
compiled (Gateway API, HTTPRoute, "Precedence"): here the first way that fits wins. Regular expressions are RE2's and take linear time.
What is prepared here is prepared once for a virtual host and shared by all requests to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar
from urllib.parse import unquote_to_bytes

import re2

from gateway.choice import Chooser
from gateway.cors import ASKED_METHOD, is_preflight
from mesh.http import CONNECT, RequestHead
from mesh.model import PATH, Match, Rule, VirtualHost

EXPRESSIONS: Final = 1024
"""Compiled expressions that are kept for the next snapshot."""

T = TypeVar("T")


class ByHost(Generic[T]):
    """Things found by host name: the exact name first, then the longest wildcard, then `*` (Gateway API, `Hostname`).

    A wildcard stands for one label or more: `*.shop.example` holds `a.b.shop.example` but not `shop.example`.
    """

    __slots__ = ("_any", "_exact", "_wild")

    def __init__(self, patterns: Mapping[str, T]) -> None:
        self._exact: dict[bytes, T] = {}
        self._wild: dict[bytes, T] = {}
        self._any: T | None = None
        for pattern, thing in patterns.items():
            name = pattern.encode("latin-1", "replace").lower()
            if name in (b"", b"*"):
                self._any = thing
            elif name.startswith(b"*."):
                self._wild[name[1:]] = thing
            else:
                self._exact[name] = thing

    def find(self, host: bytes) -> T | None:
        """The thing of the most specific pattern that holds `host` (lower-case, without a port), or None."""
        found = self._exact.get(host)
        if found is not None:
            return found
        if self._wild:
            dot = host.find(b".", 1)
            while dot >= 0:
                found = self._wild.get(host[dot:])
                if found is not None:
                    return found
                dot = host.find(b".", dot + 1)
        return self._any


@lru_cache(maxsize=EXPRESSIONS)
def expression(source: str) -> Any:
    """`source` compiled by RE2 over bytes; None when RE2 does not take it (it then matches nothing: the compiler of the snapshot has
    said so already)."""
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    try:
        return re2.compile(source.encode(), options)
    except re2.error:
        return None


def parameters(query: bytes) -> dict[bytes, bytes]:
    """The parameters of a query, decoded (`application/x-www-form-urlencoded`, as in `input.parsed_query`); of each name the first."""
    found: dict[bytes, bytes] = {}
    for part in query.split(b"&"):
        if part:
            name, _, value = part.partition(b"=")
            found.setdefault(_decoded(name), _decoded(value))
    return found


def _decoded(text: bytes) -> bytes:
    if 0x2B in text:
        text = text.replace(b"+", b" ")
    return unquote_to_bytes(text) if 0x25 in text else text


class Query:
    """A request's query parameters, taken apart when the first matcher asks."""

    __slots__ = ("_parameters", "_query")

    def __init__(self, query: bytes | None) -> None:
        self._query = query
        self._parameters: dict[bytes, bytes] | None = None

    def get(self, name: bytes) -> bytes | None:
        """The value of the first parameter `name`, or None."""
        if self._parameters is None:
            self._parameters = parameters(self._query) if self._query else {}
        return self._parameters.get(name)


_Test = tuple[bytes, bytes, str, Any]
"""Name, wanted value, source of the expression (empty for none), the expression."""


class Way:
    """A `Match`, prepared."""

    __slots__ = ("_cors", "_headers", "_method", "_queries", "chooser", "match", "pattern", "plain")

    def __init__(self, match: Match, chooser: Chooser) -> None:
        self.match = match
        self.chooser = chooser
        self._method = match.method
        self._cors = match.rule.cors is not None
        self._headers = tuple(_test(test.name, test.value, test.regex) for test in match.headers)
        self._queries = tuple(_test(test.name.encode(), test.value.encode(), test.regex) for test in match.queries)
        self.pattern = expression(match.path.decode("latin-1")) if match.path_kind == "regex" else None
        self.plain = not (self._method or self._headers or self._queries)
        """True when the path alone decides."""

    def fits(self, head: RequestHead, query: Query) -> bool:
        """Whether method, headers and query parameters are those wanted."""
        if self._method and head.method != self._method and not self._asked_for(head):
            return False
        for name, value, source, regex in self._headers:
            if not _holds(_header(head, name), value, source, regex):
                return False
        return not self._queries or all(_holds(query.get(name), value, source, regex) for name, value, source, regex in self._queries)

    def _asked_for(self, head: RequestHead) -> bool:
        """Whether it is the preflight of a request with the method: the rule that the request will fall under has the word about it."""
        return self._cors and is_preflight(head) and head.header(ASKED_METHOD) == self._method

    def why_not(self, head: RequestHead, query: Query) -> str:
        """What does not fit, in words; empty when all does. The path has been looked at."""
        if self._method and head.method != self._method and not self._asked_for(head):
            return f"the method is not {self._method.decode('latin-1')}"
        for name, value, source, regex in self._headers:
            if not _holds(_header(head, name), value, source, regex):
                what = "path" if name == PATH else f"header {name.decode('latin-1')}"
                return f"the {what} is not {_wanted(value, source)}"
        for name, value, source, regex in self._queries:
            if not _holds(query.get(name), value, source, regex):
                return f"the query parameter {name.decode('latin-1')} is not {_wanted(value, source)}"
        return ""


def _test(name: bytes, value: bytes, regex: str) -> _Test:
    return name, value, regex, expression(regex) if regex else None


def _header(head: RequestHead, name: bytes) -> bytes | None:
    if name == PATH:
        return head.path
    return head.authority if name == b"host" else head.header(name)


def _holds(found: bytes | None, value: bytes, source: str, regex: Any) -> bool:
    if found is None:
        return False
    if source:
        return regex is not None and regex.fullmatch(found) is not None
    return found == value


def _wanted(value: bytes, source: str) -> str:
    return f"one that matches {source}" if source else value.decode("latin-1")


class HostTable:
    """A `VirtualHost`, prepared."""

    __slots__ = ("_exact", "_longest", "_prefix", "_regex", "_tunnels", "host")

    def __init__(self, host: VirtualHost, choosers: ChooserMaker) -> None:
        self.host = host
        self._exact = {path: _ways(matches, choosers) for path, matches in host.exact.items()}
        self._prefix = {path: _ways(matches, choosers) for path, matches in host.prefix.items()}
        self._regex = _ways(host.regex, choosers)
        self._longest = max(map(len, self._prefix), default=-1)
        self._tunnels = tuple([way for way in self._in_order(b"/") if way.match.method == CONNECT])

    def find_tunnel(self, head: RequestHead) -> Way | None:
        """The way that a CONNECT takes: of a match that names the method, for a tunnel is nothing that another was written for."""
        query = Query(None)
        return next((way for way in self._tunnels if way.fits(head, query)), None)

    @property
    def tunnels(self) -> bool:
        """Whether there is a way for CONNECT at all."""
        return bool(self._tunnels)

    def find(self, head: RequestHead) -> Way | None:
        """The way that the request takes, or None when there is none."""
        path = head.path
        query: Query | None = None
        ways = self._exact.get(path)
        if ways is not None:
            for way in ways:
                if way.plain:
                    return way
                query = query or Query(head.query)
                if way.fits(head, query):
                    return way
        for way in self._regex:
            if way.pattern is not None and way.pattern.fullmatch(path) is not None:
                if way.plain:
                    return way
                query = query or Query(head.query)
                if way.fits(head, query):
                    return way
        if self._longest < 0:
            return None
        # No prefix is longer than the longest one: a path of eight thousand segments costs no more than a short one.
        part = path if len(path) <= self._longest else path[: path.rfind(b"/", 0, self._longest + 1)]
        while True:
            ways = self._prefix.get(part)
            if ways is not None:
                for way in ways:
                    if way.plain:
                        return way
                    query = query or Query(head.query)
                    if way.fits(head, query):
                        return way
            if not part:
                return None
            part = part[: part.rfind(b"/")]

    def considered(self, head: RequestHead) -> Iterator[tuple[Way, str]]:
        """Every way that is looked at, in the order of `find`, with why it does not fit; the first with an empty reason is the one that
        `find` gives, and the last. For `explain`."""
        query = Query(head.query)
        for way in self._tunnels if head.tunnel == CONNECT else self._in_order(head.path):
            reason = way.why_not(head, query)
            if way.match.path_kind == "regex" and (way.pattern is None or way.pattern.fullmatch(head.path) is None):
                reason = "the path does not match the expression"
            yield way, reason
            if not reason:
                return

    def _in_order(self, path: bytes) -> Iterator[Way]:
        yield from self._exact.get(path, ())
        yield from self._regex
        fitting = [part for part in self._prefix if path == part or path.startswith(part + b"/")]
        for part in sorted(fitting, key=len, reverse=True):
            yield from self._prefix[part]


class ChooserMaker:
    """Makes one `Chooser` for each rule, though many matches lead to it."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[Rule], Chooser]) -> None:
        self._make = make
        self._made: dict[int, Chooser] = {}

    def of(self, match: Match) -> Chooser:
        """The chooser of the match's rule."""
        made = self._made.get(id(match.rule))
        if made is None:
            made = self._made[id(match.rule)] = self._make(match.rule)
        return made


def _ways(matches: tuple[Match, ...], choosers: ChooserMaker) -> tuple[Way, ...]:
    return tuple(Way(match, choosers.of(match)) for match in matches)

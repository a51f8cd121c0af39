"""CORS: the gateway answers preflights, and says on every other answer which origins may read it (Gateway API GEP-1767).

What the upstream says about it is taken off: the route is the authority. A preflight carries no credentials by its nature, so no policy or
quota is asked about it, as in Envoy Gateway; it gets no further than this.
"""

from __future__ import annotations

from typing import Final

from gateway.plan import Answer
from mesh.filters import Cors
from mesh.http import Header, RequestHead

ORIGIN: Final = b"origin"
ASKED_METHOD: Final = b"access-control-request-method"
ASKED_HEADERS: Final = b"access-control-request-headers"
_SAID: Final = frozenset(
    (
        b"access-control-allow-origin",
        b"access-control-allow-credentials",
        b"access-control-allow-methods",
        b"access-control-allow-headers",
        b"access-control-expose-headers",
        b"access-control-max-age",
    )
)
_VARY: Final[Header] = (b"vary", b"Origin")
_VARY_PREFLIGHT: Final[Header] = (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers")
_OWN_PORTS: Final = {b"http": b"80", b"https": b"443"}


def is_preflight(head: RequestHead) -> bool:
    """Whether a client asks what it may ask for."""
    return head.method == b"OPTIONS" and head.header(ORIGIN) is not None and head.header(ASKED_METHOD) is not None


class Said:
    """What is said about CORS on one answer: an edit of its headers, as `gateway.headers.Changes`."""

    __slots__ = ("_headers",)

    def __init__(self, headers: tuple[Header, ...]) -> None:
        self._headers = headers

    def apply(self, headers: list[Header]) -> list[Header]:
        """`headers` with this in place of what they said about it; another list."""
        made = [field for field in headers if field[0] not in _SAID]
        made += self._headers
        return made


class CorsRule:
    """A `Cors`, prepared."""

    __slots__ = ("_common", "_cors", "_everybody", "_nobody", "_origins")

    def __init__(self, cors: Cors) -> None:
        self._cors = cors
        self._origins = frozenset(cors.origins)
        common: list[Header] = []
        if cors.credentials:
            common.append((b"access-control-allow-credentials", b"true"))
        if cors.expose:
            common.append((b"access-control-expose-headers", cors.expose))
        self._common = tuple(common)
        everybody = cors.any_origin and not cors.credentials
        self._everybody = Said(((b"access-control-allow-origin", b"*"), *common)) if everybody else None
        self._nobody = Said((_VARY,))

    def allows(self, origin: bytes) -> bool:
        """Whether pages of `origin` may read answers."""
        if self._cors.any_origin:
            return True
        scheme, colon, rest = origin.lower().partition(b"://")
        host, _, port = rest.rpartition(b":") if rest[-1:] != b"]" and b":" in rest else (rest, b"", b"")
        if not colon or not host:
            return False
        if port == _OWN_PORTS.get(scheme):
            port = b""
        if (scheme + b"://" + host + (b":" + port if port else b"")) in self._origins:
            return True
        return any(
            pattern.scheme == scheme and pattern.port == port and len(host) > len(pattern.suffix) and host.endswith(pattern.suffix)
            for pattern in self._cors.patterns
        )

    def said(self, head: RequestHead) -> Said:
        """What an answer to `head` says. It depends on the origin, which caches must know, unless everybody may read it."""
        if self._everybody is not None:
            return self._everybody
        origin = head.header(ORIGIN)
        if origin is None or not self.allows(origin):
            return self._nobody
        return Said(((b"access-control-allow-origin", origin), *self._common, _VARY))

    def preflight(self, head: RequestHead) -> Answer:
        """The answer to a preflight: 204, and nothing that would allow anything when its origin is not allowed."""
        cors = self._cors
        origin = head.header(ORIGIN) or b""
        if not self.allows(origin):
            return Answer(status=204, headers=(_VARY_PREFLIGHT,), details="cors_preflight")
        headers: list[Header] = [(b"access-control-allow-origin", b"*" if self._everybody is not None else origin)]
        headers += self._common
        method, asked = head.header(ASKED_METHOD), head.header(ASKED_HEADERS)
        if cors.methods and method:
            headers.append((b"access-control-allow-methods", method if cors.methods == b"*" else cors.methods))
        if cors.headers and asked:
            headers.append((b"access-control-allow-headers", asked if cors.headers == b"*" else cors.headers))
        headers += [(b"access-control-max-age", b"%d" % cors.max_age), _VARY_PREFLIGHT]
        return Answer(status=204, headers=tuple(headers), details="cors_preflight")

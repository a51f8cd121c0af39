"""A request's head, as every part of a gateway sees it.

Bytes stay bytes from the socket to the socket. Header names are lower-case from the codec on, so that a comparison is a
comparison of bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mesh.tokens import Bearer

Header = tuple[bytes, bytes]
"""A header field: its lower-case name and its value, both without surrounding white space."""

HTTP10: Final = b"HTTP/1.0"
HTTP11: Final = b"HTTP/1.1"
HTTP2: Final = b"HTTP/2"

UNKNOWN_LENGTH: Final = -1
NO_NAMES: Final[frozenset[bytes]] = frozenset()

WEBSOCKET: Final = b"websocket"
"""The one protocol that a client may change to within HTTP (RFC 6455), as its token in `Upgrade` and in `:protocol`."""
CONNECT: Final = b"CONNECT"
"""The method that asks for a tunnel (RFC 9110 section 9.3.6), and `RequestHead.tunnel` of a request with it."""


class RequestHead:
    """What a client asked for, before any filter.

    The codec fills it, `gateway.normalize` sets `path` and `query`, and from then on nobody writes to it: what an upstream
    gets is another list of headers, made from this one.
    """

    __slots__ = (
        "authority",
        "bearer",
        "body_length",
        "headers",
        "method",
        "path",
        "query",
        "reserved",
        "scheme",
        "target",
        "tunnel",
        "version",
    )

    method: bytes
    """As sent, case kept (`GET`)."""
    scheme: bytes
    """`https` or `http`, from the connection, never from the client's own claim."""
    authority: bytes
    """`Host` or `:authority`, lower-case, with its port if one was sent."""
    target: bytes
    """The request target as sent (origin form: path and query)."""
    path: bytes
    """The one normalised path that routing, policy, quota and the upstream see. Empty until it has been normalised."""
    query: bytes | None
    """What follows the first `?`, undecoded; None when there is no `?`."""
    headers: list[Header]
    """In the order sent, without pseudo-headers and without `host`."""
    version: bytes
    """`HTTP/1.0`, `HTTP/1.1` or `HTTP/2`."""
    body_length: int
    """Bytes announced; 0 for no body; `UNKNOWN_LENGTH` when the end is only known on arrival."""
    bearer: Bearer | None
    """Who bears the request's token, once it has been verified (`gateway.authentication`); None for a request without one."""
    reserved: frozenset[bytes]
    """Names of headers that a client must not send in its trailers: the gateway's own, and those where it looks for tokens."""
    tunnel: bytes
    """What the request asks the stream to become: `WEBSOCKET`, `CONNECT`, or empty for an ordinary request. A WebSocket is the same here
    however it was asked for: method `GET` and a header `upgrade: websocket`."""

    def __init__(
        self,
        method: bytes,
        scheme: bytes,
        authority: bytes,
        target: bytes,
        headers: list[Header],
        version: bytes,
        body_length: int,
        path: bytes = b"",
        query: bytes | None = None,
        tunnel: bytes = b"",
    ) -> None:
        self.method = method
        self.scheme = scheme
        self.authority = authority
        self.target = target
        self.headers = headers
        self.version = version
        self.body_length = body_length
        self.path = path
        self.query = query
        self.tunnel = tunnel
        self.bearer = None
        self.reserved = NO_NAMES

    def opens(self, status: int) -> bool:
        """Whether an answer with `status` opens the tunnel that the request asks for (a WebSocket of HTTP/2 counts as answered by 101)."""
        tunnel = self.tunnel
        return bool(tunnel) and (status == 101 if tunnel != CONNECT else 200 <= status < 300)

    def header(self, name: bytes) -> bytes | None:
        """The value of the header `name` (lower-case); several values are joined by `,` (RFC 9110 section 5.3); None if absent."""
        found: bytes | None = None
        for key, value in self.headers:
            if key == name:
                found = value if found is None else found + b"," + value
        return found

    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.scheme!r}://{self.authority!r}{self.target!r}>"


def host_of(authority: bytes) -> bytes:
    """The host of an authority, without its port; an IPv6 literal keeps its brackets."""
    if authority.endswith(b"]"):
        return authority
    host, colon, port = authority.rpartition(b":")
    return host if colon and (port.isdigit() or not port) else authority


NO_HEAD: Final = RequestHead(b"", b"", b"", b"", [], b"", 0)
"""Stands for the head where no HTTP is spoken: what is asked about is a connection. Nobody writes to it."""

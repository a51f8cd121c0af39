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
    """When a request may be tried again. Without a word of the route's author: only when its upstream has done nothing with it, or when a
    kept connection turned out to be closed and the request may be repeated."""

    attempts: int = 2
    """Retries after the first try."""
    statuses: tuple[int, ...] = ()
    """Answers (the upstream's, and the gateway's own for one that failed) that are not passed on while there is another try."""
    connection: bool = False
    """Whether a request that may be repeated is tried again as well when its connection broke or its try took too long."""
    replay: bool = False
    """Whether the request's body is kept for another try, as long as it is small enough."""
    backoff: float = 0.025
    """Seconds before the first retry, doubled for each further one. At most so long, unless `at_least`."""
    at_least: bool = False
    """Never less than `backoff` (what the route's author wrote), and a quarter more at most."""


class OriginPattern(msgspec.Struct, frozen=True):
    """Origins that are allowed: of a scheme, with hosts that end in `suffix` (after at least one character), at a port."""

    scheme: bytes
    suffix: bytes
    """Begins with a dot; empty for all hosts."""
    port: bytes
    """As it is written in an origin; empty for the scheme's own."""


class Cors(msgspec.Struct, frozen=True, kw_only=True):
    """CORS: which pages of other origins may read answers (the Fetch standard, "HTTP CORS protocol")."""

    any_origin: bool = False
    origins: tuple[bytes, ...] = ()
    """Without the port where it is the scheme's own."""
    patterns: tuple[OriginPattern, ...] = ()
    credentials: bool = False
    methods: bytes = b""
    """For `access-control-allow-methods`: `*` for whatever is asked for, empty for none but the safelisted ones."""
    headers: bytes = b""
    """For `access-control-allow-headers`, in the same way."""
    expose: bytes = b""
    max_age: int = 5
    """Seconds."""


class Mirror(msgspec.Struct, frozen=True, kw_only=True):
    """RequestMirror: where copies of requests go."""

    cluster: str
    """Name of a cluster of the snapshot; empty when the reference is missing or forbidden: then nothing is copied."""
    service: str
    """`namespace/name`."""
    numerator: int = 100
    denominator: int = 100
    """Of how many requests how many are copied."""


class ExternalAuth(msgspec.Struct, frozen=True, kw_only=True):
    """ExternalAuth: a service of the mesh's configuration that is asked whether a request may pass (Gateway API GEP-1494)."""

    cluster: str
    """Name of a cluster of the snapshot."""
    protocol: Literal["GRPC", "HTTP"]
    """`GRPC`: Envoy's ext_authz. `HTTP`: the request's head again; 200 lets it pass."""
    path: bytes = b""
    """HTTP: what is put in front of the request's path."""
    headers: frozenset[bytes] = frozenset()
    """Fields of the request that the service is shown. Empty: with GRPC all of them; with HTTP none but those that it always gets."""
    copied: frozenset[bytes] = frozenset()
    """HTTP: fields of its answer that go on with the request; empty for all that are not about the answer itself, if `copies_all`."""
    copies_all: bool = True
    added: tuple[Header, ...] = ()
    """HTTP: fields that the service is sent besides, in the place of the client's of the same names."""
    told: frozenset[bytes] = frozenset()
    """HTTP: fields of its answer, when it allows, that the client gets with the upstream's answer."""
    told_denied: frozenset[bytes] = frozenset()
    """HTTP: fields of its answer, when it denies, that the client gets; empty for all."""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """sessionPersistence: who was served by an endpoint is served by it again (Gateway API GEP-1619)."""

    name: bytes
    """Of the cookie, or (in lower case) of the header."""
    header: bool = False
    key: bytes = b""
    """What tokens are made and verified with; the same at every gateway of the mesh. Never printed."""
    lifetime: float | None = None
    """Seconds after which a token is worth nothing; None for no such limit."""
    permanent: bool = False
    """Whether the client keeps the cookie for `lifetime`, rather than until it ends."""
    path: bytes = b"/"
    """For which a client sends the cookie."""

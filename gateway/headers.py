"""What an upstream gets for headers: what the client sent, without what it could forge, and with what only a gateway can know.

In this order: hop-by-hop fields are off already (the codec); internal fields of a peer that is no trusted gateway are thrown away;
forwarding fields are set; the rule's changes, then the backend's; the decisions' changes (`gateway.settle`). A cluster outside the mesh
gets no internal field at all, unless a change names it.
"""

from __future__ import annotations

from typing import Final

from gateway.caller import XFCC, XFF
from gateway.trace import TRACEPARENT
from mesh.filters import HeaderChange
from mesh.http import Header

PROTO: Final = b"x-forwarded-proto"
REQUEST_ID: Final = b"x-request-id"
TRACESTATE: Final = b"tracestate"
TE_TRAILERS: Final = (b"te", b"trailers")

INTERNAL: Final = (b"x-forwarded-", b"x-envoy-", b"x-tollhouse-")
"""Names that begin so are the mesh's own."""
INTERNAL_NAMES: Final = frozenset((b"forwarded", b"x-real-ip", REQUEST_ID))

FRAMING: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"transfer-encoding",
        b"content-length",
        b"upgrade",
        b"http2-settings",
        b"te",
        b"trailer",
        b"expect",
        b"host",
    )
)
"""Of the connection, of the framing, or of the routing: nobody's to change but the codec's and the rewrite's."""
PROOF: Final = frozenset((XFCC, XFF))
"""Who the caller is and where it comes from, to the next gateway: may be taken off, never be written, whoever writes routes or policies."""

TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
"""Characters of a field name (RFC 9110 section 5.6.2), in lower case."""

# What to do with a field; names without an entry are looked at for the prefixes of INTERNAL.
_FORWARDED_FOR: Final = 1
_VOUCHED: Final = 2
_PARENT: Final = 3
_STATE: Final = 4
_TE: Final = 5
_REQUEST_ID: Final = 6
_PROTO: Final = 7
_NAMED: Final = 8
_DROPPED: Final = 9
_KINDS: Final = {
    XFF: _FORWARDED_FOR,
    XFCC: _VOUCHED,
    TRACEPARENT: _PARENT,
    TRACESTATE: _STATE,
    b"te": _TE,
    REQUEST_ID: _REQUEST_ID,
    PROTO: _PROTO,
    b"forwarded": _NAMED,
    b"x-real-ip": _NAMED,
    b"expect": _DROPPED,
}

_NO_VALUE: Final = b"\r\n\x00"


class Fields:
    """A request's fields, sorted out for one upstream. Its owner is the call of `route` that made it."""

    __slots__ = ("forwarded_for", "kept", "parent", "proto", "request_id", "spoofed", "state", "trailers", "vouched")

    def __init__(self, headers: list[Header], trusted: bool) -> None:
        """Sorts `headers` of a peer that is a `trusted` gateway or not."""
        kept: list[Header] = []
        self.forwarded_for: bytes | None = None
        """`x-forwarded-for` as sent by anybody; `gateway.caller.forwarded_for` says what of it is believed."""
        self.vouched: bytes | None = None
        """`x-forwarded-client-cert`, of a trusted gateway only."""
        self.parent: bytes | None = None
        self.state: bytes | None = None
        self.request_id: bytes | None = None
        self.proto = False
        """Whether a trusted gateway said how its client had come."""
        self.trailers = False
        self.spoofed = False
        """Whether something was thrown away that no client has a right to send."""
        for field in headers:
            name = field[0]
            kind = _KINDS.get(name)
            if kind is None:
                if name[:2] == b"x-" and not trusted and name.startswith(INTERNAL):
                    self.spoofed = True
                else:
                    kept.append(field)
            else:
                self._special(kind, field, trusted, kept)
        self.kept = kept

    def _special(self, kind: int, field: Header, trusted: bool, kept: list[Header]) -> None:
        value = field[1]
        if kind == _PARENT:
            # Two of them are as good as none (Trace Context, section 3.2).
            self.parent = value if self.parent is None else b""
        elif kind == _STATE:
            self.state = value if self.state is None else self.state + b"," + value
        elif kind == _TE:
            self.trailers = self.trailers or any(part.partition(b";")[0].strip().lower() == b"trailers" for part in value.split(b","))
        elif kind == _FORWARDED_FOR:
            self.forwarded_for = value if self.forwarded_for is None else self.forwarded_for + b"," + value
            self.spoofed = self.spoofed or not trusted
        elif kind == _DROPPED:
            pass
        elif not trusted:
            self.spoofed = True
        elif kind == _VOUCHED:
            self.vouched = value
        elif kind == _REQUEST_ID and self.request_id is None:
            self.request_id = value
        elif kind == _PROTO and not self.proto:
            self.proto = True
            kept.append(field)
        elif kind == _NAMED:
            kept.append(field)


def is_internal(name: bytes) -> bool:
    """Whether a field of this (lower-case) name is the mesh's own."""
    return name in INTERNAL_NAMES or name.startswith(INTERNAL)


def without_internal(headers: list[Header]) -> list[Header]:
    """`headers` without what is the mesh's own."""
    return [field for field in headers if not is_internal(field[0])]


def trailers_passed_on(trailers: list[Header] | None) -> list[Header] | None:
    """The trailers of a request that may go on: none that is the mesh's own or says where a trace came from, whoever sent it, and none
    whose name has an underscore. Many servers take trailers for headers, and a gateway says nothing in them."""
    if not trailers:
        return None
    return [field for field in trailers if b"_" not in field[0] and field[0] not in _KINDS and not is_internal(field[0])] or None


def is_field(name: bytes, value: bytes) -> bool:
    """Whether a field could be written as it is: a lower-case token, and a value that does not end the line."""
    return bool(name) and not name.translate(None, TOKEN) and not any(byte in value for byte in _NO_VALUE)


class Changes:
    """A `HeaderChange`, prepared: set, then add, then remove."""

    __slots__ = ("_more", "_removed", "_replaced")

    def __init__(self, change: HeaderChange) -> None:
        written = FRAMING | PROOF
        # The last of several `set` of one name wins, as if they had been made one after the other.
        sets = {name: value for name, value in change.set if name not in written}
        self._replaced = frozenset(sets)
        self._more = [*sets.items(), *(field for field in change.add if field[0] not in written)]
        self._removed = frozenset(change.remove) - FRAMING
        self._more = [field for field in self._more if field[0] not in self._removed]

    def apply(self, headers: list[Header]) -> list[Header]:
        """`headers` with the changes made; another list."""
        gone = self._replaced | self._removed
        made = [field for field in headers if field[0] not in gone]
        made += self._more
        return made

    def __bool__(self) -> bool:
        return bool(self._more or self._removed)


def changes_of(*changes: HeaderChange | None) -> tuple[Changes, ...]:
    """The changes that do something, in order."""
    return tuple(made for change in changes if change is not None and (made := Changes(change)))

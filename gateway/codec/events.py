"""What a codec says and what it is told: the same for HTTP/1.1 and HTTP/2, so that nothing after it knows the version.

Sans-io: bytes in, events out; orders in, bytes out. A codec holds one connection's framing and nothing else; it neither reads a clock
nor touches a socket. Streams are numbered by the codec (HTTP/1.1: 1, 2, 3, ... in order of the requests).

Events are small slotted classes, told apart by `kind` (an int) where speed matters and by type elsewhere.
"""

from __future__ import annotations

from typing import Final, Protocol

from mesh.http import Header, RequestHead
from mesh.refusals import Refusal

REQUEST: Final = 1
RESPONSE: Final = 2
BODY: Final = 3
END: Final = 4
RESET: Final = 5
WRITABLE: Final = 6
INFORMATIONAL: Final = 7
REFUSED: Final = 8
GOAWAY: Final = 9


class Event:
    """Base of all events; `stream` is 0 for what concerns the whole connection."""

    __slots__ = ("stream",)
    kind: int = 0

    def __init__(self, stream: int) -> None:
        self.stream = stream


class RequestReceived(Event):
    """A request's head is complete and well-formed. `head.path` is not set yet: normalising is the next step's job."""

    __slots__ = ("ended", "expects_continue", "head")
    kind = REQUEST

    def __init__(self, stream: int, head: RequestHead, ended: bool, expects_continue: bool = False) -> None:
        self.stream = stream
        self.head = head
        self.ended = ended
        """True when there is no body and there will be no `Ended`. False when a tunnel is asked for (`RequestHead.tunnel`): what comes
        through it is a body. In HTTP/1.1 nothing of it comes before `send_head` has opened it, and no end if it does not."""
        self.expects_continue = expects_continue


class ResponseReceived(Event):
    """A final answer's head."""

    __slots__ = ("body_length", "ended", "headers", "status", "version")
    kind = RESPONSE

    def __init__(self, stream: int, status: int, headers: list[Header], version: bytes, body_length: int, ended: bool) -> None:
        self.stream = stream
        self.status = status
        self.headers = headers
        """Lower-case names; hop-by-hop fields and framing (`content-length` stays, `transfer-encoding` does not) already taken off."""
        self.version = version
        self.body_length = body_length
        self.ended = ended


class Informational(Event):
    """A 1xx answer (never 101: one that was asked for is a `ResponseReceived`)."""

    __slots__ = ("headers", "status")
    kind = INFORMATIONAL

    def __init__(self, stream: int, status: int, headers: list[Header]) -> None:
        self.stream = stream
        self.status = status
        self.headers = headers


class BodyReceived(Event):
    """Some of a body, decoded from its framing."""

    __slots__ = ("credit", "data")
    kind = BODY

    def __init__(self, stream: int, data: bytes, credit: int = 0) -> None:
        self.stream = stream
        self.data = data
        self.credit = credit
        """What to give to `consumed` once the data is no longer held (flow-controlled length, padding included)."""


class Ended(Event):
    """The message is complete."""

    __slots__ = ("trailers",)
    kind = END

    def __init__(self, stream: int, trailers: list[Header] | None = None) -> None:
        self.stream = stream
        self.trailers = trailers


class Reset(Event):
    """The other side gave this one stream up."""

    __slots__ = ("code", "unprocessed")
    kind = RESET

    def __init__(self, stream: int, code: int, unprocessed: bool = False) -> None:
        self.stream = stream
        self.code = code
        """HTTP/2 error code (RFC 9113 section 7)."""
        self.unprocessed = unprocessed
        """True when the other side promises that it did nothing with the request (REFUSED_STREAM, or beyond its GOAWAY)."""


class Writable(Event):
    """The stream (0: the connection) has room again after `window` had said that it had none."""

    __slots__ = ()
    kind = WRITABLE


class Refused(Event):
    """The other side broke the protocol. With stream 0 the connection ends after what is left to write; else only the stream."""

    __slots__ = ("refusal",)
    kind = REFUSED

    def __init__(self, stream: int, refusal: Refusal) -> None:
        self.stream = stream
        self.refusal = refusal


class GoAway(Event):
    """The other side takes no more streams on this connection; those up to `last` go on."""

    __slots__ = ("last",)
    kind = GOAWAY

    def __init__(self, last: int) -> None:
        self.stream = 0
        self.last = last


class Codec(Protocol):
    """What both ends have in common."""

    def receive(self, data: bytes) -> list[Event]:
        """Takes bytes from the peer; never raises on bad ones (`Refused`). Bounded: what does not fit a limit is refused."""
        ...

    def eof(self) -> list[Event]:
        """The peer will send no more: ends a body that lasts until close, resets what is incomplete."""
        ...

    def take(self) -> bytes:
        """The bytes to write now; empties the codec's buffer. Called once for many orders, so that writes are coalesced."""
        ...

    def send_body(self, stream: int, data: bytes, ended: bool) -> None:
        """Sends some body. Give no more than `window` says; a little more is buffered, much more is the caller's fault. `ended` in an open
        tunnel ends this direction of it only; in HTTP/1.1 it is the connection's owner who shuts the socket down then."""
        ...

    def send_trailers(self, stream: int, trailers: list[Header]) -> None:
        """Ends a message with trailers (dropped where the framing has no place for them)."""
        ...

    def reset(self, stream: int, code: int) -> None:
        """Gives one stream up (HTTP/1.1: the connection can't go on after it; `closing` becomes true)."""
        ...

    def window(self, stream: int) -> int:
        """Bytes of body that may be sent on `stream` now; 0 means: wait for `Writable`."""
        ...

    def consumed(self, stream: int, credit: int) -> None:
        """Gives flow-control credit back for body that is no longer held. Does nothing in HTTP/1.1."""
        ...

    @property
    def closing(self) -> bool:
        """True when the connection is to be closed once everything is written."""
        ...

    @property
    def streams(self) -> int:
        """How many streams are open."""
        ...


class ServerCodec(Codec, Protocol):
    """The gateway's side towards clients."""

    def send_informational(self, stream: int, status: int, headers: list[Header]) -> None:
        """Sends a 1xx answer (dropped for HTTP/1.0 clients)."""
        ...

    def send_head(self, stream: int, status: int, headers: list[Header], ended: bool) -> None:
        """Sends a final answer's head. Framing is the codec's: it goes by `content-length` in `headers`, by the request's method and
        by the version. A status that opens the tunnel that was asked for (`RequestHead.opens`) makes everything after it the tunnel's."""
        ...

    def drain(self) -> None:
        """Takes no new requests: GOAWAY, or `connection: close` with the answer in progress (at once, when idle)."""
        ...


class ClientCodec(Codec, Protocol):
    """The gateway's side towards upstreams."""

    def request(self, head: RequestHead, headers: list[Header], target: bytes, authority: bytes, ended: bool) -> int:
        """Sends a request's head: method, scheme, tunnel and body length from `head`, the rest as given. Returns the stream. An answer that
        opens the tunnel is a `ResponseReceived` that is not `ended`; what comes after it is its body."""
        ...

    @property
    def websockets(self) -> bool:
        """Whether a WebSocket may be asked for: always in HTTP/1.1, in HTTP/2 once the peer has said that it takes them (RFC 8441)."""
        ...

    @property
    def available(self) -> int:
        """How many more requests may be started now (HTTP/1.1: 1 when idle; HTTP/2: by the peer's limit; 0 after GOAWAY)."""
        ...

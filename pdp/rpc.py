"""gRPC as decisions travel by it, without what carries it: calls with one message each way.

This room knows no sockets. Whoever wires a process gives the client its `Channels` (`gateway.grpc_channel`: HTTP/2 on the gateway's own
codec and wires).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from mesh.http import Header

SERVICE: Final = "envoy.service.auth.v3.Authorization"
CHECK: Final = f"/{SERVICE}/Check".encode()
DECISION: Final = "tollhouse-decision"
"""Metadata that names the decision to make."""
TIMEOUT: Final = "tollhouse-timeout"
"""Metadata that says how many seconds the decision may take; the call itself may last longer, to hear that it took too long."""
CAUSE: Final = "tollhouse-cause"
"""Trailing metadata that says what kind of error ended a call (`Decision.cause`)."""
MAX_ANSWER: Final = 4 << 20
"""Bytes of an answer, as gRPC's own clients have it; a denial's body may have 1 MiB (`pdp.fields`)."""


class Code(enum.IntEnum):
    """How a call ended (github.com/grpc/grpc, doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Result(msgspec.Struct, frozen=True, gc=False):
    """What came of a call."""

    code: Code
    details: str = ""
    """For people: what went wrong; empty with `OK`."""
    message: bytes = b""
    """The answer; empty unless `code` is `OK`."""
    trailers: Sequence[Header] = ()
    """The metadata that came with the status, without gRPC's own."""

    def trailer(self, name: bytes) -> str:
        """The value of one of `trailers`, empty when it is not there."""
        for key, value in self.trailers:
            if key == name:
                return value.decode("ascii", "replace")
        return ""


Done = Callable[[Result], None]


class Call(Protocol):
    """A call on its way."""

    def cancel(self) -> None:
        """Gives it up: its `done` is not called any more. Does nothing once it has ended."""
        ...


class Channel(Protocol):
    """The way to one server. It connects when it is asked, and again when it must."""

    def start(self, method: bytes, metadata: Sequence[Header], message: bytes, seconds: float, done: Done) -> Call:
        """Calls `method` (`/package.Service/Method`). The server is told that it has `seconds`; to give up after them is the caller's
        part. `done` gets the result, once, and never before this returns."""
        ...

    def close(self) -> None:
        """Ends the connection; calls on their way end as `UNAVAILABLE`."""
        ...


class Channels(Protocol):
    """Makes channels, all with the same idea of TLS."""

    def open(self, target: str, *, pings: bool) -> Channel:
        """A channel to `host:port`. `pings`: whether the server may be asked by a PING if it is still there. Raises ValueError for a
        target that is not one."""
        ...

"""One gRPC call with one message each way, as its client sees it, and what an answer means (PROTOCOL-HTTP2.md of github.com/grpc/grpc)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from gateway.grpc_calls import BY_STATUS, UNKNOWN, percent_decoded, speaks_grpc
from mesh.http import Header, RequestHead
from pdp.rpc import Code, Done, Result

if TYPE_CHECKING:
    from gateway.grpc_channel import GrpcChannel
    from gateway.grpc_connection import GrpcConnection

log = logging.getLogger("tollhouse.gateway")

CONTENT: Final = (b"content-type", b"application/grpc")
_FINE: Final = [(b"grpc-status", b"0")]
_PLAIN: Final = [CONTENT]
_OF_GRPC: Final = frozenset((b"grpc-status", b"grpc-message", b"content-type", b"grpc-encoding", b"grpc-accept-encoding"))


class UnaryCall:
    """One call. States: waiting (`connection` is None), sent, over (`done` is None)."""

    __slots__ = ("_size", "again", "channel", "connection", "done", "gathered", "head", "headers", "message", "number", "status", "wrong")

    def __init__(self, channel: GrpcChannel, head: RequestHead, message: bytes, done: Done) -> None:
        self.channel = channel
        self.head = head
        self.message = message
        self._size = len(message)
        channel.held += self._size
        self.done: Done | None = done
        self.connection: GrpcConnection | None = None
        self.number = 0
        self.again = 0
        """How often it has been sent before, and nothing came of it."""
        self.gathered = b""
        self.status = 0
        self.headers: list[Header] = []
        self.wrong: Result | None = None

    def cancel(self) -> None:
        """As `pdp.rpc.Call.cancel`."""
        if self.done is None:
            return
        self.done = None
        self._release()
        connection = self.connection
        if connection is not None:
            connection.abandon(self)
        else:
            self.channel.withdraw(self)

    def end(self, result: Result) -> None:
        """Tells what came of it."""
        done, self.done = self.done, None
        if done is None:
            return
        self._release()
        try:
            done(result)
        except Exception:
            log.exception("what was to be done with the result of a call failed")

    def _release(self) -> None:
        self.message = b""
        self.channel.held -= self._size

    def complete(self, trailers: list[Header]) -> None:
        """The answer has ended."""
        self.end(self.wrong or result_of(self.status, self.headers, self.gathered, trailers))


def result_of(status: int, headers: list[Header], body: bytes, trailers: list[Header]) -> Result:
    """What an answer comes to: its HTTP status and head, its body, and its trailers (its head again, when there is nothing else)."""
    if trailers == _FINE and status == 200 and headers == _PLAIN and body[:1] == b"\0" and whole_message(body):
        return Result(Code.OK, "", body[5:])
    said = next((value for name, value in trailers if name == b"grpc-status"), None)
    details = next((percent_decoded(value) for name, value in trailers if name == b"grpc-message"), "")
    more = tuple([field for field in trailers if field[0] not in _OF_GRPC])
    if said is None or (status != 200 and said == b"0"):
        found = BY_STATUS.get(status, UNKNOWN)
        return Result(Code(int(found)), f"an answer with HTTP status {status} and no status of gRPC", b"", more)
    if not said.isdigit() or len(said) > 2 or int(said) not in Code._value2member_map_:
        return Result(Code.UNKNOWN, f"the status {said[:20].decode('latin-1')}: {details}", b"", more)
    code = Code(int(said))
    if code is not Code.OK:
        return Result(code, details, b"", more)
    if not speaks_grpc(headers):
        return Result(Code.UNKNOWN, "an answer that is not gRPC's", b"", more)
    if not whole_message(body):
        return Result(Code.INTERNAL, "an answer that is not one whole message", b"", more)
    if body[0]:
        return Result(Code.INTERNAL, "an answer that is compressed, which nobody asked for", b"", more)
    return Result(Code.OK, "", body[5:], more)


def whole_message(body: bytes) -> bool:
    """Whether a body is one message."""
    return len(body) >= 5 and len(body) - 5 == int.from_bytes(body[1:5], "big")


def timeout_text(seconds: float) -> bytes:
    """`grpc-timeout`: milliseconds, which is eight digits at most (PROTOCOL-HTTP2.md); more is said in seconds."""
    milliseconds = max(1, round(seconds * 1000))
    return b"%dm" % milliseconds if milliseconds < 10**8 else b"%dS" % min(round(seconds), 10**8 - 1)

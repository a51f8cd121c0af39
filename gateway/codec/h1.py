"""HTTP/1.1 message syntax, strictly: heads, chunked bodies, trailers (RFC 9110 section 5, RFC 9112 sections 2 to 7).

What both directions share. Whatever two readers could understand in two ways is refused rather than mended: bare CR or LF, line
folding, white space before a colon, several lengths, a transfer coding other than `chunked`. Only then do the gateway and what is behind
it agree on where a message ends.
"""

from __future__ import annotations

from typing import Final

from gateway.codec.bytesets import without
from mesh.http import Header

CRLF: Final = b"\r\n"
HEAD_END: Final = b"\r\n\r\n"
FORBIDDEN: Final = bytes(c for c in range(32) if c not in b"\t\r\n") + b"\x7f"
"""Control characters that no head may hold (RFC 9110 section 5.5)."""
TOKEN: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""RFC 9110 section 5.6.2."""
HEX: Final = b"0123456789abcdefABCDEF"
SAFE: Final = without(FORBIDDEN + CRLF)
"""What no line may hold once it has been cut out of its head."""
SPLITTING: Final = b"\r\n\0"
"""What would end a line that we write."""
MAX_CHUNK_LINE: Final = 256
MAX_CHUNK_EXCESS: Final = 16 * 1024
"""Bytes of chunk extensions beyond what the chunks' data makes up for: a body may not be nearly all framing."""
MAX_TRAILERS: Final = 16 * 1024
MAX_LENGTH_DIGITS: Final = 18
HIGH_WATER: Final = 1 << 30
"""What an HTTP/1.1 codec says of its window: TCP's back-pressure is the connection's business."""

CONNECTION_FIELDS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade", b"http2-settings")
)
"""Fields about the connection: they end with it (RFC 9110 section 7.6.1)."""

NOT_IN_TRAILERS: Final = CONNECTION_FIELDS | {
    b"authorization",
    b"cache-control",
    b"content-encoding",
    b"content-length",
    b"content-range",
    b"content-type",
    b"cookie",
    b"expect",
    b"forwarded",
    b"host",
    b"max-forwards",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"set-cookie",
    b"te",
    b"trailer",
    b"www-authenticate",
}
"""Fields of framing, routing and authentication: dropped from trailers (RFC 9110 section 6.5.1)."""


NAMED_IN_VAIN: Final = frozenset(
    (
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"transfer-encoding",
        b"via",
    )
)
"""Fields for whoever answers a request in the end: no Connection field may name them, for that would change what the request means
(RFC 9110 section 7.6.1)."""


class SyntaxProblem(Exception):
    """Bytes that are not the HTTP/1.1 that this codec accepts; its text is for the log."""


class LineTooLong(SyntaxProblem):
    """A start line that does not end where it should."""


class TooLarge(SyntaxProblem):
    """A head that is larger than its limit."""


class Fields:
    """Reads header lines; keeps those that it has read, since most lines of a connection have been seen before.

    One for a worker. Bounded: `capacity` lines of at most `longest` bytes, then it begins again. Lines that hold credentials are not kept.
    """

    __slots__ = ("capacity", "kept", "longest")

    def __init__(self, capacity: int = 4096, longest: int = 256) -> None:
        self.capacity = capacity
        self.longest = longest
        self.kept: dict[bytes, Header] = {}

    def read(self, line: bytes) -> Header:
        """One line as (lower-case name, value). Raises SyntaxProblem."""
        check_line(line)
        name, colon, value = line.partition(b":")
        if not colon:
            raise SyntaxProblem("a header line without a colon")
        if not name or name.translate(None, TOKEN):
            if line[:1] in (b" ", b"\t"):
                raise SyntaxProblem("a folded header line")
            raise SyntaxProblem("a header name with a character that is none of a name's")
        name = name.lower()
        field = (name, value.strip(b" \t"))
        if len(line) <= self.longest and name not in (b"authorization", b"cookie", b"proxy-authorization", b"set-cookie"):
            if len(self.kept) >= self.capacity:
                self.kept.clear()
            self.kept[line] = field
        return field


def check_line(line: bytes) -> None:
    """Raises SyntaxProblem for a line, cut out at CR LF, that holds what none may. Lines that `Fields` keeps have been checked."""
    if line.translate(SAFE) != line:
        if line.translate(None, FORBIDDEN) != line:
            raise SyntaxProblem("a control character")
        raise SyntaxProblem("a bare CR or LF")


class PartialHead:
    """A head that comes in pieces. Each byte is looked at once, however small the pieces are.

    `longest_line` and `largest` (bytes) are the limits of the start line and of the whole.
    """

    __slots__ = ("data", "largest", "line", "longest_line")

    def __init__(self, largest: int, longest_line: int) -> None:
        self.data = bytearray()
        self.largest = largest
        self.longest_line = longest_line
        self.line = False
        """True once the start line has ended."""

    def add(self, piece: bytes) -> bool:
        """Whether the head is complete with `piece`. Raises SyntaxProblem as soon as it cannot become a good one."""
        data = self.data
        seen = len(data)
        data += piece
        end = data.find(HEAD_END, max(0, seen - 3))
        fresh = seen - 1 if seen and data[seen - 1] == 13 else seen
        stop = len(data) if end < 0 else end + 4
        if data.count(b"\n", fresh, stop) != data.count(CRLF, fresh, stop):
            raise SyntaxProblem("a bare LF")
        if not self.line:
            line = data.find(CRLF, max(0, seen - 1))
            if (line if line >= 0 else len(data) - 1) > self.longest_line:
                raise LineTooLong("a start line that is too long")
            self.line = line >= 0
        if (end if end >= 0 else len(data) - 3) > self.largest:
            raise TooLarge(f"a head of more than {self.largest} bytes")
        return end >= 0


def read_length(value: bytes) -> int:
    """The value of Content-Length. Raises SyntaxProblem for a list, a sign, white space or too many digits."""
    if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
        raise SyntaxProblem("a Content-Length that is not a number")
    return int(value)


def named_by_connection(values: list[bytes]) -> set[bytes]:
    """The lower-case options of all Connection fields."""
    return {option.strip(b" \t") for value in values for option in value.lower().split(b",")} - {b""}


def write_fields(parts: list[bytes], headers: list[Header]) -> bytes:
    """A head: `parts` (start line and lines with their CR LF), then `headers`, then the empty line.

    Raises ValueError if a value would begin another line: nothing that a policy or a filter says can split a message.
    """
    if headers:
        lines = CRLF.join(map(b": ".join, headers))
        if len(lines) - len(lines.translate(None, SPLITTING)) != 2 * (len(headers) - 1):
            raise ValueError("a header with a line break in it")
        parts.append(lines)
        parts.append(HEAD_END)
    else:
        parts.append(CRLF)
    return b"".join(parts)


SIZE: Final = 1
DATA: Final = 2
DATA_END: Final = 3
TRAILER: Final = 4
DONE: Final = 5


class Chunks:
    """Decodes one chunked body (RFC 9112 section 7.1). Its states are a line, data, the line end after data, trailers, done."""

    __slots__ = ("buffer", "excess", "fields", "left", "state", "trailers")

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.state = SIZE
        self.left = 0
        self.excess = 0
        self.buffer = b""
        self.trailers: list[Header] | None = None

    @property
    def done(self) -> bool:
        """True once the whole body, trailers included, has been read."""
        return self.state == DONE

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """(body, what comes after the message). Raises SyntaxProblem."""
        if self.buffer:
            data, self.buffer = self.buffer + data, b""
        pieces: list[bytes] = []
        at = 0
        size = len(data)
        while self.state != DONE:
            if self.state == DATA:
                piece = data[at : at + self.left]
                at += len(piece)
                self.left -= len(piece)
                if piece:
                    pieces.append(piece)
                if self.left:
                    break
                self.state = DATA_END
            elif self.state == DATA_END:
                if size - at < 2:
                    if data[at:size] not in (b"", b"\r"):
                        raise SyntaxProblem("a chunk longer than its size")
                    break
                if data[at : at + 2] != CRLF:
                    raise SyntaxProblem("a chunk longer than its size")
                at += 2
                self.state = SIZE
            elif self.state == SIZE:
                end = data.find(CRLF, at, at + MAX_CHUNK_LINE + 2)
                if end < 0:
                    if size - at > MAX_CHUNK_LINE + 1 or b"\n" in data[at:size]:
                        raise SyntaxProblem("a chunk size line that is too long or has a bare LF")
                    break
                self.left = self.read_size(data[at:end])
                if end - at > 16 or self.excess:  # as in Go's net/http (CVE-2023-39326)
                    self.excess = max(0, self.excess + end - at - 16 - 2 * self.left)
                    if self.excess > MAX_CHUNK_EXCESS:
                        raise SyntaxProblem("chunks that are nearly all extensions")
                at = end + 2
                self.state = DATA if self.left else TRAILER
            else:
                at = self.read_trailers(data, at)
                if self.state != DONE:
                    break
        if self.state == DONE:
            return b"".join(pieces), data[at:]
        self.buffer = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), b""

    @staticmethod
    def read_size(line: bytes) -> int:
        """The size of a chunk; extensions are looked at for control characters and dropped."""
        digits, semicolon, extension = line.partition(b";")
        if semicolon:
            digits = digits.rstrip(b" \t")
            if extension.translate(None, FORBIDDEN + b"\r\n") != extension:
                raise SyntaxProblem("a chunk extension with a control character")
        if not digits or digits.translate(None, HEX) or len(digits) > 15:
            raise SyntaxProblem("a chunk size that is not a number")
        return int(digits, 16)

    def read_trailers(self, data: bytes, at: int) -> int:
        """Reads the trailer section that begins at `at`, if all of it is there; returns where the message ends, or `at`."""
        if data[at : at + 2] == CRLF:
            self.state = DONE
            return at + 2
        end = data.find(HEAD_END, at, at + MAX_TRAILERS + 4)
        if end < 0:
            if len(data) - at > MAX_TRAILERS + 3:
                raise SyntaxProblem("trailers that are too long")
            return at
        lines = data[at:end].split(CRLF)
        if len(lines) > 100:
            raise SyntaxProblem("too many trailers")
        found = [self.fields.read(line) for line in lines]
        self.trailers = [field for field in found if field[0] not in NOT_IN_TRAILERS] or None
        self.state = DONE
        return end + 4

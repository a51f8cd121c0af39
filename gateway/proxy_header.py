"""The PROXY protocol (haproxy.org, "proxy-protocol.txt"), versions 1 and 2: who a connection is from, said by the proxy that passes it on.

Sans-io: bytes in, a header out, and the other way round. What is not exactly a header is refused: there is no guessing.
"""

from __future__ import annotations

import socket
from typing import Final, Literal

import msgspec

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
LONGEST_V1: Final = 107
LONGEST_V2: Final = 16 + 4096
"""Of a header with everything that is appended to it (TLVs); the addresses take 36 bytes at most, or 216 of a Unix socket."""
LONGEST: Final = LONGEST_V2
Version = Literal["v1", "v2"]
Address = tuple[str, int]

_STREAM, _CRC32C = 1, 3
_FAMILIES: Final = {1: (socket.AF_INET, 4, 12), 2: (socket.AF_INET6, 16, 36), 3: (None, 0, 216)}
"""By the number of the address family: Python's, bytes of an address, bytes of the block of addresses."""


class ProxyHeader(msgspec.Struct, frozen=True):
    """A header that has been read."""

    length: int
    """Bytes that it takes."""
    source: Address | None = None
    """The client; None when the proxy speaks for itself (LOCAL), or does not say (UNKNOWN, UNSPEC, a Unix socket)."""
    destination: Address | None = None
    """Where the client connected to."""


class BadProxyHeader(msgspec.Struct, frozen=True):
    """Why the bytes are no header."""

    reason: str


def read_proxy_header(data: bytes) -> ProxyHeader | BadProxyHeader | None:
    """The header that `data`, the first bytes of a connection, begins with; None when more is needed to tell."""
    if data[:12] == SIGNATURE[: len(data)]:
        return _read_v2(data) if len(data) >= 16 else None
    if data[:6] == b"PROXY "[: len(data)]:
        return _read_v1(data)
    return BadProxyHeader("the connection does not begin with a PROXY protocol header")


def _read_v1(data: bytes) -> ProxyHeader | BadProxyHeader | None:
    end = data.find(b"\r\n", 0, LONGEST_V1)
    if end < 0:
        return BadProxyHeader(f"no end of line within {LONGEST_V1} bytes") if len(data) >= LONGEST_V1 else None
    parts = data[:end].split(b" ")
    if len(parts) >= 2 and parts[1] == b"UNKNOWN":
        return ProxyHeader(end + 2)
    family = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}.get(parts[1]) if len(parts) == 6 else None
    if family is None:
        return BadProxyHeader("not TCP4, TCP6 or UNKNOWN with two addresses and two ports")
    source, destination = _address(family, parts[2], parts[4]), _address(family, parts[3], parts[5])
    if source is None or destination is None:
        return BadProxyHeader("an address or a port is none")
    return ProxyHeader(end + 2, source, destination)


def _address(family: socket.AddressFamily, host: bytes, port: bytes) -> Address | None:
    if not port.isdigit() or len(port) > 5 or int(port) > 65535 or (port[:1] == b"0" and port != b"0"):
        return None
    try:
        return _text(family, socket.inet_pton(family, host.decode("ascii"))), int(port)
    except (OSError, ValueError):
        return None


def _text(family: socket.AddressFamily, packed: bytes) -> str:
    if family == socket.AF_INET6 and packed[:12] == b"\0" * 10 + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(family, packed)


def _read_v2(data: bytes) -> ProxyHeader | BadProxyHeader | None:
    command, family, size = data[12], data[13], int.from_bytes(data[14:16], "big")
    if command not in {0x20, 0x21}:
        return BadProxyHeader(f"version and command {command:#04x} are not known")
    length = 16 + size
    if length > LONGEST_V2:
        return BadProxyHeader(f"{length} bytes; at most {LONGEST_V2} are read")
    if len(data) < length:
        return None
    body = data[16:length]
    if command == 0x20:
        return ProxyHeader(length)
    if family >> 4 == 0:
        return ProxyHeader(length)
    known = _FAMILIES.get(family >> 4)
    if known is None or family & 15 != _STREAM:
        return BadProxyHeader(f"address family and transport {family:#04x} are none of a connection")
    kind, width, block = known
    if len(body) < block:
        return BadProxyHeader("shorter than its addresses")
    wrong = _extra(data[:length], 16 + block)
    if wrong:
        return BadProxyHeader(wrong)
    if kind is None:
        return ProxyHeader(length)
    ports = body[2 * width : 2 * width + 4]
    source = _text(kind, body[:width]), int.from_bytes(ports[:2], "big")
    destination = _text(kind, body[width : 2 * width]), int.from_bytes(ports[2:], "big")
    return ProxyHeader(length, source, destination)


def _extra(header: bytes, at: int) -> str:
    """What is wrong with what is appended to the addresses. Nothing of it says who anybody is here."""
    while at < len(header):
        end = at + 3 + int.from_bytes(header[at + 1 : at + 3], "big")
        if at + 3 > len(header) or end > len(header):
            return "a value that is appended is cut off"
        if header[at] == _CRC32C:
            if end - at != 7:
                return "its checksum is not one"
            if crc32c(header[: at + 3] + b"\0\0\0\0" + header[end:]) != int.from_bytes(header[at + 3 : end], "big"):
                return "its checksum is wrong"
        at = end
    return ""


def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 if value & 1 else value >> 1
        found.append(value)
    return tuple(found)


_TABLE: Final = _table()


def crc32c(data: bytes) -> int:
    """The checksum of RFC 3720 appendix B.4."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def write_proxy_header(version: Version, source: Address | None, destination: Address | None) -> bytes:
    """A header; without addresses it says that the proxy speaks for itself."""
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n" if version == "v1" else SIGNATURE + b"\x20\0\0\0"
    six = ":" in source[0] or ":" in destination[0]
    hosts = [f"::ffff:{host}" if six and ":" not in host else host for host, _ in (source, destination)]
    if version == "v1":
        return f"PROXY TCP{6 if six else 4} {hosts[0]} {hosts[1]} {source[1]} {destination[1]}\r\n".encode("ascii")
    family = socket.AF_INET6 if six else socket.AF_INET
    body = b"".join(socket.inet_pton(family, host) for host in hosts) + source[1].to_bytes(2, "big") + destination[1].to_bytes(2, "big")
    return SIGNATURE + (b"\x21\x21" if six else b"\x21\x11") + len(body).to_bytes(2, "big") + body

"""The PROXY protocol's header: what is one, what is none, and that what is written is read."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy_header import (
    LONGEST_V1,
    LONGEST_V2,
    SIGNATURE,
    BadProxyHeader,
    ProxyHeader,
    Version,
    crc32c,
    read_proxy_header,
    write_proxy_header,
)


def v2(command: int, family: int, body: bytes, size: int | None = None) -> bytes:
    return SIGNATURE + bytes((command, family)) + (len(body) if size is None else size).to_bytes(2, "big") + body


FOUR = socket.inet_aton("1.2.3.4") + socket.inet_aton("5.6.7.8") + b"\x10\x00\x01\xbb"
SIX = socket.inet_pton(socket.AF_INET6, "2001:db8::1") + socket.inet_pton(socket.AF_INET6, "::1") + b"\x10\x00\x01\xbb"
MAPPED = socket.inet_pton(socket.AF_INET6, "::ffff:1.2.3.4") * 2 + b"\x10\x00\x01\xbb"


def with_checksum(header: bytes, wrong: int = 0) -> bytes:
    size = int.from_bytes(header[14:16], "big") + 7
    whole = header[:14] + size.to_bytes(2, "big") + header[16:] + b"\x03\0\x04"
    return whole + ((crc32c(whole + b"\0\0\0\0") + wrong) & 0xFFFFFFFF).to_bytes(4, "big")


@pytest.mark.parametrize(
    ("data", "source", "destination"),
    [
        (b"PROXY TCP4 1.2.3.4 5.6.7.8 4096 443\r\n", ("1.2.3.4", 4096), ("5.6.7.8", 443)),
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", ("255.255.255.255", 65535), ("255.255.255.255", 65535)),
        (b"PROXY TCP6 2001:db8::1 ::1 4096 0\r\n", ("2001:db8::1", 4096), ("::1", 0)),
        (b"PROXY TCP6 ::ffff:1.2.3.4 ::1 4096 443\r\n", ("1.2.3.4", 4096), ("::1", 443)),
        (b"PROXY UNKNOWN\r\n", None, None),
        (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None, None),
        (v2(0x21, 0x11, FOUR), ("1.2.3.4", 4096), ("5.6.7.8", 443)),
        (v2(0x21, 0x21, SIX), ("2001:db8::1", 4096), ("::1", 443)),
        (v2(0x21, 0x21, MAPPED), ("1.2.3.4", 4096), ("1.2.3.4", 443)),
        (v2(0x21, 0x11, FOUR + b"\x01\0\x02h2\x20\0\0"), ("1.2.3.4", 4096), ("5.6.7.8", 443)),
        (with_checksum(v2(0x21, 0x11, FOUR + b"\x02\0\x03a.b")), ("1.2.3.4", 4096), ("5.6.7.8", 443)),
        (v2(0x20, 0x00, b""), None, None),
        (v2(0x20, 0x11, FOUR), None, None),
        (v2(0x20, 0xFF, b"whatever"), None, None),
        (v2(0x21, 0x00, b"skipped"), None, None),
        (v2(0x21, 0x31, b"/run/x".ljust(108, b"\0") * 2), None, None),
        (v2(0x20, 0x00, b"\x04" + (4093).to_bytes(2, "big") + b"\0" * 4093), None, None),
    ],
)
def test_what_is_a_header(data: bytes, source: tuple[str, int] | None, destination: tuple[str, int] | None) -> None:
    for more in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", data):
        assert read_proxy_header(data + more) == ProxyHeader(len(data), source, destination)
    for end in range(len(data)):
        assert read_proxy_header(data[:end]) is None, data[:end]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"PROXZ",
        b"proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
        b"PROXY TCP4  1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 \xc2\xb2 2\r\n",
        b"PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 ::1 1 2\r\n",
        b"PROXY TCP4 localhost 5.6.7.8 1 2\r\n",
        b"PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        b"PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n" + b"x" * 107,
        b"PROXY \r\n",
        b"PROXY UNKNOWN " + b"x" * LONGEST_V1,
        SIGNATURE[:11] + b"x",
        v2(0x11, 0x11, FOUR),
        v2(0x22, 0x11, FOUR),
        v2(0x01, 0x11, FOUR),
        v2(0x21, 0x11, FOUR[:-1]),
        v2(0x21, 0x21, FOUR),
        v2(0x21, 0x12, FOUR),
        v2(0x21, 0x10, FOUR),
        v2(0x21, 0x41, FOUR),
        v2(0x21, 0x31, b"/run/x"),
        v2(0x21, 0x11, FOUR + b"\x01\0"),
        v2(0x21, 0x11, FOUR + b"\x01\0\x05abcd"),
        v2(0x21, 0x11, FOUR + b"\x03\0\x02ab"),
        with_checksum(v2(0x21, 0x11, FOUR), wrong=1),
        v2(0x21, 0x11, b"", LONGEST_V2 - 15),
        v2(0x20, 0x00, b"", 65535),
    ],
)
def test_what_is_none(data: bytes) -> None:
    assert isinstance(read_proxy_header(data), BadProxyHeader)


addresses = st.tuples(st.ip_addresses().map(str), st.integers(0, 65535))


@given(st.sampled_from(["v1", "v2"]), addresses, addresses)
def test_what_is_written_is_read(version: Version, source: tuple[str, int], destination: tuple[str, int]) -> None:
    def plain(address: tuple[str, int]) -> tuple[str, int]:
        ip = ipaddress.ip_address(address[0])
        mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
        return str(mapped or ip), address[1]

    header = write_proxy_header(version, source, destination)
    found = read_proxy_header(header)
    assert isinstance(found, ProxyHeader)
    assert found.source is not None
    assert found.destination is not None
    assert (found.length, plain(found.source), plain(found.destination)) == (len(header), plain(source), plain(destination))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_gateway_speaks_for_itself(version: Version) -> None:
    header = write_proxy_header(version, None, None)
    assert read_proxy_header(header) == ProxyHeader(len(header))


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    read_proxy_header(data)
    read_proxy_header(SIGNATURE + data)
    read_proxy_header(b"PROXY " + data)


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283

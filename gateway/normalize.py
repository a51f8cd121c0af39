"""One form for every path, made once: what routing, policy, quota and the upstream see is the same bytes.

Two spellings of one resource must not be two paths to a policy, and nothing that some server would read in a second way
is let through. The rules, in the order in which they apply (RFC 3986 section 6.2.2; numbers are sections of it):

1. Refused anywhere in the target: white space, control characters, non-ASCII bytes and `#`. A target begins with `/`.
2. Refused in the path: a backslash, a `%` that is not followed by two hex digits, and escapes of `/`, of a backslash and of control
   characters. The bytes that escapes stand for must be UTF-8: that rules out overlong forms (`%c0%af`), and policies read paths as text.
3. Escapes of unreserved characters are decoded (6.2.2.2), those that remain are written in upper case (6.2.2.1), and the printable
   characters that no URI may have as they are (`"<>[]^{|}` and the grave accent) are escaped. Nothing is decoded twice: `%252e` stays.
4. Several slashes become one; then dot segments are removed (5.2.4; `..` at the root stays at the root, as it says there).
5. Refused: a segment that is empty, `.` or `..` once what follows a `;` (or `%3B`) is cut off: servers that know path parameters
   read `/..;/` as `/../`. Any other `;` is a character like others.

The query is what follows the first `?`, as sent: parameters are decoded by whoever reads them, once.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from gateway.codec.bytesets import only
from mesh.http import CONNECT, RequestHead
from mesh.refusals import BadHeader, BadPath, BadRequest, MethodNotAllowed, Refusal

UNRESERVED: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
PLAIN: Final = UNRESERVED + b"!$&'()*+,=:@/"
"""What a path can have without needing a closer look: `pchar` and `/`, but neither `%` nor `;`."""
QUERY: Final = bytes(byte for byte in range(0x21, 0x7F) if byte != 0x23)
HOST: Final = b"abcdefghijklmnopqrstuvwxyz0123456789-._"
LONGEST_HOST: Final = 253
"""Characters of a name in the DNS (RFC 1035 section 2.3.4)."""

_PLAIN: Final = only(PLAIN)
_QUERY: Final = only(QUERY)
_HOST: Final = only(HOST)
_PATH: Final = only(QUERY.replace(b"\\", b""))

_ODD: Final = re.compile(rb'%(..)|["<>\[\]^`{|}]', re.DOTALL)
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_DECODED: Final = {byte: bytes([byte]) for byte in UNRESERVED}
_FORBIDDEN: Final = frozenset([*range(0x20), 0x7F, 0x2F, 0x5C])
_IPV6: Final = re.compile(rb"\[[0-9a-f:.]{2,45}\]")

_REFUSED_METHODS: Final = frozenset((CONNECT, b"TRACE"))
"""CONNECT is served where the codec says that it asks for a tunnel."""


def normalize(head: RequestHead, edge: bool = True) -> Refusal | None:
    """Sets `head.path` and `head.query`, and brings `head.authority` to one form; returns why it can't be, if so.

    At the `edge`, header names with an underscore are refused: CGI-like servers can't tell them from names with a hyphen.
    """
    if head.method in _REFUSED_METHODS and head.tunnel != CONNECT:
        return MethodNotAllowed()
    authority = head.authority
    if authority.translate(_HOST) != authority or not authority or authority[-1] == 0x2E or len(authority) > LONGEST_HOST:
        checked = normal_authority(authority)
        if checked is None:
            return BadRequest(reason="the authority is not a host with an optional port")
        head.authority = checked
    path, mark, query = head.target.partition(b"?")
    if path.translate(_PLAIN) != path or path.find(b"//") >= 0 or path.find(b"/.") >= 0 or path[:1] != b"/":
        normal = normal_path(path)
        if isinstance(normal, BadPath):
            return normal
        path = normal
    if mark:
        if query.translate(_QUERY) != query:
            return BadPath(reason="the query has white space, control characters, `#` or non-ASCII bytes")
        head.query = query
    else:
        head.query = None
    head.path = path
    if edge:
        for name, _ in head.headers:
            if 0x5F in name:
                return BadHeader(reason="a header's name has an underscore")
    return None


def normal_path(path: bytes) -> bytes | BadPath:
    """The one form of `path` (the target up to its `?`), or why it has none. Idempotent."""
    if path[:1] != b"/":
        return BadPath(reason="the target does not begin with a slash")
    if path.translate(_PATH) != path:
        return BadPath(reason="the path has white space, control characters, `#`, a backslash or non-ASCII bytes")
    if 0x25 in path:
        if len(_ESCAPE.findall(path)) != path.count(b"%"):
            return BadPath(reason="the path has a `%` without two hex digits")
        octets = {int(digits, 16) for digits in _ESCAPE.findall(path)}
        if not _FORBIDDEN.isdisjoint(octets):
            return BadPath(reason="the path escapes a slash, a backslash or a control character")
        if max(octets) >= 0x80 and not _is_text(path):
            return BadPath(reason="the escapes of the path are not UTF-8")
    path = _ODD.sub(_respell, path)
    segments: list[bytes] = []
    # The last segment decides whether the result ends with a slash: that of `/a/`, `/a/.` and `/a/b/..` does.
    *inner, last = path.split(b"/")[1:]
    for segment in inner:
        if segment == b"..":
            del segments[-1:]
        elif segment not in (b"", b"."):
            segments.append(segment)
    if last == b"..":
        del segments[-1:]
    segments.append(b"" if last in (b".", b"..") else last)
    for segment in segments:
        if segment and _before_parameters(segment) in (b"", b".", b".."):
            return BadPath(reason="a segment of the path is empty or a dot segment before its parameters")
    return b"/" + b"/".join(segments)


def normal_authority(authority: bytes) -> bytes | None:
    """The host in lower case without its final dot, with its port if there is one; None if it is no host and port."""
    return _normal_authority(authority) if len(authority) <= LONGEST_HOST + len(b".:65535") else None


@lru_cache(maxsize=1024)
def _normal_authority(authority: bytes) -> bytes | None:
    authority = authority.lower()
    if authority[:1] == b"[":
        end = authority.find(b"]") + 1
        host, rest = authority[:end], authority[end:]
        if not _IPV6.fullmatch(host):
            return None
    else:
        host, colon, port = authority.partition(b":")
        rest = colon + port
        host = host.removesuffix(b".")
        if not host or host.translate(None, HOST) or len(host) > LONGEST_HOST or host[-1] == 0x2E:
            return None
    if rest in (b"", b":"):
        return host
    port = rest[1:]
    if rest[:1] != b":" or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        return None
    return host + rest


def _respell(found: re.Match[bytes]) -> bytes:
    digits = found.group(1)
    if digits is None:
        return b"%%%02X" % found.group(0)[0]
    octet = int(digits, 16)
    return _DECODED.get(octet) or b"%%%02X" % octet


def _is_text(path: bytes) -> bool:
    octets = _ESCAPE.sub(lambda found: bytes([int(found.group(1), 16)]), path)
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _before_parameters(segment: bytes) -> bytes:
    return segment.partition(b";")[0].partition(b"%3B")[0]

"""What the fields of an HTTP/2 request say (RFC 9113 section 8.3.1, RFC 8441), strictly: there is one way to understand it, or none."""

from __future__ import annotations

from typing import Final, NamedTuple

from gateway.codec.bytesets import only, without
from gateway.codec.h1 import MAX_LENGTH_DIGITS, TOKEN, SyntaxProblem
from gateway.codec.h1_request import tunnel_to
from gateway.codec.h2_fields import MALFORMED, Malformed, check_fields
from mesh.http import CONNECT, UNKNOWN_LENGTH, WEBSOCKET, Header
from mesh.refusals import ExpectationFailed, HeadTooLarge, MethodNotAllowed, Refusal, TargetTooLong

_TOKEN: Final = only(TOKEN)
_PRINTABLE: Final = without(MALFORMED + b" ")
_PSEUDO: Final = frozenset((b":method", b":scheme", b":authority", b":path", b":protocol"))

Read = tuple[bytes, bytes, bytes, list[Header], int, bool, bytes]
"""Method, authority, target, headers, length of the body, whether the client waits for `100 Continue`, tunnel (`RequestHead.tunnel`)."""


class Limits(NamedTuple):
    """What a head may be: its bytes, its fields, the bytes of its target; and whether it may ask for a WebSocket."""

    head: int
    fields: int
    target: int
    websockets: bool


def read_request(fields: list[Header], limits: Limits) -> Read | Refusal:
    """The head that `fields` make up, or why it is refused. Raises `Malformed`."""
    if sum([len(name) + len(value) for name, value in fields]) > limits.head:
        # Before any of it is copied: a block may name one large field many times.
        return HeadTooLarge(reason=f"more than {limits.head} bytes")
    pseudo: dict[bytes, bytes] = {}
    at = 0
    for name, value in fields:
        if name[:1] != b":":
            break
        if name not in _PSEUDO or name in pseudo:
            raise Malformed(f"the pseudo-header {name[:64]!r}, which is unknown or there twice")
        pseudo[name] = value
        at += 1
    regular = fields[at:]
    if len(regular) > limits.fields:
        return HeadTooLarge(reason="too many header fields")
    check_fields(regular)
    method = pseudo.get(b":method", b"")
    if not method or method.translate(_TOKEN) != method:
        raise Malformed("no method, or one that is not a token")
    all_pseudo = b"".join(pseudo.values())
    if all_pseudo.translate(_PRINTABLE) != all_pseudo:
        raise Malformed("a pseudo-header with a control character or white space")
    protocol = pseudo.get(b":protocol")
    tunnel = b""
    if protocol is not None and method != CONNECT:
        raise Malformed("a protocol, and a method that is not CONNECT")
    if method == CONNECT:
        if protocol is None:
            if b":path" in pseudo or b":scheme" in pseudo:  # RFC 9113 section 8.5
                raise Malformed("a CONNECT with a path or a scheme")
            try:
                tunnel_to(pseudo.get(b":authority", b""), None)
            except SyntaxProblem as problem:
                raise Malformed(str(problem)) from None
            tunnel = CONNECT
        elif not limits.websockets or protocol.lower() != WEBSOCKET:
            return MethodNotAllowed(reason=f"CONNECT with the protocol {protocol[:64]!r}")
        else:
            method, tunnel = b"GET", WEBSOCKET
    target = pseudo.get(b":path", b"") if tunnel != CONNECT else b"/"
    if not target or (b":scheme" not in pseudo and tunnel != CONNECT):
        raise Malformed("no path or no scheme")
    if len(target) > limits.target:
        return TargetTooLong(reason=f"{len(target)} bytes")
    headers: list[Header] = []
    cookies: list[bytes] = []
    length = UNKNOWN_LENGTH
    expects = False
    host: bytes | None = None
    for field in regular:
        name, value = field
        if name == b"cookie":
            cookies.append(value)
            continue
        if name == b"host":
            if host is not None:
                raise Malformed("more than one Host")
            host = value
            continue
        if name == b"content-length":
            if length >= 0 or not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
                raise Malformed("a Content-Length that is not one number")
            if tunnel:
                raise Malformed("a Content-Length in a request for a tunnel")
            length = int(value)
        elif name == b"expect":
            if value.lower() != b"100-continue":
                return ExpectationFailed(reason=f"expectation {value[:64]!r}")
            expects = True
            continue
        headers.append(field)
    if cookies:
        headers.append((b"cookie", b"; ".join(cookies)))
    if tunnel == WEBSOCKET:
        headers.append((b"upgrade", tunnel))
    authority = pseudo.get(b":authority", b"")
    if host is not None and authority and host.lower() != authority.lower():
        raise Malformed("a Host that is not the authority")
    authority = authority or host or b""
    if not authority:
        raise Malformed("no authority")
    return method, authority.lower(), target, headers, length, expects, tunnel

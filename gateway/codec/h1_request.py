"""What an HTTP/1.1 request's head may say, beyond what frames it (RFC 9112 sections 3 and 9.3, RFC 9110 section 7.6.1)."""

from __future__ import annotations

from typing import Final

from gateway.codec.h1 import NAMED_IN_VAIN, TOKEN, LineTooLong, SyntaxProblem, named_by_connection
from mesh.http import HTTP11, WEBSOCKET, Header
from mesh.refusals import Refusal

USUAL_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"))
LONGEST_METHOD: Final = 50
ROOM_FOR_LINE: Final = 64
"""Bytes of a request line beyond its target: the method, the version and the spaces between them."""


class Unacceptable(Exception):
    """A request that is refused, with the refusal."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


def check_method(method: bytes) -> None:
    """Raises SyntaxProblem for a method that is not a token, or too long to be one."""
    if not method or method.translate(None, TOKEN):
        raise SyntaxProblem("a method that is not a token")
    if len(method) > LONGEST_METHOD:
        raise LineTooLong("a method that is too long")


def connection_options(values: list[bytes], headers: list[Header], keep: bool) -> tuple[list[Header], bool]:
    """Applies the Connection fields: the headers without those that they name, and whether the connection persists.

    `keep` is what goes without them. Raises SyntaxProblem for a field that names what is not the connection's business.
    """
    options = named_by_connection(values)
    if b"close" in options:
        keep = False
    elif b"keep-alive" in options:
        keep = True
    named = options - {b"close", b"keep-alive"}
    for name in named:
        if name in NAMED_IN_VAIN or name[:12] == b"x-forwarded-":
            raise SyntaxProblem(f"a Connection field that names {name[:64]!r}, which is not about the connection")
    return ([field for field in headers if field[0] not in named] if named else headers), keep


def wants_websocket(method: bytes, version: bytes, upgrade: bytes, connection: list[bytes] | None, body: bool) -> bool:
    """Whether a request with the field `Upgrade` asks for a WebSocket (RFC 6455 section 4.1). Every other protocol, a request of HTTP/1.0,
    one with a body and a field that no Connection field names are ignored, as RFC 9110 section 7.8 has it: the request is answered as if it
    had no such field. So is `h2c`, which RFC 9113 no longer has."""
    if method != b"GET" or version != HTTP11 or body or connection is None:
        return False
    return b"upgrade" in named_by_connection(connection) and WEBSOCKET in named_by_connection([upgrade])


def tunnel_to(target: bytes, host: bytes | None) -> bytes:
    """The authority that CONNECT asks for (RFC 9112 section 3.2.3: host and port). Raises SyntaxProblem for a target that is none, and for
    a Host that is another one's. Clients of HTTP/1.0 send no Host, and some leave the port out of it."""
    name, colon, port = target.lower().rpartition(b":")
    if not target.isascii() or not name or not colon or not port.isdigit() or b"/" in name or b"@" in name or b"?" in name:
        raise SyntaxProblem("a CONNECT to what is not a host and its port")
    authority = name + b":" + port
    if host is not None and host not in (authority, name):
        raise SyntaxProblem("a CONNECT to another host than Host says")
    return authority


def origin_form(method: bytes, target: bytes, host: bytes) -> bytes:
    """Absolute form and asterisk form, as an origin form (RFC 9112 section 3.2). Raises SyntaxProblem."""
    if not target.isascii():
        raise SyntaxProblem("a target with bytes beyond ASCII")
    if target == b"*" and method == b"OPTIONS":
        return target
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        raise SyntaxProblem("a target in none of the forms that are served")
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?"), rest.find(b"#")) if at >= 0), default=len(rest))
    if rest[:cut].lower() != host:
        raise SyntaxProblem("an absolute target for another host than Host says")
    rest = rest[cut:]
    return rest if rest[:1] == b"/" else b"/" + rest

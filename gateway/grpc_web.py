"""gRPC-Web towards clients, gRPC towards the upstream (github.com/grpc/grpc, PROTOCOL-WEB.md; Envoy's gRPC-Web filter does the same).

A browser cannot read trailers: they come to it as a last message of the body, and with `grpc-web-text` the whole body is base64. The
bridge stands between a request's two sides and speaks `gateway.exchange` to both.
"""

from __future__ import annotations

import binascii
from typing import Final

from gateway.exchange import Client, Forwarding
from mesh.http import Header
from mesh.refusals import BadRequest, Refusal

WEB: Final = b"application/grpc-web"
TEXT: Final = b"application/grpc-web-text"
GRPC: Final = b"application/grpc"
TRAILERS_FRAME: Final = b"\x80"
"""The first byte of the message that trailers come in."""


def web_content(headers: list[Header]) -> bytes:
    """The content type of a gRPC-Web request; empty for any other."""
    for name, value in headers:
        if name == b"content-type":
            return value if value.startswith(WEB) and _suffix(value) is not None else b""
    return b""


def _suffix(content: bytes) -> bytes | None:
    """What follows the name of the type (`+proto`, or nothing); None for another type that begins alike."""
    rest = content[len(TEXT) :] if content.startswith(TEXT) else content[len(WEB) :]
    return rest if rest[:1] in {b"", b"+", b";", b" "} else None


def to_grpc(headers: list[Header], content: bytes) -> list[Header]:
    """A gRPC-Web request's fields, as gRPC's."""
    kind = (b"content-type", GRPC + (_suffix(content) or b""))
    return [kind if field[0] == b"content-type" else field for field in headers if field[0] != b"content-length"]


class Base64:
    """Decodes base64 that comes in pieces, and that may be padded in the middle: clients pad each message."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def decode(self, data: bytes) -> bytes:
        """What `data` completes. Raises ValueError for what is no base64."""
        data = self._rest + data
        size = len(data) & ~3
        self._rest = data[size:]
        found: list[bytes] = []
        at = 0
        while at < size:
            padding = data.find(b"=", at, size)
            end = size if padding < 0 else (padding | 3) + 1
            found.append(binascii.a2b_base64(data[at:end], strict_mode=True))
            at = end
        return b"".join(found)

    @property
    def complete(self) -> bool:
        """Whether nothing is left over."""
        return not self._rest


class WebBridge:
    """`gateway.exchange.Client` to the upstream's side, `gateway.exchange.Forwarding` to the client's."""

    __slots__ = ("_base64", "_client", "_content", "_over", "forwarding", "outcome")

    def __init__(self, client: Client, content: bytes) -> None:
        """`content`: the request's content type, which is the answer's, too."""
        self._client = client
        self._content = content
        self._base64 = Base64() if content.startswith(TEXT) else None
        self._over = False
        self.forwarding: Forwarding | None = None
        """The request's way to its upstream: to be set by who began it."""
        self.outcome = client.outcome

    # To the upstream's side

    def body(self, data: bytes) -> None:
        """As `Forwarding.body`."""
        if self._base64 is not None:
            try:
                data = self._base64.decode(data)
            except ValueError:
                self._broken()
                return
        if data and self.forwarding is not None and not self._over:
            self.forwarding.body(data)

    def end(self, trailers: list[Header] | None) -> None:
        """As `Forwarding.end`."""
        if self._base64 is not None and not self._base64.complete:
            self._broken()
        elif self.forwarding is not None and not self._over:
            self.forwarding.end(trailers)

    def _broken(self) -> None:
        if not self._over:
            self.cancel()
            self._client.refuse(BadRequest(reason="a body of grpc-web-text that is not base64"))

    def answer_wanted(self) -> None:
        """As `Forwarding.answer_wanted`."""
        if self.forwarding is not None and not self._over:
            self.forwarding.answer_wanted()

    def cancel(self) -> None:
        """As `Forwarding.cancel`."""
        self._over = True
        if self.forwarding is not None:
            self.forwarding.cancel()

    # To the client's side

    def request_wanted(self, wanted: bool) -> None:
        """As `Client.request_wanted`."""
        self._client.request_wanted(wanted)

    def informational(self, status: int, headers: list[Header]) -> None:
        """As `Client.informational`."""
        self._client.informational(status, headers)

    def answer(self, status: int, headers: list[Header], ended: bool) -> None:
        """As `Client.answer`. An answer of trailers only stays one: clients look for the status in the head as well."""
        content = (b"content-type", self._content)
        grpc = any(name == b"content-type" and value.startswith(GRPC) for name, value in headers)
        if grpc:
            headers = [
                content if field[0] == b"content-type" else field for field in headers if field[0] not in {b"content-length", b"trailer"}
            ]
        self._over = self._over or ended
        self._client.answer(status, headers, ended)

    def answer_body(self, data: bytes) -> bool:
        """As `Client.answer_body`."""
        return self._client.answer_body(data if self._base64 is None else binascii.b2a_base64(data, newline=False))

    def answer_shut(self) -> None:
        """As `Client.answer_shut`."""
        raise NotImplementedError("there is no tunnel")

    def answer_end(self, trailers: list[Header] | None) -> None:
        """As `Client.answer_end`."""
        self._over = True
        text = b"".join([b"%b: %b\r\n" % field for field in trailers or ()])
        self.answer_body(TRAILERS_FRAME + len(text).to_bytes(4, "big") + text)
        self._client.answer_end(None)

    def refuse(self, refusal: Refusal) -> None:
        """As `Client.refuse`."""
        self._over = True
        self._client.refuse(refusal)

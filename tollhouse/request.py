"""A request that somebody describes, as the codec would have read it."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from gateway.caller import XFCC, vouch
from mesh.http import CONNECT, HTTP11, Header, RequestHead
from tollhouse.output import Complaint


def head_of(method: str, url: str, headers: Sequence[str], body: str, scheme: str) -> RequestHead:
    """The head of a request; `headers` as `Name: value`. The path is taken as it is written. Raises `Complaint`."""
    parts = urlsplit(url)
    fields: list[Header] = []
    authority = parts.netloc.rpartition("@")[2]
    for text in headers:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isascii():
            raise Complaint(f"--header: {text!r} is not NAME: VALUE", 2)
        if name.strip().lower() == "host":
            authority = value.strip()
        else:
            fields.append((name.strip().lower().encode(), value.strip().encode()))
    rest = url.partition("://")[2]
    cut = min((at for at in (rest.find("/"), rest.find("?")) if at >= 0), default=len(rest))
    target = rest[cut:].partition("#")[0] or "/"
    if not target.startswith("/"):
        target = "/" + target
    payload = body.encode()
    if payload:
        fields.append((b"content-length", b"%d" % len(payload)))
    tunnel = CONNECT if method.upper() == "CONNECT" else b""
    return RequestHead(
        method.upper().encode(), scheme.encode(), authority.lower().encode(), target.encode(), fields, HTTP11, len(payload), tunnel=tunnel
    )


def vouched(principal: str, via: str) -> Header:
    """What the gateway `via` would say about the caller `principal`."""
    return XFCC, vouch(principal, "0" * 64 if principal else "", via)

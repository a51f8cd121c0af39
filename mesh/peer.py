"""Who is on the wire, and whom a request is decided for.

A `Peer` is made once for a connection, by `identity`, from the certificate alone. A `Caller` is made for a request: the
peer itself, or, when the peer is one of `Mesh.trustedGateways`, the original caller that it passed on.
"""

from __future__ import annotations

from typing import final

import msgspec


class Peer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The other end of one connection."""

    principal: str = ""
    """The SPIFFE ID of a verified certificate (`spiffe://shop.example/ns/shop/sa/web`); empty for a peer without one."""
    trust_domain: str = ""
    address: str = ""
    """IP address in text."""
    port: int = 0
    local_address: str = ""
    local_port: int = 0
    tls_version: str = ""
    """`TLSv1.3`, `TLSv1.2`, or empty for plaintext."""
    cipher: str = ""
    sni: str = ""
    alpn: str = ""
    subject: str = ""
    """The certificate's subject, RFC 4514 text."""
    certificate_hash: str = ""
    """SHA-256 of the DER certificate, lower-case hex, as `Hash=` in x-forwarded-client-cert."""
    dns_names: tuple[str, ...] = ()
    serial: str = ""
    not_after: float = 0.0
    """Wall clock, seconds since the epoch; 0 without a certificate."""


@final
class Caller(msgspec.Struct, frozen=True, gc=False):
    """Whom policy and quota are about."""

    principal: str
    """SPIFFE ID of the original caller; empty when nobody proved who they are."""
    via: str = ""
    """SPIFFE ID of the trusted gateway that passed the request on; empty when the caller is the peer itself."""

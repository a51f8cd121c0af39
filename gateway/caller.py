"""Whom a request is decided for: the peer itself, or the caller that a trusted gateway vouches for.

Between gateways the original caller travels in `x-forwarded-client-cert`, in Envoy's format and always as *one* element:

* A gateway whose peer is not in `Mesh.trustedGateways` throws away whatever header the peer sent and writes its own, about the
  peer's verified certificate; about a peer without one it writes none.
* A gateway whose peer is trusted takes the header for what it says and passes it on as it came. No header means that the caller
  showed no certificate: the caller is nobody then, never the gateway.
* A header that a trusted gateway could not have written (two elements, two URIs, loose ends) is refused: with an Envoy as a trusted
  gateway, use `forward_client_cert_details: SANITIZE_SET`.
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final

from identity.problems import IdentityError
from identity.spiffe import SpiffeId
from mesh.http import Header
from mesh.model import MeshSettings
from mesh.peer import Caller, Peer
from mesh.refusals import BadHeader

XFCC: Final = b"x-forwarded-client-cert"
XFF: Final = b"x-forwarded-for"

NOBODY: Final = Caller(principal="")
LONGEST: Final = 16384
"""Bytes of a vouched header: Envoy can be told to put the certificate itself in it."""
HOPS: Final = 64
"""Addresses of an `x-forwarded-for` that are looked at."""

_KEYS: Final = frozenset((b"by", b"hash", b"cert", b"chain", b"subject", b"uri", b"dns"))
_PAIR: Final = re.compile(rb'([A-Za-z]+)=(?:"((?:[^"\\]|\\["\\])*)"|([^",;\\ ]*))(;|\Z)')
_NAMESPACE: Final = re.compile(r"spiffe://([^/]+)/ns/([^/]+)/")


def caller_of(peer: Peer, headers: list[Header], mesh: MeshSettings) -> Caller | BadHeader:
    """The caller of a request with `headers` that came from `peer`."""
    principal = peer.principal
    if principal not in mesh.trusted_gateways or not principal:
        return Caller(principal) if principal else NOBODY
    vouched: bytes | None = None
    for name, value in headers:
        if name == XFCC:
            if vouched is not None:
                return BadHeader(reason="a trusted gateway sent x-forwarded-client-cert twice")
            vouched = value
    if vouched is None:
        return Caller("", principal)
    named = vouched_principal(vouched) if len(vouched) <= LONGEST else None
    if named is None:
        return BadHeader(reason="a trusted gateway sent an x-forwarded-client-cert that is not one element with one SPIFFE ID")
    return Caller(named, principal)


@lru_cache(maxsize=1024)
def vouched_principal(value: bytes) -> str | None:
    """The SPIFFE ID in the one element of an `x-forwarded-client-cert`; empty when it has no URI, None when it is malformed.

    Envoy: "HTTP header manipulation", x-forwarded-client-cert: `;` between pairs, `,` between elements, values that have one of `,;=`
    are quoted, a quote in them is escaped by a backslash.
    """
    position, uris = 0, []
    while position < len(value):
        found = _PAIR.match(value, position)
        if not found:
            return None
        key = found.group(1).lower()
        if key not in _KEYS or (found.group(4) and found.end() == len(value)):
            return None
        if key == b"uri":
            uris.append(found.group(3) if found.group(2) is None else found.group(2))
        position = found.end()
    if position == 0 or len(uris) > 1:
        return None
    if not uris or not uris[0]:
        return ""
    principal = uris[0].decode("latin-1")
    try:
        named = SpiffeId.parse(principal)
    except IdentityError:
        return None
    # The ID of a trust domain itself is a CA's, never a workload's.
    return principal if named.path else None


@lru_cache(maxsize=4096)
def vouch(principal: str, certificate_hash: str, by: str) -> bytes:
    """The `x-forwarded-client-cert` about a caller: `By=<this gateway>;Hash=<SHA-256 of the certificate>;URI=<its SPIFFE ID>`."""
    pairs = [("By", by), ("Hash", certificate_hash), ("URI", principal)]
    return ";".join(f"{key}={_quoted(text)}" for key, text in pairs if text).encode("ascii", "replace")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r'[,;="\\ ]', text) else text


@lru_cache(maxsize=4096)
def is_proxy(address: str, proxies: tuple[str, ...]) -> bool:
    """Whether an IP address lies in one of the CIDRs."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in proxies]
    return any(ip.version == network.version and ip in network for network in networks)


def forwarded_for(peer: Peer, sent: bytes | None, gateway: bool, mesh: MeshSettings) -> tuple[bytes, str]:
    """The `x-forwarded-for` for the upstream, and the client's address as far as it can be believed: always the header's first element.

    From a trusted `gateway` the header that was `sent` is kept and the gateway's address appended. From one of `Mesh.trustedProxies`
    what lies to the left of the first address that is no proxy is cut off: anybody could have written it. From others nothing is kept.
    """
    address = peer.address
    mine = address.encode("ascii", "replace")
    if not sent or not (gateway or mesh.trusted_proxies):
        return mine, address
    if gateway:
        return sent + b", " + mine, sent.partition(b",")[0].strip().decode("latin-1")
    proxies = mesh.trusted_proxies
    if not is_proxy(address, proxies):
        return mine, address
    hops = [hop.strip().decode("latin-1") for hop in sent.rsplit(b",", HOPS)[-HOPS:]]
    hops.append(address)
    first = len(hops) - 1
    while first > 0 and is_proxy(hops[first], proxies) and _is_address(hops[first - 1]):
        first -= 1
    return ", ".join(hops[first:]).encode("latin-1"), hops[first]


def _is_address(text: str) -> bool:
    # A scope (`fe80::1%eth0`) means something on one host only, and its text is free.
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


@lru_cache(maxsize=4096)
def namespace_of(principal: str, trust_domain: str) -> str:
    """The namespace in a SPIFFE ID (`shop`), with its trust domain before it if that is another (`bank.example/shop`); empty for none."""
    found = _NAMESPACE.match(principal)
    if not found:
        return ""
    return found.group(2) if found.group(1) == trust_domain else f"{found.group(1)}/{found.group(2)}"

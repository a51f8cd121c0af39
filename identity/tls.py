"""TLS contexts for listeners and upstreams, and who is found at the other end.

The stdlib's `ssl` alone. OpenSSL verifies chains and dates in the handshake; `peer_of` and `verify_upstream` then decide who
the peer is, and until they have said so a connection may carry nothing.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from identity.files import MISSING, IdentitySource, expiry_problem
from identity.openssl import SESSION_CACHE_OFF, ask_for_any_certificate, switch_off_session_cache
from identity.problems import IdentityError, IdentityProblem
from identity.spiffe import SpiffeId
from identity.svid import Facts, facts_of, leaf_end, leaf_names, spiffe_id_of, time_problem
from mesh.model import ClientValidation, ListenerTls, UpstreamTls
from mesh.peer import Peer

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: forward secrecy and AEAD, nothing else. TLS 1.3 has no other suites."""

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

TlsStream = ssl.SSLSocket | ssl.SSLObject


class TlsObject(ssl.SSLObject):
    """What `wrap_bio` of our server contexts gives: it remembers which name the client asked for."""

    asked_name: str = ""
    """SNI, lower-case; empty when the client sent none."""


class TlsSocket(ssl.SSLSocket):
    """As `TlsObject`, for blocking sockets."""

    asked_name: str = ""


def server_context(tls: ListenerTls, identity: IdentitySource, now: float | None = None) -> ssl.SSLContext:
    """The context that a listener accepts with; make a new one when `tls` or the identity changes.

    Raises `IdentityError`: nothing to serve, a certificate or key that cannot be used, roots that hold no CA, or an SVID (or every other
    certificate) that has expired at `now` (wall clock, seconds; default: the present). Of several, those that have expired are left out.

    `insecure_fallback` asks for a certificate and takes any, or none. Nobody is identified on such a listener.
    """
    pairs = _served(tls, identity, time.time() if now is None else now)
    contexts = [_one_server_context(tls, identity, chain, key) for chain, key in pairs]
    first = contexts[0]
    first.sslobject_class = TlsObject
    first.sslsocket_class = TlsSocket
    first.sni_callback = _Chooser(pairs, contexts)
    return first


def _served(tls: ListenerTls, identity: IdentitySource, now: float) -> list[tuple[bytes, bytes]]:
    pairs = [pair for pair in tls.certificates if now <= leaf_end(pair[0])]
    if tls.certificates and not pairs and not tls.svid:
        raise IdentityError("expired", "every certificate of the listener has expired; put new ones into its Secrets")
    if tls.svid:
        own = identity.current
        expired = expiry_problem(own, now)
        if expired:
            raise IdentityError("expired" if own.chain else "no_identity", expired)
        pairs.insert(0, (own.chain, own.key))
    if not pairs:
        raise IdentityError("no_certificate", "the listener has no certificate to serve; name one in tls.certificateRefs")
    return pairs


def _one_server_context(tls: ListenerTls, identity: IdentitySource, chain: bytes, key: bytes) -> ssl.SSLContext:
    context = _hardened(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[tls.min_version]
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    if tls.alpn:
        context.set_alpn_protocols(list(tls.alpn))
    _load_pair(context, chain, key, "the listener's certificate")
    client = tls.client
    if client is not None and client.mode == "insecure_fallback":
        ask_for_any_certificate(context)
    elif client is not None:
        own = client.source != "roots"
        if own and not identity.current.bundle:
            raise IdentityError("no_identity", f"clients are to be checked by the trust bundle: {MISSING}")
        _trust(context, identity.current.bundle if own else client.roots, "the client's CAs")
        context.verify_mode = ssl.CERT_REQUIRED if client.mode == "require" else ssl.CERT_OPTIONAL
    # A resumed session would carry an identity that nobody verified again; and its memory adds up.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    switch_off_session_cache(context)
    return context


class _Chooser:
    """Picks the context of the certificate that the client's SNI names, and remembers the name."""

    __slots__ = ("_exact", "_wildcard")

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]], contexts: Sequence[ssl.SSLContext]) -> None:
        self._exact: dict[str, ssl.SSLContext] = {}
        self._wildcard: dict[str, ssl.SSLContext] = {}
        for (chain, _), context in zip(pairs, contexts, strict=True):
            for name in leaf_names(chain):
                if name.startswith("*."):
                    self._wildcard.setdefault(name[1:], context)
                else:
                    self._exact.setdefault(name, context)

    def __call__(self, stream: TlsStream, name: str | None, context: ssl.SSLContext) -> None:
        if name is None:
            return
        asked = name.lower().rstrip(".")
        if isinstance(stream, TlsObject | TlsSocket):
            stream.asked_name = asked
        chosen = self._exact.get(asked)
        if chosen is None:
            _, dot, rest = asked.partition(".")
            chosen = self._wildcard.get(dot + rest)
        if chosen is not None and chosen is not context:
            stream.context = chosen


def client_context(
    tls: UpstreamTls,
    identity: IdentitySource,
    alpn: Sequence[str] = ("h2", "http/1.1"),
    now: float | None = None,
    certificate: tuple[bytes, bytes] | None = None,
) -> ssl.SSLContext:
    """The context to reach a cluster with; pass `server_name(tls)` as `server_hostname` when wrapping.

    `certificate` (chain and key, PEM) is shown where the SVID is not. The handshake verifies the chain; who the peer is must be asked of
    `verify_upstream` after it. Raises `IdentityError` as `server_context` does.
    """
    context = _hardened(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if alpn:
        context.set_alpn_protocols(list(alpn))
    own = identity.current
    if tls.mode == "mesh" or tls.present_svid:
        expired = expiry_problem(own, time.time() if now is None else now)
        if expired:
            raise IdentityError("expired" if own.chain else "no_identity", expired)
        _load_pair(context, own.chain, own.key, f"the certificate of {own.spiffe_id}")
    elif certificate is not None:
        _load_pair(context, *certificate, "the gateway's client certificate")
    if tls.mode == "mesh":
        _trust(context, own.bundle, "the trust bundle")
    elif tls.roots:
        _trust(context, tls.roots, "the upstream's CAs")
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    # With SANs of its own the policy says what to look for; the name sent may then be another than the one shown.
    if tls.mode == "validate" and not tls.sans and tls.hostname and tls.sni in {"", tls.hostname}:
        context.check_hostname = True
    return context


def server_name(tls: UpstreamTls) -> str | None:
    """The name to send as SNI, or None for none."""
    return tls.sni or tls.hostname or None


def _hardened(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(CIPHERS)
    return context


def _trust(context: ssl.SSLContext, pem: bytes, what: str) -> None:
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "ignore"))  # comments may be of any script
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise IdentityError("bad_bundle", f"{what}: no CA certificate that can be read; PEM is expected ({reason})") from None
    if not context.cert_store_stats()["x509_ca"]:
        raise IdentityError("bad_bundle", f"{what}: none of the certificates is a CA's")
    # A bundle may hold intermediate CAs: each is trusted by itself (SPIFFE Trust Domain and Bundle, section 4).
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _load_pair(context: ssl.SSLContext, chain: bytes, key: bytes, what: str) -> None:
    def no_passphrase() -> str:
        raise IdentityError("bad_pem", f"{what}: the key is encrypted; store it unencrypted")

    with _secret_file(chain.rstrip() + b"\n" + key) as path:
        try:
            context.load_cert_chain(path, password=no_passphrase)
        except ssl.SSLError as error:
            reason = "key_mismatch" if error.reason == "KEY_VALUES_MISMATCH" else "bad_pem"
            raise IdentityError(reason, f"{what}: certificate and key cannot be used together ({error.reason or error})") from None


@contextlib.contextmanager
def _secret_file(data: bytes) -> Iterator[str]:
    """A path from which OpenSSL can read `data`, that nobody else can read and that leaves nothing behind."""
    descriptor = os.memfd_create("tollhouse-identity", os.MFD_CLOEXEC) if hasattr(os, "memfd_create") else -1
    try:
        if descriptor >= 0 and os.access(f"/proc/self/fd/{descriptor}", os.R_OK):
            with open(descriptor, "wb", closefd=False) as memory:
                memory.write(data)
            yield f"/proc/self/fd/{descriptor}"
            return
        with tempfile.NamedTemporaryFile() as file:  # mode 0600; where /proc is not mounted
            Path(file.name).write_bytes(data)
            yield file.name
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def peer_of(
    stream: TlsStream | None,
    validation: ClientValidation | None,
    remote: tuple[str, int],
    local: tuple[str, int],
    trust_domains: Collection[str] = (),
    now: float | None = None,
) -> Peer | IdentityProblem:
    """Who is at the other end of an accepted connection, once its handshake is done; `stream` is None for plaintext.

    `principal` is set for X.509-SVIDs of the trust bundle alone. With `source: roots` any certificate that the handshake verified is good
    and described (`subject`, `dns_names`, `certificate_hash`), but a CA outside the mesh can give nobody a SPIFFE ID.
    `trust_domains` are the mesh's own and its aliases; when empty, any trust domain that the bundle vouches for.
    """
    if stream is None:
        return Peer(address=remote[0], port=remote[1], local_address=local[0], local_port=local[1])
    if validation is None or validation.mode == "insecure_fallback":
        return _peer(stream, remote, local, None, None)
    der = stream.getpeercert(True)
    if der is None:
        if validation.mode == "require":
            return IdentityProblem("no_certificate", "the client showed no certificate, and this listener requires one")
        return _peer(stream, remote, local, None, None)
    facts = facts_of(der)
    if isinstance(facts, IdentityProblem):
        return facts
    if stream.session_reused and not SESSION_CACHE_OFF:
        return IdentityProblem("resumed", "the session was resumed, and its certificate was not verified again")
    problem = time_problem(facts, time.time() if now is None else now)
    if problem is not None:
        return problem
    if validation.source == "roots":
        if facts.authority:
            return IdentityProblem("authority_as_leaf", f"the certificate {facts.serial} is a CA's and cannot stand for a client")
        return _peer(stream, remote, local, facts, None)
    found = spiffe_id_of(facts)
    if isinstance(found, IdentityProblem):
        return found
    if trust_domains and found.trust_domain not in trust_domains:
        return IdentityProblem("foreign_trust_domain", f"{found} is not of this mesh's trust domain")
    return _peer(stream, remote, local, facts, found)


def _peer(stream: TlsStream, remote: tuple[str, int], local: tuple[str, int], facts: Facts | None, spiffe_id: SpiffeId | None) -> Peer:
    cipher = stream.cipher()
    return Peer(
        principal=str(spiffe_id) if spiffe_id else "",
        trust_domain=spiffe_id.trust_domain if spiffe_id else "",
        address=remote[0],
        port=remote[1],
        local_address=local[0],
        local_port=local[1],
        tls_version=stream.version() or "",
        cipher=cipher[0] if cipher else "",
        sni=getattr(stream, "asked_name", ""),
        alpn=stream.selected_alpn_protocol() or "",
        subject=facts.subject if facts else "",
        certificate_hash=facts.digest if facts else "",
        dns_names=facts.dns_names if facts else (),
        serial=facts.serial if facts else "",
        not_after=facts.not_after if facts else 0.0,
    )


def verify_upstream(
    stream: TlsStream,
    tls: UpstreamTls,
    endpoint_identities: Collection[str] = (),
    now: float | None = None,
) -> str | IdentityProblem:
    """What the upstream proved after the handshake: its SPIFFE ID, or the name that its certificate is for; or why it proved nothing.

    Under `mesh` it must show exactly one of `endpoint_identities`: with none to expect, nobody is the right one.
    """
    der = stream.getpeercert(True)
    if der is None:
        return IdentityProblem("no_certificate", "the upstream showed no certificate")
    facts = facts_of(der)
    if isinstance(facts, IdentityProblem):
        return facts
    problem = time_problem(facts, time.time() if now is None else now)
    if problem is not None:
        return problem
    if tls.mode == "validate":
        return _proven_name(facts, tls)
    found = spiffe_id_of(facts)
    if isinstance(found, IdentityProblem):
        return found
    name = str(found)
    if name not in endpoint_identities:
        expected = ", ".join(sorted(endpoint_identities)[:3]) or "none: give the service a ServiceIdentity"
        return IdentityProblem("wrong_identity", f"the upstream is {name}; expected {expected}")
    return name


def _proven_name(facts: Facts, tls: UpstreamTls) -> str | IdentityProblem:
    wanted = tls.sans or ((("DNS", tls.hostname),) if tls.hostname else ())
    for kind, value in wanted:
        if kind == "URI" and value in facts.uris:
            return value
        if kind == "DNS" and (value in facts.ip_addresses or any(_covers(pattern, value) for pattern in facts.dns_names)):
            return value
    shown = ", ".join((*facts.dns_names, *facts.uris, *facts.ip_addresses)[:5]) or "no name at all"
    sought = ", ".join(value for _, value in wanted) or "none: set validation.hostname"
    return IdentityProblem("wrong_name", f"the upstream's certificate is for {shown}; expected {sought}")


def _covers(pattern: str, name: str) -> bool:
    """RFC 6125 section 6.4: a wildcard stands for the whole left-most label and for no more than one."""
    pattern, name = pattern.lower().rstrip("."), name.lower().rstrip(".")
    if pattern.startswith("*."):
        label, dot, rest = name.partition(".")
        return bool(label and dot) and "." in rest and pattern[2:] == rest
    return pattern == name


_BY_REASON: Mapping[str, str] = {
    "HTTP_REQUEST": "plain_http",
    "HTTPS_PROXY_REQUEST": "plain_http",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "not_tls",
    "PACKET_LENGTH_TOO_LONG": "not_tls",
    "RECORD_TOO_SMALL": "bad_record",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
    "UNSUPPORTED_PROTOCOL": "protocol_version",
    "VERSION_TOO_LOW": "protocol_version",
    "TLSV1_ALERT_PROTOCOL_VERSION": "protocol_version",
    "NO_SHARED_CIPHER": "no_shared_cipher",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "no_shared_cipher",
    "NO_SHARED_SIGNATURE_ALGORITHMS": "no_shared_cipher",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "no_shared_cipher",
    "UNEXPECTED_EOF_WHILE_READING": "closed",
    "EOF_OCCURRED_IN_VIOLATION_OF_PROTOCOL": "closed",
    "NO_RENEGOTIATION": "renegotiation",
    "TLSV1_ALERT_UNKNOWN_CA": "refused_by_peer_unknown_ca",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "refused_by_peer_unknown_ca",
    "SSLV3_ALERT_BAD_CERTIFICATE": "refused_by_peer_bad_certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "refused_by_peer_bad_certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "refused_by_peer_expired",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "refused_by_peer_no_certificate",
}
"""OpenSSL's reason to ours; `refused_by_peer_...` is what the other end's alert says about our certificate."""

_BY_VERIFY_CODE: Mapping[int, str] = {
    9: "not_yet_valid",
    10: "expired",
    2: "unknown_ca",
    7: "unknown_ca",
    18: "unknown_ca",
    19: "unknown_ca",
    20: "unknown_ca",
    21: "unknown_ca",
    27: "unknown_ca",
    24: "bad_certificate",
    26: "bad_purpose",
    62: "wrong_name",
    64: "wrong_name",
}
"""X509_V_ERR_... to ours."""


def handshake_problem(error: BaseException) -> str:
    """A stable snake_case word for why a handshake failed: a label of the metric, and the word in the log."""
    if isinstance(error, IdentityError):
        return error.reason
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ssl.SSLCertVerificationError):
        return _BY_VERIFY_CODE.get(error.verify_code, "bad_certificate")
    if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError):
        return "closed"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").replace(" ", "_").upper()
        known = _BY_REASON.get(reason)
        if known is None and "ALERT" in reason:
            return "refused_by_peer"
        return known or "bad_record"
    if isinstance(error, ConnectionError | EOFError):
        return "closed"
    return "other"

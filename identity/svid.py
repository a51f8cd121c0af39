"""X.509-SVIDs: what a certificate says, and which rules of the X509-SVID specification (sections 2 to 5) it keeps.

One `Facts` is read from one DER certificate and remembered, because the same peers reconnect with the same certificates. Chains
are verified by OpenSSL during the handshake; here is what OpenSSL does not look at.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from datetime import datetime

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import NameOID

from identity.problems import IdentityError, IdentityProblem
from identity.spiffe import SpiffeId

REMEMBERED = 2048
"""Certificates whose facts are kept, some 3 kB each."""


class Facts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one certificate says."""

    uris: tuple[str, ...]
    dns_names: tuple[str, ...]
    ip_addresses: tuple[str, ...]
    subject: str
    serial: str
    """Lower-case hex."""
    digest: str
    """SHA-256 of the DER, lower-case hex."""
    not_before: float
    not_after: float
    authority: bool
    """True for a certificate that may sign others: never a peer's."""
    signs: bool
    """True when its key usage lets it sign (or names none)."""
    common_name: str = ""
    """Of the subject: says nothing in the mesh, and is the user to an etcd that goes by certificates."""


@functools.lru_cache(maxsize=REMEMBERED)
def facts_of(der: bytes) -> Facts | IdentityProblem:
    """What the certificate `der` says, or that it cannot be read."""
    try:
        return _facts(x509.load_der_x509_certificate(der), der)
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        return IdentityProblem("bad_certificate", f"the certificate cannot be read: {error}")


def _facts(certificate: x509.Certificate, der: bytes) -> Facts:
    uris: tuple[str, ...] = ()
    dns_names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    authority = False
    signs = True
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            uris = tuple(value.get_values_for_type(x509.UniformResourceIdentifier))
            dns_names = tuple(value.get_values_for_type(x509.DNSName))
            addresses = tuple(str(address) for address in value.get_values_for_type(x509.IPAddress))
        elif isinstance(value, x509.BasicConstraints):
            authority = authority or value.ca
        elif isinstance(value, x509.KeyUsage):
            authority = authority or value.key_cert_sign or value.crl_sign
            signs = value.digital_signature
    return Facts(
        uris=uris,
        dns_names=dns_names,
        common_name=next((str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)), ""),
        ip_addresses=addresses,
        subject=certificate.subject.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        digest=hashlib.sha256(der).hexdigest(),
        not_before=_seconds(certificate.not_valid_before_utc),
        not_after=_seconds(certificate.not_valid_after_utc),
        authority=authority,
        signs=signs,
    )


def _seconds(moment: datetime) -> float:
    return moment.timestamp()


def spiffe_id_of(facts: Facts) -> SpiffeId | IdentityProblem:
    """The SPIFFE ID of a leaf certificate: exactly one URI SAN, of a workload, in a certificate that signs no others."""
    if facts.authority:
        return IdentityProblem("authority_as_leaf", f"the certificate {facts.serial} is a CA's and cannot stand for a workload")
    if not facts.uris:
        return IdentityProblem("no_spiffe_id", f"the certificate {facts.serial} has no URI SAN, so it names no SPIFFE ID")
    if len(facts.uris) > 1:
        return IdentityProblem("two_uris", f"the certificate {facts.serial} has {len(facts.uris)} URI SANs; an SVID has exactly one")
    try:
        found = SpiffeId.parse(facts.uris[0])
    except IdentityError as error:
        return IdentityProblem(error.reason, f"the certificate {facts.serial}: {error}")
    if not found.path:
        return IdentityProblem("bad_spiffe_id", f"the certificate {facts.serial} names the trust domain {found}, not a workload in it")
    if not facts.signs:
        return IdentityProblem("bad_key_usage", f"the certificate {facts.serial} lacks the key usage digitalSignature")
    return found


def time_problem(facts: Facts, now: float) -> IdentityProblem | None:
    """Whether the certificate is outside its validity at `now` (wall clock, seconds since the epoch)."""
    if now > facts.not_after:
        return IdentityProblem("expired", f"the certificate {facts.serial} expired {now - facts.not_after:.0f} s ago")
    if now < facts.not_before:
        return IdentityProblem("not_yet_valid", f"the certificate {facts.serial} becomes valid in {facts.not_before - now:.0f} s")
    return None


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Our own certificate with its key, and the CAs that we trust. Its key is in no text that is made of it."""

    spiffe_id: str
    chain: bytes
    """PEM, the leaf first."""
    key: bytes
    """PEM, unencrypted. Secret."""
    bundle: bytes
    """PEM of the trusted CAs."""
    not_before: float
    """Wall clock, seconds since the epoch."""
    not_after: float
    dns_names: tuple[str, ...] = ()
    serial: str = ""

    def __repr__(self) -> str:
        return f"<Identity {self.spiffe_id} serial {self.serial} until {self.not_after:.0f}>"

    @property
    def trust_domain(self) -> str:
        """The trust domain of `spiffe_id`."""
        return SpiffeId.parse(self.spiffe_id).trust_domain

    def expired(self, now: float) -> bool:
        """Whether it may not be served any more at `now` (wall clock, seconds since the epoch)."""
        return now > self.not_after


def identity_from_pem(chain: bytes, key: bytes, bundle: bytes, *, now: float, where: str = "the identity") -> Identity:
    """Checks that the three belong together and can be served at `now`.

    Raises `IdentityError` with `where` in its message: unreadable PEM, a key of another certificate, not exactly one SPIFFE ID, outside
    its validity, a CA as leaf, or an issuer that the bundle does not know.
    """
    certificates = _certificates(chain, f"{where}: cert.pem")
    authorities = _certificates(bundle, f"{where}: ca.pem")
    leaf = certificates[0]
    if _key(key, f"{where}: key.pem").public_key() != leaf.public_key():
        raise IdentityError("key_mismatch", f"{where}: key.pem is not the key of the first certificate in cert.pem")
    facts = facts_of(leaf.public_bytes(serialization.Encoding.DER))
    if isinstance(facts, IdentityProblem):
        raise IdentityError(facts.reason, f"{where}: cert.pem: {facts}")
    found = spiffe_id_of(facts)
    problem = found if isinstance(found, IdentityProblem) else time_problem(facts, now)
    if problem is not None:
        raise IdentityError(problem.reason, f"{where}: cert.pem: {problem}")
    for authority in authorities:
        if not _is_authority(authority):
            subject = authority.subject.rfc4514_string()
            raise IdentityError("bad_bundle", f"{where}: ca.pem: {subject!r} is not a CA certificate; only CAs belong in a trust bundle")
    if not _leads_to(leaf, certificates[1:], authorities):
        raise IdentityError("unknown_ca", f"{where}: cert.pem is not issued by any CA in ca.pem; issue it again, or add its CA there")
    return Identity(
        spiffe_id=str(found),
        chain=chain,
        key=key,
        bundle=bundle,
        not_before=facts.not_before,
        not_after=facts.not_after,
        dns_names=facts.dns_names,
        serial=facts.serial,
    )


def _certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise IdentityError("bad_pem", f"{where} holds no certificate that can be read; PEM is expected ({error})") from None
    if not found:
        raise IdentityError("bad_pem", f"{where} holds no certificate; PEM is expected")
    return found


def _key(pem: bytes, where: str) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise IdentityError("bad_pem", f"{where} is encrypted; store it unencrypted, readable by its owner alone") from None
    except ValueError:
        raise IdentityError("bad_pem", f"{where} holds no private key that can be read; PEM is expected") from None


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _leads_to(leaf: x509.Certificate, between: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Whether the chain ends at a CA of the bundle. A check for people's mistakes: peers verify it in full."""
    current = leaf
    for following in between:
        if any(_issued(current, authority) for authority in authorities):
            return True
        if not _issued(current, following):
            return False
        current = following
    return any(_issued(current, authority) for authority in authorities)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # cryptography raises ValueError, TypeError or InvalidSignature: all mean no
        return False
    return True


def facts_of_pem(chain: bytes, where: str = "the certificate") -> Facts:
    """What a PEM chain's first certificate says, in force or not. Raises `IdentityError` when it cannot be read."""
    leaf = _certificates(chain, where)[0]
    facts = facts_of(leaf.public_bytes(serialization.Encoding.DER))
    if isinstance(facts, IdentityProblem):
        raise IdentityError(facts.reason, f"{where}: {facts}")
    return facts


def leaf_names(chain: bytes) -> tuple[str, ...]:
    """The DNS names of a PEM chain's first certificate, lower-case; none when it cannot be read."""
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, IndexError):
        return ()
    facts = facts_of(leaf.public_bytes(serialization.Encoding.DER))
    return () if isinstance(facts, IdentityProblem) else tuple(name.lower() for name in facts.dns_names)


@functools.lru_cache(maxsize=REMEMBERED)
def leaf_end(chain: bytes) -> float:
    """When a PEM chain's first certificate ends (wall clock, seconds); infinite when it cannot be read."""
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, IndexError):
        return float("inf")
    return leaf.not_valid_after_utc.timestamp()

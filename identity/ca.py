"""A small certificate authority for X.509-SVIDs (SPIFFE X509-SVID specification, sections 2 to 4; RFC 5280).

Its directory holds `ca.key` (mode 0600), `ca.pem` (its own certificate), and `bundle.pem`: every root that the mesh trusts. Roots are
rotated by putting the new one into the bundle, letting that reach everybody, issuing from it, and taking the old one out once nothing
it signed is valid any more.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from identity.files import CA, CERT, KEY
from identity.problems import IdentityError
from identity.spiffe import SpiffeId, check_trust_domain
from identity.svid import Identity, identity_from_pem

CA_KEY, CA_CERT, CA_BUNDLE = "ca.key", "ca.pem", "bundle.pem"

BACKDATED = 60.0
"""Seconds before now that a certificate begins: peers' clocks differ."""

DAY = 86400.0
ROOT_LIFETIME = 3650 * DAY
LEAF_LIFETIME = DAY
MIN_LIFETIME = 60.0

PublicKey = ec.EllipticCurvePublicKey


class Authority:
    """One signing key with its certificate, and the roots that the mesh trusts."""

    __slots__ = ("_certificate", "_key", "bundle", "trust_domain")

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, bundle: bytes) -> None:
        self._certificate = certificate
        self._key = key
        self.bundle = bundle
        """PEM of every root that the mesh trusts; this authority's own among them."""
        self.trust_domain = _trust_domain_of(certificate)

    def __repr__(self) -> str:
        return f"<Authority {self.trust_domain} until {self.not_after:.0f}>"

    @property
    def certificate(self) -> bytes:
        """PEM of its own certificate."""
        return _pem(self._certificate)

    @property
    def not_after(self) -> float:
        """When its certificate ends: wall clock, seconds since the epoch."""
        return self._certificate.not_valid_after_utc.timestamp()

    @classmethod
    def create(cls, trust_domain: str, lifetime: float = ROOT_LIFETIME, now: float | None = None) -> Authority:
        """A new root in memory. `lifetime` in seconds. Raises `IdentityError` for a bad trust domain."""
        check_trust_domain(trust_domain)
        _check_lifetime(lifetime)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tollhouse CA")])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key(), lifetime, time.time() if now is None else now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key, _pem(certificate))

    @classmethod
    def init(cls, directory: str | Path, trust_domain: str, lifetime: float = ROOT_LIFETIME) -> Authority:
        """A new root in `directory`. Raises `IdentityError` when there is one already: a lost root cannot be brought back."""
        directory = Path(directory)
        if (directory / CA_KEY).exists():
            raise IdentityError("exists", f"{directory / CA_KEY} is there already; name another directory to begin another CA")
        made = cls.create(trust_domain, lifetime)
        made.save(directory)
        return made

    def save(self, directory: Path) -> None:
        """Writes its three files, each atomically. Raises `IdentityError` when it cannot."""
        _make_directory(directory)
        write_atomically(directory / CA_KEY, _key_pem(self._key), 0o600)
        write_atomically(directory / CA_CERT, self.certificate, 0o644)
        write_atomically(directory / CA_BUNDLE, self.bundle, 0o644)

    @classmethod
    def load(cls, directory: str | Path) -> Authority:
        """The authority in `directory`. Raises `IdentityError`: not there, unreadable, exposed, or files that do not belong together."""
        directory = Path(directory)
        path = directory / CA_KEY
        try:
            if path.stat().st_mode & 0o077:
                raise IdentityError("key_exposed", f"{path} can be read by others; run: chmod 600 {path}")
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((directory / CA_CERT).read_bytes())
            bundle = (directory / CA_BUNDLE).read_bytes()
            x509.load_pem_x509_certificates(bundle)
        except FileNotFoundError as error:
            raise IdentityError("unreadable", f"{error.filename} is not there; run `tollhouse ca init` to make a CA") from None
        except OSError as error:
            raise IdentityError("unreadable", f"{error.filename} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError):
            raise IdentityError("bad_pem", f"{directory} holds a key, certificate or bundle that cannot be read; PEM is expected") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise IdentityError("key_mismatch", f"{path} is not the key of {directory / CA_CERT}")
        return cls(certificate, key, bundle)

    def trusting(self, *roots: bytes) -> Authority:
        """The same authority with more roots (PEM) in its bundle: how a rotation begins. Each root is there once."""
        seen: dict[bytes, None] = {}
        try:
            for certificate in x509.load_pem_x509_certificates(self.bundle + b"\n" + b"\n".join(roots)):
                seen[_pem(certificate)] = None
        except ValueError as error:
            raise IdentityError("bad_bundle", f"a root to trust cannot be read; PEM is expected ({error})") from None
        return Authority(self._certificate, self._key, b"".join(seen))

    def issue(
        self,
        spiffe_id: SpiffeId | str,
        dns: Sequence[str] = (),
        ip: Sequence[str] = (),
        lifetime: float = LEAF_LIFETIME,
        now: float | None = None,
        common_name: str = "",
    ) -> Identity:
        """A new key and its certificate. `lifetime` in seconds, cut to this authority's own. `common_name`: who it is to servers that know
        nothing of SPIFFE (an etcd with `--client-cert-auth`).

        Raises `IdentityError` for an ID that is not of a workload of this trust domain, or a bad name or address.
        """
        now = time.time() if now is None else now
        key = ec.generate_private_key(ec.SECP256R1())
        chain = self._sign(key.public_key(), spiffe_id, dns, ip, lifetime, now, common_name)
        return identity_from_pem(chain, _key_pem(key), self.bundle, now=now, where="the new certificate")

    def sign(
        self,
        request: bytes,
        spiffe_id: SpiffeId | str,
        dns: Sequence[str] = (),
        ip: Sequence[str] = (),
        lifetime: float = LEAF_LIFETIME,
        now: float | None = None,
    ) -> bytes:
        """The PEM certificate for the key of a certificate request (PEM).

        Who it is for is the caller's to say, after authenticating the one who asks: nothing but the key is taken from `request`.
        Raises `IdentityError` as `issue`, and for a request that does not prove its key or has one that is not P-256 or P-384.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            proven = asked.is_signature_valid
        except ValueError as error:
            raise IdentityError("bad_request", f"the certificate request cannot be read: {error}") from None
        key = asked.public_key()
        if not proven:
            raise IdentityError("bad_request", "the certificate request is not signed by the key that it holds")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            raise IdentityError("bad_request", "the certificate request's key must be ECDSA P-256 or P-384")
        return self._sign(key, spiffe_id, dns, ip, lifetime, time.time() if now is None else now)

    def _sign(
        self,
        key: PublicKey,
        spiffe_id: SpiffeId | str,
        dns: Sequence[str],
        ip: Sequence[str],
        lifetime: float,
        now: float,
        common_name: str = "",
    ) -> bytes:
        wanted = SpiffeId.parse(str(spiffe_id))
        if not wanted.path or wanted.trust_domain != self.trust_domain:
            raise IdentityError("bad_spiffe_id", f"{wanted} is not a workload of this CA's trust domain, {self.trust_domain}")
        _check_lifetime(lifetime)
        if now >= self.not_after:
            raise IdentityError("expired", f"the CA of {self.trust_domain} has expired; begin a new root and rotate to it")
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(wanted))]
        try:
            names += [x509.DNSName(name.encode("idna").decode()) for name in dns]
            names += [x509.IPAddress(ipaddress.ip_address(address)) for address in ip]
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
        except ValueError as error:
            raise IdentityError("bad_name", f"a name or address for {wanted} is not one: {error}") from None
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            # The SAN is critical where the subject is empty (RFC 5280 section 4.2.1.6).
            _builder(subject, self._certificate.subject, key, min(lifetime, self.not_after - now), now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=not common_name)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate)


def write_identity(identity: Identity, directory: str | Path) -> None:
    """Writes {cert,key,ca}.pem, each atomically, the key with mode 0600 and first: a reader that sees a mixture keeps what it has."""
    directory = Path(directory)
    _make_directory(directory)
    write_atomically(directory / KEY, identity.key, 0o600)
    write_atomically(directory / CERT, identity.chain, 0o644)
    write_atomically(directory / CA, identity.bundle, 0o644)


def write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Replaces `path` by `data` in one step; readers see the old file or the new one. Raises `IdentityError` when it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask says
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise IdentityError("unwritable", f"{path} cannot be written: {error.strerror or error}") from None


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError("unwritable", f"{directory} cannot be made: {error.strerror or error}") from None


def _builder(subject: x509.Name, issuer: x509.Name, key: PublicKey, lifetime: float, now: float) -> x509.CertificateBuilder:
    begin = datetime.fromtimestamp(now, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - timedelta(seconds=BACKDATED))
        .not_valid_after(begin + timedelta(seconds=lifetime))
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check_lifetime(lifetime: float) -> None:
    if not MIN_LIFETIME <= lifetime <= 100 * 365 * DAY:
        raise IdentityError("bad_lifetime", f"a certificate of {lifetime:g} s cannot be issued; at least {MIN_LIFETIME:g} s are needed")


def _trust_domain_of(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise IdentityError("bad_bundle", "the CA's certificate names no trust domain (a URI SAN spiffe://<trust domain>)") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise IdentityError("bad_bundle", "the CA's certificate must name exactly one trust domain (a URI SAN)")
    return SpiffeId.parse(uris[0]).trust_domain


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

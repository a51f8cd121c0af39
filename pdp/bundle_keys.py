"""Keys of signed OPA bundles (openpolicyagent.org, "Bundle Signature"): what signs them, and what a signature is checked with.

Which algorithm belongs to a key is said here, by the key or by whoever names it, and never by the token that is checked.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate

ALGORITHMS: Final = tuple(f"{family}{bits}" for family in ("RS", "PS", "ES", "HS") for bits in (256, 384, 512))
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_LEAST_SECRET: Final = 32
"""Bytes of a shared secret (RFC 7518, section 3.2: as long as the hash)."""
_LEAST_RSA: Final = 2048


class KeyProblem(ValueError):
    """A key that can't be used; the message says why, and what to do."""


class BundleKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key, for signing or for checking."""

    id: str
    text: str
    """PEM, or the shared secret itself."""
    algorithm: str
    """`RS256`, `ES256`, `HS256`, ..."""
    scope: str = ""
    """What the signature must be made for; empty for a signature without a scope."""

    @property
    def name(self) -> str:
        """Tells a key and its scope apart from others without showing anything of it."""
        told = "\0".join((self.id, self.algorithm, self.scope, self.text))
        return hashlib.sha256(b"tollhouse bundle key\0" + told.encode()).hexdigest()[:12]


def signing_key(path: Path, *, key_id: str = "default", algorithm: str = "", scope: str = "") -> BundleKey:
    """The private key (PEM) or shared secret in a file that only its owner can read. Raises `KeyProblem`."""
    text = secret_in(path)
    if _is_pem(text):
        try:
            key: Any = load_pem_private_key(text.encode(), None)
        except (ValueError, TypeError) as problem:
            raise KeyProblem(f"{path} holds no private key that can be read without a password: {problem}") from None
        fitting = _algorithms(key)
    else:
        fitting = _secret_algorithms(text, path)
    return BundleKey(id=key_id, text=text, algorithm=_chosen(algorithm, fitting, path), scope=scope)


def checking_key(path: Path, *, key_id: str = "default", algorithm: str = "", scope: str = "") -> BundleKey:
    """The public key or certificate (PEM), or the shared secret, in a file. A secret must be readable by its owner alone, and a private key
    is not taken: who only checks should not be able to sign. Raises `KeyProblem`."""
    text = _read(path)
    if not _is_pem(text):
        text = secret_in(path)
        return BundleKey(id=key_id, text=text, algorithm=_chosen(algorithm, _secret_algorithms(text, path), path), scope=scope)
    try:
        encoded = text.encode()
        key: Any = load_pem_x509_certificate(encoded).public_key() if "BEGIN CERTIFICATE" in text else load_pem_public_key(encoded)
    except ValueError:
        hint = "; it is a private one" if "PRIVATE KEY" in text else ""
        raise KeyProblem(f"{path} holds no public key or certificate in PEM{hint}") from None
    return BundleKey(id=key_id, text=text, algorithm=_chosen(algorithm, _algorithms(key), path), scope=scope)


def secret_in(path: Path) -> str:
    """The text of a file that nobody but its owner may read, without the line's end. Raises `KeyProblem`."""
    text = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise KeyProblem(f"{path} can be read or written by others (mode {mode:o}): chmod 600 {path}")
    return text if _is_pem(text) else text.rstrip("\r\n")


def _read(path: Path) -> str:
    try:
        text = path.read_text()
    except OSError as problem:
        raise KeyProblem(f"{path} can't be read: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise KeyProblem(f"{path} is not text: a key is PEM, or a secret in a line") from None
    if not text.strip():
        raise KeyProblem(f"{path} is empty")
    return text


def _is_pem(text: str) -> bool:
    return text.lstrip().startswith("-----BEGIN ")


def _algorithms(key: Any) -> tuple[str, ...]:
    """Those that a key is for, the usual one first."""
    if isinstance(key, (rsa.RSAPrivateKey, rsa.RSAPublicKey)) and key.key_size >= _LEAST_RSA:
        return tuple(f"{family}{bits}" for family in ("RS", "PS") for bits in (256, 384, 512))
    if isinstance(key, (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)) and key.curve.name in _CURVES:
        return (_CURVES[key.curve.name],)
    return ()


def _secret_algorithms(text: str, path: Path) -> tuple[str, ...]:
    if len(text.encode()) < _LEAST_SECRET:
        raise KeyProblem(f"the secret in {path} is too short: it needs {_LEAST_SECRET} bytes at least (openssl rand -hex 32)")
    return ("HS256", "HS384", "HS512")


def _chosen(wanted: str, fitting: tuple[str, ...], path: Path) -> str:
    if not fitting:
        raise KeyProblem(f"{path}: bundles are signed with RSA (2048 bits at least), ECDSA (P-256, P-384, P-521) or a shared secret")
    if wanted and wanted not in fitting:
        raise KeyProblem(f"{path}: {wanted} does not go with this key; use {' or '.join(fitting)}")
    return wanted or fitting[0]

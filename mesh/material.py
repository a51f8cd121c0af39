"""Certificates and keys out of Secrets and ConfigMaps, checked before anything is built on them. Never part of a message."""

from __future__ import annotations

import base64
import datetime
import functools
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mesh.documents import Document


class Unusable(msgspec.Struct, frozen=True):
    """Why a reference does not lead to what is needed."""

    message: str
    reason: str


def authorities(document: Document | None, ref: Any) -> bytes | Unusable:
    """The CA certificates (PEM) under `ca.crt` of a ConfigMap or Secret that `ref` names."""
    kind, name = ref.get("kind") or "ConfigMap", ref["name"]
    if ref.get("group") or kind not in ("ConfigMap", "Secret"):
        return Unusable(f"{kind} {name} can't hold certificates here; use a ConfigMap or a Secret with the key ca.crt", "InvalidKind")
    if document is None:
        return Unusable(f"there is no {kind} {name}", "InvalidCACertificateRef")
    pem = _value(document, "ca.crt")
    if pem is None:
        return Unusable(f"{document.key} has no key ca.crt", "InvalidCACertificateRef")
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError:
        return Unusable(f"ca.crt of {document.key} is not a list of PEM certificates", "InvalidCACertificateRef")
    return pem if pem.endswith(b"\n") else pem + b"\n"


def certificate(document: Document | None, name: str) -> tuple[bytes, bytes] | Unusable:
    """The certificate chain and the key (PEM) of a Secret of type kubernetes.io/tls."""
    if document is None:
        return Unusable(f"there is no Secret {name}", "InvalidCertificateRef")
    if document.body.get("type") != "kubernetes.io/tls":
        return Unusable(f"{document.key} is not of type kubernetes.io/tls", "InvalidCertificateRef")
    chain, key = _value(document, "tls.crt"), _value(document, "tls.key")
    if chain is None or key is None:
        return Unusable(f"{document.key} needs the keys tls.crt and tls.key", "InvalidCertificateRef")
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        return Unusable(f"tls.crt of {document.key} is not a PEM certificate", "InvalidCertificateRef")
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError):
        return Unusable(f"tls.key of {document.key} is not an unencrypted PEM key", "InvalidCertificateRef")
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        return Unusable(f"tls.key of {document.key} is not the key of its tls.crt", "InvalidCertificateRef")
    return chain, key


def secret_key(document: Document | None, name: str, least: int) -> bytes | Unusable:
    """The bytes under `key` of a Secret, `least` of them or more."""
    if document is None:
        return Unusable(f"there is no Secret {name}", "BackendNotFound")
    key = _value(document, "key")
    if key is None or len(key) < least:
        return Unusable(f"{document.key} needs a key named key, of at least {least} bytes", "Invalid")
    return key


@functools.lru_cache(maxsize=4096)
def ends(chain: bytes) -> datetime.datetime | None:
    """When the first certificate of a chain (PEM) ends; None when it can't be read."""
    try:
        return x509.load_pem_x509_certificates(chain)[0].not_valid_after_utc
    except (ValueError, IndexError):
        return None


@functools.lru_cache(maxsize=4096)
def names(chain: bytes) -> frozenset[str]:
    """The DNS names, in lower case, that the first certificate of a chain (PEM) is for; none when it can't be read."""
    try:
        found = x509.load_pem_x509_certificates(chain)[0].extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, IndexError, x509.ExtensionNotFound):
        return frozenset()
    return frozenset(name.lower() for name in found.value.get_values_for_type(x509.DNSName))


def _value(document: Document, name: str) -> bytes | None:
    body = document.body
    for field, encoded in (("stringData", False), ("data", document.key.kind == "Secret"), ("binaryData", True)):
        value = (body.get(field) or {}).get(name)
        if isinstance(value, str):
            return base64.b64decode("".join(value.split())) if encoded else value.encode()
    return None

"""What a listener shows its clients and demands of them, and what a gateway shows its upstreams: Secrets and ConfigMaps behind references.

References into another namespace need a ReferenceGrant. Where one of several does not lead anywhere, the others count; where none does, the
listener is not served: one that can't check its clients must not let them in.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from mesh import material
from mesh.compile_world import Look, Trouble
from mesh.documents import Document, FieldPath
from mesh.kinds_gateway import (
    OPTION_CERTIFICATE,
    OPTION_MIN_VERSION,
    OPTION_VALIDATION,
    OPTION_VALIDATION_MODE,
)
from mesh.model import ClientValidation, ListenerTls


class Fault(msgspec.Struct, frozen=True):
    """Why a condition of a listener (or of a Gateway) is not as one would wish it."""

    condition: Literal["Accepted", "ResolvedRefs", "Conflicted"]
    reason: str
    message: str


class Report:
    """Gathers what is wrong with one listener, as problems of its document and as conditions of its own."""

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        self.faults: list[Fault] = []

    def add(self, condition: Literal["Accepted", "ResolvedRefs", "Conflicted"], path: FieldPath, message: str, reason: str) -> None:
        """Reports one fault at the field `path`."""
        self.trouble.add(path, message, reason)
        self.faults.append(Fault(condition, reason, message))


def listener_tls(
    gateway: Document, document: Document, body: Any, path: FieldPath, look: Look, report: Report
) -> tuple[ListenerTls | None, bool]:
    """How the listener `body` of `document` (the Gateway itself or a ListenerSet) terminates TLS, and whether it can be served.

    Without `tls.certificateRefs` and options there is nothing to show, and None is returned.
    """
    tls = body["tls"]
    options = tls.get("options") or {}
    path = (*path, "tls")
    certificates: list[tuple[bytes, bytes]] = []
    for index, ref in enumerate(tls.get("certificateRefs") or []):
        found = certificate_of(document, ref, look, "InvalidCertificateRef")
        if isinstance(found, material.Unusable):
            report.add("ResolvedRefs", (*path, "certificateRefs", index), found.message, found.reason)
        else:
            certificates.append(found)
    svid = options.get(OPTION_CERTIFICATE) == "SVID"
    client, usable = _client_validation(gateway, document, body, path, look, report)
    if not usable or not (svid or certificates):
        return None, False
    version: Literal["1.2", "1.3"] = "1.3" if options.get(OPTION_MIN_VERSION) == "1.3" else "1.2"
    return ListenerTls(svid=svid, certificates=tuple(certificates), client=client, min_version=version), True


def certificate_of(document: Document, ref: Any, look: Look, reason: str) -> tuple[bytes, bytes] | material.Unusable:
    """The pair that a reference of `document` leads to, or why to none. `reason` is the condition's for one that can't be used."""
    if (ref.get("kind") or "Secret") != "Secret" or ref.get("group"):
        what = f"{ref.get('group') or 'core'}/{ref.get('kind') or 'Secret'} {ref['name']}"
        return material.Unusable(f"{what} can't hold a certificate here; use a Secret", reason)
    namespace = ref.get("namespace") or document.key.namespace
    if not look("granted", document.key.kind, document.key.namespace, "", "Secret", namespace, ref["name"]):
        return _not_granted(document, "Secret", namespace, ref["name"])
    found = material.certificate(look("document", "Secret", namespace, ref["name"]), f"{namespace}/{ref['name']}")
    return material.Unusable(found.message, reason) if isinstance(found, material.Unusable) else found


def _not_granted(document: Document, kind: str, namespace: str, name: str) -> material.Unusable:
    return material.Unusable(
        f"{kind} {namespace}/{name} is in another namespace, which has not granted it; "
        f"apply a ReferenceGrant in {namespace} from {document.key.kind} in {document.key.namespace}",
        "RefNotPermitted",
    )


def _client_validation(
    gateway: Document, document: Document, body: Any, path: FieldPath, look: Look, report: Report
) -> tuple[ClientValidation | None, bool]:
    """What is demanded of clients, and whether it can be."""
    tls = body["tls"]
    options = tls.get("options") or {}
    if options.get(OPTION_VALIDATION) == "TrustBundle":
        optional = options.get(OPTION_VALIDATION_MODE) == "Optional"
        return ClientValidation(mode="optional" if optional else "require", source="trust_bundle"), True
    validation, where = frontend_validation(gateway, body["port"])
    owner, trouble = gateway, Trouble(gateway)
    if tls.get("frontendValidation") is not None:
        validation, where, owner, trouble = tls["frontendValidation"], (*path, "frontendValidation"), document, report.trouble
    if validation is None:
        return None, True
    roots = b""
    faults = Report(trouble)
    for index, ref in enumerate(validation["caCertificateRefs"]):
        kind = ref.get("kind") or "ConfigMap"
        namespace = ref.get("namespace") or owner.key.namespace
        found: bytes | material.Unusable
        if not look("granted", owner.key.kind, owner.key.namespace, "", kind, namespace, ref["name"]):
            found = _not_granted(owner, kind, namespace, ref["name"])
        else:
            found = material.authorities(look("document", kind, namespace, ref["name"]), ref)
        if isinstance(found, bytes):
            roots += found
        else:
            reason = "InvalidCACertificateKind" if found.reason == "InvalidKind" else found.reason
            faults.add("ResolvedRefs", (*where, "caCertificateRefs", index), found.message, reason)
    if trouble is not report.trouble:
        report.trouble.found += trouble.found
    report.faults += faults.faults
    if not roots:
        message = f"none of the CA certificates that clients would be checked by can be used: {faults.faults[0].message}"
        report.faults.append(Fault("Accepted", "NoValidCACertificate", message))
    mode: Literal["require", "insecure_fallback"] = "insecure_fallback" if validation.get("mode") == "AllowInsecureFallback" else "require"
    return ClientValidation(mode=mode, source="roots", roots=roots), bool(roots)


def frontend_validation(gateway: Document, port: int) -> tuple[Any, FieldPath]:
    """What a Gateway demands of the clients of its HTTPS listeners at `port` (`spec.tls.frontend`), and where it says so."""
    frontend = (gateway.body["spec"].get("tls") or {}).get("frontend") or {}
    for index, item in enumerate(frontend.get("perPort") or []):
        if item["port"] == port:
            return item["tls"].get("validation"), ("spec", "tls", "frontend", "perPort", index, "tls", "validation")
    return (frontend.get("default") or {}).get("validation"), ("spec", "tls", "frontend", "default", "validation")


def is_insecure(gateway: Document) -> bool:
    """Whether the Gateway lets clients in whose certificates it has not been able to verify (`AllowInsecureFallback`)."""
    frontend = (gateway.body["spec"].get("tls") or {}).get("frontend") or {}
    validations = [(frontend.get("default") or {}).get("validation")]
    validations += [item["tls"].get("validation") for item in frontend.get("perPort") or []]
    return any((each or {}).get("mode") == "AllowInsecureFallback" for each in validations)

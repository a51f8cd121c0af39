"""BackendTLSPolicies: which of them holds for a service's port, and what TLS it asks for (Gateway API, "BackendTLSPolicy").

One for a port by its name goes before one for the whole service; of two for the same, the older one holds. What should be TLS never becomes
plaintext: a policy that can't be carried out makes its service a backend that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from mesh import material
from mesh.compile_world import Name, Trouble, World, age
from mesh.documents import Document, Key, Problem
from mesh.kinds_gateway import OPTION_CLIENT_CERTIFICATE
from mesh.model import UpstreamTls


class TlsPolicy(msgspec.Struct, frozen=True):
    """A BackendTLSPolicy as it holds for one service, with what its references lead to."""

    document: Document
    section: str
    index: int
    """Of the target in `spec.targetRefs`."""
    authorities: tuple[Document | None, ...]
    bad: bool = False
    """It is wrong, and no version of it was ever right: what it is for must not be spoken to in plaintext all the same."""


def tls_policies(world: World) -> dict[Name, tuple[TlsPolicy, ...]]:
    """The policies of each service, the ones that win first."""
    found: dict[Name, list[TlsPolicy]] = {}
    for document in sorted(world.of("BackendTLSPolicy").values(), key=age):
        namespace, spec = document.key.namespace, document.body["spec"]
        refs = spec["validation"].get("caCertificateRefs") or []
        authorities = tuple(world.get(ref["kind"], namespace, ref["name"]) if not ref["group"] else None for ref in refs)
        for index, target in enumerate(spec["targetRefs"]):
            policy = TlsPolicy(document, target.get("sectionName") or "", index, authorities)
            found.setdefault((namespace, target["name"]), []).append(policy)
    for key, document in sorted(world.bad.items()):
        if key.kind == "BackendTLSPolicy":
            for index, name, section in _raw_targets(document):
                found.setdefault((key.namespace, name), []).append(TlsPolicy(document, section, index, (), True))
    return {name: tuple(policies) for name, policies in found.items()}


def _raw_targets(document: Document) -> list[tuple[int, str, str]]:
    """Targets of a policy that has not passed its check: those that can be read. With a section that can't, the whole service is meant."""
    spec = document.body.get("spec")
    refs = spec.get("targetRefs") if isinstance(spec, dict) else None
    found = []
    for index, ref in enumerate(refs if isinstance(refs, list) else []):
        name, section = (ref.get("name"), ref.get("sectionName")) if isinstance(ref, dict) else (None, None)
        if isinstance(name, str):
            found.append((index, name, section if isinstance(section, str) else ""))
    return found


def conflict(document: Document, path: tuple[str | int, ...], message: str) -> list[Problem]:
    """The problem of a document that is second to another."""
    trouble = Trouble(document)
    trouble.add(path, message, "Conflicted")
    return trouble.found


def check_policies(key: Key, policies: Sequence[TlsPolicy], ports: list[Any], meshed: bool) -> list[Problem]:
    """What is wrong with the policies of the service `key`: those that mean nothing for it, are second to another, or lead nowhere.

    `meshed`: it has a ServiceIdentity.
    """
    names = {port.get("name") or "" for port in ports}
    first: dict[str, Document] = {}
    problems: list[Problem] = []
    for policy in policies:
        if policy.bad:
            continue  # its own problems are reported already
        path = ("spec", "targetRefs", policy.index)
        if meshed:
            message = f"{key} has a ServiceIdentity and is spoken to by the mesh's own mutual TLS; delete one of the two"
            problems += conflict(policy.document, path, message)
        elif policy.section and policy.section not in names:
            trouble = Trouble(policy.document)
            trouble.add((*path, "sectionName"), f'{key} has no port named "{policy.section}"', "TargetNotFound")
            problems += trouble.found
        elif policy.section in first:
            problems += conflict(policy.document, path, f"{first[policy.section].key} already holds for the same; delete one of the two")
        first.setdefault(policy.section, policy.document)
        problems += _authorities(policy)[1]
    return list(dict.fromkeys(problems))


def _authorities(policy: TlsPolicy) -> tuple[bytes, list[Problem]]:
    """The CA certificates of a policy (PEM), and what is wrong with references to them."""
    roots = b""
    trouble = Trouble(policy.document)
    for index, ref in enumerate(policy.document.body["spec"]["validation"].get("caCertificateRefs") or []):
        found = material.authorities(policy.authorities[index], ref)
        if isinstance(found, bytes):
            roots += found
        else:
            trouble.add(("spec", "validation", "caCertificateRefs", index), found.message, found.reason)
    return roots, trouble.found


def backend_tls(policies: Sequence[TlsPolicy], port: Any) -> tuple[UpstreamTls | None, str]:
    """How TLS is spoken to a port of a service with these policies, and why it can't be if so; neither where no policy holds."""
    name = port.get("name") or ""
    policy = next((policy for policy in policies if policy.section and policy.section == name), None)
    policy = policy or next((policy for policy in policies if not policy.section), None)
    if policy is None:
        return None, ""
    if policy.bad:
        return None, f"{policy.document.key} is wrong: see its own problems"
    spec = policy.document.body["spec"]
    validation = spec["validation"]
    roots, problems = _authorities(policy)
    if problems and not roots:
        return None, f"{policy.document.key} has no certificates to check it by"
    sans: list[tuple[Literal["DNS", "URI"], str]] = []
    for item in validation.get("subjectAltNames") or []:
        sans.append(("DNS", item["hostname"]) if item["type"] == "Hostname" else ("URI", item["uri"]))
    return (
        UpstreamTls(
            mode="validate",
            sni=validation["hostname"],
            hostname=validation["hostname"],
            sans=tuple(sans),
            roots=roots,
            present_svid=(spec.get("options") or {}).get(OPTION_CLIENT_CERTIFICATE) == "SVID",
        ),
        "",
    )

"""What `tollhouse up` makes by itself, below its state directory: the certificate authority, everybody's identity, the example services.

* Each Gateway of ours gets `spiffe://<trust domain>/ns/<namespace>/sa/<name>`, also for the hostnames of its listeners.
* Each identity that a ServiceIdentity names, and each service account in a Namespace's annotation `tollhouse.dev/service-accounts`,
  gets one, too.
* Services annotated `tollhouse.dev/echo: "true"` are answered for by an echo at each of their endpoints. One that has a BackendTLSPolicy
  instead of an identity stands for a service outside the mesh: its certificate is of an authority of its own, whose root is the
  ConfigMap that the policy names.

All of it is kept, so that the next start finds the same identities; certificates are renewed while it runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from identity.ca import CA_KEY, Authority
from identity.files import IdentityFiles
from identity.problems import IdentityError
from identity.renewal import Charge, Renewer
from identity.spiffe import SpiffeId
from identity.tls import server_context
from mesh.documents import Document
from mesh.model import Cluster, ListenerTls, Snapshot
from mesh.reading import document_of
from tollhouse.echo import Echo
from tollhouse.output import Complaint

log = logging.getLogger("tollhouse.up")

ECHO = "tollhouse.dev/echo"
SERVICE_ACCOUNTS = "tollhouse.dev/service-accounts"
OUTSIDE = "outside.example"
"""Trust domain of the authority of services outside the mesh; nobody in the mesh trusts it."""
GENERATED = "generated"


class Embedded:
    """Owns the state directory's authority and identities, and the example services. `look` first, then `serve` with each snapshot."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.identities = state / "identities"
        self.authority: Authority | None = None
        self._outside: Authority | None = None
        self._charges: dict[Path, Charge] = {}
        self._echoes: dict[tuple[str, str, int], Echo] = {}
        self._annotated: set[tuple[str, str]] = set()
        self._renewing: asyncio.Task[None] | None = None

    # Identities

    def look(self, documents: Collection[Document]) -> tuple[Document, ...]:
        """Issues what the documents call for and is not there yet; gives the documents that belong to it. Raises `Complaint`."""
        domain = self._trust_domain(documents)
        try:
            self.authority = self._authority(self.state / "ca", domain)
            for charge in self._wanted(documents, domain):
                self._charges[charge.directory] = charge
            self._renew_once()
            return self._certificates_outside(documents)
        except IdentityError as problem:
            raise Complaint(str(problem)) from None

    @staticmethod
    def _trust_domain(documents: Collection[Document]) -> str:
        for document in documents:
            if document.key.kind == "Mesh":
                return str(_spec(document).get("trustDomain") or "cluster.local")
        return "cluster.local"

    @staticmethod
    def _authority(directory: Path, domain: str) -> Authority:
        if not (directory / CA_KEY).exists():
            return Authority.init(directory, domain)
        found = Authority.load(directory)
        if found.trust_domain != domain:
            raise IdentityError(
                "other_trust_domain",
                f"{directory} holds the authority of {found.trust_domain}, and this mesh is {domain}; use another --state",
            )
        return found

    def _wanted(self, documents: Collection[Document], domain: str) -> list[Charge]:
        wanted: dict[str, set[str]] = {}
        for document in documents:
            key, spec = document.key, _spec(document)
            if key.kind == "Gateway":
                names = {str(listener.get("hostname")) for listener in spec.get("listeners") or () if listener.get("hostname")}
                wanted.setdefault(str(SpiffeId.workload(domain, key.namespace, key.name)), set()).update(names or {"localhost"})
            elif key.kind == "ServiceIdentity":
                for identity in spec.get("identities") or ():
                    if str(identity).startswith(f"spiffe://{domain}/ns/"):
                        wanted.setdefault(str(identity), set())
            elif key.kind == "Namespace":
                for account in str(_annotations(document).get(SERVICE_ACCOUNTS) or "").split(","):
                    if account.strip():
                        wanted.setdefault(str(SpiffeId.workload(domain, key.name, account.strip())), set())
        charges = []
        for text, names in sorted(wanted.items()):
            found = SpiffeId.parse(text)
            charges.append(Charge(directory=self.directory_of(found), spiffe_id=found, dns=tuple(sorted(names))))
        return charges

    def directory_of(self, identity: SpiffeId) -> Path:
        """Where an identity is: `<namespace>-<service account>`."""
        return self.identities / f"{identity.namespace}-{identity.service_account}"

    def _renew_once(self) -> None:
        renewer = Renewer(lambda: self._must(self.authority), list(self._charges.values()))
        renewer.run_once()
        for why in renewer.problems.values():
            raise IdentityError("unwritable", why)

    @staticmethod
    def _must(authority: Authority | None) -> Authority:
        if authority is None:
            raise IdentityError("unreadable", "there is no authority yet")
        return authority

    def gateway_identity(self, key: str) -> IdentityFiles:
        """The identity of the gateway `namespace/name`. Raises `IdentityError`."""
        namespace, _, name = key.partition("/")
        return IdentityFiles(self.identities / f"{namespace}-{name}")

    def _certificates_outside(self, documents: Collection[Document]) -> tuple[Document, ...]:
        """Authority and certificates of the annotated services that have a BackendTLSPolicy; the ConfigMaps with the root."""
        made: dict[str, Document] = {}
        there = {document.key for document in documents}
        echoes = {(d.key.namespace, d.key.name) for d in documents if d.key.kind == "Service" and _is_echo(d)}
        self._annotated = echoes
        for document in documents:
            if document.key.kind != "BackendTLSPolicy":
                continue
            namespace, spec = document.key.namespace, _spec(document)
            targets = {(namespace, str(target.get("name"))) for target in spec.get("targetRefs") or ()}
            if not targets & echoes:
                continue
            self._outside = self._authority(self.state / "outside-ca", OUTSIDE)
            validation = spec.get("validation") or {}
            for _, name in sorted(targets & echoes):
                found = SpiffeId.workload(OUTSIDE, namespace, name)
                charge = Charge(
                    directory=self.state / "outside" / f"{namespace}-{name}", spiffe_id=found, dns=(str(validation.get("hostname")),)
                )
                renewer = Renewer(lambda: self._must(self._outside), [charge])
                renewer.run_once()
            for reference in validation.get("caCertificateRefs") or ():
                body = {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"namespace": namespace, "name": str(reference.get("name"))},
                    "data": {"ca.crt": self._outside.bundle.decode()},
                }
                config_map = document_of(body, GENERATED, "1")
                if reference.get("kind") == "ConfigMap" and config_map.key not in there:
                    made[str(config_map.key)] = config_map
        return tuple(made.values())

    # Services

    async def serve(self, snapshot: Snapshot, gateways: Collection[str]) -> None:
        """Starts the example services that are not there yet, and ends those that are no longer in the snapshot. Raises OSError."""
        wanted: dict[tuple[str, str, int], Cluster] = {}
        for cluster in snapshot.clusters.values():
            if (cluster.namespace, cluster.service) in self._annotated:
                for endpoint in cluster.endpoints:
                    wanted[(f"{cluster.namespace}/{cluster.service}", endpoint.address, endpoint.port)] = cluster
        for key in [key for key in self._echoes if key not in wanted]:
            await self._echoes.pop(key).close()
        for key, cluster in wanted.items():
            if key not in self._echoes:
                echo = self._echo(cluster, gateways)
                await echo.start(key[1], key[2])
                self._echoes[key] = echo

    def _echo(self, cluster: Cluster, gateways: Collection[str]) -> Echo:
        identities = [identity for endpoint in cluster.endpoints for identity in endpoint.identities]
        if identities:
            files = IdentityFiles(self.directory_of(SpiffeId.parse(identities[0])))
            files.watch(asyncio.get_running_loop(), 5.0)
            return Echo(cluster.service, files, gateways)
        outside = self.state / "outside" / f"{cluster.namespace}-{cluster.service}"
        if cluster.tls is not None and outside.exists():
            return Echo(cluster.service, None, (), server_context(ListenerTls(svid=True), IdentityFiles(outside)))
        return Echo(cluster.service, None, ())

    def services(self) -> list[tuple[str, str]]:
        """(service, address) of each running example service."""
        return [(name, f"{address}:{port}") for name, address, port in sorted(self._echoes)]

    def start_renewing(self) -> None:
        """Renews certificates from now on."""
        renewer = Renewer(lambda: self._must(self.authority), list(self._charges.values()))
        self._renewing = asyncio.get_running_loop().create_task(renewer.run())

    async def close(self) -> None:
        """Ends the example services."""
        if self._renewing is not None:
            self._renewing.cancel()
        for echo in self._echoes.values():
            await echo.close()


def _spec(document: Document) -> Mapping[str, Any]:
    spec = document.body.get("spec")
    return spec if isinstance(spec, Mapping) else {}


def _annotations(document: Document) -> Mapping[str, Any]:
    metadata = document.body.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, Mapping) else None
    return annotations if isinstance(annotations, Mapping) else {}


def _is_echo(document: Document) -> bool:
    return str(_annotations(document).get(ECHO)).lower() == "true"

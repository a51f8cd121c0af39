"""From a Service, its endpoints and who they must be, to clusters: one for each port.

Endpoints come from EndpointSlices (matched by the port's name) and from registered instances; neither says who they are. A service with a
`ServiceIdentity` is spoken to by mutual TLS of the mesh, one with a `BackendTLSPolicy` by TLS of its own authority, and any other in
plaintext: a warning off loopback, refused under `Mesh.spec.upstream: Strict`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from mesh.compile_backend_tls import TlsPolicy, backend_tls, check_policies, conflict, tls_policies
from mesh.compile_world import Name, PortFacts, ServiceFacts, Trouble, World, age
from mesh.documents import Document, Instance, Problem
from mesh.kinds_core import SERVICE_NAME_LABEL
from mesh.model import Cluster, Endpoint, MeshSettings, UpstreamTls
from mesh.proxy_protocol import version_of
from mesh.schema import listed
from mesh.sharing import share

_WSS: Final = "kubernetes.io/wss"
_HTTP2: dict[str, Literal["auto", "always", "never"]] = {
    "": "auto",
    "http": "auto",
    "https": "auto",
    "grpc": "always",
    "http2": "always",
    "kubernetes.io/h2c": "always",
    "kubernetes.io/ws": "never",
    _WSS: "never",
}
"""`appProtocol` to what is spoken. Other names without a prefix are IANA's (`mysql`), in any case, and say nothing about HTTP."""


class Inputs(msgspec.Struct, frozen=True):
    """Everything that a service's clusters are made from: as long as it is equal, they are."""

    service: Document
    slices: tuple[Document, ...]
    instances: tuple[Instance, ...]
    identities: tuple[Document, ...]
    policies: tuple[TlsPolicy, ...]
    trusted: frozenset[str]
    strict: bool


class ServiceResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a service."""

    clusters: dict[str, Cluster]
    facts: ServiceFacts
    problems: tuple[Problem, ...] = ()


class Services:
    """Compiles services, each again only when something that it is made from has changed. Owned by the compiler."""

    def __init__(self) -> None:
        self.inputs: dict[Name, Inputs] = {}
        self.results: dict[Name, ServiceResult] = {}
        self.slices: dict[Name, tuple[Document, ...]] = {}
        self.identities: dict[Name, tuple[Document, ...]] = {}
        self.policies: dict[Name, tuple[TlsPolicy, ...]] = {}

    def compile(self, world: World, settings: MeshSettings) -> dict[Name, ServiceResult]:
        """The result of each Service, by name."""
        services = world.of("Service")
        self.slices = _by_service(world.of("EndpointSlice").values())
        only_endpoints = world.dirty <= {"EndpointSlice", "Instance"} and self.results
        if only_endpoints:
            names: Iterable[Name] = [name for name in world.dirty_services if name in services]
            results = dict(self.results)
        else:
            self.identities = _identities(world)
            self.policies = tls_policies(world)
            names, results = sorted(services), {}
        for name in names:
            results[name] = self._one(name, services[name], world, settings)
        if not only_endpoints:
            self.inputs = {name: self.inputs[name] for name in results}
        self.results = results
        return results

    def _one(self, name: Name, service: Document, world: World, settings: MeshSettings) -> ServiceResult:
        inputs = Inputs(
            service,
            self.slices.get(name, ()),
            tuple(instance for _, instance in sorted(world.instances.get(name, {}).items())),
            self.identities.get(name, ()),
            self.policies.get(name, ()),
            settings.trusted_gateways,
            settings.upstream == "Strict",
        )
        before = self.results.get(name)
        if before is not None and self.inputs.get(name) == inputs:
            return before
        self.inputs[name] = inputs
        result = compile_service(inputs)
        return share(before, result) if before is not None else result


def _by_service(slices: Iterable[Document]) -> dict[Name, tuple[Document, ...]]:
    found: dict[Name, list[Document]] = {}
    for document in slices:
        service = document.body["metadata"]["labels"][SERVICE_NAME_LABEL]
        found.setdefault((document.key.namespace, service), []).append(document)
    return {name: tuple(sorted(documents, key=lambda item: item.key)) for name, documents in found.items()}


def service_of_slice(document: Document) -> Name:
    """The service that an EndpointSlice belongs to."""
    return document.key.namespace, document.body["metadata"]["labels"][SERVICE_NAME_LABEL]


def _identities(world: World) -> dict[Name, tuple[Document, ...]]:
    found: dict[Name, list[Document]] = {}
    for document in sorted(world.of("ServiceIdentity").values(), key=age):
        found.setdefault((document.key.namespace, document.body["spec"]["service"]), []).append(document)
    return {name: tuple(documents) for name, documents in found.items()}


def compile_service(inputs: Inputs) -> ServiceResult:
    """The clusters of one service, and what is wrong with it."""
    service = inputs.service
    key, spec = service.key, service.body.get("spec") or {}
    trouble = Trouble(service)
    problems = trouble.found
    identities: tuple[str, ...] = ()
    if inputs.identities:
        identities = tuple(inputs.identities[0].body["spec"]["identities"])
        for late in inputs.identities[1:]:
            problems += conflict(late, ("spec", "service"), f"{inputs.identities[0].key} already says who {key} is; delete one of the two")
    ports = [port for port in spec.get("ports") or [] if (port.get("protocol") or "TCP") == "TCP"]
    clusters: dict[str, Cluster] = {}
    facts: dict[int, PortFacts] = {}
    gateway = bool(identities) and inputs.trusted.issuperset(identities)
    problems += check_policies(key, inputs.policies, ports, bool(identities))
    _check_instances(inputs, ports, trouble)
    for port in ports:
        index = spec["ports"].index(port)
        cluster_name = f"{key.namespace}/{key.name}:{port['port']}"
        endpoints = _endpoints(inputs, spec, port, ports, identities)
        tls, broken = (UpstreamTls(mode="mesh"), "") if identities else backend_tls(inputs.policies, port)
        reason = "InvalidCACertificateRef" if broken else ""
        off_loopback = tls is None and not broken and any(not _is_loopback(endpoint.address) for endpoint in endpoints)
        if off_loopback and inputs.strict:
            broken, reason = "it is reached in plaintext, which the mesh forbids (upstream: Strict)", "PlaintextForbidden"
        if off_loopback:
            trouble.add(
                ("spec", "ports", index),
                ("it would be" if inputs.strict else "it is")
                + " reached in plaintext over the network"
                + (", which the mesh forbids (upstream: Strict)" if inputs.strict else "")
                + "; give the service a ServiceIdentity or a BackendTLSPolicy",
                "Plaintext" if not inputs.strict else "PlaintextForbidden",
                "error" if inputs.strict else "warning",
            )
        protocol = port.get("appProtocol") or ""
        protocol = protocol if "/" in protocol else protocol.lower()
        http2 = _HTTP2.get(protocol, "auto")
        no_http = "" if broken else _no_http(protocol, tls is not None)
        if no_http:
            trouble.warn(("spec", "ports", index, "appProtocol"), f"no HTTPRoute or GRPCRoute can use it: {no_http}", "UnsupportedProtocol")
        no_grpc = f"its appProtocol {protocol} is HTTP/1.1, and gRPC needs HTTP/2" if http2 == "never" else ""
        facts[port["port"]] = PortFacts(cluster_name, broken, reason, no_http, no_grpc, protocol == _WSS and tls is None)
        if not broken:
            clusters[cluster_name] = Cluster(
                name=cluster_name,
                namespace=key.namespace,
                service=key.name,
                port=port["port"],
                endpoints=endpoints,
                tls=tls,
                http2=http2,
                within_tls=facts[port["port"]].within_tls,
                gateway=gateway,
                external=not identities,
                proxy_protocol=version_of(service.body),
            )
    udp = _datagrams(inputs, spec, identities, clusters, trouble)
    return ServiceResult(clusters=clusters, facts=ServiceFacts(ports=facts, udp=udp, gateway=gateway), problems=tuple(problems))


def _no_http(protocol: str, tls: bool) -> str:
    """Why HTTP can't be sent to a port with this `appProtocol`; empty when it can. `tls`: it is within TLS on the way there."""
    if protocol == _WSS and not tls:
        return f"its appProtocol {_WSS} is within TLS, and nothing says whom to trust; give it a BackendTLSPolicy or a ServiceIdentity"
    if "/" in protocol and protocol not in _HTTP2:
        known = listed((name for name in _HTTP2 if name.startswith("kubernetes.io/")), "and")
        return f'its appProtocol "{protocol}" is not known here; {known} are'
    return ""


def _datagrams(
    inputs: Inputs, spec: Any, identities: tuple[str, ...], clusters: dict[str, Cluster], trouble: Trouble
) -> dict[int, PortFacts]:
    """What routes must know of the UDP ports; their clusters are put into `clusters`. Nothing proves who answers a datagram."""
    key = inputs.service.key
    ports = [port for port in spec.get("ports") or [] if port.get("protocol") == "UDP"]
    facts: dict[int, PortFacts] = {}
    for port in ports:
        name = f"{key.namespace}/{key.name}:{port['port']}/udp"
        endpoints = _endpoints(inputs, spec, port, ports, ())
        broken = reason = ""
        if not all(_is_loopback(endpoint.address) for endpoint in endpoints):
            path: tuple[str | int, ...] = ("spec", "ports", spec["ports"].index(port))
            if inputs.strict:
                broken, reason = "UDP is not encrypted, and the mesh forbids plaintext (upstream: Strict)", "PlaintextForbidden"
                trouble.add(path, broken, reason)
            elif identities:
                trouble.warn(path, "its ServiceIdentity can't be checked over UDP, which is not encrypted", "Plaintext")
        facts[port["port"]] = PortFacts(name, broken, reason)
        if not broken:
            clusters[name] = Cluster(
                name=name,
                namespace=key.namespace,
                service=key.name,
                port=port["port"],
                endpoints=endpoints,
                external=not identities,
            )
    return facts


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _endpoints(inputs: Inputs, spec: Any, port: Any, ports: list[Any], identities: tuple[str, ...]) -> tuple[Endpoint, ...]:
    """Ready endpoints of a port, each address once; those of EndpointSlices first."""
    name = port.get("name") or ""
    protocol = port.get("protocol") or "TCP"
    if spec.get("type") == "ExternalName":
        return (Endpoint(address=spec["externalName"], port=port["port"], identities=identities),)
    found: dict[tuple[str, int], Endpoint] = {}
    ending: dict[tuple[str, int], Endpoint] = {}
    for document in inputs.slices:
        body = document.body
        own_ports = [own for own in body.get("ports") or [] if (own.get("protocol") or "TCP") == protocol]
        number = next((own.get("port") for own in own_ports if (own.get("name") or "") == name), None)
        if number is None:
            continue
        for item in body.get("endpoints") or []:
            conditions = item.get("conditions") or {}
            ready = conditions.get("ready") is not False
            if not ready and not (conditions.get("serving") and conditions.get("terminating")):
                continue
            # Kubernetes: every address of one endpoint leads to the same place, and the first is to be used.
            address = item["addresses"][0]
            target = (item.get("targetRef") or {}).get("name") if isinstance(item.get("targetRef"), dict) else ""
            label = target if isinstance(target, str) else ""
            endpoint = Endpoint(address=address, port=number, identities=identities, zone=item.get("zone") or "", name=label)
            (found if ready else ending).setdefault((address, number), endpoint)
    for instance in inputs.instances:
        if not instance.ready or instance.weight < 1:
            continue
        number = _instance_port(instance, name, ports)
        if number is not None:
            endpoint = Endpoint(
                address=instance.address,
                port=number,
                identities=identities,
                zone=instance.zone,
                weight=instance.weight,
                name=instance.instance,
            )
            found.setdefault((instance.address, number), endpoint)
    # As kube-proxy does (KEP-1669): those that still serve while they end are better than none at all.
    return tuple((found or ending).values())


def _instance_port(instance: Instance, name: str, ports: list[Any]) -> int | None:
    if name in instance.ports:
        return instance.ports[name]
    # With one port on both sides there is nothing to confuse, whether it has been given a name or not.
    if len(ports) == 1 and len(instance.ports) == 1 and (not name or "" in instance.ports):
        return next(iter(instance.ports.values()))
    return None


def _check_instances(inputs: Inputs, ports: list[Any], trouble: Trouble) -> None:
    for instance in inputs.instances:
        if ports and all(_instance_port(instance, port.get("name") or "", ports) is None for port in ports):
            own = ", ".join(sorted(instance.ports)) or "none"
            names = ", ".join(port.get("name") or str(port["port"]) for port in ports)
            trouble.warn(
                ("spec", "ports"), f"the instance {instance.instance} has none of its ports ({names}); it registered {own}", "NoPort"
            )

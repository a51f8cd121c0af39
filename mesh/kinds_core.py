"""Schemas of the Kubernetes kinds: what is read of them, and which of their other fields are passed over.

Of a `Service` only the ports matter here (and `externalName`); what else Kubernetes has in it is for Kubernetes and accepted.
"""

from __future__ import annotations

from typing import Any, Final

from mesh import formats
from mesh.documents import FieldPath
from mesh.schema import Base64, Choice, Faults, Fields, Flag, Free, Items, Node, Number, Table, Text

PORT: Final = Number(1, 65535)
SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"

NO_AFFINITY: Final = "clients behind one address are many; a route's sessionPersistence tells them apart"
_SERVICE_FREE: Final = (
    "selector",
    "clusterIP",
    "clusterIPs",
    "externalIPs",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "loadBalancerClass",
    "allocateLoadBalancerNodePorts",
    "externalTrafficPolicy",
    "internalTrafficPolicy",
    "healthCheckNodePort",
    "ipFamilies",
    "ipFamilyPolicy",
    "publishNotReadyAddresses",
    "trafficDistribution",
    "sessionAffinityConfig",
)


def _service_rule(spec: Any, path: FieldPath, faults: Faults) -> None:
    ports = spec.get("ports") or []
    if len(ports) > 1:
        for index, port in enumerate(ports):
            if not port.get("name"):
                faults.add((*path, "ports", index, "name"), "is missing; with several ports each needs a name")
    if spec.get("type") == "ExternalName" and not spec.get("externalName"):
        faults.add((*path, "externalName"), "is missing; a Service of type ExternalName needs it")


SERVICE: Final = Fields(
    {},
    {
        "ports": Items(
            Fields(
                {"port": PORT},
                {
                    "name": Text(formats.port_name),
                    "protocol": Choice("a protocol", "TCP", "UDP", "SCTP"),
                    "targetPort": Free(),
                    "nodePort": Free(),
                    "appProtocol": Text(most=63),
                },
            ),
            most=100,
            unique=lambda port: (port["port"], port.get("protocol") or "TCP"),
        ),
        "type": Choice("a type of Service", "ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "externalName": Text(formats.exact_hostname),
        "sessionAffinity": Choice(
            "an affinity",
            "None",
            unsupported={"ClientIP": NO_AFFINITY},
        ),
        **dict.fromkeys(_SERVICE_FREE, Free()),
    },
    rule=_service_rule,
)

SECRET: Final[dict[str, Node]] = {
    "type": Text(most=253),
    "data": Table(Base64()),
    "stringData": Table(Text(most=1 << 20)),
    "immutable": Flag(),
}

CONFIG_MAP: Final[dict[str, Node]] = {
    "data": Table(Text(most=1 << 20)),
    "binaryData": Table(Base64()),
    "immutable": Flag(),
}

ENDPOINT_SLICE: Final[tuple[dict[str, Node], dict[str, Node]]] = (
    {
        "addressType": Choice("an address type", "IPv4", "IPv6", "FQDN"),
    },
    {
        "endpoints": Items(
            Fields(
                {"addresses": Items(Text(least=1, most=253), least=1, most=100)},
                {
                    "conditions": Fields({}, {"ready": Flag(), "serving": Flag(), "terminating": Flag()}),
                    "zone": Text(most=253),
                    "hostname": Text(formats.label),
                    "nodeName": Text(most=253),
                    "targetRef": Free(),
                    "hints": Free(),
                    "deprecatedTopology": Free(),
                },
            ),
            most=1000,
        ),
        "ports": Items(
            Fields(
                {},
                {
                    "name": Text(most=63),
                    "port": PORT,
                    "protocol": Choice("a protocol", "TCP", "UDP", "SCTP"),
                    "appProtocol": Text(most=63),
                },
            ),
            most=100,
            unique=lambda port: port.get("name") or "",
        ),
    },
)
"""Required and optional fields."""


def slice_rule(body: Any, path: FieldPath, faults: Faults) -> None:
    """Addresses are of the slice's type, and the label says whose they are."""
    labels = body["metadata"].get("labels") or {}
    if not labels.get(SERVICE_NAME_LABEL):
        faults.add(
            (*path, "metadata", "labels"), f"the label {SERVICE_NAME_LABEL} is missing; it names the Service that the endpoints belong to"
        )
    of_type = {"IPv4": 4, "IPv6": 6}.get(body["addressType"], 0)
    for index, endpoint in enumerate(body.get("endpoints") or []):
        for number, address in enumerate(endpoint["addresses"]):
            here = (*path, "endpoints", index, "addresses", number)
            wrong = formats.usable_address(address, of_type) if of_type else formats.exact_hostname(address)
            if wrong:
                faults.add(here, wrong)

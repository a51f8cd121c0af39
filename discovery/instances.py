"""Instances as they are written to etcd: checked on the way in, and again on the way out.

Whoever may write to the registry must not be able to hurt a gateway with it: an address is an IP address that can be
connected to, a port is a port, and nothing is unbounded.
"""

from __future__ import annotations

import ipaddress

import msgspec

from discovery.source import InstanceName
from mesh.documents import Instance

MOST_PORTS = 64
MOST_WEIGHT = 1_000_000


class _Value(msgspec.Struct, kw_only=True):
    """The JSON value. Fields that are not known are passed over: a newer registrar may write more."""

    address: str
    ports: dict[str, int]
    zone: str = ""
    weight: int = 1
    ready: bool = True


_DECODER = msgspec.json.Decoder(_Value)


def check_instance(instance: Instance) -> str:
    """What is wrong with an instance, in one sentence; empty when nothing is."""
    try:
        address = ipaddress.ip_address(instance.address)
    except ValueError:
        return f"address {instance.address[:100]!r} is not an IP address; give the address at which the gateways reach the instance"
    if address.is_unspecified:
        return f"address {instance.address} means 'any of this machine'; give the one at which the gateways reach the instance"
    if address.is_multicast or str(address) == "255.255.255.255":
        return f"address {instance.address} is not that of one machine; give the one at which the gateways reach the instance"
    if getattr(address, "scope_id", None):
        return f"address {instance.address[:100]} has a zone, which means something on one machine only; give one without"
    if not instance.ports:
        return "it has no port; give at least one"
    if len(instance.ports) > MOST_PORTS:
        return f"it has {len(instance.ports)} ports; at most {MOST_PORTS} are taken"
    for name, port in instance.ports.items():
        if not 1 <= port <= 65535:
            return f"port {name or 'without a name'} is {port}; a port is between 1 and 65535"
        if len(name) > 63:
            return f"the port name {name[:63]!r}... is longer than 63 characters"
    if not 0 <= instance.weight <= MOST_WEIGHT:
        return f"weight {instance.weight} is not between 0 and {MOST_WEIGHT}"
    if len(instance.zone) > 253:
        return "its zone is longer than 253 characters"
    return ""


def read_instance(name: InstanceName, value: bytes) -> Instance:
    """The instance that a JSON value describes. Raises ValueError, worded for people."""
    try:
        read = _DECODER.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a valid instance: {error}") from error
    namespace, service, own = name
    instance = Instance(
        namespace=namespace,
        service=service,
        instance=own,
        address=read.address,
        ports=read.ports,
        zone=read.zone,
        weight=read.weight,
        ready=read.ready,
    )
    wrong = check_instance(instance)
    if wrong:
        raise ValueError(wrong)
    return msgspec.structs.replace(instance, address=str(ipaddress.ip_address(instance.address)))


def write_instance(instance: Instance) -> bytes:
    """The JSON value of an instance. Raises ValueError when it may not be registered."""
    wrong = check_instance(instance)
    if wrong:
        raise ValueError(f"instance {instance.namespace}/{instance.service}/{instance.instance}: {wrong}")
    return msgspec.json.encode(
        _Value(address=instance.address, ports=instance.ports, zone=instance.zone, weight=instance.weight, ready=instance.ready)
    )


def name_of(instance: Instance) -> InstanceName:
    """Namespace, service and instance."""
    return instance.namespace, instance.service, instance.instance

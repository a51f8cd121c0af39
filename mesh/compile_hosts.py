"""From routes at a listener to virtual hosts, ready for look-up.

A virtual host has the routes of its own hostname only: as in Envoy, a request is looked up in the most specific one that fits its host.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from mesh.compile_l4 import L4Binding, l4_listener
from mesh.compile_listeners import GatewayPart, ListenerPart
from mesh.compile_routes import Binding, Ranked
from mesh.kinds_l4 import L4_PROTOCOLS
from mesh.model import GatewayConfig, Listener, Match, VirtualHost

Place = tuple[str, str]
"""Gateway (`namespace/name`) and section."""


class Hosts:
    """Puts listeners together, each again only when a route at it (or the listener itself) has changed. Owned by the compiler."""

    def __init__(self) -> None:
        self.bindings: dict[Place, list[Binding]] = {}
        self.parts: dict[Place, ListenerPart] = {}
        self.ranked: dict[tuple[str, str, str], list[Ranked]] = {}
        self.hosts: dict[tuple[str, str, str], VirtualHost] = {}
        self.listeners: dict[Place, Listener] = {}
        self.gateways: dict[str, GatewayConfig] = {}

    def compile(self, parts: list[GatewayPart], bindings: list[Binding], l4: Iterable[L4Binding] = ()) -> dict[str, GatewayConfig]:
        """The gateways with their routes (`l4`: those below HTTP), by `namespace/name`."""
        at: dict[Place, list[Binding]] = {}
        below: dict[Place, list[L4Binding]] = {}
        for each in l4:
            below.setdefault((each.gateway, each.section), []).append(each)
        for binding in bindings:
            at.setdefault((binding.gateway, binding.section), []).append(binding)
        gateways: dict[str, GatewayConfig] = {}
        listeners: dict[Place, Listener] = {}
        kept: dict[Place, ListenerPart] = {}
        for part in parts:
            name = f"{part.namespace}/{part.name}"
            for own in part.listeners:
                if not own.broken:
                    place = (name, own.listener.name)
                    if own.listener.protocol in L4_PROTOCOLS:
                        listeners[place] = l4_listener(self.listeners.get(place), own.listener, below.get(place, ()))
                    else:
                        listeners[place] = self._listener(place, own, at.get(place, []))
                    kept[place] = own
            gateway = GatewayConfig(
                namespace=part.namespace,
                name=part.name,
                listeners=tuple(listeners[name, own.listener.name] for own in part.listeners if not own.broken),
                addresses=part.addresses,
                labels=part.labels,
                annotations=part.annotations,
                client_certificate=part.client_certificate,
                no_client_certificate=part.no_client_certificate,
                proxy_ports=part.proxy_ports,
                authentication=part.authentication,
            )
            before = self.gateways.get(name)
            gateways[name] = before if before is not None and _same_gateway(before, gateway) else gateway
        self.bindings = {place: at.get(place, []) for place in kept}
        self.parts, self.listeners, self.gateways = kept, listeners, gateways
        for key in [key for key in self.hosts if key[:2] not in kept]:
            del self.hosts[key], self.ranked[key]
        return gateways

    def _listener(self, place: Place, part: ListenerPart, bindings: list[Binding]) -> Listener:
        before = self.listeners.get(place)
        if before is not None and self.parts[place] is part and _identical(self.bindings[place], bindings):
            return before
        by_host: dict[str, list[Ranked]] = {}
        for binding in bindings:
            for hostname in binding.hostnames:
                by_host.setdefault(hostname, []).extend(binding.matches)
        hosts = {hostname: self._host(place, hostname, by_host[hostname]) for hostname in sorted(by_host)}
        for key in [key for key in self.hosts if key[:2] == place and key[2] not in hosts]:
            del self.hosts[key], self.ranked[key]
        base = part.listener
        tls = before.tls if before is not None and before.tls == base.tls else base.tls
        listener = Listener(name=base.name, port=base.port, protocol=base.protocol, hostname=base.hostname, tls=tls, hosts=hosts)
        unchanged = before is not None and _same_listener(before, listener)
        return before if unchanged and before is not None else listener

    def _host(self, place: Place, hostname: str, ranked: list[Ranked]) -> VirtualHost:
        key = (*place, hostname)
        before = self.hosts.get(key)
        if before is not None and _identical(self.ranked[key], ranked):
            return before
        host = virtual_host(hostname, ranked)
        if before is not None:
            host = _shared_host(before, host)
        self.hosts[key], self.ranked[key] = host, ranked
        return host


def virtual_host(hostname: str, ranked: list[Ranked]) -> VirtualHost:
    """The index of one hostname."""
    exact: dict[bytes, list[Match]] = {}
    prefix: dict[bytes, list[Match]] = {}
    regex: list[Match] = []
    for item in sorted(ranked, key=attrgetter("rank")):
        match = item.match
        if match.path_kind == "exact":
            exact.setdefault(match.path, []).append(match)
        elif match.path_kind == "prefix":
            prefix.setdefault(match.path, []).append(match)
        else:
            regex.append(match)
    return VirtualHost(
        hostname=hostname,
        exact={path: tuple(exact[path]) for path in sorted(exact)},
        prefix={path: tuple(prefix[path]) for path in sorted(prefix)},
        regex=tuple(regex),
    )


def _shared_host(before: VirtualHost, after: VirtualHost) -> VirtualHost:
    """Keeps the tuples that have not changed. Their matches are shared already, by the routes that they came from."""
    if before == after:
        return before

    def shared(old: dict[bytes, tuple[Match, ...]], new: dict[bytes, tuple[Match, ...]]) -> dict[bytes, tuple[Match, ...]]:
        return {path: old[path] if old.get(path) == ways else ways for path, ways in new.items()}

    regex = before.regex if before.regex == after.regex else after.regex
    return VirtualHost(
        hostname=after.hostname,
        exact=shared(before.exact, after.exact),
        prefix=shared(before.prefix, after.prefix),
        regex=regex,
    )


def _identical(before: list[Binding] | list[Ranked], after: list[Binding] | list[Ranked]) -> bool:
    return len(before) == len(after) and all(one is other for one, other in zip(before, after, strict=True))


def _same_listener(before: Listener, after: Listener) -> bool:
    """Whether two listeners differ in nothing; their hosts are compared by identity, since equal ones are the same."""
    facts = ("name", "port", "protocol", "hostname")
    return (
        all(getattr(before, fact) == getattr(after, fact) for fact in facts)
        and before.tls is after.tls
        and before.hosts.keys() == after.hosts.keys()
        and all(before.hosts[name] is host for name, host in after.hosts.items())
    )


def _same_gateway(before: GatewayConfig, after: GatewayConfig) -> bool:
    return (
        (before.addresses, before.labels, before.annotations, before.proxy_ports, before.no_client_certificate)
        == (after.addresses, after.labels, after.annotations, after.proxy_ports, after.no_client_certificate)
        and before.authentication == after.authentication
        and before.client_certificate == after.client_certificate
        and len(before.listeners) == len(after.listeners)
        and all(one is other for one, other in zip(before.listeners, after.listeners, strict=True))
    )

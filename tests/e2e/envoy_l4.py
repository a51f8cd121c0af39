"""A static configuration of Envoy for what is below HTTP: one listener a table entry, written from Envoy's words and nothing of ours."""

from __future__ import annotations

import json
from typing import Any

Body = dict[str, Any]
BIGGEST = 65_507
"""Bytes of UDP payload."""


def api(name: str) -> str:
    return f"type.googleapis.com/envoy.extensions.{name}"


def address(port: int, protocol: str = "TCP") -> Body:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port, "protocol": protocol}}


def tcp_proxy(weights: dict[str, int]) -> Body:
    """The filter for some clusters by weight. TCPRoute: what has no backend is rejected, which Envoy does where a cluster is not there."""
    config: Body = {"@type": api("filters.network.tcp_proxy.v3.TcpProxy"), "stat_prefix": "tcp", "max_connect_attempts": 3}
    clusters = [{"name": name, "weight": weight} for name, weight in weights.items() if weight]
    if len(clusters) == 1:
        config["cluster"] = clusters[0]["name"]
    elif clusters:
        config["weighted_clusters"] = {"clusters": clusters}
    else:
        config["cluster"] = "none"
    return {"name": "tcp", "typed_config": config}


def terminated(chain: str, key: str) -> Body:
    """TLS of a listener."""
    pair = {"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}
    context = {"@type": api("transport_sockets.tls.v3.DownstreamTlsContext"), "common_tls_context": {"tls_certificates": [pair]}}
    return {"name": "tls", "typed_config": context}


def bootstrap(
    tcp: dict[int, dict[str, int]], tls: tuple[int, dict[str, Body]], udp: dict[int, str], services: dict[str, tuple[str, int]]
) -> str:
    """The whole configuration.

    tcp: by port, weights by service. tls: the port, and by server name the weights, with a `pair` (chain, key) where TLS ends here. udp: by
    port, the service. services: by name, the protocol and the loopback port.
    """
    listeners: list[Body] = [
        {"name": f"tcp-{port}", "address": address(port), "filter_chains": [{"filters": [tcp_proxy(weights)]}]}
        for port, weights in tcp.items()
    ]
    chains = []
    for name, way in tls[1].items():
        chain: Body = {"filter_chain_match": {"server_names": [name]}, "filters": [tcp_proxy(way["weights"])]}
        if "pair" in way:
            chain["transport_socket"] = terminated(*way["pair"])
        chains.append(chain)
    inspector = {"name": "hello", "typed_config": {"@type": api("filters.listener.tls_inspector.v3.TlsInspector")}}
    listeners.append({"name": "tls", "address": address(tls[0]), "listener_filters": [inspector], "filter_chains": chains})
    for port, service in udp.items():
        route = {"name": "route", "typed_config": {"@type": api("filters.udp.udp_proxy.v3.Route"), "cluster": service}}
        config = {
            "@type": api("filters.udp.udp_proxy.v3.UdpProxyConfig"),
            "stat_prefix": "udp",
            "matcher": {"on_no_match": {"action": route}},
            "upstream_socket_config": {"max_rx_datagram_size": BIGGEST},
        }
        listeners.append(
            {
                "name": f"udp-{port}",
                "address": address(port, "UDP"),
                "udp_listener_config": {"downstream_socket_config": {"max_rx_datagram_size": BIGGEST}},
                "listener_filters": [{"name": "udp", "typed_config": config}],
            }
        )
    clusters = [
        {
            "name": name,
            "type": "STATIC",
            "connect_timeout": "5s",
            "load_assignment": {
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(port, protocol)}}]}],
            },
        }
        for name, (protocol, port) in services.items()
    ]
    return json.dumps({"static_resources": {"listeners": listeners, "clusters": clusters}})

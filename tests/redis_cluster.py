"""A real Redis Cluster on loopback: masters, and a replica of each.

with cluster(3) as nodes:
    nodes.url ... nodes.owner(slot).kill() ...
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import redis

from tests import servers

SLOTS = 16384


def cluster_port() -> int:
    """A free port with the one for the cluster's own traffic, 10,000 above."""
    while True:
        port = servers.free_port()
        if port >= 22_000:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        return port


class Cluster:
    """The nodes: masters first, then a replica of each, if there are replicas."""

    def __init__(self, nodes: Sequence[servers.Server], masters: int) -> None:
        self.nodes = nodes
        self.masters = masters
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        self.url = f"redis+cluster://{hosts}"

    def admin(self, node: servers.Server) -> redis.Redis:
        """A client of one node."""
        return redis.Redis(port=node.port, protocol=2, decode_responses=True)

    def say(self, node: servers.Server, *command: Any) -> Any:
        """One command to one node, with what it answers as Redis puts it."""
        connection = redis.Connection(port=node.port, protocol=2)
        try:
            connection.send_command(*command)
            return connection.read_response()
        finally:
            connection.disconnect()

    def name(self, node: servers.Server) -> str:
        """A node's id."""
        return bytes(self.say(node, "CLUSTER", "MYID")).decode()

    def range_of(self, master: int) -> tuple[int, int]:
        """First and last slot that a master had in the beginning."""
        return SLOTS * master // self.masters, SLOTS * (master + 1) // self.masters - 1

    def master_of(self, slot: int) -> int:
        """Which of the masters had a slot in the beginning."""
        return next(at for at in range(self.masters) if self.range_of(at)[0] <= slot <= self.range_of(at)[1])

    def build(self) -> None:
        """Makes a cluster of the nodes."""
        first = self.nodes[0]
        for at, node in enumerate(self.nodes[: self.masters]):
            low, high = self.range_of(at)
            self.say(node, "CLUSTER", "ADDSLOTS", *range(low, high + 1))
            self.say(node, "CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        for node in self.nodes[1:]:
            self.say(node, "CLUSTER", "MEET", "127.0.0.1", first.port)
        for node in self.nodes:
            servers.wait_for("the nodes to know each other", lambda node=node: self._knows(node))
        for at, node in enumerate(self.nodes[self.masters :]):
            self.say(node, "CLUSTER", "REPLICATE", self.name(self.nodes[at]))
        for node in self.nodes:
            servers.wait_for("the cluster", lambda node=node: b"cluster_state:ok" in self.say(node, "CLUSTER", "INFO"))
        for node in self.nodes[self.masters :]:
            servers.wait_for("a replica", lambda node=node: b"master_link_status:up" in self.say(node, "INFO", "replication"))

    def _knows(self, node: servers.Server) -> bool:
        lines = bytes(self.say(node, "CLUSTER", "NODES")).decode().splitlines()
        return len(lines) == len(self.nodes) and not any("handshake" in line for line in lines)


@contextmanager
def cluster(masters: int, *, replicas: bool = True, timeout: int = 1000) -> Iterator[Cluster]:
    """Starts one. `timeout`: milliseconds after which a node counts as gone (`cluster-node-timeout`)."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(servers.redis("--cluster-enabled", "yes", "--cluster-node-timeout", str(timeout), port=cluster_port()))
            for _ in range(masters * (2 if replicas else 1))
        ]
        made = Cluster(nodes, masters)
        made.build()
        yield made

"""For the discovery tests: an etcd spoken to over its own API, resources, and a receiver that remembers what a source delivered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from discovery.address import parse_etcd_url
from discovery.etcd import Etcd
from discovery.source import Change, InstanceName, PolicyFiles
from mesh.documents import Document, Instance, Key, Problem


def body(name: str = "cart", note: str = "1", kind: str = "HTTPRoute", namespace: str = "shop") -> dict[str, Any]:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "annotations": {"note": note}},
        "spec": {},
    }


def key(name: str = "cart", namespace: str = "shop") -> Key:
    return Key("gateway.networking.k8s.io", "HTTPRoute", namespace, name)


def yaml_of(*bodies: dict[str, Any]) -> str:
    """JSON is YAML."""
    return "---\n".join(json.dumps(each, indent=1) + "\n" for each in bodies)


def an_instance(own: str = "one", port: int = 8080, ready: bool = True, service: str = "cart", address: str = "127.0.0.1") -> Instance:
    return Instance(namespace="shop", service=service, instance=own, address=address, ports={"http": port}, ready=ready)


class Receiver:
    """What a source delivered, put together as its reader would."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.documents: dict[Key, Document] = {}
        self.instances: dict[InstanceName, Instance] = {}
        self.problems: tuple[Problem, ...] = ()
        self.policy = PolicyFiles()
        self.at = 0.0

    def __call__(self, change: Change) -> None:
        self.at = time.monotonic()
        self.changes.append(change)
        if change.replace:
            self.documents.clear()
            self.instances.clear()
        for document in change.upserts:
            self.documents[document.key] = document
        for gone in change.deletes:
            del self.documents[gone]
        for instance in change.instances:
            self.instances[instance.namespace, instance.service, instance.instance] = instance
        for name in change.gone_instances:
            del self.instances[name]
        self.problems = change.problems
        if change.policy is not None:
            self.policy = change.policy

    def notes(self) -> dict[str, str]:
        """Each resource's name and note."""
        return {key.name: document.body["metadata"]["annotations"]["note"] for key, document in self.documents.items()}


async def until(what: str, ready: Callable[[], object], seconds: float = 15.0) -> None:
    """Waits until `ready()` is true."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        await asyncio.sleep(0.005)


def client(url: str, **more: Any) -> Etcd:
    return Etcd(parse_etcd_url(url), **more)

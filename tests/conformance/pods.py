"""What runs a Deployment where there is no Kubernetes: a process for each replica at a loopback address of its own, the Pod that says so,
and the EndpointSlice that leads there."""

from __future__ import annotations

import base64
import datetime
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.store import Body, Kind, Store

WHOAMI = "coredns"
"""Deployments whose image is this one run our small name server; all others the suite's echo program."""


class Pod:
    """One process of a Deployment."""

    def __init__(self, namespace: str, name: str, address: str, deployment: Body, folder: Path) -> None:
        self.namespace = namespace
        self.name = name
        self.address = address
        self.template = deployment["spec"]["template"]
        self.folder = folder
        self.lines: list[tuple[float, str]] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self, binaries: dict[str, Path], files: Callable[[str, str, str], dict[str, bytes] | None]) -> bool:
        """Starts the process; False while something that it mounts is missing."""
        container = self.template["spec"]["containers"][0]
        mounts: dict[str, Path] = {}
        for volume in self.template["spec"].get("volumes") or []:
            source = "Secret" if "secret" in volume else "ConfigMap"
            asked = volume.get("secret") or volume.get("configMap") or {}
            found = files(source, self.namespace, asked.get("secretName") or asked.get("name") or "")
            if found is None:
                return False
            where = self.folder / volume["name"]
            where.mkdir(parents=True, exist_ok=True)
            names = {item["key"]: item["path"] for item in asked.get("items") or []} or {name: name for name in found}
            for key, path in names.items():
                (where / path).write_bytes(found[key])
            mounts[volume["name"]] = where
        environment = {**os.environ, "POD_IP": self.address}
        for item in container.get("env") or []:
            field = ((item.get("valueFrom") or {}).get("fieldRef") or {}).get("fieldPath")
            value = {"metadata.name": self.name, "metadata.namespace": self.namespace, "status.podIP": self.address}.get(field or "")
            text = value if value is not None else item.get("value", "")
            for mount in container.get("volumeMounts") or []:
                text = text.replace(mount["mountPath"] + "/", f"{mounts.get(mount['name'], '')}/")
            environment[item["name"]] = text
        program = binaries["whoami" if WHOAMI in container["image"] else "echo-basic"]
        self.process = subprocess.Popen(
            [program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
        )
        threading.Thread(target=self._read, daemon=True).start()
        return True

    def _read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.time(), line))

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Pods:
    """Owns the pods of a store's Deployments. Called by one thread."""

    def __init__(self, store: Store, kinds: dict[str, Kind], binaries: dict[str, Path]) -> None:
        self.store = store
        self.kinds = kinds
        self.binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="tollhouse-pods-"))
        self.pods: dict[tuple[str, str], list[Pod]] = {}
        self.number = 0

    def sync(self) -> None:
        """Starts and ends pods as Deployments say, and writes the EndpointSlices of Services with a selector."""
        deployments = {(body["metadata"]["namespace"], body["metadata"]["name"]): body for body in self.store.all(self.kinds["Deployment"])}
        for place in [place for place in self.pods if place not in deployments]:
            for pod in self.pods.pop(place):
                pod.stop()
                self.store.delete(self.kinds["Pod"], pod.namespace, pod.name)
        for (namespace, name), body in deployments.items():
            pods = self.pods.setdefault((namespace, name), [])
            wanted = body["spec"].get("replicas", 1)
            while len(pods) < wanted:
                self.number += 1
                address = f"127.77.{self.number // 250}.{self.number % 250 + 1}"
                pod = Pod(namespace, f"{name}-0-{len(pods)}", address, body, self.folder / f"{namespace}-{name}-{len(pods)}")
                pods.append(pod)
            for pod in pods:
                if pod.process is None and pod.start(self.binaries, self._files):
                    self._show(pod)
        self._slices()

    def _files(self, kind: str, namespace: str, name: str) -> dict[str, bytes] | None:
        body = self.store.get(self.kinds[kind], namespace, name)
        if body is None:
            return None
        data = body.get("data") or {}
        return {key: base64.b64decode(text) if kind == "Secret" else text.encode() for key, text in data.items()}

    def _show(self, pod: Pod) -> None:
        labels = pod.template["metadata"].get("labels") or {}
        containers = [{"name": item["name"], "image": item["image"]} for item in pod.template["spec"]["containers"]]
        conditions = [{"type": name, "status": "True"} for name in ("Initialized", "Ready", "ContainersReady", "PodScheduled")]
        status = {"phase": "Running", "podIP": pod.address, "podIPs": [{"ip": pod.address}], "conditions": conditions}
        meta = {"name": pod.name, "labels": labels}
        self.store.create(self.kinds["Pod"], pod.namespace, {"metadata": meta, "spec": {"containers": containers}, "status": status})

    def _slices(self) -> None:
        kind = self.kinds["EndpointSlice"]
        wanted: dict[tuple[str, str], Body] = {}
        for service in self.store.all(self.kinds["Service"]):
            namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
            selector = service["spec"].get("selector")
            if not selector:
                continue
            chosen = [
                pod
                for pods in self.pods.values()
                for pod in pods
                if pod.namespace == namespace
                and pod.process is not None
                and selector.items() <= (pod.template["metadata"].get("labels") or {}).items()
            ]
            ports = [
                {"name": port.get("name", ""), "port": port.get("targetPort", port["port"]), "protocol": port.get("protocol", "TCP")}
                for port in service["spec"].get("ports") or []
            ]
            wanted[namespace, f"{name}-pods"] = {
                "metadata": {"name": f"{name}-pods", "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [pod.address], "conditions": {"ready": True}} for pod in chosen],
                "ports": ports,
            }
        for body in self.store.all(kind):
            place = (body["metadata"]["namespace"], body["metadata"]["name"])
            if place[1].endswith("-pods") and place not in wanted:
                self.store.delete(kind, *place)
        for (namespace, name), body in wanted.items():
            before = self.store.get(kind, namespace, name)
            if before is None:
                self.store.create(kind, namespace, body)
            elif any(before[part] != body[part] for part in ("endpoints", "ports")):
                self.store.replace(kind, namespace, name, {**before, **body, "metadata": before["metadata"]})

    def logs(self, namespace: str, name: str, since: str) -> str:
        """What a pod printed since a time."""
        start = datetime.datetime.fromisoformat(since.replace("Z", "+00:00")).timestamp() if since else 0.0
        found: list[Any] = [pod for pods in list(self.pods.values()) for pod in pods if (pod.namespace, pod.name) == (namespace, name)]
        return "".join(line for pod in found for at, line in list(pod.lines) if at >= start)

    def close(self) -> None:
        """Ends all pods."""
        for pods in self.pods.values():
            for pod in pods:
                pod.stop()

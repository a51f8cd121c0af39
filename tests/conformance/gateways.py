"""Keeps a directory of manifests equal to the store, one `tollhouse gateway` for each Gateway of ours over it, and the objects' status as
`tollhouse get` shows it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.conformance.pods import Pods
from tests.conformance.store import Body, Kind, Place, Store

PLAIN = ("Namespace", "Service", "Secret", "ConfigMap", "EndpointSlice")
SETTLE = 0.05
"""Seconds without a change before the directory is written."""


class Process:
    """The `tollhouse gateway` of one Gateway. Started again when it ends, as a unit of systemd is."""

    def __init__(self, key: str, config: Path, own: str, number: int, log: Path) -> None:
        """`own`: an address that the Gateway names itself, if it does."""
        bound = bool(own)
        address = own or f"127.88.0.{number}"
        self.address = address
        self.admin = f"127.88.0.{number}:15000"
        self.log = log
        self.command = [sys.executable, "-m", "tollhouse", "gateway", key, "--config", str(config), "--admin", self.admin, "--drain", "1s"]
        if not bound:
            self.command += ["--address", address]
        self.process: subprocess.Popen[bytes] | None = None
        self.next = 0.0

    def keep(self, now: float) -> None:
        """Starts it if it is not running, a moment after it ended."""
        if self.process is not None and self.process.poll() is None:
            return
        if now >= self.next:
            self.next = now + 2.0
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def status(self, namespace: str, name: str) -> Body | None:
        """The status of its Gateway, as its admin page has it; None while there is none."""
        try:
            with urllib.request.urlopen(f"http://{self.admin}/status", timeout=2) as page:
                said = json.load(page)
        except (OSError, ValueError):
            return None
        wanted = {"kind": "Gateway", "namespace": namespace, "name": name}
        return next((each["status"] for each in said["resources"] if each.items() >= wanted.items()), None)

    def stop(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Cluster:
    """Owns the thread that follows the store. What it needs is started by `start` and ended by `close`."""

    def __init__(self, store: Store, kinds: list[Kind], binaries: dict[str, Path], class_name: str, folder: Path) -> None:
        self.store = store
        self.kinds = {kind.kind: kind for kind in reversed(kinds)}
        self.pods = Pods(store, self.kinds, binaries)
        self.class_name = class_name
        self.folder = folder
        self.config = folder / "config"
        self.config.mkdir(parents=True)
        (folder / "logs").mkdir()
        self.families = {Store.family(kind) for kind in kinds if kind.kind in PLAIN or kind.group == "gateway.networking.k8s.io"}
        self.written: dict[Place, str] = {}
        self.gateways: dict[tuple[str, str], Process] = {}
        self.telling: set[tuple[str, str]] = set()
        """Gateways whose process told their status when it was last asked."""
        self.number = 0
        self.problem = ""
        self._dirty = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        store.changed = self._changed

    def start(self) -> None:
        """Begins to follow the store."""
        self._thread.start()

    def close(self) -> None:
        """Ends everything that was started."""
        self._over = True
        self._dirty.set()
        self._thread.join()
        for process in self.gateways.values():
            process.stop()
        self.pods.close()

    def _changed(self, family: str) -> None:
        if threading.current_thread() is not self._thread:
            self._dirty.set()

    def _run(self) -> None:
        while not self._over:
            changed = self._dirty.wait(0.3)
            if changed:
                while self._dirty.is_set():
                    self._dirty.clear()
                    time.sleep(SETTLE)
            try:
                if changed:
                    self.pods.sync()
                    self._write()
                self._keep_gateways()
                self._show_gateways()
                if changed or self.problem:
                    self._show()
            except Exception as problem:
                print(f"the cluster: {type(problem).__name__}: {problem}", file=sys.stderr)
                self.problem = str(problem)

    def _write(self) -> None:
        """Every object as one file; each is replaced at once, whole."""
        wanted: dict[Place, str] = {}
        for place, body in self.store.every():
            if place[0] in self.families:
                body.pop("status", None)
                meta = body["metadata"]
                wanted[place] = json.dumps({**body, "metadata": {k: v for k, v in meta.items() if k != "resourceVersion"}})
        for place in [place for place in self.written if place not in wanted]:
            self._path(place).unlink()
            del self.written[place]
        for place, text in wanted.items():
            if self.written.get(place) != text:
                path = self._path(place)
                with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
                    file.write(text)
                Path(file.name).rename(path)
                self.written[place] = text

    def _path(self, place: Place) -> Path:
        family, namespace, name = place
        return self.config / f"{family.split('.')[0]}-{namespace}-{name}.yaml"

    def _keep_gateways(self) -> None:
        found = {
            (body["metadata"]["namespace"], body["metadata"]["name"]): body
            for body in self.store.all(self.kinds["Gateway"])
            if body["spec"]["gatewayClassName"] == self.class_name
        }
        for place in [place for place in self.gateways if place not in found]:
            self.gateways.pop(place).stop()
        for place, body in found.items():
            if place not in self.gateways:
                self.number += 1
                own = [item.get("value") for item in body["spec"].get("addresses") or []]
                address = next((value for value in own if value), "")
                log = self.folder / "logs" / f"{place[0]}-{place[1]}"
                key = f"{place[0]}/{place[1]}"
                self.gateways[place] = Process(key, self.config, address, self.number, log)
            self.gateways[place].keep(time.monotonic())

    def _show(self) -> None:
        """Puts the status that `tollhouse get` gives into the store's objects."""
        command = [sys.executable, "-m", "tollhouse", "get", "--config", str(self.config), "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        self.problem = "" if done.returncode == 0 else done.stderr
        if not done.stdout:
            raise RuntimeError(f"tollhouse get printed nothing: {done.stderr[-500:]}")
        said: Any = json.loads(done.stdout)
        for body in said if isinstance(said, list) else said.get("items", [said]):
            kind = self.kinds.get(body.get("kind", ""))
            if kind is None or not body.get("status") or kind.group != "gateway.networking.k8s.io":
                continue
            meta = body["metadata"]
            namespace, name = meta.get("namespace", "") if kind.namespaced else "", meta["name"]
            before = self.store.get(kind, namespace, name)
            status = body["status"]
            if before is None or before["metadata"]["generation"] != meta.get("generation"):
                continue
            if kind.kind == "Gateway" and (namespace, name) in self.telling:
                continue
            self._put_status(kind, namespace, name, before, status)

    def _show_gateways(self) -> None:
        """The status of each Gateway whose process runs is what that process says: it knows what it can serve."""
        kind = self.kinds["Gateway"]
        self.telling.clear()
        for (namespace, name), process in self.gateways.items():
            status = process.status(namespace, name)
            before = self.store.get(kind, namespace, name)
            if status is None or before is None:
                continue
            self.telling.add((namespace, name))
            if all(each["observedGeneration"] == before["metadata"]["generation"] for each in status["conditions"]):
                self._put_status(kind, namespace, name, before, status)

    def _put_status(self, kind: Kind, namespace: str, name: str, before: Body, status: Body) -> None:
        if kind.kind == "Gateway" and (namespace, name) in self.gateways and not status.get("addresses"):
            status["addresses"] = [{"type": "IPAddress", "value": self.gateways[namespace, name].address}]
        if before.get("status") != status:
            self.store.replace(kind, namespace, name, {"status": status}, status=True)


def gateway_class(name: str, controller: str) -> Body:
    """The class whose Gateways are run."""
    return {"metadata": {"name": name}, "spec": {"controllerName": controller}}

"""A concurrency limit of a fleet: real gateways on a real Redis, before a service that answers when it is told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import servers
from tests.servers import wait_for

GROUP = "gateway.networking.k8s.io"
MOST = 4


class Upstream:
    """Counts the requests in progress, and answers them when `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.now = self.worst = self.done = 0
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while connection.recv(65536):
                with self._lock:
                    self.now += 1
                    self.worst = max(self.worst, self.now)
                while not self.go.wait(0.02):
                    connection.setblocking(False)
                    try:
                        ended = not connection.recv(1, socket.MSG_PEEK)
                    except BlockingIOError:
                        ended = False
                    except OSError:
                        ended = True
                    connection.setblocking(True)
                    if ended:
                        break
                with self._lock:
                    self.now -= 1
                    self.done += 1
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                except OSError:
                    return

    def close(self) -> None:
        self.go.set()
        self._server.close()


def mesh(port: int, upstream: int) -> list[dict[str, Any]]:
    made = lambda version, kind, spec: {  # noqa: E731
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": "a", **({} if kind == "GatewayClass" else {"namespace": "edge"})},
        **spec,
    }
    slice_ = made("discovery.k8s.io/v1", "EndpointSlice", {"addressType": "IPv4", "ports": [{"port": upstream}]})
    slice_["metadata"]["labels"] = {"kubernetes.io/service-name": "a"}
    slice_["endpoints"] = [{"addresses": ["127.0.0.1"]}]
    listener = {"name": "http", "port": port, "protocol": "HTTP"}
    target = {"group": GROUP, "kind": "HTTPRoute", "name": "a"}
    limits = [{"name": "at-once", "per": [{"header": "x-key"}], "concurrency": MOST}]
    return [
        made(f"{GROUP}/v1", "GatewayClass", {"spec": {"controllerName": "tollhouse.dev/gateway-controller"}}),
        made(f"{GROUP}/v1", "Gateway", {"spec": {"gatewayClassName": "a", "listeners": [listener]}}),
        made("v1", "Service", {"spec": {"ports": [{"port": 80}]}}),
        slice_,
        made(
            f"{GROUP}/v1", "HTTPRoute", {"spec": {"parentRefs": [{"name": "a"}], "rules": [{"backendRefs": [{"name": "a", "port": 80}]}]}}
        ),
        made("tollhouse.dev/v1", "QuotaPolicy", {"spec": {"targetRefs": [target], "timeout": "1s", "limits": limits}}),
    ]


class Fleet:
    """Gateways, a Redis and an upstream."""

    def __init__(self, folder: Path, redis: str, count: int) -> None:
        self.redis, self.config = redis, folder / "0"
        self.upstream = Upstream()
        self.ports: list[int] = []
        self.admins: list[int] = []
        self.processes: list[servers.Process] = []
        for number in range(count):
            port, admin = servers.free_port(), servers.free_port()
            config = folder / str(number)
            config.mkdir()
            (config / "mesh.yaml").write_text(yaml.safe_dump_all(mesh(port, self.upstream.port)))
            words = ["gateway", "edge/a", "--config", str(config), "--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}"]
            ready = lambda admin=admin: servers.fetched(f"http://127.0.0.1:{admin}/readyz")  # noqa: E731
            process = servers.tollhouse(*words, "--redis", redis, "--access-log", "off", ready=ready, name="gateway")
            self.processes.append(process)
            process.start()
            self.ports.append(port)
            self.admins.append(admin)

    def begin(self, port: int, key: str) -> socket.socket:
        """Sends a request."""
        made = socket.create_connection(("127.0.0.1", port), timeout=20)
        made.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx-key: %b\r\n\r\n" % key.encode())
        return made

    def quota(self, *words: str) -> Any:
        """What `tollhouse quota` says."""
        done = subprocess.run(
            [sys.executable, "-m", "tollhouse", "quota", *words, "-o", "json"], capture_output=True, text=True, check=True, timeout=60
        )
        return json.loads(done.stdout)

    def get(self, key: str) -> Any:
        """What Redis has of a key."""
        return self.quota("get", "edge/a/at-once", key, "--config", str(self.config), "--redis", self.redis)

    def close(self) -> None:
        """Ends all."""
        self.upstream.close()
        for process in self.processes:
            process.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with servers.redis() as redis:
        made = Fleet(tmp_path_factory.mktemp("slots"), redis.url + "?start=full", 3)
        try:
            yield made
        finally:
            made.close()


def answered(made: socket.socket) -> int:
    """The status of the answer."""
    with made:
        return int(made.recv(4096).split()[1])


def test_a_fleet_has_no_more_in_progress_than_the_limit_and_gives_all_back(fleet: Fleet) -> None:
    upstream = fleet.upstream
    begun = [fleet.begin(port, "one") for _ in range(4) for port in fleet.ports]
    wait_for("the slots", lambda: upstream.now == MOST)
    (shown,) = fleet.quota("top", *[word for admin in fleet.admins for word in ("--admin", f"127.0.0.1:{admin}")])
    assert (shown["limit"], shown["inUse"], shown["concurrency"], shown["gateways"]) == ("edge/a/at-once", MOST, MOST, 3)
    assert shown["refused"] == len(begun) - MOST
    got = fleet.get("one")
    assert (got["onLease"], got["left"], got["concurrency"]) == (MOST, 0, MOST)
    upstream.go.set()
    statuses = sorted(answered(each) for each in begun)
    assert statuses == [200] * MOST + [429] * (len(begun) - MOST)
    passed = 0
    end = time.monotonic() + 10.0
    while passed < 60:  # short ones, from all sides
        assert time.monotonic() < end
        rush = [fleet.begin(port, "one") for port in fleet.ports for _ in range(3)]
        passed += [answered(each) for each in rush].count(200)
    assert upstream.worst == MOST
    wait_for("all slots", lambda: fleet.get("one")["left"] == MOST)
    upstream.go.clear()


def test_the_slots_of_a_gateway_that_dies_come_back_at_the_end_of_its_lease(fleet: Fleet) -> None:
    upstream = fleet.upstream
    begun = [fleet.begin(fleet.ports[2], "two") for _ in range(MOST)]
    wait_for("the slots", lambda: upstream.now == MOST)
    fleet.processes[2].kill()
    for each in begun:
        each.close()
    began = time.monotonic()
    assert answered(fleet.begin(fleet.ports[0], "two")) == 429
    wait_for("the end of the lease", lambda: fleet.get("two")["left"] == MOST, 20)
    assert time.monotonic() - began < 15
    upstream.go.set()
    assert answered(fleet.begin(fleet.ports[0], "two")) == 200

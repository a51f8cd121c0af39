"""Several workers behind one address: replaced one by one, started again when they die, one metrics page, gone with their parent."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPSConnection
from pathlib import Path

import pytest
import yaml

from identity.ca import Authority, write_identity
from tests import servers
from tollhouse.sockets import bind, hand_over, inherited

EXAMPLE = Path(__file__).resolve().parents[2] / "conf" / "examples" / "shop"


class Here(HTTPSConnection):
    """A connection to a host of the mesh, which is on this machine."""

    def connect(self) -> None:
        raw = socket.create_connection(("127.0.0.1", self.port), 15)
        self.sock = self._context.wrap_socket(raw, server_hostname=self.host)  # type: ignore[attr-defined]


class Fleet:
    """A gateway with two workers, an example service behind it, and a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.echo_port, self.admin = (servers.free_port() for _ in range(3))
        authority = Authority.create("shop.example")
        for name, namespace, dns in (("ingress", "edge", ("shop.example",)), ("catalog", "shop", ()), ("web", "shop", ())):
            write_identity(authority.issue(f"spiffe://shop.example/ns/{namespace}/sa/{name}", dns=dns), folder / name)
        config = folder / "config"
        shutil.copytree(EXAMPLE, config, ignore=shutil.ignore_patterns("policy"))
        self.gateways = config / "gateways.yaml"
        self.listen(self.port)
        services = config / "services.yaml"
        services.write_text(
            services.read_text().replace("port: 9101", f"port: {self.echo_port}").replace("port: 9102", f"port: {self.echo_port}")
        )
        mesh = list(yaml.safe_load_all((config / "mesh.yaml").read_text()))
        mesh[0]["spec"].pop("defaultAccessPolicy")
        (config / "mesh.yaml").write_text(yaml.safe_dump_all([mesh[0]]))
        routes = list(yaml.safe_load_all((config / "routes.yaml").read_text()))
        (config / "routes.yaml").write_text(yaml.safe_dump_all([routes[0]]))
        self.echo = servers.tollhouse(
            "echo", "--name", "catalog", "--listen", f"127.0.0.1:{self.echo_port}", "--identity", str(folder / "catalog"),
            "--gateway", "spiffe://shop.example/ns/edge/sa/ingress", ready=lambda: servers.answers(self.echo_port), name="echo",
        )  # fmt: skip
        self.gateway = servers.tollhouse(
            "gateway", "edge/ingress", "--config", str(config), "--identity", str(folder / "ingress"), "--workers", "2",
            "--admin", f"127.0.0.1:{self.admin}", "--access-log", "off",
            ready=lambda: servers.fetched(f"http://127.0.0.1:{self.admin}/readyz"), name="gateway",
        )  # fmt: skip

    def listen(self, port: int) -> None:
        """Writes the ingress' port."""
        gateways = list(yaml.safe_load_all((EXAMPLE / "gateways.yaml").read_text()))[:2]
        gateways[1]["spec"]["listeners"][0]["port"] = port
        new = self.gateways.with_suffix(".new")
        new.write_text(yaml.safe_dump_all(gateways))
        new.replace(self.gateways)
        self.port = port

    def workers(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.gateway.pid)], capture_output=True, text=True, check=False).stdout
        return sorted(int(pid) for pid in found.split())

    def connection(self) -> HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.folder / "web" / "ca.pem"))
        context.load_cert_chain(self.folder / "web" / "cert.pem", self.folder / "web" / "key.pem")
        return Here("shop.example", self.port, context=context, timeout=15)

    def ask(self, connection: HTTPSConnection) -> int:
        connection.request("GET", "/catalog/1")
        answer = connection.getresponse()
        answer.read()
        if answer.will_close:
            connection.close()
        return answer.status

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5) as page:
            text = page.read().decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    try:
        made.echo.start()
        made.gateway.start()
        yield made
    finally:
        made.gateway.close()
        made.echo.close()


class Load(threading.Thread):
    """Asks without pause, with connections that are kept and connections that are new."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(daemon=True)
        self.fleet = fleet
        self.done = threading.Event()
        self.statuses: list[int] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.done.is_set():
            connection = self.fleet.connection()
            try:
                for _ in range(10):
                    self.statuses.append(self.fleet.ask(connection))
            except OSError as problem:
                self.failures.append(repr(problem))
            finally:
                connection.close()


def test_workers_are_replaced_under_load_without_a_failure(fleet: Fleet) -> None:
    before = fleet.workers()
    assert len(before) == 2
    loads = [Load(fleet) for _ in range(3)]
    for load in loads:
        load.start()
    fleet.gateway.signal(signal.SIGUSR2)
    servers.wait_for("new workers", lambda: len(fleet.workers()) == 2 and not set(fleet.workers()) & set(before), 60)
    for load in loads:
        load.done.set()
        load.join(30)
    assert not [failure for load in loads for failure in load.failures]
    assert {status for load in loads for status in load.statuses} == {200}
    assert sum(len(load.statuses) for load in loads) > 20


def test_a_worker_that_dies_is_started_again_on_the_same_sockets(fleet: Fleet) -> None:
    os.kill(fleet.workers()[0], signal.SIGKILL)
    servers.wait_for(
        "another worker", lambda: fleet.metric("tollhouse_workers") == 2 and fleet.metric("tollhouse_worker_restarts_total") == 1, 30
    )
    assert fleet.ask(fleet.connection()) == 200


def test_one_page_adds_the_workers_up(fleet: Fleet) -> None:
    for _ in range(12):  # each on a connection of its own, so that both workers have some
        assert fleet.ask(fleet.connection()) == 200
    servers.wait_for("twelve requests on the page", lambda: fleet.metric("istio_requests_total") == 12)
    with urllib.request.urlopen(f"http://127.0.0.1:{fleet.admin}/status", timeout=5) as page:
        assert json.loads(page.read())["gateways"][0]["gateway"] == "edge/ingress"


def test_another_port_means_other_sockets(fleet: Fleet) -> None:
    old = fleet.port
    fleet.listen(servers.free_port())
    servers.wait_for("the new port", lambda: servers.answers(fleet.port), 30)
    assert fleet.ask(fleet.connection()) == 200

    def refused() -> bool:
        try:
            return not servers.answers(old)
        except ConnectionRefusedError:
            return True

    servers.wait_for("the old port to be closed", refused, 60)


def test_workers_end_with_their_parent(fleet: Fleet) -> None:
    workers = fleet.workers()
    fleet.gateway.kill()
    servers.wait_for("the workers to end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)


def test_quotas_of_several_workers_need_a_store_that_they_share(tmp_path: Path) -> None:
    made = Fleet(tmp_path)
    for name in ("routes.yaml", "mesh.yaml"):
        shutil.copy(EXAMPLE / name, made.folder / "config" / name)
    with pytest.raises(AssertionError, match=r"quotas need"):
        made.gateway.start()
    made.gateway.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_sockets_are_handed_over(kind: socket.SocketKind) -> None:
    first = bind(("127.0.0.1", 0, kind), shared=True)
    where = (*first.getsockname(), kind)
    second = bind(where, shared=True)
    environment, numbers = hand_over([first, second])
    assert numbers == (first.fileno(), second.fileno())
    taken = inherited({**environment, "TOLLHOUSE_SOCKETS": str(os.dup(first.fileno()))})
    assert set(taken) == {where}
    for each in (first, second, *taken.values()):
        each.close()
    with pytest.raises(OSError, match="in use") as refused, bind(("127.0.0.1", 0, kind), shared=False) as alone:
        bind((*alone.getsockname(), kind), shared=False)
    assert refused.value.filename.startswith("127.0.0.1:")

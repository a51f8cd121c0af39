from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from telemetry_world import an_outcome, of

from telemetry.admin import MAX_CONNECTIONS, Admin, AdminError, serve_admin
from telemetry.notify import Notifier
from telemetry.record import Telemetry

Scene = Callable[[Admin, Telemetry], Awaitable[None]]


async def ask(address: str, request: str) -> tuple[int, dict[str, str], bytes]:
    if address.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(address)
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.write(request.encode("latin-1"))
    async with asyncio.timeout(10):
        data = await reader.read()
    writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return int(first.split(" ")[1]), dict(line.split(": ", 1) for line in rest), body


def get(path: str, host: str = "127.0.0.1:9901", method: str = "GET") -> str:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"


def play(scene: Scene, host: str = "127.0.0.1", ready: tuple[bool, str] = (True, ""), **options: object) -> None:
    async def broken() -> bytes:
        raise RuntimeError("secret")

    async def later() -> bytes:
        await asyncio.sleep(0)
        return b'{"later":1}'

    async def run() -> None:
        telemetry = Telemetry()
        telemetry.record(an_outcome())
        extra = {"/stats": lambda: b'{"a":1}', "/broken": broken, "/later": later}
        admin = await serve_admin(host, 0, telemetry, lambda: b'{"version":"1"}', lambda: ready, extra, **options)  # type: ignore[arg-type]
        try:
            await scene(admin, telemetry)
        finally:
            await admin.close()

    asyncio.run(run())


def test_it_shows_what_it_should() -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        status, headers, body = await ask(admin.address, get("/metrics"))
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert of(body, "istio_requests_total") == 1
        assert (await ask(admin.address, get("/healthz")))[0] == 200
        assert (await ask(admin.address, get("/readyz")))[2] == b"ready\n"
        status, headers, body = await ask(admin.address, get("/config?pretty"))
        assert (status, headers["content-type"], json.loads(body)) == (200, "application/json", {"version": "1"})
        assert headers["content-length"] == str(len(body))
        assert (await ask(admin.address, get("/stats")))[2] == b'{"a":1}'
        assert (await ask(admin.address, get("/later")))[2] == b'{"later":1}'
        assert (await ask(admin.address, get("/config", method="HEAD")))[2] == b""
        status, _, body = await ask(admin.address, get("/nowhere"))
        assert status == 404
        assert b"/metrics" in body

    play(scene)


def test_not_ready_says_why() -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        status, _, body = await ask(admin.address, get("/readyz"))
        assert (status, body) == (503, b"not ready: no configuration yet\n")

    play(scene, ready=(False, "no configuration yet"))


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (get("/metrics", "evil.example"), 421),
        (get("/metrics", "evil.example:9901"), 421),
        (get("/metrics", "localhost.evil.example"), 421),
        (get("/metrics", "127.0.0.1.evil.example"), 421),
        (get("/metrics", ""), 421),
        (get("/metrics", "localhost:9901"), 200),
        (get("/metrics", "LOCALHOST"), 200),
        (get("/metrics", "[::1]:9901"), 200),
        ("GET /metrics HTTP/1.1\r\n\r\n", 400),
        ("GET /metrics HTTP/1.0\r\n\r\n", 200),
        ("GET /metrics HTTP/1.1\r\nHost: localhost\r\nhost: evil.example\r\n\r\n", 400),
        (get("/config", method="POST"), 405),
        (get("/config", method="DELETE"), 405),
        ("nonsense\r\n\r\n", 400),
        ("GET http://localhost/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost: localhost\r\nx: " + "y" * 9000 + "\r\n\r\n", 431),
        (get("/broken"), 500),
    ],
)
def test_odd_requests_get_what_they_should(request_text: str, status: int) -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        found, _, body = await ask(admin.address, request_text)
        assert found == status
        assert b"secret" not in body

    play(scene)


def test_names_of_its_own_are_answered_to() -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        assert (await ask(admin.address, get("/healthz", "gateway-1.example")))[0] == 200
        assert (await ask(admin.address, get("/healthz", "evil.example")))[0] == 421

    play(scene, names=["gateway-1.example"])


def test_connections_are_bounded_and_the_silent_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telemetry.admin.READ_TIMEOUT", 0.3)

    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        host, _, port = admin.address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS + 5)]
        async with asyncio.timeout(10):
            for reader, writer in silent:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
                writer.close()
        assert (await ask(admin.address, get("/healthz")))[0] == 200

    play(scene)


def test_it_serves_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()

    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        assert admin.address == str(path)
        assert path.stat().st_mode & 0o007 == 0
        assert (await ask(str(path), get("/healthz", "whatever.example")))[0] == 200
        with pytest.raises(AdminError, match="another process"):
            await serve_admin(str(path), 0, telemetry, lambda: b"", lambda: (True, ""))

    play(scene, host=str(path))
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(AdminError, match="a file of that name"):
        play(scene, host=str(path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", ""])
def test_it_stays_on_loopback(host: str) -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        raise AssertionError(admin.address)

    with pytest.raises(AdminError, match="loopback"):
        play(scene, host=host)


def test_elsewhere_only_when_told() -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        port = admin.address.rpartition(":")[2]
        assert (await ask(f"127.0.0.1:{port}", get("/healthz", "gateway-1.example")))[0] == 200

    play(scene, host="0.0.0.0", allow_remote=True)


def test_a_port_in_use_is_one_line() -> None:
    async def scene(admin: Admin, telemetry: Telemetry) -> None:
        port = int(admin.address.rpartition(":")[2])
        with pytest.raises(AdminError, match="choose another"):
            await serve_admin("127.0.0.1", port, telemetry, lambda: b"", lambda: (True, ""))

    play(scene)


@pytest.fixture
def systemd(tmp_path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.settimeout(5)
    return listening


def test_systemd_is_told(systemd: socket.socket) -> None:
    notify = Notifier({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())})
    assert notify.watchdog == 5
    notify.ready("serving\nedge/ingress")
    assert systemd.recv(1000) == b"READY=1\nSTATUS=serving edge/ingress"
    notify.reloading()
    assert systemd.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    notify.alive()
    assert systemd.recv(1000) == b"WATCHDOG=1"
    notify.status("stale")
    assert systemd.recv(1000) == b"STATUS=stale"
    notify.stopping()
    assert systemd.recv(1000) == b"STOPPING=1"
    notify.extend(2.5)
    assert systemd.recv(1000) == b"EXTEND_TIMEOUT_USEC=2500000"
    systemd.close()


def test_an_abstract_socket_is_understood() -> None:
    name = f"tollhouse-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name)
        listening.settimeout(5)
        Notifier({"NOTIFY_SOCKET": "@" + name}).ready()
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "environment",
    [{}, {"NOTIFY_SOCKET": "/nowhere/notify"}, {"WATCHDOG_USEC": "nonsense"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}],
)
def test_without_systemd_nothing_happens(environment: dict[str, str]) -> None:
    notify = Notifier(environment)
    notify.ready()
    notify.alive()
    assert notify.watchdog == 0

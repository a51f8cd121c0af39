"""Real servers for the tests: each is started on a free loopback port, waited for, and ended by its pid.

with servers.etcd() as etcd, servers.redis() as redis:
    ... etcd.url ... redis.url ... redis.stop(); redis.start() ...
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import install


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens at, below the range from which the system takes ports for outgoing connections."""
    while True:
        port = random.randrange(12000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_for(what: str, ready: Callable[[], object], seconds: float = 20.0) -> None:
    """Polls `ready` until it is true; fails with `what` after `seconds`. An OSError counts as not yet."""
    end = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < end:
        try:
            if ready():
                return
        except OSError as problem:
            last = problem
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}" + (f": {last}" if last else ""))


def answers(port: int) -> bool:
    """Whether something accepts connections at a loopback port."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


class Process:
    """One program that a test started. `command` may be started again after `stop` or `kill`."""

    def __init__(self, command: Sequence[str], *, ready: Callable[[], object], name: str, env: dict[str, str] | None = None) -> None:
        self.command = list(command)
        self.name = name
        self.ready = ready
        self.env = {**os.environ, **(env or {})}
        self.folder = Path(tempfile.mkdtemp(prefix=f"tollhouse-{name}-"))
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Starts it and waits until it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, env=self.env)
        process = self.process

        def up() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {process.returncode}:\n{self.output()[-3000:]}")
            return bool(self.ready())

        wait_for(self.name, up)

    def stop(self, seconds: float = 15.0) -> int:
        """Asks it to end (SIGTERM) and waits; kills it after `seconds`. Returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"{self.name} did not end within {seconds} s of SIGTERM:\n{self.output()[-3000:]}") from None
        return self.process.returncode

    def kill(self) -> None:
        """Ends it at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal (SIGSTOP freezes it, SIGCONT lets it go on)."""
        os.kill(self.pid, number)

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        """Ends it whatever it does and takes its folder away."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Server(Process):
    """A process that listens at one loopback port."""

    def __init__(
        self,
        name: str,
        port: int,
        command: Sequence[str],
        url: str,
        ready: Callable[[], object] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        super().__init__(command, ready=ready or (lambda: answers(port)), name=name, env=env)
        self.port = port
        self.url = url


def fetched(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    with urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Starts a server and closes it in the end."""
    try:
        server.start()
        yield server
    finally:
        server.close()


@contextmanager
def etcd(*arguments: str, port: int | None = None, fsync: bool = False) -> Iterator[Server]:
    """A single etcd member without TLS (`.url` is `http://127.0.0.1:PORT`); its data outlives `stop`/`start`. `fsync`: as in earnest."""
    client, peer = port or free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-etcd-data-"))
    command = [
        str(install.install("etcd")), "--name=one", f"--data-dir={folder}", f"--listen-client-urls=http://127.0.0.1:{client}",
        f"--advertise-client-urls=http://127.0.0.1:{client}", f"--listen-peer-urls=http://127.0.0.1:{peer}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}", f"--initial-cluster=one=http://127.0.0.1:{peer}", "--log-level=error",
        *([] if fsync else ["--unsafe-no-fsync"]), *arguments,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{client}"
    try:
        with running(Server("etcd", client, command, url, lambda: fetched(url + "/health"))) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


REDIS_SERVERS = ("redis-server", "redis-server-7.0", "redis-server-8.2", "valkey-server-8.1", "valkey-server-9.1")
"""What speaks Redis' protocol, as `tests.install` names it: Redis 6.2 and later ones, and Valkey."""


def redis_program(name: str = "") -> str:
    """The path of a server of `REDIS_SERVERS`; of the one that `$TOLLHOUSE_REDIS_SERVER` is, or else Redis 6.2, when none is named."""
    return str(install.install(name)) if name else os.environ.get("TOLLHOUSE_REDIS_SERVER") or str(install.install("redis-server"))


@contextmanager
def redis(*arguments: str, port: int | None = None, wrapper: Sequence[str] = (), program: str = "") -> Iterator[Server]:
    """A Redis without persistence (`.url` is `redis://127.0.0.1:PORT/0`). `wrapper`: what runs it; `program`: as `redis_program`."""
    number = port or free_port()
    command = [
        *wrapper,
        redis_program(program),
        "--port",
        str(number),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        *arguments,
    ]
    with running(Server("redis", number, command, f"redis://127.0.0.1:{number}/0")) as server:
        yield server


@contextmanager
def opa(*arguments: str, port: int | None = None) -> Iterator[Server]:
    """An OPA server (`opa run --server`); `arguments` are more flags, or files and bundles to load."""
    number = port or free_port()
    url = f"http://127.0.0.1:{number}"
    command = [
        str(install.install("opa")),
        "run",
        "--server",
        f"--addr=127.0.0.1:{number}",
        "--log-level=error",
        "--disable-telemetry",
        *arguments,
    ]
    with running(Server("opa", number, command, url, lambda: fetched(url + "/health"))) as server:
        yield server


@contextmanager
def envoy(config: str, port: int, *arguments: str) -> Iterator[Server]:
    """A real Envoy with the given bootstrap (YAML text) that listens at `port`."""
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-envoy-"))
    path = folder / "envoy.yaml"
    path.write_text(config)
    command = [
        str(install.install("envoy")),
        "-c",
        str(path),
        "--log-level",
        "warn",
        "--disable-hot-restart",
        "--concurrency",
        "1",
        *arguments,
    ]
    try:
        with running(Server("envoy", port, command, f"http://127.0.0.1:{port}")) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tollhouse(*arguments: str, ready: Callable[[], object], name: str = "tollhouse", env: dict[str, str] | None = None) -> Process:
    """A Tollhouse process (not started yet), run by the interpreter that runs the tests. Whoever runs those in the background may have
    SIGINT ignored, which would be inherited."""
    return Process(["env", "--default-signal=INT", sys.executable, "-m", "tollhouse", *arguments], ready=ready, name=name, env=env)

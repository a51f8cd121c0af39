"""Builds what the measurements need beside the tests' servers: the load tool and the peers."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from tests import install

HERE = Path(__file__).resolve().parent
PACKAGES = {"tool": ".", "authz": ".", "ratelimit": "github.com/envoyproxy/ratelimit/src/service_cmd"}


def binary(name: str) -> Path:
    """The Go program in `bench/<name>`, built first if its sources have changed."""
    folder = HERE / name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.go"), folder / "go.mod", folder / "go.sum"]):
        if path.exists():
            digest.update(path.read_bytes())
    place = install.cache() / "bin" / f"bench-{name}-{digest.hexdigest()[:12]}"
    if not place.exists():
        install.say(f"{name}: building with Go")
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            out = Path(scratch) / name
            subprocess.run([install.go(), "build", "-trimpath", "-ldflags=-s -w", "-o", str(out), PACKAGES[name]], cwd=folder, check=True)
            out.replace(place)
    return place

"""Builds the suite and its helpers with Go, once for each state of their sources, into the cache of test tools."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from tests import install

SOURCES = Path(__file__).resolve().parent / "suite"
ECHO = "sigs.k8s.io/gateway-api/conformance"
BINDS = {
    "echo-basic.go": ('fmt.Sprintf(":%s",', 'fmt.Sprintf(os.Getenv("POD_IP")+":%s",'),
    "tcpserver/tcpserver.go": ('fmt.Sprintf(":%s",', 'fmt.Sprintf(os.Getenv("POD_IP")+":%s",'),
    "grpc/grpc.go": ('fmt.Sprintf("0.0.0.0:%d",', 'fmt.Sprintf(os.Getenv("POD_IP")+":%d",'),
    "udpechoserver/udpechoserver.go": ('":"+port', 'os.Getenv("POD_IP")+":"+port'),
}
"""Where the echo program binds to all addresses, and what it does instead: each pod has one of its own."""


def module(path: str) -> Path:
    """Where the sources of a module that the suite needs are."""
    environment = {**os.environ, "GOFLAGS": "-mod=mod"}
    listed = subprocess.run(
        [install.go(), "list", "-m", "-json", path], cwd=SOURCES, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(listed.stdout)
    if "Dir" not in found:
        subprocess.run([install.go(), "mod", "download", path], cwd=SOURCES, env=environment, check=True)
        return module(path)
    return Path(found["Dir"])


def built() -> dict[str, Path]:
    """The programs `suite`, `echo-basic` and `whoami`."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.rglob("*.go"), SOURCES / "go.mod", SOURCES / "go.sum", Path(__file__)]):
        digest.update(path.read_bytes())
    folder = install.cache() / "conformance" / digest.hexdigest()[:12]
    names = {name: folder / name for name in ("suite", "echo-basic", "whoami")}
    if all(path.exists() for path in names.values()):
        return names
    folder.mkdir(parents=True, exist_ok=True)
    copied = folder / "module"
    shutil.copytree(module(ECHO), copied, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for name, (before, after) in BINDS.items():
        path = copied / "echo-basic" / name
        text = path.read_text()
        if before not in text:
            raise RuntimeError(f"{name} of the echo program no longer has {before}")
        path.write_text(text.replace(before, after))
    # The suite is built from the module as it is, the echo program from the copy.
    (folder / "go.mod").write_text((SOURCES / "go.mod").read_text() + f"\nreplace {ECHO} => {copied}\n")
    shutil.copyfile(SOURCES / "go.sum", folder / "go.sum")
    environment = {**os.environ, "GOFLAGS": ""}
    for name, command in {
        "whoami": ["build", "-o", str(names["whoami"]), "./whoami"],
        "echo-basic": ["build", "-modfile", str(folder / "go.mod"), "-o", str(names["echo-basic"]), f"{ECHO}/echo-basic"],
        "suite": ["test", "-c", "-o", str(names["suite"]), "."],
    }.items():
        print(f"building the conformance suite: {name}", flush=True)
        subprocess.run([install.go(), *command], cwd=SOURCES, env=environment, check=True)
    return names

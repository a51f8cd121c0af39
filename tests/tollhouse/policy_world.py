"""For tests of `tollhouse policy` as an author uses it: the command, OPA, and folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import conf
from tests.install import install

SHOP = Path(conf.__file__).parent / "examples/shop/policy"
WEB = "spiffe://shop.example/ns/shop/sa/web"


def run(*arguments: str | Path, stdin: str = "", where: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tollhouse", "policy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, input=stdin, cwd=where)


def opa(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([install("opa"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def folder(path: Path, text: str, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "a.rego").write_text(text)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path

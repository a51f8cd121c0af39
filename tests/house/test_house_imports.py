"""The house rules that a machine can check: which room may import which, and how large a file may grow."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALL = {"mesh", "telemetry", "identity", "discovery", "pdp", "quota", "gateway", "tollhouse", "conf"}
MAY_IMPORT = {
    "mesh": set(),
    "telemetry": {"mesh"},
    "identity": {"mesh", "telemetry"},
    "discovery": {"mesh", "telemetry"},
    "pdp": {"mesh", "telemetry", "identity"},
    "quota": {"mesh", "telemetry"},
    "gateway": {"mesh", "telemetry", "identity", "discovery", "pdp", "quota"},
    "conf": set(),
    "tollhouse": ALL,
}
"""The plan of the house (docs/architecture.md): arrows go one way; nobody but the command line imports `gateway`."""


def imported(path: Path) -> set[str]:
    """The rooms of ours that a module imports, at its top or anywhere else in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found & (ALL | {"tests", "bench"})


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_rooms_import_only_what_lies_below_them(room: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in (ROOT / room).rglob("*.py")
        for other in imported(path) - MAY_IMPORT[room] - {room}
    }
    assert not wrong


def test_every_room_says_what_it_is_for() -> None:
    for room in MAY_IMPORT:
        assert ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())), f"{room}/__init__.py has no docstring"


def test_files_stay_small_enough_to_hold_in_the_head() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert not long


def test_no_merge_was_left_half_done() -> None:
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    wrong = {
        f"{name}:{number}"
        for name in kept
        if name.endswith((".md", ".py", ".yaml", ".txt", ".cfg", ".toml", ".go", ".rego"))
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if line.startswith(marks)
    }
    assert not wrong

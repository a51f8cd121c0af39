"""Whatever docs/guarantees.md promises has tests, which are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
PROMISES = [line for line in PAGE.split("## Not promised")[0].splitlines() if line.startswith("| ") and "---" not in line][1:]


@pytest.mark.parametrize("promise", PROMISES)
def test_each_promise_is_held_by_a_test(promise: str) -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
    assert tests
    for path, name in tests:
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name} is not there"

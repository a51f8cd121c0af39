"""The limits that users read about are those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from gateway.limits import Limits
from tollhouse.values import LIMIT, limits_of

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", PAGE.partition("## Limits")[2], re.MULTILINE))


def test_every_limit_is_on_the_page_and_none_besides() -> None:
    assert list(ROWS) == list(Limits.__struct_fields__)


@pytest.mark.parametrize(("name", "written"), ROWS.items())
def test_the_defaults_on_the_page_are_the_defaults(name: str, written: str) -> None:
    assert limits_of([LIMIT.convert(f"{name}={written}", None, None)]) == Limits()


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [("buffer=64Ki", "buffer", 65536), ("head=1Mi", "head", 1 << 20), ("idle_stream=1m", "idle_stream", 60.0), ("streams=7", "streams", 7)],
)
def test_values(text: str, name: str, value: float) -> None:
    assert getattr(limits_of([LIMIT.convert(text, None, None)]), name) == value


@pytest.mark.parametrize(
    "text", ["", "buffers=1", "buffer", "buffer=", "buffer=-1", "buffer=0", "buffer=1.5", "idle_stream=5", "idle_stream=0s"]
)
def test_what_is_no_limit_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(click.BadParameter):
        LIMIT.convert(text, None, None)

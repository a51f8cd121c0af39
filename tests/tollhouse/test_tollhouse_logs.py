"""What the command line says about the decision log."""

from __future__ import annotations

import re

import pytest

from tollhouse.logs import DecisionLogOptions, decision_log_options
from tollhouse.output import Complaint


def read(words: list[str]) -> DecisionLogOptions:
    """As a worker reads what its parent tells it."""
    to = tuple(value for name, value in zip(words[::2], words[1::2], strict=True) if name == "--decision-log")
    settings = tuple(value for name, value in zip(words[::2], words[1::2], strict=True) if name == "--decision-log-set")
    return decision_log_options(to, settings)


@pytest.mark.parametrize(
    ("to", "settings"),
    [
        ((), ()),
        (("off",), ()),
        (("-",), ("which=refused",)),
        (("a.log", "-", "https://logs.example/x"), ("input=full", "upload_limit=65536", "token=/t", "ca=/c", "buffer_limit=70000")),
        (("http://127.0.0.1:1",), ("token=/t",)),
    ],
)
def test_workers_are_told_the_same(to: tuple[str, ...], settings: tuple[str, ...]) -> None:
    options = decision_log_options(to, settings)
    assert read(options.arguments()) == options


@pytest.mark.parametrize(
    ("to", "settings", "said"),
    [
        (("off", "a.log"), (), "off goes with nothing else"),
        (("a.log", "a.log"), (), "named twice"),
        (("ftp://x",), (), "not the URL of a server"),
        (("http://u:p@x",), (), "may have no user"),
        (("http://logs.example",), ("token=/t",), "in plaintext, off this machine"),
        (("a.log",), ("token=/t",), "token is about uploads"),
        ((), ("which=all",), "there is no --decision-log"),
        (("a.log",), ("which=some",), "which is all or refused, not 'some'"),
        (("a.log",), ("which",), "not NAME=VALUE"),
        (("a.log",), ("colour=red",), "not NAME=VALUE with a name of which, input"),
        (("https://x",), ("upload_limit=1",), "a number of bytes from 1024"),
        (("https://x",), ("buffer_limit=many",), "a number of bytes from 65536"),
    ],
)
def test_what_is_wrong_is_said(to: tuple[str, ...], settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(Complaint, match=re.escape(said)):
        decision_log_options(to, settings)

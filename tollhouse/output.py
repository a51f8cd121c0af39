"""What the commands print: tables for people, JSON and YAML for programs, and one-line complaints. Colour only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])

NO_TERMINAL = 4000
"""Columns where nobody sees where lines end."""


class Complaint(Exception):
    """Something that the user can put right: printed as one line, without a traceback."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def show(self) -> None:
        """Prints it to standard error."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]tollhouse:[/] {escape(self.message)}")


def console() -> Console:
    """Standard output: colours on a terminal, plain text elsewhere, lines never broken where nobody sees it."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, soft_wrap=True, width=NO_TERMINAL)


def format_option(function: F) -> F:
    """Adds `-o table|json|yaml` to a command."""
    return click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(["table", "json", "yaml"]),
        default="table",
        show_default=True,
        help="How to print the result.",
    )(function)


def emit(form: str, value: Any, rows: Sequence[Sequence[str]], columns: Sequence[str], empty: str = "nothing there") -> None:
    """Prints `value` as JSON or YAML, or `rows` below `columns` as a table."""
    if form == "json":
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
    elif form == "yaml":
        click.echo(to_yaml(value), nl=False)
    elif not rows:
        click.echo(empty)
    else:
        show_table(rows, columns)


def show_table(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Prints a plain table."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in columns:
        table.add_column(name.upper(), overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


def to_yaml(value: Any) -> str:
    """Block-style YAML in the order given."""
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=140)


def plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, for the serialisers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value

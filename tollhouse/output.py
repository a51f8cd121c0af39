"""What the commands print: tables for people, JSON and YAML for programs, and one-line complaints. Colour only on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

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
        name = click.style("tollhouse:", fg="red", bold=True) if coloured(sys.stderr) else "tollhouse:"
        click.echo(f"{name} {self.message}", err=True)


def coloured(stream: Any) -> bool:
    """Whether what is written to `stream` may have colours: on a terminal, where NO_COLOR (no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def console() -> Console:
    """Standard output: colours on a terminal, plain text elsewhere, lines never broken where nobody sees it."""
    from rich.console import Console

    system = "auto" if coloured(sys.stdout) else None
    if sys.stdout.isatty():
        return Console(highlight=False, color_system=system)  # type: ignore[arg-type]  # it takes a literal
    return Console(highlight=False, color_system=None, soft_wrap=True, width=NO_TERMINAL)


EXAMPLE_WIDTH = 76
"""Columns of an example in a command's help."""


def example(command: str) -> str:
    """The end of a command's help: an example to paste. A long one is broken as a shell allows it, before an option."""
    lines, line = [], ""
    for part in command.replace(" -", "\n-").split("\n"):
        if line and len(line) + len(part) + 3 > EXAMPLE_WIDTH:
            lines.append(line + " \\")
            line = "    " + part
        else:
            line += (" " if line else "") + part
    return "\b\nExample:\n" + "\n".join("  " + each for each in [*lines, line])


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
    """Prints a table: on a terminal, long cells are broken to fit; elsewhere each row is one line."""
    heads = [name.upper() for name in columns]
    if not sys.stdout.isatty():
        rows = [[" ".join(cell.split()) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        for row in (heads, *rows):
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for name in heads:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


def to_yaml(value: Any) -> str:
    """Block-style YAML in the order given."""
    import yaml

    text: str = yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=140)
    return text


def plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, for the serialisers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value


def printable(text: str) -> str:
    """Text that somebody else wrote, as a terminal may be shown it."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)

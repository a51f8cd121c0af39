"""What rules did on the way to an answer, in words, as `tollhouse policy explain` and `why` show it."""

from __future__ import annotations

from collections.abc import Callable

import click

from pdp.authoring import Explanation, Step
from tollhouse.output import printable


def show_steps(told: Explanation, shown: Callable[[str], str]) -> None:
    """Prints the steps; `shown` says where the user finds a file that is named as in a revision."""
    click.echo("")
    for step in told.steps:
        place = f"{shown(step.file)}:{step.row}" if step.row else ""
        click.echo("  " * step.depth + printable(f"rule {step.rule} at {place} {_became(step)}"))
    if told.more:
        click.echo("(more rules were asked than are shown)")
    for error in told.errors:
        click.echo(printable(f"error of a builtin, which makes its expression undefined: {error}"))
    for line in told.printed.splitlines():
        click.echo(printable(f"printed: {line}"))


def _became(step: Step) -> str:
    kind = {"else": " (its else)", "default": " (its default)"}.get(step.kind, "")
    if step.held:
        return f"held{kind}: {', '.join(step.values) or 'true'}"
    if step.failed is None:
        return f"did not hold{kind}: it was not asked with such arguments"
    place = f" (line {step.failed.row})" if step.failed.row not in (0, step.row) else ""
    more = f" [the first of {step.tries} tries]" if step.tries > 1 else ""
    return f"did not hold{kind}{place}: {step.failed.said}{more}"

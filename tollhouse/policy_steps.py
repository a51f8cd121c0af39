"""What rules did on the way to an answer, in words, as `tollhouse policy explain` and `why`, and `explain --rules`, show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import click

from pdp.authoring import Explanation, Step
from tollhouse.output import printable

Shown = Callable[[str], str]
"""Where the user finds a file that is named as in a revision."""


def show_steps(told: Explanation, shown: Shown) -> None:
    """Prints the steps."""
    click.echo("")
    for line in lines(told, shown):
        click.echo(line)


def lines(told: Explanation, shown: Shown, indent: str = "  ") -> Iterator[str]:
    """A line for each rule, behind an `indent` for each rule that asked for it, and what else there is to say."""
    for step in told.steps:
        place = f" at {shown(step.file)}:{step.row}" if step.row else ""
        yield indent * step.depth + printable(f"rule {step.rule}{place} {_became(step)}")
    if told.more:
        yield "(more rules were asked than are shown)"
    for error in told.errors:
        yield printable(f"error of a builtin, which makes its expression undefined: {error}")
    for line in told.printed.splitlines():
        yield printable(f"printed: {line}")


def _became(step: Step) -> str:
    kind = {"else": " (its else)", "default": " (its default)"}.get(step.kind, "")
    if step.held:
        return f"held{kind}: {', '.join(step.values) or 'true'}"
    if step.failed is None:
        return f"did not hold{kind}: it takes no such arguments"
    place = f" (line {step.failed.row})" if step.failed.row not in (0, step.row) else ""
    more = f" [the first of {step.tries} tries]" if step.tries > 1 else ""
    return f"did not hold{kind}{place}: {step.failed.said}{more}"


def values(told: Explanation, shown: Shown) -> list[dict[str, Any]]:
    """The same for programs."""
    return [_value(step, shown) for step in told.steps]


def _value(step: Step, shown: Shown) -> dict[str, Any]:
    failed = step.failed
    condition = None
    if failed is not None:
        condition = {"file": shown(failed.file), "row": failed.row, "condition": failed.text, "said": failed.said, "tries": step.tries}
    return {
        "rule": step.rule,
        "kind": step.kind,
        "file": shown(step.file),
        "row": step.row,
        "depth": step.depth,
        "held": step.held,
        "values": list(step.values),
        "failed": condition,
    }

"""`tollhouse completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from tollhouse.output import example


@click.command(epilog=example("echo 'eval \"$(tollhouse completion bash)\"' >> ~/.bashrc"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell."""
    from tollhouse.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "tollhouse", "_TOLLHOUSE_COMPLETE").source())

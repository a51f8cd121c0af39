"""The command line: one parser. Commands are imported when they are called, so that `tollhouse --help` is quick.

Exit codes: 0 fine, 1 what was asked for failed, 2 wrong usage.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

import click

from tollhouse.output import Complaint

COMMANDS: Final = {
    "up": ("up", "everything in one process: the example mesh, or yours"),
    "gateway": ("gateway", "one gateway: the listeners of one Gateway"),
    "pdp": ("pdp", "the policy decision point (ext_authz v3)"),
    "quota": ("quota", "the rate-limit service (RLS v3)"),
    "ca": ("ca", "the certificate authority: init, issue, run"),
    "register": ("register", "one instance of a service, under an etcd lease"),
    "echo": ("echo", "a service that answers with what it received"),
    "apply": ("config", "put resources into the configuration"),
    "get": ("config", "show resources, with their status"),
    "delete": ("config", "take resources out of the configuration"),
    "validate": ("config", "check resources without touching anything"),
    "etcd": ("etcd", "roles and users in an etcd: who may change what"),
    "policy": ("policy", "publish and activate policy revisions"),
    "status": ("status", "what is in force, and how it is doing"),
    "explain": ("explain", "what would happen to a request, and why"),
    "completion": ("completion", "completion for bash, zsh or fish"),
}
"""Each command, the module of `tollhouse.commands` that it is in, and what it does in a few words."""


INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells have it."""


class Commands(click.Group):
    """The group of all commands; imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table: processes first, then configuration, then looking."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(f"tollhouse.commands.{entry[0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for a name that is nearly right."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {near[0]!r}?" if near else "; see tollhouse --help"))
        return super().resolve_command(ctx, args)


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: tollhouse up",
)
@click.version_option(package_name="tollhouse", prog_name="tollhouse")
def cli() -> None:
    """Tollhouse: a gateway mesh without sidecars.

    Gateways terminate mTLS, know who is calling, ask one policy decision point, take a token from a quota and pass the request on.
    """


def main() -> None:
    """The entry point of the `tollhouse` program."""
    # gRPC reads both when it is imported; what it has to say is told by whoever asked it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        code = cli.main(prog_name="tollhouse", standalone_mode=False)
        sys.stdout.flush()
    except Complaint as complaint:
        complaint.show()
        code = complaint.code
    except click.exceptions.NoArgsIsHelpError as nothing:
        nothing.show()
        code = nothing.exit_code
    except click.ClickException as wrong:
        Complaint(one_line(wrong)).show()
        code = wrong.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more. What is still in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def one_line(wrong: click.ClickException) -> str:
    """What is wrong with how the program was called, and where its right use is told."""
    context = getattr(wrong, "ctx", None)
    message = " ".join(wrong.format_message().split())
    if not isinstance(context, click.Context):
        return message
    return f"{message.rstrip('.')} (see {context.command_path} --help)"

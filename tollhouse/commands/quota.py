"""`tollhouse quota`: the rate-limit service."""

from __future__ import annotations

from pathlib import Path

import click

from tollhouse.commands.quota_incident import history, reset, set_command
from tollhouse.commands.quota_live import get, top
from tollhouse.commands.quota_watch import explain, watch
from tollhouse.output import example
from tollhouse.values import ADMIN, TARGET


@click.group(
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    epilog=example("tollhouse quota --config etcd://127.0.0.1:2379 --redis redis://127.0.0.1:6379/0 --listen 127.0.0.1:8081"),
)
@click.option("--config", default="", help="Where the mesh is: a directory, or etcd://HOST:PORT[,HOST:PORT...].")
@click.option(
    "--descriptors", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A folder of envoyproxy/ratelimit's YAML files."
)
@click.option("--listen", type=TARGET, default="127.0.0.1:8081", show_default=True, metavar="HOST:PORT", help="Where to listen (gRPC).")
@click.option("--redis", default="", metavar="URL", help="Where the buckets are; without it, in this process's memory.")
@click.option("--admin", type=ADMIN, default="off", show_default=True, metavar="HOST:PORT|off", help="Where the admin page is.")
@click.option("--state", type=click.Path(path_type=Path), help="Folder for the last good configuration, for a start without etcd.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
@click.pass_context
def quota(
    context: click.Context, config: str, descriptors: Path | None, listen: str, redis: str, admin: str, state: Path | None, verbose: bool
) -> None:
    """Run the rate-limit service (RLS v3) for Envoy and others; Tollhouse gateways lease from Redis themselves.

    With --config it serves the limits of the mesh's QuotaPolicies, with --descriptors those of envoyproxy/ratelimit's YAML; both may be
    given. The commands look at limits that are in use, and change them.
    """
    if context.invoked_subcommand is not None:
        return
    from tollhouse.quota_process import QuotaOptions, run_quota
    from tollhouse.runtime import run as run_process

    if not config and descriptors is None:
        raise click.UsageError("give --config (a mesh), or --descriptors (a folder of envoyproxy/ratelimit's YAML), or both")
    options = QuotaOptions(config=config, descriptors=descriptors, listen=listen, redis=redis, admin=admin, state=state)
    run_process(lambda runtime: run_quota(options, runtime), verbose)


quota.add_command(top)
quota.add_command(get)
quota.add_command(set_command)
quota.add_command(history)
quota.add_command(reset)
quota.add_command(watch)
quota.add_command(explain)

"""`tollhouse up`: everything in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tollhouse.commands.bundle_options import BUNDLE_SERVICES, served_bundles
from tollhouse.opa_servers import OpaOptions, opa_choices
from tollhouse.output import example
from tollhouse.values import ADMIN, DURATION, JWKS_CA, LIMIT, decision_log_choices, limits_of

if TYPE_CHECKING:
    from tollhouse.bundling import BundleOptions


@click.command(epilog=example("tollhouse up --state /tmp/try --redis redis://127.0.0.1:6379/0"))
@click.option("--config", default="", metavar="DIR", help="A directory of resources.  [default: the example mesh, a shop]")
@click.option("--state", type=click.Path(path_type=Path), default=Path(".tollhouse"), show_default=True, help="Where identities are kept.")
@click.option(
    "--etcd", default="", metavar="URL", help="Read the configuration from this etcd; an empty one is filled from --config first."
)
@click.option("--redis", default="", metavar="URL", help="Keep the buckets of quotas in this Redis in place of memory.")
@opa_choices
@served_bundles(alone=False)
@BUNDLE_SERVICES
@JWKS_CA
@click.option("--admin", type=ADMIN, default="127.0.0.1:15000", show_default=True, metavar="HOST:PORT|off", help="Where the admin page is.")
@click.option("--drain", type=DURATION, default="10s", show_default=True, help="How long requests in progress may take at the end.")
@click.option("--access-log", metavar="FILE|-|off", help="One line of JSON for each request.  [default: access.log in the state directory]")
@decision_log_choices
@click.option("--limit", "limits", type=LIMIT, multiple=True, metavar="NAME=VALUE", help="A bound; docs/configuration.md has them all.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
def up(
    config: str,
    state: Path,
    etcd: str,
    redis: str,
    opa: OpaOptions,
    bundles: BundleOptions,
    bundle_services: Path | None,
    jwks_ca: Path | None,
    admin: str,
    drain: float,
    access_log: str | None,
    decision_log: tuple[str, ...],
    decision_log_set: tuple[str, ...],
    limits: tuple[tuple[str, float], ...],
    verbose: bool,
) -> None:
    """Run a whole mesh in one process: gateways, policy, quota, identities, and the example services.

    No server is needed: a directory stands for etcd, memory for Redis, a worker process for OPA. Each of the three options swaps one of
    them for the real one. Ctrl-C finishes what is in progress and ends.
    """
    from tollhouse.logs import decision_log_options
    from tollhouse.parts import is_etcd
    from tollhouse.runtime import run as run_process
    from tollhouse.up_process import UpOptions, run_up

    if is_etcd(config):
        raise click.UsageError("--config names a directory; for an etcd, write --etcd URL")
    options = UpOptions(
        config=config,
        state=state,
        etcd=etcd,
        redis=redis,
        opa=opa,
        bundles=bundles,
        bundle_services=bundle_services,
        jwks_ca=jwks_ca,
        admin=admin,
        drain=drain,
        limits=limits_of(limits),
        decision_log=decision_log_options(decision_log, decision_log_set),
        access_log=access_log or str(state / "access.log"),
    )
    run_process(lambda runtime: run_up(options, runtime), verbose, quiet=not verbose)

"""`tollhouse gateway`: one gateway as a process of its own, or as several workers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tollhouse.commands.bundle_options import BUNDLE_SERVICES, served_bundles
from tollhouse.opa_servers import OpaOptions, opa_choices
from tollhouse.output import Complaint, example
from tollhouse.values import ADMIN, DURATION, JWKS_CA, LIMIT, NAMED, TARGETS, decision_log_choices, limits_of

log = logging.getLogger("tollhouse.gateway")

if TYPE_CHECKING:
    from tollhouse.bundling import BundleOptions


@click.command(
    epilog=example(
        "tollhouse gateway edge/ingress --config etcd://127.0.0.1:2379 --identity /etc/tollhouse/identities/edge-ingress "
        "--pdp 127.0.0.1:9191 --redis redis://127.0.0.1:6379/0"
    )
)
@click.argument("name", type=NAMED, metavar="NAMESPACE/NAME")
@click.option("--config", required=True, help="Where the configuration is: a directory, or etcd://HOST:PORT[,HOST:PORT...].")
@click.option("--address", default="", metavar="IP", help="Where to bind when the Gateway names no address.  [default: everywhere]")
@click.option(
    "--pdp",
    type=TARGETS,
    default="",
    metavar="HOST:PORT[,...]",
    help="Decision points to ask; without one, an OPA worker of its own decides.",
)
@click.option("--pdp-name", default="", metavar="DNS-NAME", help="Ask them under mTLS, and expect a certificate for this name.")
@opa_choices
@served_bundles(alone=False)
@BUNDLE_SERVICES
@JWKS_CA
@click.option("--redis", default="", metavar="URL", help="Where the buckets of quotas are; without it, in this process's memory.")
@click.option(
    "--identity",
    type=click.Path(path_type=Path),
    help="Folder with this gateway's cert.pem, key.pem and ca.pem; without one, only what needs no SVID is served.",
)
@click.option(
    "--admin",
    type=ADMIN,
    default="127.0.0.1:15000",
    show_default=True,
    metavar="HOST:PORT|off",
    help="Where /metrics, /healthz, /readyz, /config and /status are.",
)
@click.option("--state", type=click.Path(path_type=Path), help="Folder for the last good configuration, for a start without etcd.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that share the listening ports.")
@click.option(
    "--drain", type=DURATION, default="30s", show_default=True, help="How long requests in progress may take once it is asked to end."
)
@click.option("--access-log", default="-", show_default=True, metavar="FILE|-|off", help="One line of JSON for each request.")
@decision_log_choices
@click.option("--limit", "limits", type=LIMIT, multiple=True, metavar="NAME=VALUE", help="A bound; docs/configuration.md has them all.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
def gateway(
    name: str,
    config: str,
    address: str,
    pdp: tuple[str, ...],
    pdp_name: str,
    opa: OpaOptions,
    bundles: BundleOptions,
    bundle_services: Path | None,
    jwks_ca: Path | None,
    redis: str,
    identity: Path | None,
    admin: str,
    state: Path | None,
    workers: int,
    drain: float,
    access_log: str,
    decision_log: tuple[str, ...],
    decision_log_set: tuple[str, ...],
    limits: tuple[tuple[str, float], ...],
    verbose: bool,
) -> None:
    """Run one gateway: the listeners of the Gateway of that name.

    SIGTERM finishes what is in progress and ends; SIGHUP reads certificates, directory and logs again; with workers, SIGUSR2 replaces
    them one by one without losing a connection.
    """
    from tollhouse.gateway_process import GatewayOptions, run_gateway, run_workers
    from tollhouse.logs import decision_log_options
    from tollhouse.runtime import run as run_process

    options = GatewayOptions(
        name=name,
        config=config,
        address=address,
        pdp=pdp,
        pdp_name=pdp_name,
        opa=opa,
        bundles=bundles,
        bundle_services=bundle_services,
        jwks_ca=jwks_ca,
        redis=redis,
        identity=identity,
        admin=admin,
        state=state,
        drain=drain,
        limits=limits_of(limits),
        access_log=access_log,
        decision_log=decision_log_options(decision_log, decision_log_set),
    )
    if address:
        import ipaddress

        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise Complaint(f"--address: {address!r} is not an IP address; write for example 127.0.0.1", 2) from None
    if workers > 1:
        run_process(lambda runtime: run_workers(options, workers, runtime, verbose=verbose), verbose)
    else:
        run_process(lambda runtime: run_gateway(options, runtime), verbose)

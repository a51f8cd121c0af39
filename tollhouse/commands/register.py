"""`tollhouse register`: keeps one instance of a service in the registry."""

from __future__ import annotations

import logging
import os
import socket

import click

from tollhouse.output import Complaint, example
from tollhouse.values import DURATION, NAMED

log = logging.getLogger("tollhouse.register")


@click.command(
    epilog=example("tollhouse register shop/orders --config etcd://127.0.0.1:2379 --address 10.0.0.7 --port https=9103 --check tcp")
)
@click.argument("service", type=NAMED, metavar="NAMESPACE/SERVICE")
@click.option("--config", required=True, help="The etcd: etcd://HOST:PORT[,HOST:PORT...].")
@click.option("--address", required=True, metavar="IP", help="Where the gateways reach the instance.")
@click.option("--port", "ports", multiple=True, required=True, metavar="[NAME=]PORT", help="A port of the Service; may be given again.")
@click.option("--instance", default="", help="Its name.  [default: host name and process id]")
@click.option("--zone", default="", help="Where it is, for balancers that care.")
@click.option("--weight", type=click.IntRange(0, 1_000_000), default=1, show_default=True, help="Its share of the requests.")
@click.option("--ttl", type=DURATION, default="10s", show_default=True, help="For how long it is believed in without a sign of life.")
@click.option("--check", default="tcp", show_default=True, metavar="tcp|none|URL", help="How its health is looked at.")
@click.option("--interval", type=DURATION, default="2s", show_default=True, help="Between two looks at its health.")
def register(
    service: str,
    config: str,
    address: str,
    ports: tuple[str, ...],
    instance: str,
    zone: str,
    weight: int,
    ttl: float,
    check: str,
    interval: float,
) -> None:
    """Register one instance of a service under an etcd lease, for as long as it is healthy; deregister it at the end.

    Run it beside the service (systemd: BindsTo=). An instance says where it is, never who it is: that is what ServiceIdentity is for.
    """
    from discovery.health import HealthCheck, TcpCheck, parse_check
    from discovery.instances import check_instance
    from discovery.register import Registrar
    from mesh.documents import Instance
    from telemetry.notify import Notifier
    from tollhouse.parts import is_etcd, open_etcd
    from tollhouse.runtime import Runtime
    from tollhouse.runtime import run as run_process

    if not is_etcd(config):
        raise click.UsageError("--config: instances are registered in an etcd: write etcd://HOST:PORT; a directory has EndpointSlices")
    numbers: dict[str, int] = {}
    for text in ports:
        name, equals, number = text.rpartition("=")
        if not number.isdigit() or (equals and not name):
            raise click.UsageError(f"--port: {text!r} is not [NAME=]PORT; write for example https=9103")
        numbers[name] = int(number)
    namespace, _, named = service.partition("/")
    made = Instance(
        namespace=namespace,
        service=named,
        instance=instance or f"{socket.gethostname()}-{os.getpid()}",
        address=address,
        ports=numbers,
        zone=zone,
        weight=weight,
    )
    wrong = check_instance(made)
    if wrong:
        raise Complaint(f"the instance cannot be registered: {wrong}", 2)
    health: HealthCheck | None
    try:
        health = None if check == "none" else TcpCheck(address, next(iter(numbers.values()))) if check == "tcp" else parse_check(check)
    except ValueError as problem:
        raise click.UsageError(f"--check: {problem}") from None

    async def process(runtime: Runtime) -> None:
        etcd = open_etcd(config)
        registrar = Registrar(etcd, made, ttl=max(2, round(ttl)), check=health, interval=interval)
        notifier = Notifier()
        try:
            await registrar.start()
            log.info("registering %s as %s at %s", service, made.instance, address)
            notifier.ready()
            await runtime.stopping.wait()
            notifier.stopping()
        finally:
            await registrar.stop()
            await etcd.close()

    run_process(process)

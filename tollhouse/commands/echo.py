"""`tollhouse echo`: a service that answers with what it received."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from tollhouse.output import Complaint, example
from tollhouse.sockets import shown_address
from tollhouse.values import ADDRESS

log = logging.getLogger("tollhouse.echo")


@click.command(
    epilog=example(
        "tollhouse echo --listen 127.0.0.1:9103 --identity identities/shop-orders --gateway spiffe://shop.example/ns/edge/sa/ingress"
    )
)
@click.option(
    "--listen", type=ADDRESS, default="127.0.0.1:0", show_default=True, metavar="HOST:PORT", help="Where to listen; port 0 takes any."
)
@click.option("--identity", type=click.Path(path_type=Path), help="Folder with cert.pem, key.pem and ca.pem; without it, plain HTTP.")
@click.option("--gateway", "gateways", multiple=True, help="SPIFFE ID of a gateway that may connect; may be given again.")
@click.option("--public", is_flag=True, help="Ask for no client certificate: a service outside the mesh.")
@click.option("--name", default="echo", show_default=True, help="What the answers call it.")
def echo(listen: tuple[str, int], identity: Path | None, gateways: tuple[str, ...], public: bool, name: str) -> None:
    """Answer every request with JSON that says what arrived.

    As every service of a mesh should, it takes connections from the gateways named and from nobody else.
    """
    from identity.files import IdentityFiles
    from identity.problems import IdentityError
    from identity.tls import server_context
    from mesh.model import ListenerTls
    from telemetry.notify import Notifier
    from tollhouse.echo import Echo
    from tollhouse.runtime import Runtime
    from tollhouse.runtime import run as run_process

    if identity is not None and not gateways and not public:
        raise click.UsageError("say who may connect: --gateway SPIFFE-ID (may be given again), or --public for anybody")
    if gateways and (public or identity is None):
        raise click.UsageError("--gateway needs --identity, and goes without --public: it is about client certificates")

    async def process(runtime: Runtime) -> None:
        try:
            files = IdentityFiles(identity) if identity is not None else None
            context = server_context(ListenerTls(svid=True), files) if files is not None and public else None
        except IdentityError as problem:
            raise Complaint(str(problem)) from None
        if files is not None:
            files.watch(runtime.loop)
            runtime.on_reload(files.reload)
        service = Echo(name, files, gateways, context)
        await service.start(*listen)
        host, port = service.address
        click.echo(f"{name} listens at {'https' if identity else 'http'}://{shown_address(host, port)}")
        notifier = Notifier()
        notifier.ready()
        await runtime.stopping.wait()
        notifier.stopping()
        await service.close()

    run_process(process)

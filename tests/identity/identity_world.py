"""For the identity tests: who there is, and a handshake in memory."""

from __future__ import annotations

import ssl

from identity.files import StaticIdentity
from identity.tls import client_context, server_context
from mesh.model import ClientValidation, ListenerTls, UpstreamTls

GATEWAY = "spiffe://shop.example/ns/edge/sa/ingress"
WEB = "spiffe://shop.example/ns/shop/sa/web"


def mutual(**changes: object) -> ListenerTls:
    """A listener that serves its SVID and requires one of its clients."""
    fields: dict[str, object] = {"svid": True, "client": ClientValidation(), **changes}
    return ListenerTls(**fields)  # type: ignore[arg-type]


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = None) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Runs a handshake in memory; raises what either side raises first."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    accepted = server.wrap_bio(to_server, to_client, server_side=True)
    asking = client.wrap_bio(to_client, to_server, server_hostname=name)
    done: set[str] = set()
    for _ in range(10):
        for side, stream in (("client", asking), ("server", accepted)):
            if side not in done:
                try:
                    stream.do_handshake()
                    done.add(side)
                except ssl.SSLWantReadError:
                    continue
    assert done == {"client", "server"}
    return accepted, asking


def mesh_pair(
    server: StaticIdentity, client: StaticIdentity, listener: ListenerTls | None = None, name: str | None = None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    return shake(server_context(listener or mutual(), server), client_context(UpstreamTls(mode="mesh"), client), name)

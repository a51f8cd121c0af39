"""What a gateway shows to upstreams outside of the mesh: the certificate of its `spec.tls.backend`, and a new one when that changes."""

from __future__ import annotations

import ssl
from typing import Any

from upstream_world import GATEWAY, OTHER, cluster_of, identity, ok, permit, run, upstream

from mesh.model import UpstreamTls

TLS = UpstreamTls(mode="validate", hostname="orders.shop", sni="orders.shop", roots=identity(GATEWAY).current.bundle)


def pair(spiffe_id: str) -> tuple[bytes, bytes]:
    return identity(spiffe_id).current.chain, identity(spiffe_id).current.key


def test_upstreams_see_the_certificate_and_its_successor() -> None:
    seen: list[str] = []

    def handler(connection: Any) -> None:
        while connection.head():
            uris = [value for kind, value in connection.sock.getpeercert().get("subjectAltName", ()) if kind == "URI"]
            seen.extend(uris)
            connection.send(ok())

    with upstream(handler) as orders:
        cluster = cluster_of(orders.endpoint(), tls=TLS)

        async def conversation(world: Any) -> None:
            for who in (GATEWAY, OTHER):
                world.forwarder.show(pair(who))
                assert (await world.ask(permit(cluster))).status == 200
            assert seen == [GATEWAY, OTHER]
            world.forwarder.show(pair(OTHER))
            assert (await world.ask(permit(cluster))).status == 200
            assert orders.accepted == 2
            # Without one, who demands a certificate serves nobody.
            world.forwarder.show(None)
            client = await world.ask(permit(cluster))
            assert client.refusal is not None

        run(conversation)


def test_without_the_certificate_that_it_should_show_a_gateway_sends_nothing() -> None:
    """Also to an upstream that would have asked for none: it may go by what it sees, and let nobody be somebody."""

    def handler(connection: Any) -> None:
        while connection.head():
            connection.send(ok())

    with upstream(handler) as orders:
        assert orders.context is not None
        orders.context.verify_mode = ssl.CERT_OPTIONAL
        cluster = cluster_of(orders.endpoint(), tls=TLS)

        async def conversation(world: Any) -> None:
            world.forwarder.show(None, "there is no Secret edge/cert")
            refusal = (await world.ask(permit(cluster))).refusal
            assert (refusal.status, refusal.flag) == (503, "UF")
            assert refusal.reason == "the Gateway has no certificate to show: there is no Secret edge/cert"
            assert orders.accepted == 0
            world.forwarder.show(None)
            assert (await world.ask(permit(cluster))).status == 200
            world.forwarder.show(None, "it is gone again")
            assert (await world.ask(permit(cluster))).refusal is not None
            world.forwarder.show(pair(GATEWAY))
            assert (await world.ask(permit(cluster))).status == 200

        run(conversation)

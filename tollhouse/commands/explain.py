"""`tollhouse explain`: what would happen to a request, and why."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from tollhouse.output import Complaint, emit, example, format_option
from tollhouse.values import JWKS_CA, NAMED, TARGETS

BELOW = ("tcp", "tls", "udp")
"""Schemes of what is below HTTP."""
CONNECTION = "-"
"""In place of the method, where a connection or a flow is described."""


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the command line describes it, and where the answers come from."""

    method: str
    url: str
    key: str
    principal: str
    via: str
    headers: tuple[str, ...]
    address: str
    body: str
    config: str
    redis: str
    pdp: tuple[str, ...]
    jwks_ca: Path | None
    rules: bool
    quota: bool = False
    """Only its limits; no policy is asked."""


def explained(asked: Described) -> Any:
    """The explanation of a request. Raises `Complaint`."""
    return asyncio.run(_explain(asked))


@click.command(
    epilog=example(
        "tollhouse explain --gateway edge/ingress --as spiffe://shop.example/ns/shop/sa/batch POST https://shop.example/payments/1"
    )
)
@click.argument("method")
@click.argument("url")
@click.option("--gateway", "key", type=NAMED, required=True, metavar="NAMESPACE/NAME", help="Which gateway the request comes to.")
@click.option("--as", "principal", default="", metavar="SPIFFE-ID", help="Who asks; nobody in particular without it.")
@click.option("--via", default="", metavar="SPIFFE-ID", help="The gateway that passes the request on, if it does not come directly.")
@click.option("--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header of the request; may be given again.")
@click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where it comes from.")
@click.option("--body", default="", help="The request's body, for policies that read it.")
@click.option("--config", default="", help="Where the configuration is: a directory or etcd://HOST:PORT.  [default: the example mesh]")
@click.option("--redis", default="", metavar="URL", help="Look at the buckets in this Redis; without it all are full.")
@click.option(
    "--pdp", type=TARGETS, default="", metavar="HOST:PORT[,...]", help="Ask these decision points; without one, an OPA worker of its own."
)
@JWKS_CA
@click.option("--rules", is_flag=True, help="Of each decision, tell which rules held, and of the others which condition did not.")
@format_option
def explain(form: str, **described: Any) -> None:
    """Tell what a gateway would do with a request, step by step, with its own code. Nothing is spent and nothing is forwarded.

    For a connection, or a flow of datagrams, write - for the method and tcp://HOST:PORT, tls://NAME:PORT or udp://HOST:PORT.

    Exit code 0 when the request would be forwarded or answered, 1 when it would be refused.
    """
    explanation = explained(Described(**described))
    rows = [row for step in explanation.steps for row in ([step.name, step.text], *more_about(step.details))]
    emit(form, msgspec.to_builtins(explanation), rows, ["step", "what happens"])
    if explanation.result == "refuse":
        raise SystemExit(1)


DEPENDS = ("depends_on", "depends_on_whether_defined", "depends_on_length", "depends_on_type")


def more_about(details: Mapping[str, Any]) -> list[list[str]]:
    """The rows below a decision's own: which revision answered, which rule, what the answer depends on, and what its rules did."""
    rows = []
    if details.get("revision"):
        rows.append(["", f"revision {details['revision'][:19]}" + (f", rule {details['rule']!r}" if details.get("rule") else "")])
    reads = [path for field in DEPENDS for path in details.get(field, ())]
    if reads or details.get("volatile"):
        rows.append(["", "depends on " + ", ".join([*reads, *(f"{name}()" for name in details.get("volatile", ()))])])
    rows += [["", line] for line in details.get("rules_told", ())]
    return rows


async def _explain(asked: Described) -> Any:
    from gateway.explain import explain as tell
    from gateway.external_auth import ServiceAsker
    from gateway.forward import UpstreamForwarder
    from gateway.grpc_channel import GrpcChannels
    from gateway.l4_explain import explain_connection
    from gateway.place import Place
    from gateway.quota_explain import explain_quota
    from gateway.rate_limits import Services, answers_of
    from identity.files import NoIdentity
    from identity.problems import IdentityError
    from identity.spiffe import SpiffeId
    from mesh.peer import Peer
    from pdp.asker import EngineAsker
    from pdp.client import Providers
    from pdp.decider import PolicyDecider
    from pdp.engines.apart import Apart
    from pdp.kept import KeptDecisions
    from quota.lessee import QuotaLessee
    from telemetry.record import Telemetry
    from tollhouse.authorization import Authorizer
    from tollhouse.deciding import open_client, preload
    from tollhouse.gateway_process import unknown_gateway
    from tollhouse.keeper import Keeper
    from tollhouse.parts import Configuration, LazyPool, holder, open_store, open_tokens
    from tollhouse.policy_rules import Noting, add_rules
    from tollhouse.policy_supply import open_supply
    from tollhouse.request import head_of, vouched
    from tollhouse.up_process import bundled

    for text in (asked.principal, asked.via):
        if text:
            try:
                SpiffeId.parse(text)
            except IdentityError as problem:
                raise Complaint(str(problem), 2) from None
    parts = urlsplit(asked.url)
    if parts.scheme not in {"http", "https", *BELOW} or not parts.netloc:
        raise Complaint(f"{asked.url!r} is not a URL; write for example https://shop.example/orders/1 or tls://shop.example:8443", 2)
    below = parts.scheme in BELOW
    if below != (asked.method == CONNECTION):
        what = f"a connection has no method; write {CONNECTION} for it" if below else f"{CONNECTION} goes with tcp://, tls:// and udp://"
        raise Complaint(f"{asked.method} {asked.url}: {what}", 2)
    if below and asked.quota:
        raise Complaint(f"{asked.url}: this is about requests; tollhouse explain tells of the limits of connections, too", 2)
    if below and (asked.headers or asked.body or asked.via):
        raise Complaint("--header, --body and --via mean nothing for a connection: it has no head that could say so", 2)
    loop = asyncio.get_running_loop()
    source, extra = bundled(asked.config)
    configuration = Configuration(source, None)
    pool = LazyPool()
    local = EngineAsker(pool)
    channels = GrpcChannels(loop)
    client = open_client(asked.pdp, channels)
    decider = PolicyDecider(central=client or local, local=local, kept=KeptDecisions(), providers=Providers(channels), clock=loop.time)
    forwarder = UpstreamForwarder(loop, identity=NoIdentity())
    decider.services[asked.key] = ServiceAsker(forwarder)
    buckets = QuotaLessee(open_store(asked.redis), holder=holder())
    lessee = Services(buckets, forwarder, asked.key, answers_of(Telemetry()))
    tokens, fetcher = open_tokens(asked.jwks_ca)
    supply = open_supply(pool, None, None)
    keeper = Keeper(configuration.source, pool.compile, extra, Authorizer(pool.compile), supply)
    try:
        await keeper.start()
        snapshot = keeper.snapshot
        found = snapshot.gateways.get(asked.key)
        if found is None:
            raise Complaint(unknown_gateway(asked.key, snapshot))
        if not asked.quota:
            await preload(snapshot, decider, Apart(pool, pool), pool, remote=client is not None)
        forwarder.apply(snapshot)
        tunnel = asked.method.upper() == "CONNECT"  # to whom the URL says; the listener is the proxy's own
        listener = listener_for(found, parts.hostname or "", None if tunnel else parts.port, "" if tunnel else parts.scheme)
        siblings = tuple(each for each in found.listeners if each.port == listener.port)
        identity = str(SpiffeId.workload(snapshot.mesh.trust_domain, found.namespace, found.name))
        tokens.follow(snapshot, (asked.key,))
        place = Place(snapshot=snapshot, gateway=found, listener=listener, siblings=siblings, identity=identity, tokens=tokens)
        peer_id = asked.via or asked.principal
        peer = Peer(
            principal=peer_id,
            trust_domain=SpiffeId.parse(peer_id).trust_domain if peer_id else "",
            address=asked.address,
            port=40000,
            local_address=found.hosts("127.0.0.1")[0],
            local_port=listener.port,
            tls_version="TLSv1.3" if listener.tls else "",
            sni=(parts.hostname or "") if listener.encrypted else "",
        )
        rng = random.Random()  # noqa: S311 -- picks among weighted backends
        noted = Noting(decider)
        if below:
            explained = await explain_connection(peer, place, time.time(), rng, noted, lessee, clock=loop.time)
            if asked.rules:
                await add_rules(explained, noted, pool)
            return explained
        head = head_of(asked.method, asked.url, asked.headers, asked.body, parts.scheme)
        if asked.via:
            head.headers.append(vouched(asked.principal, asked.via))
        if asked.quota:
            return await explain_quota(head, peer, place, time.time(), rng, lessee)
        explained = await tell(
            head, peer, place, time.time(), rng, noted, lessee, clock=loop.time, body=asked.body.encode() if asked.body else None
        )
        if asked.rules:
            await add_rules(explained, noted, pool)
        return explained
    finally:
        await keeper.stop()
        await supply.close()
        await tokens.store.close()
        await fetcher.close()
        await buckets.close()
        await decider.close()
        if client is not None:
            await client.close()
        channels.close()
        await forwarder.close(0)
        await pool.close()
        await configuration.close()


def listener_for(gateway: Any, host: str, port: int | None, scheme: str) -> Any:
    """The listener that a connection for `host` would reach, at a `port` and by a `scheme` (None and empty: any). Raises `Complaint`."""
    from gateway.gateway import specificity

    protocols = (scheme.upper(),) if scheme else ("HTTP", "HTTPS")
    fitting = [each for each in gateway.listeners if each.protocol in protocols and (port is None or each.port == port)]
    for listener in sorted(fitting, key=specificity):
        pattern = listener.hostname or "*"
        if pattern in {"*", host} or (pattern.startswith("*.") and host.endswith(pattern[1:])):
            return listener
    there = ", ".join(f"{each.name} ({each.protocol} {each.port}, {each.hostname or '*'})" for each in gateway.listeners) or "none"
    raise Complaint(
        f"no listener of {gateway.key} takes {scheme or 'connect'}://{host}" + (f":{port}" if port else "") + f"; there is {there}"
    )

"""`tollhouse policy`: publish, activate and list revisions of policy; what authors do with a folder is in `policy_authoring`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tollhouse.commands.bundle_options import ALGORITHMS, BUNDLE_SERVICES, FILE
from tollhouse.commands.policy_active import activate, change_options, history, list_revisions, rollback, switch
from tollhouse.commands.policy_asking import bench, evaluate, explain
from tollhouse.commands.policy_authoring import check, fingerprint, fmt, init, test
from tollhouse.commands.policy_data import data
from tollhouse.commands.policy_diff import diff
from tollhouse.commands.policy_log import replay, why
from tollhouse.commands.policy_shadow import canary, differences, drop, promote, shadow
from tollhouse.output import Complaint, example
from tollhouse.values import DURATION

DECISIONS = click.option("--decision", "decisions", multiple=True, help="A decision to serve (shop.authz.decision); may be given again.")


@click.group(epilog=example("tollhouse policy publish conf/examples/shop/policy --config etcd://127.0.0.1:2379 --activate"))
def policy() -> None:
    """Publish policy as revisions, and say which one is in force.

    A revision is a whole folder of Rego and data, compiled, named by its digest and never changed. Activating it puts it in force at every
    gateway at once.
    """


@policy.command(epilog=example("tollhouse policy publish conf/examples/shop/policy --config etcd://127.0.0.1:2379"))
@click.argument("source", metavar="FOLDER|BUNDLE|URL")
@DECISIONS
@click.option("--verify-key", type=FILE, help="Public key (PEM) or shared secret that a bundle must be signed with.")
@click.option("--verify-algorithm", type=click.Choice(ALGORITHMS), help="How it must be signed.  [default: by the key]")
@click.option("--verify-scope", default="", metavar="TEXT", help="What it must be signed for.")
@click.option("--token", type=FILE, help="File with the bearer token for the bundle server; chmod 600.")
@click.option("--ca", type=FILE, help="CA certificates (PEM) of the bundle server.  [default: the system's]")
@BUNDLE_SERVICES
@click.option("--by-reference", is_flag=True, help="Store where the bundle is, and its digest, in place of what is in it.")
@click.option("--name", default="", metavar="NAME", help="Call it so from now on, and no other revision; commands know it by that.")
@click.option("--activate", "and_activate", is_flag=True, help="Put it in force, too.")
@click.option("--watch", "-w", is_flag=True, help="Follow the folder or URL, and publish (and --activate) whatever is new there.")
@click.option(
    "--interval", type=DURATION, default="10s", show_default=True, help="With --watch: how often a server without long polling is asked."
)
@change_options
def publish(
    source: str,
    decisions: tuple[str, ...],
    verify_key: Path | None,
    verify_algorithm: str | None,
    verify_scope: str,
    token: Path | None,
    ca: Path | None,
    bundle_services: Path | None,
    by_reference: bool,
    name: str,
    and_activate: bool,
    watch: bool,
    interval: float,
    config: str,
    reason: str,
    wait: bool,
    timeout: float,
) -> None:
    """Compile a folder of Rego, or an OPA bundle, and store it as a revision.

    A bundle is a file (.tar.gz), or comes from a server (http or https). With --verify-key it must be signed; without, it must not be. The
    decisions are those that AccessPolicies name, and those given here. A revision that is too large for etcd is published --by-reference:
    whoever decides by it fetches the bundle from its URL, which must go on having the same content.

    With --watch it goes on until it is interrupted: what is wrong, or can't be had, is told, and what is in force stays.
    """
    import msgspec

    from mesh.formats import bundle_url, label
    from mesh.policies import revision_body
    from mesh.reading import document_of
    from tollhouse.bundle_source import BundleSource, is_url
    from tollhouse.commands.config import with_store
    from tollhouse.keeper import decisions_of
    from tollhouse.policy_revisions import digest_like, label_of, labelled, need_etcd
    from tollhouse.policy_watch import Unusable, watch_files, watch_server

    if name and (problem := label(name) or digest_like(name)):
        raise Complaint(f"--name: {problem}", 2)
    folder = not is_url(source) and Path(source).is_dir()
    if folder and (verify_key or verify_algorithm or verify_scope):
        raise Complaint("--verify-...: a folder is not signed; a bundle is", 2)
    if not is_url(source) and (token or ca):
        raise Complaint("--token and --ca are for a bundle server: give its URL", 2)
    if is_url(source) and (problem := bundle_url(source)):
        raise Complaint(f"the URL {problem}", 2)
    if by_reference and not is_url(source):
        raise Complaint("--by-reference: give the URL from which gateways can fetch the bundle (opa build -b FOLDER -o bundle.tar.gz)", 2)
    if bundle_services is not None and (not is_url(source) or verify_key or token or ca):
        raise Complaint("--bundle-services says what goes with a URL: it is for a URL, without --verify-key, --token and --ca", 2)
    if verify_key is None and (verify_algorithm or verify_scope):
        raise Complaint("--verify-algorithm and --verify-scope go with --verify-key", 2)
    if by_reference and watch:
        raise Complaint("--watch: what changes behind a URL can't be published --by-reference: its content must go on having its digest", 2)
    need_etcd(config)
    bundle = BundleSource(where=source, key=verify_key, algorithm=verify_algorithm or "", scope=verify_scope, token=token, ca=ca)
    bundle = msgspec.structs.replace(bundle, services=bundle_services)

    def once(packed: bytes | None) -> None:
        documents, _ = with_store(config, lambda store: store.list())
        wanted = (*decisions, *decisions_of(documents))
        try:
            revision = compiled(Path(source), wanted) if folder else compiled_bundle(bundle, wanted, packed)
            body = revision_body(msgspec.structs.replace(revision, bundle=source) if by_reference else revision)
            check_size(body)
        except Complaint as problem:
            raise Unusable(problem) from None
        store_and_switch(documents, revision, body)

    def store_and_switch(documents: Any, revision: Any, body: Any) -> None:
        there = [each for each in documents if each.key.kind == "PolicyRevision"]
        before = next((label_of(each) for each in there if each.key.name == body["metadata"]["name"]), "")
        document = document_of(labelled(body, name or before), source)
        others = [each for each in there if name and label_of(each) == name and each.key != document.key]
        renamed = [document_of(labelled(each.body, ""), "--name") for each in others]
        with_store(config, lambda store: store.apply([document, *renamed]), "publish", reason)
        click.echo(f"published {document.key.name}: {', '.join(sorted(revision.entry_points)) or 'no decisions'}")
        if and_activate:
            switch(document.key.name, config, "activate", reason, wait, timeout)

    try:
        if watch and is_url(source):
            watch_server(bundle, interval, once)
        elif watch:
            watch_files(Path(source), lambda: fingerprint(Path(source)), once)
        else:
            once(None)
    except Unusable as problem:
        raise problem.complaint from None
    except KeyboardInterrupt:
        if not watch:
            raise


# What authors and operators do


AUTHORS = (init, check, test, fmt, evaluate, explain, bench, replay, why, diff)
OPERATORS = (activate, rollback, history, list_revisions, shadow, canary, differences, promote, drop, data)

for command in (*AUTHORS, *OPERATORS):
    policy.add_command(command)


# What they share


def check_size(body: Any) -> None:
    """Raises `Complaint` for a revision that etcd does not take."""
    import json

    from discovery.etcd_store import MOST_REQUEST

    # As it is written, with room for its key and for the entry of the audit log.
    size, most = len(json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()), MOST_REQUEST - 10_000
    if size > most:
        raise Complaint(
            f"the revision has {size} bytes, and etcd takes {most}: put its bundle (opa build -b FOLDER -o bundle.tar.gz) where gateways "
            "can fetch it, and publish its URL --by-reference; or give data a revision of their own (tollhouse policy data)"
        )


def compiled(folder: Path, decisions: tuple[str, ...]) -> Any:
    """The revision of a folder. Raises `Complaint`."""
    from pdp.authoring import inspect
    from pdp.engines.engine import PolicyError
    from pdp.publish import without_tests
    from tollhouse.policy_folder import outside_roots, read_folder
    from tollhouse.policy_work import with_pool

    async def work(pool: Any) -> Any:
        found = read_folder(folder)
        shipped = without_tests(found.modules)
        wrong = outside_roots(found, (await inspect(pool, shipped, found.data)).packages)
        if wrong:
            raise PolicyError(wrong)
        return await pool.compile(shipped, found.data, frozenset(decisions))

    return with_pool(folder, work)


def compiled_bundle(source: Any, decisions: tuple[str, ...], packed: bytes | None = None) -> Any:
    """The revision of a bundle, or of the one that has been fetched from there. Raises `Complaint`."""
    from pdp.bundle_files import BundleProblem
    from tollhouse.bundle_source import access_of, open_bundle, opened
    from tollhouse.policy_work import with_pool

    async def work(pool: Any) -> Any:
        try:
            bundle = await open_bundle(source, pool) if packed is None else await opened(source, packed, access_of(source), pool)
        except BundleProblem as problem:
            raise Complaint(f"the bundle {source.where} can't be used: {problem}") from None
        if not bundle.modules:
            raise Complaint(f"the bundle {source.where} has no module (.rego): publish data alone by `tollhouse policy data publish`")
        return await pool.compile(bundle.modules, bundle.data, frozenset(decisions))

    return with_pool(Path(source.where), work)

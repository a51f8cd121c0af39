"""`tollhouse policy`: publish, activate and list revisions of policy; what authors do with a folder is in `policy_authoring`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tollhouse.commands.policy_asking import bench, evaluate, explain
from tollhouse.commands.policy_authoring import check, fmt, init, test
from tollhouse.commands.policy_log import replay, why
from tollhouse.output import Complaint, emit, example, format_option
from tollhouse.values import DURATION

FOLDER = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
CONFIG = click.option("--config", required=True, help="The etcd: etcd://HOST:PORT[,HOST:PORT...].")
DECISIONS = click.option("--decision", "decisions", multiple=True, help="A decision to serve (shop.authz.decision); may be given again.")


@click.group(epilog=example("tollhouse policy publish conf/examples/shop/policy --config etcd://127.0.0.1:2379 --activate"))
def policy() -> None:
    """Publish policy as revisions, and say which one is in force.

    A revision is a whole folder of Rego and data, compiled, named by its digest and never changed. Activating it puts it in force at every
    gateway at once.
    """


@policy.command(epilog=example("tollhouse policy publish conf/examples/shop/policy --config etcd://127.0.0.1:2379"))
@FOLDER
@CONFIG
@DECISIONS
@click.option("--activate", "and_activate", is_flag=True, help="Put it in force, too.")
@click.option("--timeout", type=DURATION, default="10s", show_default=True, help="How long to wait until every gateway applies it.")
def publish(folder: Path, config: str, decisions: tuple[str, ...], and_activate: bool, timeout: float) -> None:
    """Compile a folder of Rego and store it as a revision. The decisions are those that AccessPolicies name, and those given here."""
    from mesh.policies import revision_body
    from mesh.reading import document_of
    from tollhouse.commands.config import with_store
    from tollhouse.keeper import decisions_of

    documents, _ = with_store(need_etcd(config), lambda store: store.list())
    revision = compiled(folder, (*decisions, *decisions_of(documents)))
    document = document_of(revision_body(revision), str(folder))
    with_store(config, lambda store: store.apply([document]))
    click.echo(f"published {document.key.name}: {', '.join(sorted(revision.entry_points)) or 'no decisions'}")
    if and_activate:
        switch(document.key.name, config, timeout)


@policy.command(epilog=example("tollhouse policy activate sha256-2f0c... --config etcd://127.0.0.1:2379"))
@click.argument("revision")
@CONFIG
@click.option("--timeout", type=DURATION, default="10s", show_default=True, help="How long to wait until every gateway applies it.")
def activate(revision: str, config: str, timeout: float) -> None:
    """Put a published revision in force everywhere, and wait until every gateway says that it applies it. Its first digits will do."""
    switch(revision, need_etcd(config), timeout)


@policy.command("list", epilog=example("tollhouse policy list --config etcd://127.0.0.1:2379"))
@CONFIG
@format_option
def list_revisions(config: str, form: str) -> None:
    """Show the revisions that there are, and which one is in force."""
    documents, active = revisions(need_etcd(config))
    rows, value = [], []
    for document in documents:
        spec = document.body["spec"]
        decisions = [str(entry.get("path")) for entry in spec.get("entryPoints") or ()]
        rows.append(
            [document.key.name, "active" if document.key.name == active else "", ", ".join(decisions), str(len(spec.get("modules") or {}))]
        )
        value.append({"name": document.key.name, "active": document.key.name == active, "decisions": decisions})
    emit(form, value, rows, ["revision", "", "decisions", "modules"], "nothing has been published")


# What authors do, and what decision logs tell


for command in (init, check, test, fmt, evaluate, explain, bench, replay, why):
    policy.add_command(command)


# What they share


def need_etcd(config: str) -> str:
    """`config`, which must name an etcd. Raises `Complaint`."""
    from tollhouse.parts import is_etcd

    if not is_etcd(config):
        raise Complaint(
            "--config: revisions are kept in an etcd: write etcd://HOST:PORT; in a directory, what is in policy/ is in force", 2
        )
    return config


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


def revisions(config: str) -> tuple[list[Any], str]:
    """The PolicyRevisions in an etcd, and the name of the active one."""
    from tollhouse.commands.config import with_store

    documents, _ = with_store(config, lambda store: store.list("tollhouse.dev"))
    active = ""
    for document in documents:
        spec = document.body.get("spec")
        if document.key.kind == "ActivePolicy" and isinstance(spec, Mapping):
            active = str(spec.get("revision") or "")
    return [document for document in documents if document.key.kind == "PolicyRevision"], active


def switch(name: str, config: str, timeout: float) -> None:
    """Makes a revision the active one and waits for the gateways. Raises `Complaint`."""
    from discovery.etcd import EtcdError
    from discovery.reports import wait_for_revision
    from mesh.policies import active_policy_body, revision_digest, revision_name
    from mesh.reading import document_of
    from tollhouse.commands.config import with_store
    from tollhouse.parts import open_etcd

    wanted = revision_name(name)
    documents, active = revisions(config)
    fitting = [
        document.key.name
        for document in documents
        if document.key.name.startswith(wanted) or document.key.name.removeprefix("sha256-").startswith(wanted)
    ]
    if len(fitting) != 1:
        there = ", ".join(document.key.name[:19] for document in documents) or "none; publish one first"
        raise Complaint(f"{name} names {'no' if not fitting else 'more than one'} revision; there is {there}")
    digest = revision_digest(fitting[0])
    body = active_policy_body(digest)
    with_store(config, lambda store: store.apply([document_of(body, "policy activate", json.dumps(body, sort_keys=True))]))

    async def wait() -> Any:
        etcd = open_etcd(config)
        try:
            return await wait_for_revision(etcd, digest, timeout)
        finally:
            await etcd.close()

    try:
        missing = asyncio.run(wait())
    except EtcdError as problem:
        raise Complaint(str(problem)) from None
    before = f" (before: {active[:19]})" if active and active != fitting[0] else ""
    click.echo(f"active: {fitting[0]}{before}")
    if missing and timeout > 0:
        late = ", ".join(f"{each.namespace}/{each.name} ({each.instance})" for each in missing)
        raise Complaint(f"after {timeout:g} s these gateways do not apply it yet: {late}")

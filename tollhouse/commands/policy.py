"""`tollhouse policy`: publish, activate and list revisions of policy; what authors do with a folder is in `policy_authoring`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tollhouse.commands.policy_active import activate, change_options, history, list_revisions, rollback, switch
from tollhouse.commands.policy_asking import bench, evaluate, explain
from tollhouse.commands.policy_authoring import check, fmt, init, test
from tollhouse.commands.policy_diff import diff
from tollhouse.commands.policy_log import replay, why
from tollhouse.commands.policy_shadow import canary, differences, drop, promote, shadow
from tollhouse.output import example

FOLDER = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
DECISIONS = click.option("--decision", "decisions", multiple=True, help="A decision to serve (shop.authz.decision); may be given again.")


@click.group(epilog=example("tollhouse policy publish conf/examples/shop/policy --config etcd://127.0.0.1:2379 --activate"))
def policy() -> None:
    """Publish policy as revisions, and say which one is in force.

    A revision is a whole folder of Rego and data, compiled, named by its digest and never changed. Activating it puts it in force at every
    gateway at once.
    """


@policy.command(epilog=example("tollhouse policy publish conf/examples/shop/policy --config etcd://127.0.0.1:2379"))
@FOLDER
@DECISIONS
@click.option("--activate", "and_activate", is_flag=True, help="Put it in force, too.")
@change_options
def publish(folder: Path, decisions: tuple[str, ...], and_activate: bool, config: str, reason: str, wait: bool, timeout: float) -> None:
    """Compile a folder of Rego and store it as a revision. The decisions are those that AccessPolicies name, and those given here."""
    from mesh.policies import revision_body
    from mesh.reading import document_of
    from tollhouse.commands.config import with_store
    from tollhouse.keeper import decisions_of
    from tollhouse.policy_revisions import need_etcd

    documents, _ = with_store(need_etcd(config), lambda store: store.list())
    revision = compiled(folder, (*decisions, *decisions_of(documents)))
    document = document_of(revision_body(revision), str(folder))
    with_store(config, lambda store: store.apply([document]), "publish", reason)
    click.echo(f"published {document.key.name}: {', '.join(sorted(revision.entry_points)) or 'no decisions'}")
    if and_activate:
        switch(document.key.name, config, "activate", reason, wait, timeout)


# What authors and operators do


AUTHORS = (init, check, test, fmt, evaluate, explain, bench, replay, why, diff)
OPERATORS = (activate, rollback, history, list_revisions, shadow, canary, differences, promote, drop)

for command in (*AUTHORS, *OPERATORS):
    policy.add_command(command)


# What they share


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

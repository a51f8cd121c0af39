"""`tollhouse policy`: check, test, publish, activate and list revisions of policy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

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


@policy.command(epilog=example("tollhouse policy check conf/examples/shop/policy --decision shop.authz.decision"))
@FOLDER
@DECISIONS
@format_option
def check(folder: Path, decisions: tuple[str, ...], form: str) -> None:
    """Compile a folder of Rego, and say for each decision what it reads: that is what answers are kept by."""
    from pdp.publish import report

    revision = compiled(folder, decisions)
    found = [report(point) for point in revision.entry_points.values()]
    rows = [[each.path, "yes" if each.keepable else "no", ", ".join(each.reads), "; ".join(each.notes)] for each in found]
    value = [{"decision": each.path, "kept": each.keepable, "reads": list(each.reads), "notes": list(each.notes)} for each in found]
    emit(
        form,
        {"digest": revision.digest, "decisions": value},
        rows,
        ["decision", "kept", "reads", "notes"],
        "it compiles; name a --decision to see what it reads",
    )


@policy.command(epilog=example("tollhouse policy test conf/examples/shop/policy"))
@FOLDER
@format_option
def test(folder: Path, form: str) -> None:
    """Run the tests of a folder of Rego (`test_...` rules). Exit code 1 when one fails."""
    from pdp.publish import run_tests

    modules, data = read_folder(folder, tests=True)

    async def work(pool: Any) -> Any:
        return await run_tests(pool, modules, data)

    results = with_pool(work)
    rows = [
        [f"{each.file}:{each.row}", each.name, "passed" if each.passed else "skipped" if each.skipped else "FAILED", each.error]
        for each in results
    ]
    value = [{"file": each.file, "row": each.row, "name": each.name, "passed": each.passed, "error": each.error} for each in results]
    emit(form, value, rows, ["where", "test", "result", "error"], "there are no tests")
    if any(not each.passed and not each.skipped for each in results):
        raise SystemExit(1)


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


# What they share


def need_etcd(config: str) -> str:
    """`config`, which must name an etcd. Raises `Complaint`."""
    from tollhouse.parts import is_etcd

    if not is_etcd(config):
        raise Complaint(
            "--config: revisions are kept in an etcd: write etcd://HOST:PORT; in a directory, what is in policy/ is in force", 2
        )
    return config


def read_folder(folder: Path, *, tests: bool) -> tuple[dict[str, str], bytes]:
    """The modules and the data of a folder, laid out as an OPA bundle. Raises `Complaint`."""
    from discovery.policy_files import DATA_NAMES, PolicyFile, put_together, read_policy_file

    files: dict[str, PolicyFile] = {}
    for path in sorted(folder.rglob("*")):
        name = path.name
        if not path.is_file() or not (name in DATA_NAMES or name.endswith(".rego")) or (name.endswith("_test.rego") and not tests):
            continue
        label = f"policy/{path.relative_to(folder)}"
        try:
            files[label] = read_policy_file(label, path.read_bytes())
        except OSError as problem:
            raise Complaint(f"{path}: {problem.strerror}") from None
        except ValueError as problem:
            raise Complaint(f"{path}: {problem}") from None
    found, clashes = put_together(files)
    if clashes:
        raise Complaint(str(clashes[0]))
    if not found.modules:
        raise Complaint(f"{folder} has no .rego file", 2)
    return dict(found.modules), found.data


def with_pool(work: Any) -> Any:
    """Does `work` with an OPA worker. Raises `Complaint`."""
    from pdp.engines.engine import EngineUnavailable, PolicyError
    from tollhouse.keeper import policy_problems
    from tollhouse.parts import LazyPool

    async def run() -> Any:
        pool = LazyPool(0)
        try:
            return await work(pool)
        finally:
            await pool.close()

    try:
        return asyncio.run(run())
    except PolicyError as problem:
        *others, last = policy_problems(problem)
        for each in others:
            Complaint(str(each)).show()
        raise Complaint(str(last)) from None
    except EngineUnavailable as problem:
        raise Complaint(str(problem)) from None


def compiled(folder: Path, decisions: tuple[str, ...]) -> Any:
    """The revision of a folder. Raises `Complaint`."""
    modules, data = read_folder(folder, tests=False)

    async def work(pool: Any) -> Any:
        return await pool.compile(modules, data, frozenset(decisions))

    return with_pool(work)


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

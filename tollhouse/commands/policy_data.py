"""`tollhouse policy data`: data that change without the policy, with revisions of their own."""

from __future__ import annotations

import time
from typing import Any

import click

from tollhouse.commands.bundle_options import BUNDLE_SERVICES
from tollhouse.commands.policy_active import CONFIG, change_options
from tollhouse.output import Complaint, emit, example, format_option, printable

ROOT = click.argument("root", metavar="ROOT")


@click.group("data", epilog=example("tollhouse policy data publish grants.json --root shop/grants --config etcd://127.0.0.1:2379"))
def data() -> None:
    """Publish data that policy reads, without publishing the policy anew.

    What is at a ROOT (a path below data, as in shop/grants) is a revision of its own, named by its digest. A change of it is in force at
    every gateway when the command returns; no policy is compiled again, and decisions that do not depend on it stay kept.
    """


@data.command(
    epilog=example("tollhouse policy data publish grants.json --root shop/grants --config etcd://127.0.0.1:2379 --reason 'ada may pay'")
)
@click.argument("source", metavar="FILE|-|URL")
@click.option("--root", default="", metavar="ROOT", help="Where it is below data: shop/grants.  [default: it is all of data]")
@BUNDLE_SERVICES
@click.option("--by-reference", is_flag=True, help="Store where the bundle is, and the digest, in place of the data.")
@change_options
def publish(source: str, root: str, bundle_services: Any, by_reference: bool, config: str, reason: str, wait: bool, timeout: float) -> None:
    """Put the data in FILE (JSON or YAML; - for standard input) in force at ROOT, and wait until every gateway says that it applies them.

    With the URL of an OPA bundle it is what that has at ROOT. Exit code 1 when a gateway that is registered does not apply it in time.
    """
    from tollhouse.policy_data import change_data, data_revision, published_data, refuse_clashes, root_argument, wait_for_data

    where = root_argument(root)
    made = data_revision(source, where, services=bundle_services, by_reference=by_reference)
    there = published_data(config)
    refuse_clashes(there, where)
    changed = change_data(config, "data publish", reason, where, made.digest, made)
    old = changed.before.get(where)
    click.echo(f"data at {root or 'the root'}: {_short(made.digest)}" + (f" (before: {_short(old)})" if old and old != made.digest else ""))
    if wait and timeout > 0:
        wait_for_data(config, changed.after, timeout)


@data.command("list", epilog=example("tollhouse policy data list --config etcd://127.0.0.1:2379"))
@CONFIG
@format_option
def list_data(config: str, form: str) -> None:
    """Show the roots with data in force, and the revisions that there are of each."""
    from mesh.policy_data import root_text
    from tollhouse.policy_data import published_data

    there = published_data(config)
    rows, value = [], []
    for root in sorted({*there.active, *(each.root for each in there.revisions)}):
        digest = there.active.get(root, "")
        kept = [each for each in there.revisions if each.root == root]
        size = next((each.size for each in kept if each.digest == digest), 0)
        rows.append([root_text(root) or "(all)", _short(digest) or "none", str(size) if size else "-", str(len(kept))])
        value.append({"root": root_text(root), "revision": digest, "bytes": size, "revisions": [each.digest for each in kept]})
    emit(form, value, rows, ["root", "in force", "bytes", "revisions"], "no data have been published")


@data.command(epilog=example("tollhouse policy data show shop/grants --config etcd://127.0.0.1:2379"))
@ROOT
@click.option("--revision", default="", metavar="DIGEST", help="Not the one in force; its first digits will do.")
@CONFIG
def show(root: str, revision: str, config: str) -> None:
    """Print the data at ROOT as JSON (`/` for all data)."""
    from tollhouse.policy_data import named_data, published_data

    found = named_data(published_data(config), root, revision)
    if found.bundle:
        raise Complaint(f"{_short(found.digest)} is in the bundle at {found.bundle}")
    click.echo(found.text())


@data.command(epilog=example("tollhouse policy data history shop/grants --config etcd://127.0.0.1:2379"))
@click.argument("root", metavar="[ROOT]", default="")
@CONFIG
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many changes to show, the newest first.")
@format_option
def history(root: str, config: str, limit: int, form: str) -> None:
    """Show who changed which data, when and why: of one ROOT, or of all."""
    from tollhouse.policy_data import data_history

    rows, value = [], []
    for each in data_history(config, root or None)[:limit]:
        when = time.gmtime(each.time)
        told = f"{each.root or '(all)'}: {_short(each.before) or 'none'} -> {_short(each.after) or 'none'}"
        rows.append([time.strftime("%Y-%m-%d %H:%M:%S", when), each.action, each.who, told, each.reason or "-"])
        value.append({**each.as_value(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", when)})
    shown = [[printable(cell) for cell in row] for row in rows]
    emit(form, value, shown, ["when (UTC)", "what", "who", "change", "why"], "nothing has been changed yet")


@data.command(epilog=example("tollhouse policy data rollback shop/grants --config etcd://127.0.0.1:2379 --reason 'ada may not'"))
@ROOT
@click.option("--to", "revision", default="", metavar="DIGEST", help="This revision, in place of the one before; its first digits will do.")
@change_options
def rollback(root: str, revision: str, config: str, reason: str, wait: bool, timeout: float) -> None:
    """Put the data in force again that were at ROOT before. A second time, this goes back to where it was."""
    from tollhouse.policy_data import change_data, data_before, named_data, published_data, refuse_clashes, root_argument, wait_for_data

    there = published_data(config)
    where = root_argument(root)
    if not revision:
        revision = data_before(config, where, there)
    found = named_data(there, root, revision)
    refuse_clashes(there, where)
    changed = change_data(config, "data rollback", reason, where, found.digest)
    old = changed.before.get(where, "")
    click.echo(f"data at {root}: {_short(found.digest)} (before: {_short(old) or 'none'})")
    if wait and timeout > 0:
        wait_for_data(config, changed.after, timeout)


@data.command(epilog=example("tollhouse policy data delete shop/grants --config etcd://127.0.0.1:2379"))
@ROOT
@change_options
def delete(root: str, config: str, reason: str, wait: bool, timeout: float) -> None:
    """Have no data at ROOT any more. Its revisions stay, and `rollback` brings the last one back."""
    from tollhouse.policy_data import change_data, named_data, published_data, root_argument, wait_for_data

    where = root_argument(root)
    found = named_data(published_data(config), root, "")
    changed = change_data(config, "data delete", reason, where, "")
    click.echo(f"data at {root}: none (before: {_short(found.digest)})")
    if wait and timeout > 0:
        wait_for_data(config, changed.after, timeout)


def _short(digest: str) -> str:
    from tollhouse.policy_revisions import short

    return short(digest)

"""`tollhouse policy diff`: what is not the same in two revisions of policy."""

from __future__ import annotations

from typing import Any

import click

from tollhouse.commands.policy_log import CONFIG, changes, show, summary
from tollhouse.output import emit, example, format_option, printable, show_table
from tollhouse.policy_work import ALLOW_BUILTIN, DECISIONS


@click.command(epilog=example("tollhouse policy diff sha256-2f0c conf/examples/shop/policy --config etcd://127.0.0.1:2379"))
@click.argument("before", metavar="DIR|REVISION")
@click.argument("after", metavar="DIR|REVISION")
@CONFIG
@DECISIONS
@click.option("--log", "logs", multiple=True, metavar="FILE", help="A decision log: say whose access changes; may be given again.")
@click.option("--text", is_flag=True, help="Show the modules' lines that differ, too.")
@click.option("--fail-on-change", is_flag=True, help="With --log: exit code 1 when access changes, or when that can't be told.")
@ALLOW_BUILTIN
@format_option
def diff(
    before: str,
    after: str,
    config: str,
    decisions: tuple[str, ...],
    logs: tuple[str, ...],
    text: bool,
    fail_on_change: bool,
    allow: tuple[str, ...],
    form: str,
) -> None:
    """Show what is not the same in two revisions: modules, data, decisions, and what those read.

    Each is a folder or a published revision. With --log, every decision in a decision log is decided by both, and those that differ are
    shown by caller and rule.
    """
    from pdp.difference import difference
    from tollhouse.decision_files import decision_files
    from tollhouse.output import Complaint
    from tollhouse.policy_replay import paths_in, replay
    from tollhouse.policy_revisions import entry_points, look_up, resolved, with_workers

    if fail_on_change and not logs:
        raise Complaint("--fail-on-change is about the decisions of a --log; there is none", 2)
    one, other = look_up(before, config), look_up(after, config)
    with decision_files(logs) as events:
        paths = paths_in(events)

        async def work(pool: Any) -> Any:
            wanted = {*decisions, *paths}
            for named in (one, other):
                wanted |= await entry_points(pool, named)
            old, new = await resolved(pool, one, wanted), await resolved(pool, other, wanted)
            return old, new, await replay(pool, events, new, old) if logs else None

        old, new, replayed = with_workers(work, allow)
        found = difference(old, new)
        if form != "table":
            import msgspec

            whole = {"before": old.digest, "after": new.digest, **msgspec.to_builtins(found)}
            if replayed is not None:
                whole["replayed"] = {"counts": replayed.tally.counts, "decided": replayed.decided, "changes": _rows(replayed)}
            emit(form, whole, (), ())
        else:
            _show(old, new, found, text)
            if replayed is not None:
                click.echo("")
                show(form, replayed, events, {})
                click.echo(summary(replayed))
    if fail_on_change and replayed is not None and changes(replayed):
        raise SystemExit(1)


def _show(old: Any, new: Any, found: Any, text: bool) -> None:
    from tollhouse.policy_revisions import short

    click.echo(f"{short(old.digest)} -> {short(new.digest)}")
    if old.digest == new.digest:
        click.echo("they are the same")
        return
    rows = [[each.name, each.change, f"+{each.added} -{each.removed}"] for each in found.modules]
    rows += [[path, change, ""] for path, change in found.data]
    click.echo("")
    show_table([[printable(cell) for cell in row] for row in rows], ["module or data", "change", "lines"])
    kept = {True: "kept", False: "asked every time"}
    decided = []
    for each in found.decisions:
        reads = [f"+ {path}" for path in each.reads_more] + [f"- {path}" for path in each.reads_less]
        if each.keepable[0] != each.keepable[1]:
            reads.append(f"{kept[each.keepable[0]]} -> {kept[each.keepable[1]]}")
        decided.append([each.path, each.change, "; ".join(reads) or "the same"])
    decided += [[path, "the same answers", "the same"] for path in found.same]
    if decided:
        click.echo("")
        show_table([[printable(cell) for cell in row] for row in decided], ["decision", "change", "reads"])
    if text:
        for each in found.modules:
            click.echo("")
            for line in each.text.splitlines():
                click.echo(printable(line.expandtabs(4)))


def _rows(replayed: Any) -> list[dict[str, Any]]:
    return [
        {"change": row.change, "caller": row.caller, "decision": row.path, "before": row.before, "after": row.after, "count": group.count}
        for row, group in replayed.tally.rows
    ]

"""`tollhouse policy replay` and `why`: what decision logs tell."""

from __future__ import annotations

from itertools import chain
from typing import Any

import click
import msgspec

from tollhouse.output import Complaint, emit, example, format_option, printable
from tollhouse.policy_work import ALLOW_BUILTIN

CONFIG = click.option("--config", default="", help="The etcd with the published revisions: etcd://HOST:PORT[,HOST:PORT...].")
MOST_ROWS = 200


@click.command(epilog=example("tollhouse policy replay decisions.log --against conf/examples/shop/policy"))
@click.argument("log", nargs=-1, required=True)
@click.option("--against", required=True, metavar="DIR|REVISION", help="Who decides: a folder, or a published revision's first digits.")
@CONFIG
@ALLOW_BUILTIN
@click.option("--fail-on-change", is_flag=True, help="Exit code 1 when anybody gains or loses access, or when that can't be told.")
@format_option
def replay(log: tuple[str, ...], against: str, config: str, allow: tuple[str, ...], fail_on_change: bool, form: str) -> None:
    """Decide what LOG holds anew, by another revision: who gains access, and who loses it, by caller and rule.

    LOG are decision logs of gateways (or of OPA): lines of JSON or uploads, also gzipped; - is standard input.
    """
    from tollhouse.decision_files import decision_files
    from tollhouse.policy_replay import paths_in
    from tollhouse.policy_replay import replay as decide_again
    from tollhouse.policy_revisions import look_up, resolved, short, with_workers

    named = look_up(against, config, with_data_in_force=True)
    with decision_files(log) as events:
        paths = paths_in(events)

        async def work(pool: Any) -> Any:
            revision = await resolved(pool, named, paths)
            return revision.policy, await decide_again(pool, events, revision)

        digest, found = with_workers(work, allow)
        show(form, found, events, {"against": digest})
        if form == "table":
            click.echo(f"against {short(digest)}: " + summary(found))
    if fail_on_change and changes(found):
        raise SystemExit(1)


@click.command(epilog=example("tollhouse policy why REQUEST-ID --log decisions.log --policy conf/examples/shop/policy"))
@click.argument("request", metavar="REQUEST-ID")
@click.option("--log", "logs", multiple=True, metavar="FILE", help="A decision log, or - for stdin; may be given again.")
@click.option("--admin", "admins", multiple=True, metavar="HOST:PORT", help="A gateway that has a decision log; may be given again.")
@click.option("--policy", "folder", default="", metavar="DIR|REVISION", help="Explain by this policy which condition did not hold.")
@CONFIG
@ALLOW_BUILTIN
@format_option
def why(request: str, logs: tuple[str, ...], admins: tuple[str, ...], folder: str, config: str, allow: tuple[str, ...], form: str) -> None:
    """Say which policy, which rule and which condition refused a request. Its id is in `x-request-id` of the refusal.

    Gateways keep their newest refusals (500) while they write a decision log. With --config the revision that decided is asked what its
    rules did; with --policy a folder, or another revision. Exit code 1 when nothing of the request is found.
    """
    from pdp.why import culprit, decisions_of, sentence
    from tollhouse.commands.status import fetch
    from tollhouse.decision_files import decision_files
    from tollhouse.policy_steps import show_steps

    if not logs and not admins:
        raise Complaint("where is it to be looked for? name a decision log (--log FILE), or gateways (--admin HOST:PORT)", 2)
    with decision_files(logs) as events:
        kept = [event for admin in admins for event in fetch(admin, "/refusals")["events"]]
        found = decisions_of(chain(events, kept), request)
    if not found:
        raise Complaint(
            f"{', '.join((*logs, *admins))}: nothing of the request {request}; what no policy was asked about is in the access log alone"
        )
    by = culprit(found)
    told = _explained(by or found[0], folder, config, allow) if folder or config else None
    if form != "table":
        whole: dict[str, Any] = {"request": request, "why": sentence(found)}
        whole["decisions"] = [{"event": one.event, "refused": one is by} for one in found]
        if told is not None:
            whole["explanation"] = {"notes": told.notes, "steps": msgspec.to_builtins(told.explanation.steps)}
        emit(form, whole, (), ())
        return
    rows = []
    for one in found:
        record = one.record
        said = [record.verdict, record.rule or "-", record.reason or "-", "yes" if one.kept else "no", "yes" if record.enforced else "no"]
        rows.append([one.policy, one.level, record.path, *said, record.revision[:19] or "-"])
    labels = found[0].event.get("labels") or {}
    asked = f"{found[0].record.method} {found[0].record.target}".strip() or "a connection"
    where = f"at {labels.get('gateway', '?')}, {found[0].event.get('timestamp')}"
    click.echo(printable(f"{asked} of {found[0].record.caller or 'nobody known'}, {where}"))
    click.echo("")
    columns = ["policy", "level", "decision", "answer", "rule", "reason", "kept", "enforced", "revision"]
    emit(form, None, [[printable(cell) for cell in row] for row in rows], columns)
    click.echo("")
    click.echo(printable(sentence(found)))
    if told is not None:
        show_steps(told.explanation, told.shown)
        for note in told.notes:
            click.echo(printable(f"note: {note}"))


class _Told(msgspec.Struct):
    explanation: Any
    notes: list[str]
    shown: Any


def _explained(one: Any, folder: str, config: str, allow: tuple[str, ...]) -> _Told:
    """What the rules of a policy did for one decision. Raises `Complaint`."""
    from pdp.authoring import explain
    from pdp.replay import missing
    from tollhouse.policy_revisions import look_up, resolved, with_workers

    record = one.record
    what = folder or record.revision
    if record.provider or not what:
        raise Complaint(f"the decision was made by {record.provider or 'nobody known'}, whose rules are not known here")
    named = look_up(what, config, with_data_in_force=True)

    async def work(pool: Any) -> _Told:
        revision = await resolved(pool, named, (record.path,))
        document = msgspec.json.encode(record.document)
        told = await explain(pool, revision.modules, revision.data, record.path, document)
        notes = []
        if record.revision and record.revision != revision.policy:
            notes.append(f"{record.revision[:19]} decided, and this is {revision.policy[:19]}")
        point = revision.entry_points.get(record.path)
        gone = missing(record, point.reads) if point is not None else ()
        if gone:
            notes.append(f"it reads {', '.join(gone)}, which the log does not have: the steps may be others than they were")
        return _Told(told, notes, named.shown)

    return with_workers(work, allow)


def changes(found: Any) -> int:
    """How many decisions are others, or may be."""
    return sum(count for change, count in found.tally.counts.items() if change != "same")


def summary(found: Any) -> str:
    """The outcome in one line."""
    counts = found.tally.counts
    text = f"{found.decided} decisions: {counts['loses']} lose access, {counts['gains']} gain it, {counts['same']} stay the same"
    if counts["differs"]:
        text += f", {counts['differs']} are refused otherwise"
    if counts["unsure"]:
        text += f", of {counts['unsure']} it can't be told"
    for why, count in sorted(found.skipped.items()):
        text += f"; {count} {why}"
    return text


def show(form: str, found: Any, events: Any, more: dict[str, Any]) -> None:
    """Prints what changes. Raises `Complaint` when the files hold no event at all."""
    if not found.events:
        raise Complaint(f"there is no event in it{f': {events.where} is not JSON' if events.where else ''}")
    rows, value = [], []
    for row, group in found.tally.rows:
        rows.append([row.change, row.caller or "-", row.path, row.before, row.after, str(group.count), group.asked, group.example])
        value.append(
            {
                "change": row.change,
                "caller": row.caller,
                "decision": row.path,
                "before": row.before,
                "after": row.after,
                "count": group.count,
                "example": {"request": group.example, "asked": group.asked},
            }
        )
    whole = {**more, "decided": found.decided, "counts": found.tally.counts, "skipped": found.skipped, "changes": value}
    whole |= {"unreadable": events.unreadable, "notes": list(found.notes)}
    shown = [[printable(cell) for cell in row] for row in rows[:MOST_ROWS]]
    emit(form, whole, shown, ["change", "caller", "decision", "before", "now", "count", "for example", "request"], "nothing changes")
    if form != "table":
        return
    if len(rows) > MOST_ROWS:
        click.echo(f"({len(rows) - MOST_ROWS} rows more: -o json has them all)")
    for note in found.notes:
        click.echo(f"note: {note}")
    if events.unreadable:
        click.echo(f"note: {events.unreadable} lines are not events (the first is {events.where})")

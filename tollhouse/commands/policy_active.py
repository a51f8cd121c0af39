"""`tollhouse policy activate`, `rollback`, `history` and `list`: which revision is in force, and who made it so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from tollhouse.output import Complaint, emit, example, format_option
from tollhouse.values import DURATION

F = TypeVar("F", bound=Callable[..., Any])

CONFIG = click.option("--config", required=True, help="The etcd: etcd://HOST:PORT[,HOST:PORT...].")


def change_options(function: F) -> F:
    """The options of every command that changes what is in force: `config`, `reason`, `wait`, `timeout`."""
    for option in (
        click.option("--timeout", type=DURATION, default="10s", show_default=True, help="How long to wait until every gateway applies it."),
        click.option("--wait", type=bool, default=True, show_default=True, help="Wait until every gateway applies it."),
        click.option("--reason", default="", help="Why, for the audit log."),
        CONFIG,
    ):
        function = option(function)
    return function


@click.command(epilog=example("tollhouse policy activate sha256-2f0c... --config etcd://127.0.0.1:2379 --reason 'web may pay'"))
@click.argument("revision")
@change_options
def activate(revision: str, config: str, reason: str, wait: bool, timeout: float) -> None:
    """Put a published revision in force everywhere, and wait until every gateway says that it applies it. Its first digits will do.

    A shadow or canary that was being tried ends. Exit code 1 when a gateway that is registered does not apply it in time: it is named.
    """
    from tollhouse.policy_revisions import named, need_etcd, published

    documents, _ = published(need_etcd(config))
    switch(named(documents, revision).key.name, config, "activate", reason, wait, timeout)


@click.command(epilog=example("tollhouse policy rollback --config etcd://127.0.0.1:2379 --reason 'batch can not pay any more'"))
@change_options
def rollback(config: str, reason: str, wait: bool, timeout: float) -> None:
    """Put the revision in force again that was before the present one. A second time, this goes back to where it was.

    A shadow or canary that was being tried ends.
    """
    from discovery.audit import before_of
    from tollhouse.policy_revisions import need_etcd, published, short
    from tollhouse.policy_switch import audit_entries

    documents, active = published(need_etcd(config))
    current = str(active.get("revision") or "")
    if not current:
        raise Complaint("no revision is in force: there is nothing to go back from")
    before = before_of(audit_entries(config), current)
    if not before:
        raise Complaint(f"the history knows of no revision before {short(current)}; `tollhouse policy list` shows those that there are")
    if before not in {document.key.name for document in documents}:
        raise Complaint(f"the revision before, {before}, has been deleted; publish it again, or activate another one")
    switch(before, config, "rollback", reason, wait, timeout)


@click.command(epilog=example("tollhouse policy history --config etcd://127.0.0.1:2379"))
@CONFIG
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many entries to show, the newest first.")
@format_option
def history(config: str, limit: int, form: str) -> None:
    """Show who changed policy, when and why: what is in force, and what decides who may call what.

    First comes what was changed by other means than these commands, and so by nobody knows whom.
    """
    from tollhouse.audited import show_history
    from tollhouse.policy_revisions import need_etcd
    from tollhouse.policy_switch import audit_entries, changed_elsewhere

    show_history(audit_entries(need_etcd(config))[:limit], changed_elsewhere(config), _told, form)


def _told(change: Any) -> str:
    """One change, for people."""
    from tollhouse.policy_revisions import short

    if change.kind == "ActiveData":
        return _told_data(change)
    if change.kind in ("PolicyRevision", "DataRevision"):
        return f"{short(change.name)} {change.verb}"
    if change.kind != "ActivePolicy":
        return f"{change.kind} {f'{change.namespace}/' if change.namespace else ''}{change.name} {change.verb}"
    before, after = change.before or {}, change.after or {}
    parts = []
    for field in ("revision", "shadow", "canary"):
        old, new = _field(before.get(field)), _field(after.get(field))
        if old != new:
            name = "" if field == "revision" else f"{field} "
            parts.append(f"{name}{old or 'none'} -> {new or 'none'}")
    return ", ".join(parts) or change.verb


def _told_data(change: Any) -> str:
    """A change of the data in force, for people."""
    from mesh.policies import active_data_of
    from mesh.policy_data import root_text
    from tollhouse.policy_revisions import short

    before, after = active_data_of(change.before), active_data_of(change.after)
    parts = [
        f"data {root_text(root) or '(all)'}: {short(before.get(root, '')) or 'none'} -> {short(after.get(root, '')) or 'none'}"
        for root in sorted({*before, *after})
        if before.get(root) != after.get(root)
    ]
    return ", ".join(parts) or f"ActiveData {change.verb}"


def _field(said: Any) -> str:
    """A revision with its share, for people."""
    from mesh.policies import trial_of
    from tollhouse.policy_revisions import short

    if not isinstance(said, (str, Mapping)):
        return ""
    name, share = trial_of(said)
    whom = [f"{share.percent} %{' of callers' if share.by_identity else ''}"] if share.percent not in (0, 100) else []
    whom += [f"{len(share.identities)} callers"] if share.identities else []
    return short(name) + (f" ({', '.join(whom)})" if whom else "")


@click.command("list", epilog=example("tollhouse policy list --config etcd://127.0.0.1:2379"))
@CONFIG
@format_option
def list_revisions(config: str, form: str) -> None:
    """Show the revisions that there are, and which one is in force."""
    from tollhouse.policy_revisions import label_of, need_etcd, published

    documents, active = published(need_etcd(config))
    from mesh.policies import trial_of

    tried = {trial_of(active[field])[0]: field for field in ("shadow", "canary") if active.get(field)}
    rows, value = [], []
    for document in documents:
        spec = document.body["spec"]
        decisions = [str(entry.get("path")) for entry in spec.get("entryPoints") or ()]
        is_active = document.key.name == active.get("revision")
        state = "active" if is_active else tried.get(document.key.name, "")
        rows.append([document.key.name, label_of(document), state, ", ".join(decisions), str(len(spec.get("modules") or {}))])
        value.append({"name": document.key.name, "label": label_of(document), "active": is_active, "state": state, "decisions": decisions})
    emit(form, value, rows, ["revision", "name", "", "decisions", "modules"], "nothing has been published")


def switch(name: str, config: str, action: str, reason: str, wait: bool, timeout: float) -> None:
    """Puts the revision `name` in force and waits for the gateways. Raises `Complaint`."""
    from tollhouse.policy_revisions import short
    from tollhouse.policy_switch import change_active, wait_for_gateways

    changed = change_active(config, action, reason, lambda _: {"revision": name})
    old = str(changed.before.get("revision") or "")
    before = f" (before: {short(old)})" if old and old != name else ""
    click.echo(f"active: {name}{before}")
    for field in ("shadow", "canary"):
        if changed.before.get(field):
            click.echo(f"the {field} {_field(changed.before[field])} has ended")
    if wait and timeout > 0:
        wait_for_gateways(config, changed.after, timeout)

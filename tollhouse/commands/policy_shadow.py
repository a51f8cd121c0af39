"""`tollhouse policy shadow`, `canary`, `differences`, `promote` and `drop`: a revision is tried before all requests depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from tollhouse.commands.policy_active import change_options
from tollhouse.output import Complaint, emit, example, format_option, printable
from tollhouse.values import ADMINS

F = TypeVar("F", bound=Callable[..., Any])

WHICH = click.option("--which", type=click.Choice(["shadow", "canary"]), help="Which of the two, where both are tried.")


def share_options(function: F) -> F:
    """On which requests a revision is tried: `percent`, `by` and `identities`."""
    for option in (
        click.option("--identity", "identities", multiple=True, metavar="SPIFFE-ID", help="All of this caller; may be given again."),
        click.option(
            "--by",
            type=click.Choice(["request", "identity"]),
            help="What the share is of: requests, or callers (all of whose are in it, or none).  [default: request]",
        ),
        click.option("--percent", type=click.IntRange(0, 100), help="This share of the requests of all callers."),
    ):
        function = option(function)
    return function


@click.command(epilog=example("tollhouse policy shadow sha256-2f0c... --config etcd://127.0.0.1:2379 --percent 10"))
@click.argument("revision")
@share_options
@change_options
def shadow(
    revision: str, percent: int | None, by: str | None, identities: tuple[str, ...], config: str, reason: str, wait: bool, timeout: float
) -> None:
    """Have a published revision asked beside the active one, and its answers compared, never enforced.

    About all requests, or those that --percent and --identity say. `differences` shows what it would change; `promote` makes it the active
    one, `drop` ends it.
    """
    try_revision("shadow", revision, percent, by, identities, config, reason, wait, timeout)


@click.command(epilog=example("tollhouse policy canary sha256-2f0c... --config etcd://127.0.0.1:2379 --percent 5"))
@click.argument("revision")
@share_options
@change_options
def canary(
    revision: str, percent: int | None, by: str | None, identities: tuple[str, ...], config: str, reason: str, wait: bool, timeout: float
) -> None:
    """Have a published revision decide about some requests, in the place of the active one.

    About those that --percent and --identity say. The active one is asked beside it, so that `differences` shows what it changes; `promote`
    makes it the active one, `drop` ends it.
    """
    if percent is None and not identities:
        raise Complaint("name the requests that it decides about: --percent 5, or --identity SPIFFE-ID", 2)
    try_revision("canary", revision, percent, by, identities, config, reason, wait, timeout)


@click.command(epilog=example("tollhouse policy promote --config etcd://127.0.0.1:2379 --reason 'no differences in a day'"))
@WHICH
@change_options
def promote(which: str | None, config: str, reason: str, wait: bool, timeout: float) -> None:
    """Make the revision that is tried (canary or shadow) the active one everywhere, and wait as `activate` does. Nothing is tried then."""
    from tollhouse.policy_revisions import need_etcd, published, short
    from tollhouse.policy_switch import change_active, tried_of, wait_for_gateways

    documents, _ = published(need_etcd(config))
    there = {document.key.name for document in documents}

    def make(spec: dict[str, Any]) -> dict[str, Any]:
        field, name = tried_of(spec, which)
        if name not in there:
            raise Complaint(f"the {field} {name} has been deleted; publish it again")
        return {"revision": name}

    changed = change_active(config, "promote", reason, make)
    click.echo(f"active: {changed.after['revision']} (before: {short(str(changed.before.get('revision') or 'none'))})")
    if wait and timeout > 0:
        wait_for_gateways(config, changed.after, timeout)


@click.command(epilog=example("tollhouse policy drop --config etcd://127.0.0.1:2379 --reason 'batch would lose the catalog'"))
@WHICH
@change_options
def drop(which: str | None, config: str, reason: str, wait: bool, timeout: float) -> None:
    """End what is tried (canary or shadow): the active revision decides about all requests, alone."""
    from tollhouse.policy_revisions import need_etcd, short
    from tollhouse.policy_switch import change_active, tried_of, wait_for_gateways

    dropped: list[str] = []

    def make(spec: dict[str, Any]) -> dict[str, Any]:
        field, name = tried_of(spec, which)
        dropped[:] = [field, name]
        return {key: value for key, value in spec.items() if key != field}

    changed = change_active(need_etcd(config), "drop", reason, make)
    click.echo(f"the {dropped[0]} {short(dropped[1])} has ended; active: {changed.after.get('revision')}")
    if wait and timeout > 0:
        wait_for_gateways(config, changed.after, timeout)


@click.command(epilog=example("tollhouse policy differences --admin 127.0.0.1:15000"))
@ADMINS
@format_option
def differences(admins: tuple[str, ...], form: str) -> None:
    """Show what a revision that is tried, or a policy in shadow mode, decides otherwise: by rule and caller, with a request as an example.

    Gateways count since they started. Exit code 0, also when there are differences.
    """
    import json

    import msgspec

    from telemetry.trials import merged
    from tollhouse.commands.status import fetch

    found = json.loads(merged([msgspec.json.encode(fetch(admin, "/trials")) for admin in admins]))
    columns = ["change", "what", "revision", "policy", "caller", "before", "with it", "count", "for example", "request"]
    rows = [
        [
            each["change"], each["kind"], each["revision"][:19] or "-", each["policy"], each["caller"] or "-", each["before"],
            each["after"], str(each["count"]), each["asked"] or "-", each["request_id"] or "-",
        ]
        for each in found["differences"]
    ]  # fmt: skip
    emit(form, found, [[printable(cell) for cell in row] for row in rows], columns, "no differences so far")
    if form == "table" and found["leftOut"]:
        click.echo(f"({found['leftOut']} more had no room)")


def try_revision(
    field: str,
    revision: str,
    percent: int | None,
    by: str | None,
    identities: tuple[str, ...],
    config: str,
    reason: str,
    wait: bool,
    timeout: float,
) -> None:
    """Has a published revision tried, and waits for the gateways. Raises `Complaint`."""
    from mesh import formats
    from mesh.policies import trial_spec
    from tollhouse.policy_revisions import named, need_etcd, published, short
    from tollhouse.policy_switch import change_active, wait_for_gateways

    if by is not None and percent is None:
        raise Complaint("--by says what --percent is of: give that, too", 2)
    for identity in identities:
        wrong = formats.spiffe_id(identity)
        if wrong:
            raise Complaint(f"--identity: {wrong}", 2)
    if len(set(identities)) != len(identities) or len(identities) > 64:
        raise Complaint("--identity: at most 64 callers, each once", 2)
    documents, _ = published(need_etcd(config))
    name = named(documents, revision).key.name

    def make(spec: dict[str, Any]) -> dict[str, Any]:
        if not spec.get("revision"):
            raise Complaint("no revision is active: activate one first")
        if spec["revision"] == name:
            raise Complaint(f"{short(name)} is the active revision: there is nothing to try")
        return {**spec, field: trial_spec(name, percent, identities, by_identity=by == "identity")}

    changed = change_active(config, field, reason, make)
    whom = [f"{percent} % of the {'callers' if by == 'identity' else 'requests'}"] if percent is not None else []
    whom += [f"{len(identities)} caller{'s' if len(identities) > 1 else ''}"] if identities else []
    click.echo(f"{field}: {name} for {' and '.join(whom) or 'all requests'}; active: {short(str(changed.after['revision']))}")
    if wait and timeout > 0:
        wait_for_gateways(config, changed.after, timeout)

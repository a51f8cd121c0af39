"""`tollhouse quota set`, `reset` and `history`: what an operator does to a limit, and what was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from tollhouse.output import Complaint, emit, example, format_option, printable
from tollhouse.values import DURATION

F = TypeVar("F", bound=Callable[..., Any])
LONGEST_REASON = 1000
LONGEST_CHANGE = 3660 * 86_400.0
"""Seconds."""

CONFIG = click.option("--config", required=True, help="Where the mesh is: etcd://HOST:PORT[,HOST:PORT...], or a directory.")


class Reason(click.ParamType[str]):
    """Why, in a sentence."""

    name = "reason"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As click has it."""
        text = str(value).strip()
        if not text:
            self.fail("say why, for those who read the audit log", param, ctx)
        if len(text) > LONGEST_REASON:
            self.fail(f"has {len(text)} characters; at most {LONGEST_REASON} are kept", param, ctx)
        return text


class Moment(click.ParamType[float]):
    """A date and time."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click has it."""
        from mesh.quota_changes import instant

        if isinstance(value, float):
            return value
        try:
            return instant(str(value))
        except ValueError as problem:
            self.fail(str(problem), param, ctx)


REASON = click.option("--reason", type=Reason(), required=True, help="Why, for the audit log.")
WAIT = click.option("--wait", type=bool, default=True, show_default=True, help="Wait until every gateway applies it.")
TIMEOUT = click.option("--timeout", type=DURATION, default="10s", show_default=True, help="How long to wait for them.")


@click.command(
    "set",
    epilog=example(
        "tollhouse quota set shop/orders/per-caller spiffe://shop.example/ns/shop/sa/web --tokens 1 --interval 1m --for 30m"
        " --reason 'web retries without end' --config etcd://127.0.0.1:2379"
    ),
)
@click.argument("limit")
@click.argument("values", nargs=-1)
@click.option("--tokens", type=click.IntRange(1, 1_000_000_000), help="Refilled each interval.")
@click.option("--interval", type=DURATION, metavar="DURATION", help="At most 744h.")
@click.option("--burst", type=click.IntRange(1, 1_000_000_000), help="What a full bucket holds.  [default: as many seconds as before]")
@click.option("--concurrency", type=click.IntRange(1, 1_000_000), help="How many may be in progress at once.")
@click.option("--lift", is_flag=True, help="Let everything pass.")
@click.option("--block", is_flag=True, help="Let nothing pass.")
@click.option("--undo", is_flag=True, help="Go back to what the QuotaPolicy says.")
@click.option("--for", "lasting", type=DURATION, metavar="DURATION", help="How long it is to hold.  [default: until it is undone]")
@click.option("--until", type=Moment(), metavar="TIME", help="Until when (2026-01-31T12:00:00Z).")
@REASON
@CONFIG
@WAIT
@TIMEOUT
@format_option
def set_command(
    limit: str,
    values: tuple[str, ...],
    tokens: int | None,
    interval: float | None,
    burst: int | None,
    concurrency: int | None,
    lift: bool,
    block: bool,
    undo: bool,
    lasting: float | None,
    until: float | None,
    reason: str,
    config: str,
    wait: bool,
    timeout: float,
    form: str,
) -> None:
    """Change, lift or block a LIMIT by hand, for some VALUES of its descriptors or for all, and wait until every gateway does so.

    LIMIT is NAMESPACE/POLICY/LIMIT, VALUES are those of its descriptors, in their order; a value that `top` and `watch` show in part may
    be given as it is shown. The QuotaPolicy stays as it is. Who did it, and why, is in `tollhouse quota history`.

    Exit code 1 when a gateway that is registered does not apply it in time: it is named.
    """
    from mesh.quota_changes import instant_text
    from tollhouse.parts import is_etcd
    from tollhouse.quota_limits import numbers_text
    from tollhouse.quota_switch import Wanted, acknowledged, set_limit

    numbers = any(number is not None for number in (tokens, interval, burst, concurrency))
    if sum((lift, block, undo, numbers)) != 1:
        raise Complaint("say one of --lift, --block and --undo, or other numbers: --tokens, --interval, --burst, --concurrency", 2)
    if interval is not None and not 0.001 <= interval <= 31 * 86_400:
        raise Complaint("--interval: from 1ms to 744h (31 days)", 2)
    end = ending(lasting, until)
    if undo and end:
        raise Complaint("--undo holds from now on; --for and --until mean nothing beside it", 2)
    wanted = Wanted(
        tokens=tokens,
        interval=interval,
        burst=burst,
        concurrency=concurrency,
        lift=lift,
        block=block,
        undo=undo,
        until=end,
        reason=reason,
    )
    done = set_limit(config, limit, values, wanted)
    key = None if done.values is None else list(done.values)
    value: dict[str, Any] = {"limit": limit, "values": key, "before": done.before, "after": done.after}
    value["until"] = instant_text(done.until) if done.until else None
    known = is_etcd(config)
    complaint: Complaint | None = None
    if not known:
        click.echo("a directory keeps no audit log: the reason is in its QuotaChange, and whoever watches it applies it", err=True)
    elif wait and timeout > 0:
        try:
            value["gateways"] = acknowledged(config, done, timeout)
        except Complaint as problem:
            complaint = problem
    if done.limit.shadow:
        click.echo("this limit is in shadow mode: it refuses nobody, whatever its numbers are", err=True)
    row = [limit, "all" if key is None else " ".join(key), numbers_text(done.before), numbers_text(done.after), value["until"] or "-"]
    emit(form, value, [[printable(cell) for cell in row]], ["limit", "key", "before", "now", "until"])
    if complaint is not None:
        raise complaint


@click.command(
    epilog=example(
        "tollhouse quota reset shop/orders/per-caller spiffe://shop.example/ns/shop/sa/web --reason 'it was our own test'"
        " --config etcd://127.0.0.1:2379 --redis redis://127.0.0.1:6379/0"
    )
)
@click.argument("limit")
@click.argument("values", nargs=-1)
@click.option("--empty", is_flag=True, help="Empty the bucket instead of refilling it.")
@REASON
@CONFIG
@click.option("--redis", required=True, metavar="URL", help="Where the buckets are.")
@WAIT
@TIMEOUT
@format_option
def reset(
    limit: str, values: tuple[str, ...], empty: bool, reason: str, config: str, redis: str, wait: bool, timeout: float, form: str
) -> None:
    """Refill the one bucket of a LIMIT for some VALUES, or empty it, and wait until every gateway has forgotten that it was empty.

    Tokens that gateways have on lease stay with them: a bucket that is refilled gets as many as its burst leaves room for, and one that
    is emptied ends at zero with those still to be spent.
    """
    from tollhouse.parts import is_etcd
    from tollhouse.quota_reset import reset_bucket
    from tollhouse.quota_switch import acknowledged

    made = reset_bucket(config, redis, limit, values, empty=empty, reason=reason)
    key = list(made.done.values or ())
    value: dict[str, Any] = {
        "limit": limit,
        "key": key,
        "before": made.before,
        "left": made.after,
        "burst": made.burst,
        "onLease": made.out,
    }
    complaint: Complaint | None = None
    if not is_etcd(config):
        click.echo("a directory keeps no audit log: the reason is in its QuotaChange, and whoever watches it applies it", err=True)
    elif wait and timeout > 0:
        try:
            value["gateways"] = acknowledged(config, made.done, timeout)
        except Complaint as problem:
            complaint = problem
    row = [limit, " ".join(key) or "all", *(str(number) for number in (made.before, made.after, made.burst, made.out))]
    emit(form, value, [[printable(cell) for cell in row]], ["limit", "key", "held", "holds", "burst", "on lease"])
    if complaint is not None:
        raise complaint


def ending(lasting: float | None, until: float | None) -> float:
    """When a change is to end, in seconds since the epoch; 0 for never. Raises `Complaint`."""
    if lasting is not None and until is not None:
        raise Complaint("--for and --until say the same: give one of them", 2)
    now = time.time()
    if lasting is not None:
        if not 0 < lasting <= LONGEST_CHANGE:
            raise Complaint("--for: longer than nothing, and at most 3660d; without it, a change holds until it is undone", 2)
        return now + lasting
    if until is not None and until <= now:
        raise Complaint("--until: that is over already", 2)
    return until or 0.0


@click.command(epilog=example("tollhouse quota history --config etcd://127.0.0.1:2379"))
@CONFIG
@click.option("--limit", "most", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many entries, the newest first.")
@format_option
def history(config: str, most: int, form: str) -> None:
    """Show who changed which limit, when and why.

    First comes what was changed by other means than these commands, and so by nobody knows whom.
    """
    from tollhouse.audited import show_history
    from tollhouse.parts import is_etcd
    from tollhouse.policy_switch import audit_entries, changed_elsewhere

    if not is_etcd(config):
        raise Complaint("--config: the history is kept in an etcd: write etcd://HOST:PORT; a directory has the one that you give it", 2)
    show_history(audit_entries(config, "quota")[:most], changed_elsewhere(config, "quota"), told_of, form)


def told_of(change: Any) -> str:
    """One change, for people."""
    if change.kind != "QuotaChange":
        return f"{change.kind} {change.namespace}/{change.name} {change.verb}" + _limits_told(change.before or {}, change.after or {})
    before, after = _by_key(change.before or {}), _by_key(change.after or {})
    spec = change.after or change.before or {}
    name = f"{change.namespace}/{spec.get('policy')}/{spec.get('limit')}" if spec else f"{change.namespace}/{change.name}"
    parts = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if old != new and not (new is None and _over(old)):
            whom = " ".join(key[1]) if key[1] else "all"
            parts.append(f"{whom}: {_item_text(old)} -> {_item_text(new)}" if not key[0] else f"{whom}: bucket reset")
    return f"{name}: {', '.join(parts)}" if parts else f"{name} {change.verb}"


def _limits_told(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    old = {each.get("name"): each for each in before.get("limits") or () if isinstance(each, Mapping)}
    new = {each.get("name"): each for each in after.get("limits") or () if isinstance(each, Mapping)}
    changed = [str(name) for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    return f" ({', '.join(changed)})" if changed else ""


def _by_key(spec: Mapping[str, Any]) -> dict[tuple[bool, tuple[str, ...]], Mapping[str, Any]]:
    items = [item for item in spec.get("changes") or () if isinstance(item, Mapping)]
    return {(bool(item.get("reset")), tuple(map(str, item.get("values") or ()))): item for item in items}


def _over(item: Mapping[str, Any] | None) -> bool:
    """Whether an item has gone because it was over: nobody changed anything then."""
    from mesh.quota_changes import ended

    if item is None or item.get("reset"):
        return True
    try:
        return ended(item, time.time())
    except ValueError:
        return True


def _item_text(item: Mapping[str, Any] | None) -> str:
    if item is None:
        return "as its QuotaPolicy has it"
    if item.get("lift") or item.get("block"):
        text = "lifted" if item.get("lift") else "blocked"
    else:
        said: Sequence[str] = [
            f"{name} {item[name]}" for name in ("tokens", "interval", "burst", "concurrency") if item.get(name) is not None
        ]
        text = ", ".join(said)
    return text + (f" until {item['until']}" if item.get("until") else "")

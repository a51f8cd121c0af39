"""`tollhouse quota top` and `get`: who uses what of which limit, who is being refused, and what is left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

from tollhouse.output import emit, example, format_option, printable
from tollhouse.values import ADMINS

COLUMNS = ["limit", "key", "tokens/s", "in use", "spent", "refused", "in hand", "gateways"]


@click.command(epilog=example("tollhouse quota top --admin 127.0.0.1:15000 --watch"))
@ADMINS
@click.option("--watch", is_flag=True, help="Show it again each second, until Ctrl-C.")
@click.option("--most", type=click.IntRange(1, 1000), default=20, show_default=True, help="How many buckets to show.")
@format_option
def top(admins: Sequence[str], watch: bool, most: int, form: str) -> None:
    """Show who uses what, and who is being refused.

    Those buckets come first of which most was refused, and then those of which most is used. Of a concurrency limit it shows how many
    requests are in progress, and how many slots are in the gateways' hands, with those in use.

    Counts are a gateway's own, since it began to use the bucket; one that is not used for a while is forgotten. Values of headers and
    cookies may be secrets: of long ones only the beginning is shown.
    """
    while True:
        found = together(admins)[:most]
        if watch and form == "table":
            click.clear()
            click.echo(time.strftime("%H:%M:%S"))
        emit(form, found, [row(each) for each in found], COLUMNS, "no limit is in use there")
        if not watch:
            return
        time.sleep(1.0)


def row(each: dict[str, Any]) -> list[str]:
    """A bucket's cells."""
    key = " ".join(printable(value) or "''" for value in each["key"]) or "all"
    if each.get("caller"):
        key += f" of {printable(each['caller'])}"
    speed = f"{each['tokensPerSecond']:g}" if "tokensPerSecond" in each else "-"
    in_use = f"{each['inUse']} of {each['concurrency']}" if "concurrency" in each else "-"
    return [each["limit"], key, speed, in_use, *(str(each[name]) for name in ("spent", "refused", "inHand", "gateways"))]


def together(admins: Iterable[str]) -> list[dict[str, Any]]:
    """What all lessees behind these admin pages know, a bucket once. Raises `Complaint`."""
    from tollhouse.commands.status import fetch

    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for admin in admins:
        for lessee in fetch(admin, "/quota")["lessees"]:
            for each in (*lessee["top"], *lessee["slots"]):
                summed = [name for name in SUMMED if name in each]
                known = found.setdefault(
                    (each["limit"], each.get("caller"), *each["key"]), {**each, **dict.fromkeys(summed, 0), "gateways": 0}
                )
                for name in summed:
                    known[name] += each[name]
                known["gateways"] += 1
    return sorted(found.values(), key=lambda each: (each["refused"], each.get("tokensPerSecond", each.get("inUse", 0))), reverse=True)


SUMMED = ("tokensPerSecond", "inUse", "spent", "refused", "inHand", "waiting")


@click.command(
    epilog=example(
        "tollhouse quota get shop/orders/per-caller spiffe://shop.example/ns/shop/sa/web --config DIR --redis redis://127.0.0.1:6379/0"
    )
)
@click.argument("limit")
@click.argument("values", nargs=-1)
@click.option("--config", required=True, help="Where the mesh is: a directory, or etcd://HOST:PORT[,HOST:PORT...].")
@click.option("--redis", required=True, metavar="URL", help="Where the buckets are.")
@format_option
def get(limit: str, values: tuple[str, ...], config: str, redis: str, form: str) -> None:
    """Show what is left of a LIMIT for some VALUES.

    LIMIT is NAMESPACE/POLICY/LIMIT, VALUES are those of its descriptors, in their order. Nothing is spent. Of a concurrency limit, what is
    in use is as gateways told last, which may be some seconds ago.
    """
    from tollhouse.quota_look import look

    found = look(limit, values, config, redis)
    if "concurrency" in found:
        cells = [limit, " ".join(values) or "all", *(str(found[name]) for name in ("inUse", "onLease", "left", "concurrency", "lessees"))]
        cells.append(changed_text(found["changed"]))
        emit(form, found, [cells], ["limit", "key", "in use", "on lease", "free", "of", "lessees", "changed by hand"])
        return
    names = ["limit", "key", "left", "burst", "per second", "on lease", "lessees", "full in", "changed by hand"]
    cells = [
        limit,
        " ".join(values) or "all",
        str(found["left"]),
        str(found["burst"]),
        f"{found['tokensPerSecond']:g}" if "tokensPerSecond" in found else "-",
        str(found["onLease"]),
        str(found["lessees"]),
        f"{found['fullInSeconds']:g} s",
        changed_text(found["changed"]),
    ]
    emit(form, found, [cells], names)


def changed_text(changed: dict[str, Any] | None) -> str:
    """What was changed by hand, for people."""
    from tollhouse.quota_limits import numbers_text

    if changed is None:
        return "-"
    return numbers_text(changed) + (f" until {changed['until']}" if changed["until"] else "")

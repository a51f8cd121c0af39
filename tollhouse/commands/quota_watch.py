"""`tollhouse quota watch` and `explain`: who is being refused just now, and what limits a request meets."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tollhouse.output import Complaint, emit, example, format_option, printable
from tollhouse.values import ADMINS, DURATION, JWKS_CA, NAMED

COLUMNS = ["time", "limit", "key", "refused/s", "admitted/s", "gateways", "callers"]
CALLERS = 3

Key = tuple[str, tuple[str, ...]]


class Seen:
    """What was refused between two looks at gateways' admin pages. Pure: pages in, rows out."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, Key], tuple[int, int]] = {}
        self._since = 0.0
        self._first = True

    def take(self, lessees: Sequence[Mapping[str, Any]], refusals: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """What was refused in the last `seconds`, the most first; nothing at the first look, which only counts."""
        found: dict[Key, dict[str, Any]] = {}
        counts: dict[tuple[str, Key], tuple[int, int]] = {}
        for lessee in lessees:
            # Who refused something long ago is in `top` alone: it is to be known how much, should it refuse again.
            for each in (*lessee["top"], *lessee["refusing"], *lessee.get("slots", ())):
                key: Key = (each["limit"], tuple(each["key"]))
                counts[lessee["holder"], key] = each["refused"], each["spent"]
        for (holder, key), now in counts.items():
            before = self._counts.get((holder, key), (0, 0))
            if now[0] < before[0]:  # the lessee had forgotten the bucket, and counts anew
                before = (0, 0)
            if self._first or now[0] == before[0]:
                continue
            row = found.setdefault(key, {"limit": key[0], "key": list(key[1]), "refused": 0, "spent": 0, "gateways": 0, "callers": []})
            row["refused"] += now[0] - before[0]
            row["spent"] += max(0, now[1] - before[1])
            row["gateways"] += 1
        self._counts = counts
        newest = max((each["at"] for each in refusals), default=0.0)
        for each in refusals:
            if each["at"] > self._since and not self._first:
                _note_caller(found, each)
        self._since = max(self._since, newest)
        self._first = False
        rows = sorted(found.values(), key=lambda row: row["refused"], reverse=True)
        for row in rows:
            row["refusedPerSecond"] = round(row["refused"] / seconds, 1)
            row["admittedPerSecond"] = round(row.pop("spent") / seconds, 1)
        return rows


def _note_caller(found: Mapping[Key, dict[str, Any]], refusal: Mapping[str, Any]) -> None:
    for limit in refusal["limits"]:
        row = found.get((limit["limit"], tuple(limit["key"])))
        caller = refusal["caller"] or "nobody known"
        if row is not None and limit["limit"] == refusal["limit"] and caller not in row["callers"]:
            row["callers"].append(caller)


@click.command(epilog=example("tollhouse quota watch --admin 127.0.0.1:15000"))
@ADMINS
@click.option("--every", type=DURATION, default="1s", show_default=True, help="How long between two looks.")
@click.option("--count", type=click.IntRange(1), help="End after so many looks.  [default: at Ctrl-C]")
@format_option
def watch(admins: Sequence[str], every: float, count: int | None, form: str) -> None:
    """Show who is being refused, as it happens: a line for each limit and bucket that refused something since the last look.

    With -o json each look that saw something is one line of JSON, and with -o yaml one document. Rates are over all gateways of --admin.
    Callers are those of the newest refusals; of values of headers and cookies only the beginning is shown, as in `top`.
    """
    if not 0.1 <= every <= 3600:
        raise Complaint("--every: from 100ms to 1h", 2)
    seen, looks, header = Seen(), 0, False
    look(admins, seen, every)
    began = time.monotonic()
    while count is None or looks < count:
        time.sleep(every)
        now = time.monotonic()
        rows = look(admins, seen, now - began)
        began, looks = now, looks + 1
        stamp = time.strftime("%H:%M:%S")
        if form == "json" and rows:
            click.echo(json.dumps({"time": stamp, "refused": rows}, ensure_ascii=False))
        elif form == "yaml" and rows:
            click.echo("---")
            emit(form, {"time": stamp, "refused": rows}, (), ())
        elif form == "table":
            header = _lines(rows, stamp, header)


def look(admins: Sequence[str], seen: Seen, seconds: float) -> list[dict[str, Any]]:
    """One look at gateways' pages. Raises `Complaint`."""
    from tollhouse.commands.status import fetch

    lessees = [lessee for admin in admins for lessee in fetch(admin, "/quota")["lessees"]]
    refusals = [each for admin in admins for each in fetch(admin, "/quota/refusals")["refusals"]]
    return seen.take(lessees, refusals, max(seconds, 0.001))


def _lines(rows: Sequence[Mapping[str, Any]], stamp: str, header: bool) -> bool:
    widths = (8, 32, 40, 10, 10, 8)
    if rows and not header:
        click.echo("  ".join(name.upper().ljust(width) for name, width in zip(COLUMNS, (*widths, 0), strict=True)).rstrip())
    for row in rows:
        callers = [printable(caller) for caller in row["callers"]]
        told = ", ".join(callers[:CALLERS]) + (f" and {len(callers) - CALLERS} more" if len(callers) > CALLERS else "")
        key = " ".join(printable(value) or "''" for value in row["key"]) or "all"
        cells = [stamp, row["limit"], key, f"{row['refusedPerSecond']:g}", f"{row['admittedPerSecond']:g}", str(row["gateways"])]
        click.echo("  ".join(cell.ljust(width) for cell, width in zip((*cells, told or "-"), (*widths, 0), strict=True)).rstrip())
    return header or bool(rows)


@click.command(
    epilog=example(
        "tollhouse quota explain --gateway edge/ingress --as spiffe://shop.example/ns/shop/sa/web GET https://shop.example/orders/1"
        " --config etcd://127.0.0.1:2379 --redis redis://127.0.0.1:6379/0"
    )
)
@click.argument("what", metavar="METHOD|REQUEST-ID")
@click.argument("url", default="")
@click.option("--gateway", "key", type=NAMED, default=None, metavar="NAMESPACE/NAME", help="Which gateway the request comes to.")
@click.option("--as", "principal", default="", metavar="SPIFFE-ID", help="Who asks; nobody in particular without it.")
@click.option("--via", default="", metavar="SPIFFE-ID", help="The gateway that passes the request on, if it does not come directly.")
@click.option("--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header of the request; may be given again.")
@click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where it comes from.")
@click.option("--config", default="", help="Where the configuration is: a directory or etcd://HOST:PORT.  [default: the example mesh]")
@click.option("--redis", default="", metavar="URL", help="Look at the buckets in this Redis; without it all are full.")
@click.option("--admin", "admins", multiple=True, metavar="HOST:PORT", help="A gateway that refused REQUEST-ID; may be given again.")
@JWKS_CA
@format_option
def explain(
    what: str,
    url: str,
    key: str | None,
    principal: str,
    via: str,
    headers: tuple[str, ...],
    address: str,
    config: str,
    redis: str,
    admins: tuple[str, ...],
    jwks_ca: Path | None,
    form: str,
) -> None:
    """Tell which limits a request meets, by which policy, what is left in its buckets, and which one would refuse it. Nothing is spent.

    With METHOD and URL the request is described, as for `tollhouse explain`; policies are not asked. With the id of a request that
    gateways have refused (`x-request-id` of the answer) and --admin, what they knew when they refused it: each keeps its newest 500.

    Exit code 1 when the request would be, or was, refused.
    """
    if not url:
        if not admins:
            raise Complaint("who is to know that request? name gateways (--admin HOST:PORT), or describe one: METHOD URL", 2)
        _refused_before(what, admins, form)
        raise SystemExit(1)
    if key is None:
        raise Complaint("--gateway NAMESPACE/NAME: which gateway does the request come to?", 2)
    if admins:
        raise Complaint("--admin is for the id of a request that was refused; what is described is looked up in --config and --redis", 2)
    _described(what, url, key, principal, via, headers, address, config, redis, jwks_ca, form)


def _refused_before(request: str, admins: Sequence[str], form: str) -> None:
    from tollhouse.commands.status import fetch

    found = [each for admin in admins for each in fetch(admin, "/quota/refusals")["refusals"] if each["requestId"] == request]
    if not found:
        raise Complaint(f"{', '.join(admins)}: no limit refused the request {request} lately; the access log tells what became of it")
    if form != "table":
        emit(form, found, (), ())
        return
    for each in found:
        click.echo(
            printable(f"{each['method']} {each['path']} of {each['caller'] or 'nobody known'}, at {each['gateway']}, {each['time']}")
        )
        rows = []
        for limit in each["limits"]:
            whom = " ".join(f"{kind}={value}" for kind, value in zip(limit["per"], limit["key"], strict=False)) or "all"
            state = limit["error"] or ("admitted" if limit["admitted"] else f"none left; again in {limit['retryAfter']:g} s")
            mode = " (shadow)" if limit["shadow"] else ""
            numbers = f"{limit['tokens']} each {limit['interval']:g} s, burst {limit['burst']}"
            if limit["concurrency"]:
                numbers = f"{limit['concurrency']} at once"
            refused = "refused it" if limit["limit"] == each["limit"] else ""
            rows.append([limit["limit"] + mode, limit["level"], whom, str(limit["cost"]), numbers, state, refused])
        shown = [[printable(cell) for cell in row] for row in rows]
        emit(form, None, shown, ["limit", "level", "key", "cost", "numbers", "answer", ""])
        click.echo(printable(f"{each['status']} {each['flag']}: {each['reason']}"))


def _described(
    method: str,
    url: str,
    key: str,
    principal: str,
    via: str,
    headers: tuple[str, ...],
    address: str,
    config: str,
    redis: str,
    jwks_ca: Path | None,
    form: str,
) -> None:
    import msgspec

    from tollhouse.commands.explain import Described, explained

    asked = Described(
        method=method,
        url=url,
        key=key,
        principal=principal,
        via=via,
        headers=headers,
        address=address,
        body="",
        config=config,
        redis=redis,
        pdp=(),
        jwks_ca=jwks_ca,
        rules=False,
        quota=True,
    )
    found = explained(asked)
    rows = [[step.name, printable(step.text)] for step in found.steps]
    emit(form, msgspec.to_builtins(found), rows, ["step", "what is so"])
    if found.result == "refuse":
        raise SystemExit(1)

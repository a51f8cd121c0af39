"""`tollhouse status`: what is in force, and how it is doing."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterable
from typing import Any

import click

from tollhouse.output import Complaint, emit, example, format_option, show_table
from tollhouse.shown import conditions_text


@click.command(epilog=example("tollhouse status --admin 127.0.0.1:15000"))
@click.option("--admin", default="127.0.0.1:15000", show_default=True, metavar="HOST:PORT", help="The admin page of the process to ask.")
@click.option("--config", default="", help="In place of it: an etcd, which knows all gateways of the fleet.")
@format_option
def status(admin: str, config: str, form: str) -> None:
    """Show which configuration and policy are in force, what is wrong with them, and how gateways and upstreams are doing.

    Exit code 1 when something is wrong: a problem in the configuration, a listener that is not served, a source that is stale, or gateways
    that have another policy in force than the active one.
    """
    if config:
        fleet(config, form)
    else:
        one(admin, form)


def one(admin: str, form: str) -> None:
    """The process behind one admin page."""
    shown = fetch(admin, "/status")
    rows = []
    for gateway in shown["gateways"]:
        where = ", ".join(f"{each['address']}:{each['port']}" for each in gateway["listening"]) or "nothing"
        until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(gateway["identityUntil"])) if gateway["identity"] else "-"
        counts = [str(gateway["connections"]), str(gateway["requests"])]
        rows.append([gateway["gateway"], where, *counts, gateway["identity"] or "-", until])
    emit(form, shown, rows, ["gateway", "listens at", "connections", "requests", "identity", "until (UTC)"], "no gateway runs there")
    wrong = problems_of(shown)
    if form == "table":
        show_listeners(shown)
        source = shown["source"]["text"] or "a directory"
        click.echo(f"\nconfiguration {shown['snapshot'][:16]} from {source}; policy {shown['policy'] or 'none'}")
        for what in ("shadow", "canary"):
            if shown.get(what):
                share = shown[what]
                callers = f" and {len(share['identities'])} callers" if share["identities"] else ""
                click.echo(
                    f"{what} {share['revision']} for {share['percent']} % of the requests{callers}; see tollhouse policy differences"
                )
        upstreams = [
            [name, each["address"], each["state"]]
            for gateway in shown["gateways"]
            for name, cluster in gateway["upstreams"]["clusters"].items()
            for each in endpoints_of(cluster)
            if each["state"] != "healthy"
        ]
        if upstreams:
            show_table(upstreams, ["cluster", "endpoint", "state"])
        show_keys(shown.get("tokenKeys", ()))
        show_opa(shown.get("opaServers", ()))
        for line in wrong:
            click.echo(line)
    if wrong:
        raise SystemExit(1)


def show_listeners(shown: dict[str, Any]) -> None:
    """A table of the listeners of every Gateway and ListenerSet in force, with their conditions."""
    rows = [
        [
            f"{each['kind']} {each['namespace']}/{each['name']}",
            listener["name"],
            str(listener["attachedRoutes"]),
            ", ".join(kind["kind"] for kind in listener["supportedKinds"]) or "none",
            conditions_text(listener["conditions"]),
        ]
        for each in shown["resources"]
        for listener in each["status"].get("listeners", ())
    ]
    if rows:
        click.echo()
        show_table(rows, ["resource", "listener", "routes", "kinds", "conditions"])


def show_keys(sources: Iterable[dict[str, Any]]) -> None:
    """A table of where the keys of tokens come from."""
    rows = [
        [
            each["source"],
            ", ".join(name or "(no id)" for name in each["ids"]) or "none",
            "-" if each["age"] is None else f"{each['age']:.0f} s ago",
            each["error"] or "-",
        ]
        for each in sources
    ]
    if rows:
        click.echo()
        show_table(rows, ["token keys", "ids", "fetched", "last error"])


def show_opa(servers: Iterable[dict[str, Any]]) -> None:
    """A table of the user's OPA servers."""
    rows = [
        [
            each["url"],
            "well" if each["well"] else "not asked",
            ", ".join(revision[:19] for revision in each["revisions"]) or "none",
            str(each["drifts"]),
            each["problem"] or "-",
        ]
        for each in servers
    ]
    if rows:
        click.echo()
        show_table(rows, ["OPA server", "state", "revisions", "drifts", "problem"])


def endpoints_of(cluster: dict[str, Any]) -> list[dict[str, str]]:
    """The endpoints of a cluster as `/status` shows it."""
    return [
        {"address": each["address"], "state": f"left out for {each['ejected']:.0f} s more" if each["ejected"] else "healthy"}
        for each in cluster.get("endpoints", ())
    ]


def problems_of(shown: dict[str, Any]) -> list[str]:
    """What is wrong, a line each."""
    lines = [f"{each['severity']}: {each['text']}" for each in shown["problems"]]
    if shown["source"]["stale"]:
        lines.append(f"stale: {shown['source']['stale']}")
    for gateway in shown["gateways"]:
        lines += [f"not served: {gateway['gateway']} {name}: {why}" for name, why in gateway["problems"].items()]
        if gateway["identityProblem"]:
            lines.append(f"identity: {gateway['gateway']}: {gateway['identityProblem']}")
    lines += [f"OPA server {each['url']}: {each['problem']}" for each in shown.get("opaServers", ()) if each["problem"]]
    lines += [f"keys: {each['source']}: {each['error']}" for each in shown.get("tokenKeys", ()) if each["error"]]
    return lines


def fetch(admin: str, path: str) -> Any:
    """A JSON page. Raises `Complaint`."""
    host, _, port = admin.rpartition(":")
    if not host or not port.isdigit():
        raise Complaint(f"--admin: {admin!r} is not HOST:PORT; write for example 127.0.0.1:15000", 2)
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as problem:
        raise Complaint(f"nobody answers at {admin} ({problem}); is the process running, with that --admin?") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise Complaint(f"http://{admin}{path} answers {answer.status}: {text.decode('utf-8', 'replace').strip()[:200]}")
    return json.loads(text)


def fleet(config: str, form: str) -> None:
    """All gateways that report to an etcd."""
    import msgspec

    from discovery.etcd import EtcdError
    from discovery.reports import reports
    from discovery.store import StoreError, open_store
    from mesh.documents import Key
    from mesh.policies import revision_digest
    from tollhouse.parts import is_etcd, open_etcd, unreachable

    if not is_etcd(config):
        raise Complaint("--config: gateways report to an etcd: write etcd://HOST:PORT; for a directory, use --admin", 2)

    async def ask() -> tuple[list[Any], str]:
        etcd, store = open_etcd(config), open_store(config)
        try:
            active = await store.get(Key("tollhouse.dev", "ActivePolicy", "", "active"))
            wanted = revision_digest(active.body["spec"]["revision"]) if active is not None else ""
            return list(await reports(etcd)), wanted
        except (EtcdError, StoreError) as problem:
            raise Complaint(unreachable(problem)) from None
        finally:
            await store.close()
            await etcd.close()

    found, active = asyncio.run(ask())
    shown = [{**msgspec.to_builtins(each), "current": each.policy == active} for each in found]
    rows = [
        [
            f"{each.namespace}/{each.name}",
            each.instance,
            each.policy[:19] or "none",
            "yes" if each.policy == active else "no",
            str(each.problems),
            each.stale or "-",
        ]
        for each in found
    ]
    emit(
        form,
        {"activePolicy": active, "gateways": shown},
        rows,
        ["gateway", "instance", "policy", "active", "problems", "stale"],
        "no gateway reports",
    )
    if any(each.policy != active or each.stale or each.problems for each in found):
        raise SystemExit(1)

"""`python -m bench.activate`: from `tollhouse policy activate` to a revision that every gateway applies. Prints Markdown.

Everything is real: an etcd that syncs to disk, a decision point, and gateways with the code of `tollhouse gateway`. A number of them are in
each of a few processes, every one with connections, listeners and reports of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.scale import resource
from discovery.acknowledged import Standing, wait_until
from discovery.address import parse_etcd_url
from discovery.etcd import Etcd, Put
from discovery.keys import config_key
from discovery.reports import reports
from mesh.documents import Key
from mesh.policies import active_policy_body
from tests import servers
from tests.servers import Process, free_port

GROUP = "gateway.networking.k8s.io"
DECISION = "shop.authz.decision"
REGO = """package shop.authz

default decision := {"allowed": false}

decision := {"allowed": true} if input.attributes.request.http.method == "GET"

version := %d
"""


def bodies(ports: Sequence[int]) -> list[dict[str, Any]]:
    """A mesh with one Gateway for each port, and one policy for all."""
    policy = {"decision": DECISION, "timeout": "1s"}
    made = [
        resource("tollhouse.dev/v1", "Mesh", "", "mesh", {"trustDomain": "shop.example"}),
        resource(f"{GROUP}/v1", "GatewayClass", "", "tollhouse", {"controllerName": "tollhouse.dev/gateway-controller"}),
        resource("tollhouse.dev/v1", "AccessPolicy", "edge", "all", policy | {"targetRefs": []}),
    ]
    made[-1]["spec"]["targetRefs"] = [{"group": GROUP, "kind": "Gateway", "name": f"gw{number}"} for number in range(min(16, len(ports)))]
    for number, port in enumerate(ports):
        listener = {"name": "http", "port": port, "protocol": "HTTP"}
        made.append(resource(f"{GROUP}/v1", "Gateway", "edge", f"gw{number}", {"gatewayClassName": "tollhouse", "listeners": [listener]}))
    return made


def gateways(config: str, pdp: str, names: Sequence[str]) -> None:
    """Runs some gateways in this process, as `tollhouse gateway` would each."""
    from tollhouse.gateway_process import GatewayOptions, run_gateway
    from tollhouse.runtime import Runtime, run

    async def work(runtime: Runtime) -> None:
        options = [
            GatewayOptions(name=name, config=config, address="127.0.0.1", pdp=(pdp,), admin="off", access_log="off", drain=0.1)
            for name in names
        ]
        await asyncio.gather(*(run_gateway(each, runtime) for each in options))

    run(work, quiet=True)


def tollhouse(*arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run([sys.executable, "-m", "tollhouse", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


async def activated(url: str, digest: str) -> tuple[list[float], float]:
    """One activation, as the command does it: milliseconds until each gateway applied it, and until the command knew of all."""
    etcd = Etcd(parse_etcd_url(url))
    try:
        await etcd.now(b"/")  # the connection is there, as the command's is when it has looked which revisions there are
        body = active_policy_body(digest)
        began = time.time()
        written = await etcd.commit(
            [Put(config_key(Key("tollhouse.dev", "ActivePolicy", "", body["metadata"]["name"])), json.dumps(body).encode())]
        )
        standing: Standing = await wait_until(etcd, lambda report: report.policy == digest, written or 0, 30.0)
        ended = time.time()
        if standing.missing:
            raise SystemExit(f"{len(standing.missing)} gateways did not follow")
        return [(each.time - began) * 1e3 for each in await reports(etcd)], (ended - began) * 1e3
    finally:
        await etcd.close()


def measured(count: int, processes: int, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds: of each gateway in each round, of each round's wait, and of the whole command."""
    with ExitStack() as stack:
        etcd = stack.enter_context(servers.etcd(fsync=True))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollhouse-bench-")))
        (folder / "all.json").write_text("---\n".join(json.dumps(body) + "\n" for body in bodies([free_port() for _ in range(count)])))
        tollhouse("apply", "-f", str(folder / "all.json"), "--config", etcd.url)
        names = []
        for version in range(2):
            (folder / "policy").mkdir(exist_ok=True)
            (folder / "policy" / "authz.rego").write_text(REGO % version)
            names.append(tollhouse("policy", "publish", str(folder / "policy"), "--config", etcd.url).split()[1].rstrip(":"))
        tollhouse("policy", "activate", names[0], "--config", etcd.url)
        port = free_port()
        words = ["pdp", "--config", etcd.url, "--listen", f"127.0.0.1:{port}"]
        pdp = servers.tollhouse(*words, ready=lambda: servers.answers(port), name="pdp")
        stack.callback(pdp.close)
        pdp.start()
        for part in range(processes):
            those = [f"edge/gw{number}" for number in range(part, count, processes)]
            command = [sys.executable, "-m", "bench.activate", "--run", etcd.url, f"127.0.0.1:{port}", *those]
            process = Process(command, ready=lambda: True, name=f"gateways-{part}")
            process.env["PYTHONPATH"] = str(Path(__file__).parents[1])
            stack.callback(process.close)
            process.start()
        servers.wait_for("all gateways", lambda: asyncio.run(counted(etcd.url)) == count, 120.0)
        each, waits, whole = [], [], []
        for turn in range(rounds):
            digest = names[(turn + 1) % 2].replace("-", ":", 1)
            took, wait = asyncio.run(activated(etcd.url, digest))
            each += took
            waits.append(wait)
            time.sleep(0.3)
        for turn in range(5):
            began = time.perf_counter()
            tollhouse("policy", "activate", names[(rounds + turn + 1) % 2], "--config", etcd.url)
            whole.append((time.perf_counter() - began) * 1e3)
        return each, waits, whole


async def counted(url: str) -> int:
    """Gateways that report."""
    etcd = Etcd(parse_etcd_url(url))
    try:
        return len(await reports(etcd))
    finally:
        await etcd.close()


def at(values: Sequence[float], share: float) -> str:
    """The value that this share of all does not exceed."""
    return f"{sorted(values)[min(len(values) - 1, int(len(values) * share))]:.0f} ms"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.activate", description=__doc__)
    parser.add_argument("--gateways", type=int, default=50)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        gateways(options.run[0], options.run[1], options.run[2:])
        return
    each, waits, whole = measured(options.gateways, options.processes, options.rounds)
    print("| from the change to ... | median | p99 | longest |")
    print("| --- | --- | --- | --- |")
    print(f"| a gateway that applies it | {at(each, 0.5)} | {at(each, 0.99)} | {max(each):.0f} ms |")
    print(f"| a command that knows it of all {options.gateways} | {at(waits, 0.5)} | {at(waits, 0.99)} | {max(waits):.0f} ms |")
    print(f"| the whole command, with its start | {statistics.median(whole):.0f} ms | | {max(whole):.0f} ms |")


if __name__ == "__main__":
    main()

"""`python -m bench`: measures all contenders in one interleaved run and prints Markdown tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import build, l4, procfs
from bench.contenders import ALL, BY_AREA, POLICY, Contender, EnvoyAlone, EnvoyAsking
from identity.ca import Authority, write_identity
from tests import servers


@dataclass
class Figures:
    """What the rounds of one contender in one scenario gave."""

    cpu: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    errors: int = 0
    refused: int = 0
    note: str = ""


@dataclass(frozen=True)
class Scenario:
    """One kind of load."""

    name: str
    arguments: tuple[str, ...]
    callers: str
    requests: int
    policy: str = POLICY


class Bench:
    """The folder with identities, the upstream, and the runs."""

    def __init__(self, folder: Path, callers: int) -> None:
        self.folder = folder
        authority = Authority.create("bench.example")
        self.identity = folder / "gw"
        write_identity(authority.issue("spiffe://bench.example/ns/bench/sa/gw", dns=("bench.example",)), self.identity)
        self.callers = [f"c{number:04d}" for number in range(callers)]
        for name in self.callers:
            write_identity(authority.issue(f"spiffe://bench.example/ns/callers/sa/{name}"), folder / "callers" / name)
        self.port = servers.free_port()
        command = [str(build.binary("tool")), "upstream", "-listen", f"127.0.0.1:{self.port}", "-identity", str(self.identity)]
        self.upstream = servers.Process(command, ready=lambda: servers.answers(self.port), name="upstream")
        self.upstream.start()

    def start(self, kind: type[Contender], policy: str = POLICY) -> Contender:
        """One contender, running."""
        folder = Path(tempfile.mkdtemp(prefix="contender-", dir=self.folder))
        made = kind(folder, self.identity, self.port, self.callers, policy)
        try:
            made.start()
        except BaseException:
            made.close()
            raise
        return made

    def load(self, contender: Contender, scenario: Scenario, *more: str) -> dict[str, Any]:
        """One run of the load; returns what it measured."""
        command = [
            str(build.binary("tool")),
            "load",
            "-address",
            f"127.0.0.1:{contender.port}",
            "-identities",
            str(self.folder / "callers" / scenario.callers),
        ]
        done = subprocess.run(
            [*command, "-requests", str(scenario.requests), *scenario.arguments, *more], capture_output=True, check=False, text=True
        )
        if done.returncode:
            raise SystemExit(f"{contender.name}: the load failed: {done.stderr.strip()}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def measure(self, contender: Contender, scenario: Scenario, figures: Figures, *more: str) -> None:
        """One round."""
        pids = procfs.tree(contender.pids())
        before = procfs.cpu(pids)
        found = self.load(contender, scenario, *more)
        used = procfs.cpu(procfs.tree(contender.pids()) | pids) - before
        figures.cpu.append(used / max(found["requests"], 1))
        for name in ("p50", "p99", "rate"):
            getattr(figures, name).append(found[name])
        figures.errors += found["errors"]
        figures.refused += sum(count for status, count in found["statuses"].items() if int(status) != 200)
        figures.note = contender.note()

    def interleaved(self, scenario: Scenario, rounds: int, warm: bool, *more: str) -> dict[str, Figures]:
        """All contenders in turn, `rounds` times; those that are `warm` have seen the load once before."""
        results = {kind.name: Figures() for kind in ALL}
        running = [self.start(kind) for kind in ALL] if warm else []
        try:
            for contender in running:
                self.load(contender, scenario)
            for _ in range(rounds):
                for contender in running:
                    self.measure(contender, scenario, results[contender.name], *more)
                if not warm:
                    for kind in ALL:
                        fresh = self.start(kind, scenario.policy)
                        try:
                            self.measure(fresh, scenario, results[kind.name], *more)
                        finally:
                            fresh.close()
        finally:
            for contender in running:
                contender.close()
        return results

    def idle(self, kind: type[Contender], connections: int) -> tuple[float, float]:
        """Bytes of memory for one idle connection, and microseconds of CPU for one handshake."""
        contender = self.start(kind)
        try:
            scenario = Scenario("idle", (), "c0000", 0)
            self.load(contender, Scenario("warm", ("-connections", "64", "-workers", "64"), "c0000", 2000))
            pids = procfs.tree(contender.pids())
            memory, cpu = procfs.resident([contender.gateway()]), procfs.cpu(pids)
            command = [
                str(build.binary("tool")),
                "load",
                "-address",
                f"127.0.0.1:{contender.port}",
                "-connections",
                str(connections),
                "-idle",
            ]
            command += ["-identities", str(self.folder / "callers" / scenario.callers)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                used = procfs.cpu(pids) - cpu
                grown = procfs.resident([contender.gateway()]) - memory
                process.communicate()
            return grown / connections, used / connections
        finally:
            contender.close()


def table(title: str, results: dict[str, Figures], constant: bool = False) -> str:
    """One Markdown table. The ratio is against Envoy for those that ask nothing, else against Envoy with its servers."""
    lines = [f"### {title}", ""]
    lines += ["| contender | CPU µs/request | × Envoy | × Envoy + OPA + ratelimit | requests/s | p50 µs | p99 µs | errors | not 200 | |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    alone, asking = (statistics.median(results[kind.name].cpu) for kind in (EnvoyAlone, EnvoyAsking))
    for name, found in results.items():
        cpu = statistics.median(found.cpu)
        rate, p50, p99 = (statistics.median(values) for values in (found.rate, found.p50, found.p99))
        lines.append(
            f"| {name} | {cpu:.0f} | {cpu / alone:.2f} | {cpu / asking:.2f} | {rate:.0f} | {p50:.0f} | {p99:.0f}"
            f" | {found.errors} | {found.refused} | {found.note} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Reads the options and runs everything."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures Tollhouse beside Envoy. Example: python -m bench --rounds 5"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20000, help="requests in each round of each scenario")
    parser.add_argument("--callers", type=int, default=1000)
    parser.add_argument("--only", default="", help="only scenarios whose name contains this")
    options = parser.parse_args()
    scenarios = [
        Scenario("HTTP/1.1, repeating requests, 32 connections", ("-connections", "32", "-workers", "32"), "c000*", options.requests),
        Scenario("HTTP/2, repeating requests, 32 connections", ("-connections", "32", "-workers", "32", "-h2"), "c000*", options.requests),
        *(
            Scenario(
                f"HTTP/1.1, {options.callers} callers, 100,000 paths (Zipf 1.1), from a cold start, policy reads {what}",
                ("-connections", str(options.callers), "-workers", "32", "-paths", "100000"),
                "c*",
                options.requests * 2,
                policy,
            )
            for what, policy in (("the first segment of the path", BY_AREA), ("the whole path", POLICY))
        ),
    ]
    with tempfile.TemporaryDirectory(prefix="tollhouse-bench-") as folder:
        bench = Bench(Path(folder), options.callers)
        try:
            print(f"Python {platform.python_version()}, {platform.machine()}; {options.rounds} interleaved rounds, medians\n", flush=True)
            for scenario in scenarios:
                if options.only and options.only not in scenario.name:
                    continue
                cold = "cold" in scenario.name
                results = bench.interleaved(scenario, options.rounds, not cold)
                print(table(scenario.name, results), flush=True)
                if scenario is scenarios[0]:
                    rate = min(statistics.median(found.rate) for found in results.values()) / 2
                    constant = bench.interleaved(
                        scenario, options.rounds, True, "-rate", f"{rate:.0f}", "-workers", "256", "-connections", "256"
                    )
                    print(table(f"{scenario.name}: constant {rate:.0f} requests/s, latency from when each was due", constant), flush=True)
            if not options.only:
                print("### Connections\n\n| contender | bytes/idle connection | CPU µs/handshake |\n| --- | ---: | ---: |")
                for kind in ALL:
                    memory, handshake = bench.idle(kind, 1000)
                    print(f"| {kind.name} | {memory:.0f} | {handshake:.0f} |", flush=True)
        finally:
            bench.upstream.close()
    if options.only in "Below HTTP":
        print(l4.run(options.rounds, 1024, options.requests // 10), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""`python -m bench`: measures all contenders in one interleaved run and prints Markdown tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import build, l4, procfs
from bench.contenders import ALL, RPC, Contender
from bench.report import Figures, bad, table
from bench.scenarios import Scenario, scenarios
from identity.ca import Authority, write_identity
from tests import servers

IDLE = Scenario("Idle connections, handshakes", ("-connections", "1000", "-idle"), 1000, callers="c0000")


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
        self.port, self.rpc = servers.free_port(), servers.free_port()
        command = [str(build.binary("tool")), "upstream", "-listen", f"127.0.0.1:{self.port}", "-grpc", f"127.0.0.1:{self.rpc}"]
        self.upstream = servers.Process(
            [*command, "-identity", str(self.identity)],
            ready=lambda: servers.answers(self.port) and servers.answers(self.rpc),
            name="upstream",
        )
        self.upstream.start()

    def start(self, kind: type[Contender], scenario: Scenario) -> Contender:
        """One contender, running."""
        folder = Path(tempfile.mkdtemp(prefix="contender-", dir=self.folder))
        upstream = self.rpc if scenario.speech == RPC else self.port
        made = kind(folder, self.identity, upstream, self.callers, scenario.policy, scenario.speech)
        try:
            made.start()
        except BaseException:
            made.close()
            raise
        return made

    def loading(self, contender: Contender, scenario: Scenario, *more: str) -> subprocess.Popen[str]:
        """The load, started."""
        identities = str(self.folder / "callers" / scenario.callers)
        command = [str(build.binary("tool")), "load", "-address", f"127.0.0.1:{contender.port}", "-identities", identities]
        command += ["-requests", str(scenario.requests), *scenario.arguments, *more]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def load(self, contender: Contender, scenario: Scenario, *more: str) -> tuple[dict[str, Any], float]:
        """One run of the load; returns what it found, and the microseconds of CPU that the contender used."""
        pids = procfs.tree(contender.pids())
        before = procfs.cpu(pids)
        with self.loading(contender, scenario, *more, *(["-hold"] if scenario.held else [])) as process:
            assert process.stdout is not None
            if scenario.held:
                process.stdout.readline()
                before = procfs.cpu(pids)
            out, err = process.communicate("\n")
        if process.returncode:
            raise SystemExit(f"{scenario.name}: {contender.name}: the load failed: {err.strip()}")
        found: dict[str, Any] = json.loads(out)
        return found, procfs.cpu(procfs.tree(contender.pids()) | pids) - before

    def measure(self, contender: Contender, scenario: Scenario, figures: Figures, *more: str) -> None:
        """One round."""
        figures.add(*self.load(contender, scenario, *more))
        figures.note = contender.note()

    def interleaved(self, scenario: Scenario, rounds: int, *more: str) -> dict[str, Figures]:
        """All contenders in turn, `rounds` times; unless they are to be cold, they have seen the load once before."""
        results = {kind.name: Figures() for kind in scenario.contenders}
        running: list[Contender] = []
        try:
            if not scenario.cold:
                for kind in scenario.contenders:
                    running.append(self.start(kind, scenario))
                    self.load(running[-1], scenario)
            for _ in range(rounds):
                for contender in running:
                    self.measure(contender, scenario, results[contender.name], *more)
                if scenario.cold:
                    for kind in scenario.contenders:
                        fresh = self.start(kind, scenario)
                        try:
                            self.measure(fresh, scenario, results[kind.name], *more)
                        finally:
                            fresh.close()
        finally:
            for contender in running:
                contender.close()
        return results

    def idle(self, kind: type[Contender]) -> tuple[float, float]:
        """Bytes of memory for one idle connection, and microseconds of CPU for one handshake."""
        contender = self.start(kind, IDLE)
        try:
            self.load(contender, Scenario("warm", ("-connections", "64", "-workers", "64"), 2000, callers=IDLE.callers))
            pids = procfs.tree(contender.pids())
            memory, cpu = procfs.resident([contender.gateway()]), procfs.cpu(pids)
            with self.loading(contender, IDLE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                used = procfs.cpu(pids) - cpu
                grown = procfs.resident([contender.gateway()]) - memory
                process.communicate()
            return grown / IDLE.requests, used / IDLE.requests
        finally:
            contender.close()


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures Tollhouse beside Envoy. Example: python -m bench --only gRPC --rounds 5"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20000, help="about as many requests in each round of each scenario")
    parser.add_argument("--callers", type=int, default=1000)
    parser.add_argument("--only", default="", help="only scenarios whose name contains this, in capitals or not")
    found = parser.parse_args()
    if found.rounds < 1 or found.requests < 100 or not 1 <= found.callers <= 10000:
        parser.error("at least one round, a hundred requests, and one caller (ten thousand at most)")
    names = [scenario.name for scenario in scenarios(found.requests, found.callers)] + [IDLE.name, l4.NAME]
    if not any(chosen(found.only, name) for name in names):
        parser.error(f'no scenario has "{found.only}" in its name; there are\n  ' + "\n  ".join(names))
    return found


def chosen(only: str, name: str) -> bool:
    """Whether a scenario is one of those that were asked for."""
    return only.lower() in name.lower()


def main() -> int:
    """Reads the options and runs everything; 1 if there were wrong answers."""
    asked = options()
    wrong = 0
    print(f"Python {platform.python_version()}, {platform.machine()}; {asked.rounds} interleaved rounds, medians\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="tollhouse-bench-") as folder:
        bench = Bench(Path(folder), asked.callers)
        try:
            for scenario in scenarios(asked.requests, asked.callers):
                if not chosen(asked.only, scenario.name):
                    continue
                results = bench.interleaved(scenario, asked.rounds)
                print(table(scenario.name, scenario, results), flush=True)
                wrong += len(bad(results))
                if scenario.paced:
                    rate = min(statistics.median(found.rate) for found in results.values()) / 2
                    paced = bench.interleaved(scenario, asked.rounds, "-rate", f"{rate:.0f}", "-workers", "256", "-connections", "256")
                    title = f"{scenario.name}: constant {rate:.0f} requests/s, latency from when each was due"
                    print(table(title, scenario, paced), flush=True)
                    wrong += len(bad(paced))
            if chosen(asked.only, IDLE.name):
                print(f"### {IDLE.name}\n\n| contender | bytes/idle connection | CPU µs/handshake |\n| --- | ---: | ---: |")
                for kind in ALL:
                    memory, handshake = bench.idle(kind)
                    print(f"| {kind.name} | {memory:.0f} | {handshake:.0f} |", flush=True)
                print()
        finally:
            bench.upstream.close()
    if chosen(asked.only, l4.NAME):
        print(l4.run(asked.rounds, 1024, asked.requests // 10), flush=True)
    if wrong:
        print("there were errors or wrong answers: see below the tables", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

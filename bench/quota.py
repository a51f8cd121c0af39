"""`python -m bench.quota` (`make bench-quota`): what a quota decision costs, beside envoyproxy/ratelimit and the library `limits`.

Each contender has a Redis of its own, whose CPU counts as its own. What decides in the gateway is measured as the gateway calls it, in the
process that asks; a service is measured without the process that asks it, which costs its callers something on top.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from bench import peer_ratelimit, procfs
from bench.quota_load import DOMAIN, LIMIT
from bench.report import row
from tests import servers

FILE = f"domain: {DOMAIN}\ndescriptors:\n- key: user\n  rate_limit: {{unit: second, requests_per_unit: {LIMIT}}}\n"
GATEWAY, RATELIMIT, SERVICE, LIBRARY = "Tollhouse, in the gateway", "envoyproxy/ratelimit", "tollhouse quota (service)", "limits (library)"
INFLIGHT = 64


@dataclass
class Scene:
    """Over how many keys how much is asked."""

    name: str
    keys: int
    requests: int
    contenders: tuple[str, ...] = (GATEWAY, RATELIMIT, SERVICE, LIBRARY)


@dataclass
class Found:
    """What the rounds of one contender gave, each a list of its rounds."""

    cpu: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    refused: int = 0


@contextmanager
def contender(name: str, folder: Path) -> Iterator[tuple[str, str, list[int], int]]:
    """Starts one: the kind of load, the address, the processes that are its own (the asking one's aside), and its Redis' port."""
    with ExitStack() as stack:
        store = stack.enter_context(servers.redis())
        if name == RATELIMIT:
            server = stack.enter_context(servers.running(peer_ratelimit.ratelimit(folder, store.port, {"bench.yaml": FILE})))
        elif name == SERVICE:
            port = servers.free_port()
            (folder / "limits").mkdir()
            (folder / "limits" / "bench.yaml").write_text(FILE)
            arguments = [f"--listen=127.0.0.1:{port}", f"--descriptors={folder / 'limits'}", f"--redis={store.url}?start=full"]
            command = [str(Path(sys.executable).parent / "tollhouse"), "quota", *arguments, "--admin", "127.0.0.1:0"]
            server = stack.enter_context(servers.running(servers.Server("quota", port, command, f"127.0.0.1:{port}")))
        else:
            yield {GATEWAY: "lessee", LIBRARY: "limits"}[name], store.url, [store.pid], store.port
            return
        yield "service", server.url, [server.pid, store.pid], store.port


def reads(port: int) -> int:
    """How often this Redis has read from its clients' sockets: the round trips, however many commands went together."""
    with redis.Redis(port=port) as client:
        return int(client.info("stats")["total_reads_processed"])


def measure(name: str, scene: Scene, found: Found) -> None:
    """One round, on servers that are new."""
    with tempfile.TemporaryDirectory(prefix="tollhouse-bench-") as folder, contender(name, Path(folder)) as (kind, url, pids, port):
        command = [sys.executable, "-m", "bench.quota_load", kind, url, str(scene.keys), str(scene.requests), str(INFLIGHT)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asker:
            assert asker.stdin is not None and asker.stdout is not None
            assert asker.stdout.readline() == "ready\n", f"{name}: the load did not start"
            own = [*pids, *([] if kind == "service" else [asker.pid])]
            before, trips = procfs.cpu(procfs.tree(own)), reads(port)
            deciding = asker.pid if kind != "service" else pids[0]
            memory = procfs.resident([deciding])
            asker.stdin.write("go\n")
            asker.stdin.flush()
            told: dict[str, Any] = json.loads(asker.stdout.readline())
            used, trips, memory = procfs.cpu(procfs.tree(own)) - before, reads(port) - trips - 1, procfs.resident([deciding]) - memory
            asker.communicate("done\n")
    found.cpu.append(used / scene.requests)
    found.calls.append(trips / scene.requests)
    found.rate.append(scene.requests / told["seconds"])
    found.p50.append(told["p50"])
    found.p99.append(told["p99"])
    found.memory.append(memory / 1e6)
    found.refused += told["refused"]


def table(scene: Scene, results: dict[str, Found]) -> str:
    """Markdown, of medians."""
    heads = ["contender", "CPU µs", "× ratelimit", "Redis calls", "decisions/s", "p50 µs", "p99 µs", "memory grown MB", "refused"]
    lines = [
        f"### {scene.name}: {scene.requests:,} decisions, {INFLIGHT} at once",
        "",
        row(heads),
        row(["---", *["---:"] * (len(heads) - 1)]),
    ]
    against = statistics.median(results[RATELIMIT].cpu) if RATELIMIT in results else 0.0
    for name, found in results.items():
        cpu, calls, rate, p50, p99, memory = (
            statistics.median(values) for values in (found.cpu, found.calls, found.rate, found.p50, found.p99, found.memory)
        )
        ratio = f"{cpu / against:.3f}" if against else ""
        lines.append(
            row([name, f"{cpu:.1f}", ratio, f"{calls:.4f}", f"{rate:.0f}", f"{p50:.0f}", f"{p99:.0f}", f"{memory:.0f}", str(found.refused)])
        )
    return "\n".join([*lines, ""])


def main() -> int:
    """Reads the options and runs everything; 1 if anything was refused or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quota", description="Measures quota decisions. Example: python -m bench.quota --only hot"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=50_000, help="decisions in each round")
    parser.add_argument("--only", default="", help="only scenarios whose name contains this")
    asked = parser.parse_args()
    if asked.rounds < 1 or asked.requests < 1000:
        parser.error("at least one round and a thousand requests")
    scenes = [
        Scene("one hot key", 1, asked.requests),
        Scene("100 keys", 100, asked.requests),
        Scene("100,000 keys, each asked about once", 100_000, 100_000),
        Scene("1,000,000 keys, each asked about once", 1_000_000, 1_000_000, (GATEWAY,)),
    ]
    chosen = [scene for scene in scenes if asked.only in scene.name]
    if not chosen:
        parser.error("no scenario has this in its name; there are: " + "; ".join(scene.name for scene in scenes))
    print(f"Python {platform.python_version()}, {platform.machine()}; {asked.rounds} interleaved rounds, medians\n", flush=True)
    wrong = 0
    for scene in chosen:
        results = {name: Found() for name in scene.contenders}
        for _ in range(asked.rounds if len(scene.contenders) > 1 else 1):
            for name, found in results.items():
                measure(name, scene, found)
        print(table(scene, results), flush=True)
        wrong += sum(found.refused for found in results.values())
    if wrong:
        print(f"{wrong} decisions were refused or failed: nothing is to be read from these figures", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

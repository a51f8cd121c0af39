"""Gateways under load while their Redis is killed, paused, slow, cut off or failed over: what is admitted, and what a request pays.

Usage: python -m bench.redis_faults [--seconds 6] [--rounds 1] [TOPOLOGY ...]

Several real gateways share limits in a real Redis (`single`, with `sentinel`, as `cluster`). Five limits are used all the time: `exact`, a
busy one that is leased; `small`, one too small to be, so that Redis is asked with each request in hand; `cold`, with a new key for each
request; `local` and `allow`, by their failure mode; `free` has none. For each fault it prints what `exact` and `small` admitted, by how
much the fullest window of time so far passed `rate x time` (it may by the burst), and the delay that the fault adds to a request: its
time less the longest that a request without a quota took at that gateway meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import yaml

from bench.contenders import resource
from bench.redis_load import PATHS
from identity.ca import Authority, write_identity
from tests import servers
from tests.faulty_link import Link
from tests.redis_cluster import Cluster, cluster

GATEWAYS = 3
RATE = 20.0
"""Requests a second, to each gateway and path."""
LIMITS = {
    "exact": (10, 40, "Deny"),
    "small": (5, 5, "Deny"),
    "cold": (5, 5, "Deny"),
    "local": (30, 60, "Local"),
    "allow": (30, 60, "Allow"),
}
"""Tokens a second, burst, failure mode."""
GROUP = "gateway.networking.k8s.io"


@dataclass(frozen=True)
class Seen:
    """One answer."""

    began: float
    ended: float
    port: int
    path: str
    status: int


@dataclass
class Outcome:
    """What came of one fault."""

    topology: str
    fault: str
    statuses: dict[str, Counter[int]]
    worst: dict[str, float]
    """The longest added delay, in seconds, by path."""
    slowest: float
    """The longest time of any request with a quota, nothing taken off."""
    calm: float
    """The longest time of a request without one, meanwhile."""
    recovered: float
    """Seconds from the fault's end until every gateway knew again whether `exact` has tokens."""
    calls: int
    """Asks that Redis carried out in the second after that."""
    excess: dict[str, float] = field(default_factory=dict)
    """By which the fullest window passed `rate x time`, by limit: to be no more than the burst."""

    @property
    def added(self) -> float:
        """The worst of all."""
        return max(self.worst.values())

    def line(self) -> str:
        """For the table."""
        exact, small = self.statuses["exact"], self.statuses["small"]
        return (
            f"| {self.topology} | {self.fault} | {exact[302]} / {exact[429]} / {exact[503]} | {small[302]} / {small[429]} / {small[503]} "
            f"| {self.excess['exact']:.1f} of {LIMITS['exact'][1]}, {self.excess['small']:.1f} of {LIMITS['small'][1]} "
            f"| {1000 * self.added:.0f} | {1000 * self.slowest:.0f} | {1000 * self.calm:.0f} | {self.recovered:.1f} | {self.calls} |"
        )


HEAD = (
    "| Redis | fault | exact: 302 / 429 / 503 | small: 302 / 429 / 503 | fullest window over rate x time, of burst "
    "| worst added ms | slowest ms | without quota ms | again after s | asks in the second after |\n" + "|---" * 10 + "|"
)


def resources(ports: Sequence[int]) -> list[dict[str, Any]]:
    """A Gateway for each port, all with the same routes, which answer by themselves."""
    made = [resource(f"{GROUP}/v1", "GatewayClass", "tollhouse", "", {"controllerName": "tollhouse.dev/gateway-controller"})]
    parents = []
    for at, port in enumerate(ports):
        listener = {"name": "http", "port": port, "protocol": "HTTP"}
        made.append(resource(f"{GROUP}/v1", "Gateway", f"gw{at}", "faults", {"gatewayClassName": "tollhouse", "listeners": [listener]}))
        parents.append({"name": f"gw{at}"})
    for path in (*PATHS, "free"):
        rule = {
            "matches": [{"path": {"type": "PathPrefix", "value": f"/{path}"}}],
            "filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": "elsewhere.example"}}],
        }
        made.append(resource(f"{GROUP}/v1", "HTTPRoute", path, "faults", {"parentRefs": parents, "rules": [rule]}))
        if path in LIMITS:
            tokens, burst, mode = LIMITS[path]
            limit: dict[str, Any] = {"name": "all", "tokens": tokens, "interval": "1s", "burst": burst}
            if path == "cold":
                limit["per"] = [{"header": "x-key"}]
            target = {"group": GROUP, "kind": "HTTPRoute", "name": path}
            made.append(
                resource(
                    "tollhouse.dev/v1", "QuotaPolicy", path, "faults", {"targetRefs": [target], "failureMode": mode, "limits": [limit]}
                )
            )
    made.append(resource("tollhouse.dev/v1", "Mesh", "faults", "", {"trustDomain": "faults.example"}))
    return made


class Load:
    """The process that asks, and what it saw."""

    def __init__(self, ports: Sequence[int]) -> None:
        command = [sys.executable, "-m", "bench.redis_load", str(RATE), *map(str, ports)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seen: list[Seen] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seen.append(Seen(*json.loads(line)))

    def since(self, at: float, path: str, *statuses: int) -> set[int]:
        """The gateways that answered like that to a request begun since then."""
        found = set()
        for each in reversed(self.seen):
            if each.ended < at:
                break
            if each.began >= at and each.path == path and each.status in statuses:
                found.add(each.port)
        return found

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._thread.join()


@dataclass
class Place:
    """A topology that runs: where gateways find it, what can be done to it, and how many asks it has carried out."""

    url: str
    faults: dict[str, Callable[[], contextlib.AbstractContextManager[None]]]
    nodes: list[servers.Server]

    def calls(self) -> int:
        """Scripts that were run, by all nodes that answer."""
        total = 0
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError), redis.Redis(port=node.port, protocol=2, socket_timeout=0.5) as client:
                stats = client.info("commandstats")
                total += sum(stats.get(name, {}).get("calls", 0) for name in ("cmdstat_evalsha", "cmdstat_eval"))
        return total


@contextlib.contextmanager
def killed(server: servers.Server, again: bool = True) -> Iterator[None]:
    """Ended at once; started anew in the end, if it is to be."""
    server.kill()
    yield
    if again:
        server.start()


@contextlib.contextmanager
def paused(server: servers.Server) -> Iterator[None]:
    """Stopped, connections and all, as by a machine that hangs."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


@contextlib.contextmanager
def network(link: Link, **faults: Any) -> Iterator[None]:
    """The network has faults."""
    before = {name: getattr(link, name) for name in faults}
    for name, value in faults.items():
        setattr(link, name, value)
    if faults.get("refusing"):
        link.reset()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(link, name, value)
        link.reset()


@contextlib.contextmanager
def single() -> Iterator[Place]:
    """One Redis, behind a network that has faults."""
    with servers.redis() as server, Link(server.port) as link:
        yield Place(
            f"redis://127.0.0.1:{link.port}/0",
            {
                "killed and started anew": lambda: killed(server),
                "paused": lambda: paused(server),
                "10 ms slow": lambda: network(link, delay=0.005),
                "100 ms slow": lambda: network(link, delay=0.05),
                "600 ms slow": lambda: network(link, delay=0.3),
                "network drops everything": lambda: network(link, deaf=True),
                "connections reset and refused": lambda: network(link, refusing=True),
            },
            [server],
        )


@contextlib.contextmanager
def sentinel() -> Iterator[Place]:
    """A master and a replica, watched by three Sentinels."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(servers.redis()) for _ in range(2))
        redis.Redis(port=second.port).replicaof("127.0.0.1", first.port)
        ports = []
        for number in range(3):
            port = servers.free_port()
            config = first.folder / f"sentinel-{number}.conf"
            config.write_text(
                f"port {port}\nsentinel monitor main 127.0.0.1 {first.port} 2\nsentinel down-after-milliseconds main 500\n"
                "sentinel failover-timeout main 5000\n"
            )
            command = [servers.redis_program(), str(config), "--sentinel"]
            stack.enter_context(servers.running(servers.Server(f"sentinel-{number}", port, command, "")))
            ports.append(port)
        watchers = [redis.Redis(port=port) for port in ports]
        for watcher in watchers:
            servers.wait_for(
                "the Sentinels to know all",
                lambda watcher=watcher: (
                    watcher.sentinel_master("main")["num-slaves"] == 1 and watcher.sentinel_master("main")["num-other-sentinels"] == 2
                ),
                60,
            )

        @contextlib.contextmanager
        def over(how: Callable[[servers.Server], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
            _, port = watchers[0].sentinel_get_master_addr_by_name("main")  # type: ignore[misc]
            master = next(node for node in (first, second) if node.port == port)
            with how(master):
                servers.wait_for("a new master", lambda: watchers[0].sentinel_get_master_addr_by_name("main")[1] != port, 60)  # type: ignore[index]
                yield

        url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/main"
        faults = {"master killed": lambda: over(killed), "master paused": lambda: over(paused)}
        yield Place(url, faults, [first, second])


@contextlib.contextmanager
def clustered() -> Iterator[Place]:
    """Three masters with a replica each."""
    with cluster(3) as made:
        faults = {
            "a master paused": lambda: paused(made.nodes[_owner(made, 2)]),
            "a master killed, its replica takes over": lambda: killed(made.nodes[_owner(made, 0)]),
        }
        yield Place(made.url, faults, list(made.nodes))


def _owner(made: Cluster, part: int) -> int:
    """Which node has a third of the slots now."""
    slot = made.range_of(part)[0]
    for low, high, master, *_ in made.say(made.nodes[1], "CLUSTER", "SLOTS"):
        if low <= slot <= high:
            return next(at for at, node in enumerate(made.nodes) if node.port == master[1])
    raise AssertionError(f"nobody has slot {slot}")


TOPOLOGIES: dict[str, Callable[[], contextlib.AbstractContextManager[Place]]] = {
    "single": single,
    "sentinel": sentinel,
    "cluster": clustered,
}


def excess(seen: Sequence[Seen], path: str) -> float:
    """By how much the fullest window of time passes `rate x time`. A request counts from when its answer came."""
    worst = total = 0.0
    least = float("inf")
    for at in sorted(each.ended for each in seen if each.path == path and each.status == 302):
        least = min(least, total - LIMITS[path][0] * at)
        total += 1
        worst = max(worst, total - LIMITS[path][0] * at - least)
    return worst


def added(seen: Sequence[Seen]) -> dict[str, float]:
    """The worst delay by path: a request's time less the longest of those without a quota at the same gateway that overlap it."""
    worst = dict.fromkeys(PATHS, 0.0)
    free: dict[int, list[Seen]] = {}
    for each in seen:
        if each.path == "free":
            free.setdefault(each.port, []).append(each)
    for each in seen:
        took = each.ended - each.began
        if each.path == "free" or took <= worst[each.path]:
            continue
        beside = [
            other.ended - other.began for other in free[each.port] if other.ended > each.began - 0.02 and other.began < each.ended + 0.02
        ]
        worst[each.path] = max(worst[each.path], took - max(beside, default=0.0))
    return worst


class Fleet:
    """Gateways on one topology, under load."""

    def __init__(self, place: Place, stack: ExitStack) -> None:
        self.place = place
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollhouse-faults-")))
        ports = [servers.free_port() for _ in range(GATEWAYS)]
        (folder / "config").mkdir()
        (folder / "config" / "mesh.yaml").write_text(yaml.safe_dump_all(resources(ports), sort_keys=False))
        authority = Authority.create("faults.example")
        self.gateways = []
        for at in range(GATEWAYS):
            write_identity(authority.issue(f"spiffe://faults.example/ns/faults/sa/gw{at}"), folder / f"gw{at}")
            admin = servers.free_port()
            command = ["gateway", f"faults/gw{at}", "--config", str(folder / "config"), "--identity", str(folder / f"gw{at}")]
            command += [
                "--redis",
                place.url,
                "--admin",
                f"127.0.0.1:{admin}",
                "--address",
                "127.0.0.1",
                "--access-log",
                "off",
            ]
            ready = f"http://127.0.0.1:{admin}/readyz"
            gateway = servers.tollhouse(*command, ready=lambda ready=ready: servers.fetched(ready), name=f"gateway-{at}")
            stack.callback(gateway.close)
            gateway.start()
            self.gateways.append(gateway)
        self.load = Load(ports)
        stack.callback(self.load.close)
        self.again(time.monotonic())

    def again(self, since: float) -> float:
        """Waits until all gateways know again who is admitted, and one is; the seconds that it took."""
        servers.wait_for("somebody to be admitted again", lambda: self.load.since(since, "exact", 302), 60)
        servers.wait_for("all gateways to know again", lambda: len(self.load.since(since, "exact", 302, 429)) == GATEWAYS, 60)
        return time.monotonic() - since

    def suffer(self, topology: str, name: str, seconds: float) -> Outcome:
        """One fault, for so long."""
        first = len(self.load.seen)
        with self.place.faults[name]():
            time.sleep(seconds)
        recovered = self.again(time.monotonic())
        calls = self.place.calls()
        time.sleep(1.0)
        calls = self.place.calls() - calls
        time.sleep(max(0.0, seconds / 3))
        seen = self.load.seen[first:]
        quota = [each for each in seen if each.path != "free"]
        statuses = {path: Counter(each.status for each in quota if each.path == path) for path in PATHS}
        outcome = Outcome(
            topology,
            name,
            statuses,
            added(seen),
            max(each.ended - each.began for each in quota),
            max(each.ended - each.began for each in seen if each.path == "free"),
            recovered,
            calls,
        )
        outcome.excess = {path: excess(self.load.seen, path) for path in ("exact", "small")}
        return outcome


def run(topologies: Sequence[str], seconds: float, rounds: int, say: Callable[[str], None] = print) -> list[Outcome]:
    """Every fault of every topology, in turn; says what came of each."""
    outcomes = []
    say(HEAD)
    for topology in topologies:
        with ExitStack() as stack:
            fleet = Fleet(stack.enter_context(TOPOLOGIES[topology]()), stack)
            for _ in range(rounds):
                for name in fleet.place.faults:
                    outcomes.append(fleet.suffer(topology, name, seconds))
                    say(outcomes[-1].line())
            told = Counter(line[:120] for gateway in fleet.gateways for line in gateway.output().splitlines() if "Traceback" in line)
            assert not told, told
    say(f"worst added delay of all: {1000 * max(outcome.added for outcome in outcomes):.0f} ms")
    return outcomes


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Gateways under load while their Redis has faults.")
    parser.add_argument("topologies", nargs="*", metavar="TOPOLOGY", help=", ".join(TOPOLOGIES))
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each fault lasts")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    outcomes = run(options.topologies or list(TOPOLOGIES), options.seconds, options.rounds, lambda text: print(text, flush=True))
    over = [outcome for outcome in outcomes if outcome.added > 0.05 or outcome.excess["exact"] > LIMITS["exact"][1] + 1]
    sys.exit(f"{len(over)} of {len(outcomes)} are not as promised" if over else 0)


if __name__ == "__main__":
    main()

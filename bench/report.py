"""What was measured, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.contenders import EnvoyAlone, EnvoyAsking
from bench.scenarios import Scenario


@dataclass
class Figures:
    """What the rounds of one contender in one scenario gave."""

    cpu: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    errors: int = 0
    wrong: int = 0
    first: str = ""
    note: str = ""

    def add(self, found: dict[str, Any], cpu: float) -> None:
        """One round: what the load found, and the microseconds of CPU. What was answered wrongly counts as work, and not as a request."""
        self.cpu.append(cpu / max(found["requests"], 1))
        for name in ("p50", "p99", "rate"):
            getattr(self, name).append(found[name])
        self.errors += found["errors"]
        self.wrong += found["wrong"]
        self.first = self.first or found["first"]


def table(title: str, scenario: Scenario, results: dict[str, Figures]) -> str:
    """One Markdown table, of medians. `errors` had no complete answer, `wrong` had another than the right one."""
    against = [("× Envoy", EnvoyAlone.name), ("× Envoy + OPA + ratelimit", EnvoyAsking.name)]
    against = [(head, name) for head, name in against if name in results]
    heads = ["contender", f"CPU µs/{scenario.unit}", *(head for head, _ in against), f"{scenario.unit}s/s"]
    heads += [*(["MB/s"] if scenario.size else []), "p50 µs", "p99 µs", "errors", "wrong", ""]
    lines = [f"### {title}", "", row(heads), row(["---", *["---:"] * (len(heads) - 2), "---"])]
    for name, found in results.items():
        cpu, rate, p50, p99 = (statistics.median(values) for values in (found.cpu, found.rate, found.p50, found.p99))
        ratios = [f"{cpu / statistics.median(results[other].cpu):.2f}" for _, other in against]
        cells = [name, f"{cpu:.1f}" if cpu < 30 else f"{cpu:.0f}", *ratios, f"{rate:.0f}"]
        cells += [*([f"{rate * scenario.size / 1e6:.0f}"] if scenario.size else []), f"{p50:.0f}", f"{p99:.0f}"]
        lines.append(row([*cells, str(found.errors), str(found.wrong), found.note]))
    lines += [f"\n**{name}: {found.errors} errors, {found.wrong} wrong; the first: {found.first}**" for name, found in bad(results)]
    return "\n".join([*lines, ""])


def bad(results: dict[str, Figures]) -> list[tuple[str, Figures]]:
    """Those whose answers were not all right: nothing is to be read from their figures."""
    return [(name, found) for name, found in results.items() if found.errors or found.wrong]


def row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"

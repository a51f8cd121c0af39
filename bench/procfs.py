"""What the kernel says about processes: CPU time and memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICK = 1_000_000 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(pids: Iterable[int]) -> set[int]:
    """The processes and all their descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    todo = list(pids)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return found


def cpu(pids: Iterable[int]) -> float:
    """Microseconds of CPU, user and system, that the processes have used."""
    used = 0.0
    for pid in pids:
        try:
            # schedstat counts nanoseconds on the CPU for each thread; stat only counts ticks of 10 ms.
            for thread in Path(f"/proc/{pid}/task").iterdir():
                used += int((thread / "schedstat").read_text().split()[0]) / 1000
        except OSError:
            continue
    return used


def resident(pids: Iterable[int]) -> int:
    """Bytes of memory in use, summed."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        except OSError:
            continue
    return total

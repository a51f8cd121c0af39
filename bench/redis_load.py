"""The load of `bench.redis_faults`: paced requests to several gateways, each with requests beside it that no quota holds up.

Runs as a process of its own, so that nothing else holds it up: writes a line of JSON for each answer, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from typing import Any

PATHS = ("exact", "small", "cold", "local", "allow")
"""What is asked of each gateway at the same pace; `free` at four times of it."""


async def one(port: int, path: str, period: float, out: list[Any]) -> None:
    """Asks again and again on a kept connection."""
    rng = random.Random(f"{port}{path}")
    reader = writer = None
    due = time.monotonic() + rng.random() * period
    for number in itertools.count():
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due = max(due + period, time.monotonic())
        key = f"{port}-{number}" if path == "cold" else "one"
        began = time.monotonic()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                began = time.monotonic()
            writer.write(f"GET /{path}/x HTTP/1.1\r\nhost: faults.example\r\nx-key: {key}\r\n\r\n".encode())
            assert reader is not None
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
            await reader.readexactly(length)
            status = int(head[9:12])
        except (OSError, asyncio.IncompleteReadError):
            status, writer = 0, None
        out.append((began, time.monotonic(), port, path, status))


async def write(out: list[Any]) -> None:
    """Hands over what came."""
    while True:
        await asyncio.sleep(0.1)
        sys.stdout.write("".join(json.dumps(each) + "\n" for each in out))
        sys.stdout.flush()
        out.clear()


async def main(ports: list[int], rate: float) -> None:
    """All of them, until standard input ends."""
    out: list[Any] = []
    tasks = [asyncio.ensure_future(write(out))]
    for port in ports:
        tasks += [asyncio.ensure_future(one(port, path, 1 / rate, out)) for path in PATHS]
        tasks += [asyncio.ensure_future(one(port, "free", 1 / rate, out)) for _ in range(4)]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main([int(port) for port in sys.argv[2:]], float(sys.argv[1])))

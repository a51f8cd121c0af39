"""`python -m bench.directory`: from a file in a gateway's configuration directory to the first request that goes by it. Prints Markdown."""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.scale import route, world
from tests import servers

CHANGES = 20
POLL = 0.001


def files(folder: Path, size: int, port: int, *, one_file: bool) -> Path:
    """The configuration of `size` endpoints below `folder`: a file for each resource, or all in one. Returns the file to change."""
    bodies = world(size)
    for body in bodies:
        if body["kind"] == "Gateway":
            body["spec"]["listeners"][0]["port"] = port
    if one_file:
        path = folder / "all.yaml"
        path.write_text("---\n".join(json.dumps(body) + "\n" for body in bodies))
        return path
    for number, body in enumerate(bodies):
        (folder / f"{number}.json").write_text(json.dumps(body))
    return folder / "new.json"


def replaced(path: Path, text: str) -> None:
    """Writes beside and renames, as whoever cares does."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def until(port: int, path: str, status: int) -> None:
    """Asks until the answer has this status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        while True:
            connection.request("GET", path, headers={"host": "new.example"})
            answer = connection.getresponse()
            answer.read()
            if answer.status == status:
                return
            time.sleep(POLL)
    finally:
        connection.close()


def measured(size: int, *, one_file: bool) -> list[float]:
    """Milliseconds of each change."""
    with tempfile.TemporaryDirectory(prefix="tollhouse-bench-") as name:
        folder, port, admin = Path(name), servers.free_port(), servers.free_port()
        changing = files(folder, size, port, one_file=one_file)
        kept = changing.read_text() if one_file else ""
        ready: Callable[[], object] = lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz")  # noqa: E731
        options = ["--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}", "--access-log", "off"]
        process = servers.tollhouse("gateway", "edge/gw", "--config", str(folder), *options, ready=ready, name="gateway")
        try:
            process.start()
            took = []
            for number in range(CHANGES):
                body = route(0, "new.example", f"/new{number}", 0)
                body["metadata"]["name"] = "new"
                body["spec"]["rules"][0]["filters"] = [{"type": "RequestRedirect", "requestRedirect": {"hostname": "there.example"}}]
                body["spec"]["rules"][0].pop("backendRefs", None)
                text = json.dumps(body)
                began = time.perf_counter()
                replaced(changing, f"{kept}---\n{text}\n" if one_file else text)
                until(port, f"/new{number}", 302)
                took.append((time.perf_counter() - began) * 1e3)
            return took
        finally:
            process.close()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.directory", description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[100, 1_000, 10_000])
    options = parser.parse_args()
    print("| endpoints | resources | a file each: median | longest | all in one file: median | longest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        cells = [f"{size:,}", f"{len(world(size)):,}"]
        for one_file in (False, True):
            took = measured(size, one_file=one_file)
            cells += [f"{statistics.median(took):.0f} ms", f"{max(took):.0f} ms"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""What docs/quota.md tells an author to type, typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "quota.md").read_text()
DEADLINE = 60.0


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def answers(port: int) -> None:
    """Waits until something serves at `port`, without asking for anything that costs a token."""
    ends = time.monotonic() + DEADLINE
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
        except OSError:
            assert time.monotonic() < ends
            time.sleep(0.05)
        else:
            return


def test_from_nothing_to_nested_limits(tmp_path: Path, running: list[subprocess.Popen[bytes]]) -> None:
    section = PAGE.split("## From nothing to nested limits\n")[1].split("\n## ")[0]
    ports = {number: str(servers.free_port()) for number in ("18080", "19000", "15900")}
    section = re.sub("|".join(ports), lambda found: ports[found.group()], section)
    (manifests,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mesh.yaml").write_text(manifests)
    (tmp_path / "tollhouse").write_text(f'#!/bin/sh\nexec {sys.executable} -m tollhouse "$@"\n')
    (tmp_path / "tollhouse").chmod(0o755)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root}
    typed: list[tuple[str, list[str]]] = []
    for line in re.findall(r"^    (.*)$", re.sub(r"```.*?```", "", section, flags=re.DOTALL), re.MULTILINE):
        if line.startswith("$ "):
            typed.append((line[2:], []))
        else:
            typed[-1][1].append(line)
    functions = ""
    for command, expected in typed:
        if command.endswith("&"):
            running.append(subprocess.Popen(["sh", "-c", "exec " + command[:-1]], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL))
            if " gateway " in command:
                answers(int(ports["15900"]))
        elif command.startswith("call()"):
            functions = command
        else:
            shell = ["bash", "-c", f"{functions}\n{command}"]
            done = subprocess.run(shell, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
            if expected != ["..."]:
                assert [line.rstrip() for line in done.stdout.splitlines()] == expected, command
    page = json.load(urllib.request.urlopen(f"http://127.0.0.1:{ports['15900']}/quota", timeout=10))
    spent = {(row["limit"], *row["key"]): row["spent"] for row in page["lessees"][0]["top"]}
    assert spent[("shop/orders/whole",)] == 10  # what was refused has been charged nowhere
    assert [spent["shop/orders/tenant", name] for name in ("blue", "red", "green")] == [6, 3, 1]
    users = ("blue", "ann"), ("blue", "bob"), ("red", "cy"), ("green", "dee")
    assert [spent[("shop/orders/user", *name)] for name in users] == [4, 2, 3, 1]


def test_validate_tells_of_limits_that_cannot_be_leased(tmp_path: Path) -> None:
    (manifests,) = re.findall(r"```yaml\n(.*?)```", PAGE.split("## From nothing to nested limits\n")[1].split("\n## ")[0], re.DOTALL)
    limits = "[{name: a, tokens: 50, burst: 5}, {name: b, tokens: 50}, {name: c, tokens: 1, interval: 1m}]"
    text = f"{manifests.split('  limits:')[0]}  limits: {limits}\n"
    (tmp_path / "mesh.yaml").write_text(text)

    def validate(*words: str) -> list[str]:
        command = [sys.executable, "-m", "tollhouse", "validate", "-f", str(tmp_path), "-o", "json", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return [problem["text"].split(" (")[0] for problem in json.loads(done.stdout)]

    assert validate() == []
    (warning,) = validate("--workers", "3")
    assert warning.startswith("QuotaPolicy shop/orders: spec.limits[0]: a burst of 5 can't be leased, 3 lessees")


def test_a_table_is_in_force_within_a_moment_of_its_being_applied(tmp_path: Path, running: list[subprocess.Popen[bytes]]) -> None:
    (manifests,) = re.findall(r"```yaml\n(.*?)```", PAGE.split("## From nothing to nested limits\n")[1].split("\n## ")[0], re.DOTALL)
    ports = {number: str(servers.free_port()) for number in ("18080", "19000", "15900")}
    limits = "[{name: tenant, per: [{header: x-tenant}], tokens: 1, interval: 1h, overridesFrom: {name: tenants}}]"
    text = f"{manifests.split('  limits:')[0]}  limits: {limits}\n"
    (tmp_path / "mesh.yaml").write_text(re.sub("|".join(ports), lambda found: ports[found.group()], text))
    table = "apiVersion: tollhouse.dev/v1\nkind: QuotaOverrides\nmetadata: {namespace: shop, name: tenants}\nspec: {rows: [ROWS]}\n"
    filler = ", ".join(f"{{values: [t{number}], tokens: 7}}" for number in range(3000))
    (tmp_path / "tenants.yaml").write_text(table.replace("ROWS", filler))
    here = [sys.executable, "-m", "tollhouse"]
    running.append(subprocess.Popen([*here, "echo", "--listen", f"127.0.0.1:{ports['19000']}"], stdout=subprocess.DEVNULL))
    gateway = [
        *here,
        "gateway",
        "shop/front",
        "--config",
        str(tmp_path),
        "--address",
        "127.0.0.1",
        "--admin",
        f"127.0.0.1:{ports['15900']}",
    ]
    running.append(subprocess.Popen([*gateway, "--access-log", "off"], stderr=subprocess.DEVNULL))
    answers(int(ports["15900"]))

    def status(tenant: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{ports['18080']}/", headers={"x-tenant": tenant})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as problem:
            return problem.code

    assert [status("blue"), status("blue"), status("t7"), status("t7")] == [200, 429, 200, 200]
    (tmp_path / "tenants.yaml").write_text(table.replace("ROWS", filler + ", {values: [blue], exempt: true}"))
    ends = time.monotonic() + DEADLINE
    while status("blue") != 200:
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert [status("blue") for _ in range(5)] == [200] * 5

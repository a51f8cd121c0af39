"""`tollhouse up` as a newcomer sees it: one screen, three commands that do what they say, changes in force at once, a clean end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers

EXAMPLE = Path(__file__).resolve().parents[2] / "conf" / "examples" / "shop"
PORTS = (8443, 8444, 8445, 9101, 9102, 9103, 9104, 9105)


class Up:
    """A running `tollhouse up` on free ports."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.ports = {before: servers.free_port() for before in PORTS}
        self.config, self.state = folder / "config", folder / "state"
        shutil.copytree(EXAMPLE, self.config)
        for path in self.config.rglob("*.*"):
            text = path.read_text()
            for before, after in self.ports.items():
                text = re.sub(rf"\b{before}\b", str(after), text)
            path.write_text(text)
        self.admin = servers.free_port()
        command = ["up", "--config", str(self.config), "--state", str(self.state), "--admin", f"127.0.0.1:{self.admin}", *more]
        self.process = servers.tollhouse(*command, ready=lambda: servers.fetched(f"http://127.0.0.1:{self.admin}/readyz"), name="up")

    def commands(self) -> list[str]:
        found = [line.strip() for line in self.process.output().splitlines() if line.startswith("  curl ")]
        assert len(found) == 3, self.process.output()
        return found

    def status(self) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/status", timeout=5) as page:
            value: dict[str, object] = json.loads(page.read())
            return value


def shell(command: str) -> str:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False).stdout


def children(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path)
    try:
        made.process.start()
        yield made
    finally:
        made.process.close()


def test_the_screen_and_what_it_offers(up: Up) -> None:
    servers.wait_for("the screen", lambda: "Ctrl-C" in up.process.output())
    screen = up.process.output()
    for part in ("edge/ingress", "edge/eastwest", "edge/egress", f"https://127.0.0.1:{up.ports[8443]}", "shop/payments", "identities"):
        assert part in screen
    assert "\x1b" not in screen
    allowed, denied, over = up.commands()
    assert json.loads(shell(allowed))["service"] in {"catalog-v1", "catalog-v2"}
    assert shell(denied).startswith("HTTP/2 403")
    counted = Counter({line.split()[1]: int(line.split()[0]) for line in shell(over).splitlines()})
    assert set(counted) == {"200", "429"}
    assert 20 <= counted["200"] <= 30
    for path in (up.state / "identities").rglob("key.pem"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (up.state / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600


def test_the_end_is_clean(up: Up) -> None:
    servers.wait_for("a worker", lambda: children(up.process.pid))
    workers = children(up.process.pid)
    began = time.monotonic()
    up.process.signal(signal.SIGINT)
    assert up.process.process is not None
    assert up.process.process.wait(20) == 0
    assert time.monotonic() - began < 15
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists()
    for word in ("Traceback", "Task was destroyed", "never awaited"):
        assert word not in up.process.output()


def test_changes_are_in_force_at_once_and_wrong_ones_not_at_all(up: Up) -> None:
    allowed, denied, _ = up.commands()
    assert shell(denied).startswith("HTTP/2 403")
    policy = up.config / "policy" / "authz.rego"
    good = policy.read_text()
    policy.write_text(
        good.replace('area == "payments"', 'area in {"payments", "paid"}').replace("caller == orders\n", "caller in {orders, batch}\n")
    )
    servers.wait_for("the new policy", lambda: shell(denied).startswith("HTTP/2 200"), 10)
    policy.write_text(good + "\nbroken := {\n")
    servers.wait_for("the problem", lambda: "authz.rego" in json.dumps(up.status()["problems"]), 10)
    assert shell(denied).startswith("HTTP/2 200"), "the last good policy stays in force"
    policy.write_text(good)
    servers.wait_for("the old policy", lambda: shell(denied).startswith("HTTP/2 403"), 10)

    routes = up.config / "routes.yaml"
    text = routes.read_text()
    routes.write_text(text.replace("type: PathPrefix", "type: Prefix"))
    servers.wait_for("the problem", lambda: "PathPrefix" in json.dumps(up.status()["problems"]), 10)
    assert json.loads(shell(allowed))["path"] == "/catalog/1"
    routes.write_text(text.replace("value: /catalog", "value: /katalog"))
    servers.wait_for("the new route", lambda: shell(allowed) == "This path is not served here.\n" or "404" in shell(f"{allowed} -i"), 10)


def test_the_admin_page_shows_no_key(up: Up) -> None:
    for path in ("/config", "/status", "/metrics"):
        with urllib.request.urlopen(f"http://127.0.0.1:{up.admin}{path}", timeout=5) as page:
            assert b"PRIVATE KEY" not in page.read()
    request = urllib.request.Request(f"http://127.0.0.1:{up.admin}/config", headers={"host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=5)


def test_upstream_metrics_of_all_gateways_are_on_the_page(up: Up) -> None:
    shell(up.commands()[0])
    with urllib.request.urlopen(f"http://127.0.0.1:{up.admin}/metrics", timeout=5) as page:
        text = page.read().decode()
    assert re.search(r'tollhouse_upstream_connects_total\{gateway="edge/ingress",cluster="shop/catalog-v\d:443",result="ok"\} 1', text)


def test_what_is_in_use_is_said_in_one_line(tmp_path: Path, up: Up) -> None:
    other = Up(tmp_path / "other")
    shutil.rmtree(other.config)
    shutil.copytree(up.config, other.config)
    with pytest.raises(AssertionError, match="ended with 1"):
        other.process.start()
    lines = other.process.output().strip().splitlines()
    assert "another process listens there" in lines[-1]
    assert "Traceback" not in other.process.output()
    other.process.close()

"""A revision that is too large for etcd lies behind a URL: over real processes and a real web server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_traffic import ask, page
from e2e_world import EXAMPLE, Mesh, shop, tollhouse

from tests import install, servers
from tests.servers import wait_for

pytestmark = pytest.mark.e2e
WRITES = """
allowing contains "web writes the catalog" if {
	caller == web
	method == "POST"
	area == "catalog"
}
"""


def bundle(folder: Path, name: str, more: str, size: int) -> Path:
    """An OPA bundle made by OPA."""
    source = folder / f"source-{name}"
    shutil.copytree(EXAMPLE / "policy", source)
    (source / "authz.rego").write_text((source / "authz.rego").read_text() + more)
    (source / "big").mkdir()
    (source / "big" / "data.json").write_text(json.dumps({"numbers": [f"{name}-{each:030}" for each in range(size)]}))
    made = folder / "www" / f"{name}.tar.gz"
    made.parent.mkdir(exist_ok=True)
    command = [str(install.install("opa")), "build", "-b", str(source), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2"), gateways=("ingress",)) as running:
        yield running


def web(folder: Path) -> servers.Process:
    port = servers.free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder / "www")]
    process = servers.Process(command, ready=lambda: servers.answers(port), name="www")
    process.name = f"http://127.0.0.1:{port}"
    return process


def published(mesh: Mesh, url: str) -> str:
    done = tollhouse("policy", "publish", url, "--by-reference", "--config", mesh.config)
    return done.stdout.split()[1].rstrip(":")


def in_force(mesh: Mesh) -> str:
    return str(json.loads(page(mesh, "ingress", "/status"))["policy"]).replace(":", "-", 1)


def test_it_is_fetched_checked_and_kept(mesh: Mesh, tmp_path: Path) -> None:
    bundle(tmp_path, "one", "", 60_000)
    bundle(tmp_path, "two", WRITES, 60_000)
    done = tollhouse("policy", "publish", str(tmp_path / "source-one"), "--config", mesh.config, check=False)
    assert done.returncode == 1
    assert "publish its URL --by-reference" in done.stderr
    site = web(tmp_path)
    mesh.stack.callback(site.close)
    site.start()
    url = site.name
    one, two = published(mesh, f"{url}/one.tar.gz"), published(mesh, f"{url}/two.tar.gz")
    tollhouse("policy", "activate", one, "--config", mesh.config)
    assert in_force(mesh) == one
    assert ask(mesh, "web", "/catalog/1", "POST").status == 403
    site.stop()

    done = tollhouse("policy", "activate", two, "--config", mesh.config, "--timeout", "4s", check=False)
    assert done.returncode == 1
    assert "edge/ingress" in done.stderr
    assert "is not ready here yet: no decision point holds it" in done.stderr
    assert in_force(mesh) == one
    assert (ask(mesh, "web", "/catalog/1").status, ask(mesh, "web", "/catalog/1", "POST").status) == (200, 403)
    assert "/two.tar.gz" in mesh.processes["pdp"].output()
    site.start()
    wait_for("the gateway to follow", lambda: in_force(mesh) == two, 60)
    assert ask(mesh, "web", "/catalog/1", "POST").status == 200

    # Without the server and from the disk alone.
    site.stop()
    for name in ("pdp", "gateway-ingress"):
        mesh.processes[name].stop()
        mesh.processes[name].start()
    wait_for("the policy to be back", lambda: in_force(mesh) == two, 60)
    assert (ask(mesh, "web", "/catalog/2", "POST").status, ask(mesh, "web", "/catalog/2").status) == (200, 200)

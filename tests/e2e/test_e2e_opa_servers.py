"""The user's own OPA servers kept in step by a decision point, over real processes: by REST and as bundles, changed and started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from e2e_world import EXAMPLE, tollhouse

from tests import servers
from tests.servers import Process, Server, free_port, wait_for

pytestmark = pytest.mark.e2e
TOKEN = "token-of-the-test"
GUARD = """package system.authz

default allow := false

allow if input.path == ["health"]

allow if input.identity in {"token-of-the-test", "somebody"}
"""


def ask(port: int, path: str = "/catalog/1") -> int:
    """The decision point's answer to a request by nobody for a path that nobody may, or to nonsense; 503 for an error."""
    headers = {"X-Original-Method": "GET", "X-Original-URI": path, "Host": "shop.example"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/original", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def call(server: Server, method: str, path: str, body: str = "", token: str = "somebody") -> bytes:
    request = urllib.request.Request(server.url + path, body.encode(), {"Authorization": f"Bearer {token}"}, method=method)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return bytes(answer.read())


@contextmanager
def pdp(config: str, *more: str) -> Iterator[tuple[Process, int, str]]:
    web, admin = free_port(), f"127.0.0.1:{free_port()}"
    process = servers.tollhouse(
        "pdp", "--config", config, "--listen", f"127.0.0.1:{free_port()}", "--http", f"127.0.0.1:{web}", "--admin", admin,
        "--decision", "shop.authz.decision", *more, ready=lambda: servers.answers(web), name="pdp",
    )  # fmt: skip
    try:
        process.start()
        yield process, web, admin
    finally:
        process.close()


def published(config: str, folder: Path, allowed: str) -> str:
    """A revision that allows what lies below one path; its name."""
    folder.mkdir(exist_ok=True)
    lib = "package lib\n\nfirst := input.parsed_path[0]\n\nmay contains path if some path in data.shop.open\n"
    (folder / "lib.rego").write_text(lib)
    (folder / "authz.rego").write_text(
        "package shop.authz\n\nimport data.lib\n\ndefault decision := false\n\ndecision if lib.first in lib.may\n"
    )
    (folder / "data.json").write_text(json.dumps({"shop": {"open": [allowed]}}))
    done = tollhouse("policy", "publish", str(folder), "--config", config, "--decision", "shop.authz.decision")
    return done.stdout.split()[1].rstrip(":")


def status(admin: str) -> dict[str, str]:
    done = tollhouse("status", "--admin", admin, "-o", "json", check=False)
    return dict(json.loads(done.stdout)["opaServers"][0])


def test_revisions_are_written_kept_and_mended(tmp_path: Path) -> None:
    token, guard = tmp_path / "token", tmp_path / "guard.rego"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    guard.write_text(GUARD)
    with servers.etcd() as etcd, servers.opa("--authentication=token", "--authorization=basic", str(guard)) as opa:
        first = published(etcd.url, tmp_path / "policy", "catalog")
        second = published(etcd.url, tmp_path / "policy", "orders")
        tollhouse("policy", "activate", first, "--config", etcd.url)
        with pdp(etcd.url, "--opa", opa.url, "--opa-by", "rest", "--opa-token", str(token)) as (_, web, admin):
            wait_for("the first revision", lambda: ask(web) == 200)
            assert ask(web, "/orders/1") == 403
            tollhouse("policy", "activate", second, "--config", etcd.url)
            wait_for("the second revision", lambda: ask(web, "/orders/1") == 200)
            assert ask(web) == 403
            place = "/v1/policies/tollhouse/" + second.removeprefix("sha256-")
            call(opa, "DELETE", place)
            assert ask(web, "/orders/1") == 200, "the answer that was missing had it written again"
            call(opa, "PUT", place, json.loads(call(opa, "GET", place))["result"]["raw"].replace('"orders"', '"catalog"'))
            wait_for("it is mended", lambda: ask(web) == 403 and ask(web, "/orders/1") == 200)
            assert int(status(admin)["drifts"]) >= 2
            opa.kill()
            assert ask(web, "/orders/1") == 503
            wait_for("it is said", lambda: status(admin)["problem"])
            shown = tollhouse("status", "--admin", admin, check=False)
            assert (shown.returncode, f"OPA server {opa.url}" in shown.stdout) == (1, True)
            opa.start()
            wait_for("an OPA that was empty", lambda: ask(web, "/orders/1") == 200)
            assert ask(web) == 403
            with urllib.request.urlopen(f"http://{admin}/metrics", timeout=5) as page:
                text = page.read().decode()
            assert f'tollhouse_opa_server_well{{server="{opa.url}"}} 1' in text
            assert f'tollhouse_opa_server_drifts_total{{server="{opa.url}"}}' in text


def test_an_opa_that_does_not_follow_is_shown(tmp_path: Path) -> None:
    """One that fetches its bundle once in ten minutes holds the revision before."""
    port = free_port()
    with servers.etcd() as etcd:
        first = published(etcd.url, tmp_path / "policy", "catalog")
        second = published(etcd.url, tmp_path / "policy", "orders")
        tollhouse("policy", "activate", first, "--config", etcd.url)
        settings = (
            f"services.tollhouse.url=http://127.0.0.1:{port}",
            "bundles.own.service=tollhouse",
            "bundles.own.resource=bundle.tar.gz",
            "bundles.own.polling.min_delay_seconds=600",
            "bundles.own.polling.max_delay_seconds=600",
        )
        with (
            servers.opa(*(f"--set={each}" for each in settings)) as opa,
            pdp(etcd.url, "--opa", opa.url, "--opa-bundles", f"127.0.0.1:{port}") as (_, web, admin),
        ):
            wait_for("the first revision", lambda: ask(web) == 200)
            assert (status(admin)["problem"], status(admin)["well"]) == ("", True)
            tollhouse("policy", "activate", second, "--config", etcd.url)
            wait_for("it is said", lambda: status(admin)["problem"])
            said = status(admin)["problem"]
            assert f"holds {first.replace('-', ':')}, not {second.replace('-', ':')}" in said
            assert [ask(web), ask(web, "/orders/1")] == [200, 403], "and is not taken for the new one"


MESH = """apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {{name: tollhouse}}
spec: {{controllerName: tollhouse.dev/gateway-controller}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{namespace: edge, name: front}}
spec:
  gatewayClassName: tollhouse
  listeners: [{{name: http, port: {port}, protocol: HTTP}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: edge, name: away}}
spec:
  parentRefs: [{{name: front}}]
  rules: [{{filters: [{{type: RequestRedirect, requestRedirect: {{hostname: elsewhere.example}}}}]}}]
---
apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {{namespace: edge, name: asked}}
spec: {{decision: shop.authz.decision, place: Local, targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: front}}]}}
"""


def seen(port: int, path: str) -> set[int]:
    """The answers to requests on connections of their own, which several workers share."""
    found = set()
    for _ in range(16):
        with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as client:
            client.request("GET", path)
            found.add(client.getresponse().status)
    return found


@pytest.mark.parametrize("by", ["bundle", "rest"])
def test_workers_of_a_gateway_have_one_opa(tmp_path: Path, by: str) -> None:
    port, bundles, admin = free_port(), free_port(), free_port()
    (tmp_path / "mesh.yaml").write_text(MESH.format(port=port))
    fetches = (
        f"services.tollhouse.url=http://127.0.0.1:{bundles}",
        "bundles.own.service=tollhouse",
        "bundles.own.resource=bundle.tar.gz",
        "bundles.own.polling.min_delay_seconds=1",
        "bundles.own.polling.max_delay_seconds=2",
    )
    settings = [f"--set={each}" for each in fetches] if by == "bundle" else []
    with servers.etcd() as etcd, servers.opa(*settings) as opa:
        first = published(etcd.url, tmp_path / "policy", "catalog")
        second = published(etcd.url, tmp_path / "policy", "orders")
        tollhouse("policy", "activate", first, "--config", etcd.url)
        tollhouse("apply", "-f", str(tmp_path / "mesh.yaml"), "--config", etcd.url)
        words = ["--opa", opa.url, *(["--opa-bundles", f"127.0.0.1:{bundles}"] if by == "bundle" else ["--opa-by", "rest"])]
        gateway = servers.tollhouse(
            "gateway", "edge/front", "--config", etcd.url, "--workers", "2", "--admin", f"127.0.0.1:{admin}", "--access-log", "off", *words,
            ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="gateway",
        )  # fmt: skip
        try:
            gateway.start()
            wait_for("both by the first", lambda: seen(port, "/catalog/1") == {302} and seen(port, "/orders/1") == {403})
            tollhouse("policy", "activate", second, "--config", etcd.url)
            wait_for("both by the second", lambda: seen(port, "/catalog/1") == {403} and seen(port, "/orders/1") == {302})
            children = subprocess.run(["pgrep", "-P", str(gateway.pid)], capture_output=True, text=True, check=True).stdout.split()
            for pid in children:
                os.kill(int(pid), signal.SIGKILL)
            # The reports of those that were killed outlive them, so that it can't be waited for here.
            tollhouse("policy", "activate", first, "--config", etcd.url, "--timeout", "1s", check=False)
            wait_for("workers in their places", lambda: seen_again(port) == ({302}, {403}), 60)
            with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=5) as page:
                drifts = [line for line in page.read().decode().splitlines() if line.startswith("tollhouse_opa_server_drifts_total{")]
            assert {float(line.split()[-1]) for line in drifts} == {0.0}, "two that write the same don't undo each other's work"
        finally:
            gateway.close()


def seen_again(port: int) -> tuple[set[int], set[int]] | None:
    try:
        return seen(port, "/catalog/1"), seen(port, "/orders/1")
    except OSError:
        return None


def refused(*options: str) -> str:
    done = tollhouse("pdp", "--policy", str(EXAMPLE / "policy"), "--decision", "shop.authz.decision", *options, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_what_a_decision_point_does_not_start_with(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    assert "say which by --opa" in refused("--opa-by", "rest")
    assert "chmod 600" in refused("--opa", "https://opa.example", "--opa-by", "rest", "--opa-token", str(token))
    token.chmod(0o600)
    assert "use https" in refused("--opa", "http://opa.example", "--opa-by", "rest", "--opa-token", str(token))
    assert "no URL of an OPA server" in refused("--opa", "opa.example:8181", "--opa-by", "rest")

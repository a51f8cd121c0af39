"""Who uses what of a limit, as an operator sees it: real gateways on a real Redis."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.rpc import error_details_pb2, status_pb2

from tests import servers

GROUP = "gateway.networking.k8s.io"
KEY = "a-long-api-key-that-is-secret"
RESPONSE = {
    "contentType": "application/json",
    "body": '{"limit":"%LIMIT%","again":%RETRY_AFTER%,"id":"%REQUEST_ID%"}',
    "headers": [{"name": "X-RateLimit-Limit", "value": "%QUOTA%"}],
    "retryAfterJitter": "60s",
}


def mesh(port: int) -> list[dict[str, Any]]:
    limit = {"name": "per-tenant", "per": [{"header": "x-key"}], "tokens": 5, "interval": "1h"}
    limit["overrides"] = [{"values": ["gold"], "tokens": 50}]
    specs: list[tuple[str, str, dict[str, Any]]] = [
        (f"{GROUP}/v1", "GatewayClass", {"controllerName": "tollhouse.dev/gateway-controller"}),
        (f"{GROUP}/v1", "Gateway", {"gatewayClassName": "a", "listeners": [{"name": "http", "port": port, "protocol": "HTTP"}]}),
        (
            f"{GROUP}/v1",
            "HTTPRoute",
            {
                "parentRefs": [{"name": "a"}],
                "rules": [{"filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": "there.example"}}]}],
            },
        ),
        (
            "tollhouse.dev/v1",
            "QuotaPolicy",
            {"targetRefs": [{"group": GROUP, "kind": "HTTPRoute", "name": "a"}], "limits": [limit], "response": RESPONSE, "timeout": "5s"},
        ),
    ]
    return [
        {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": "a", **({} if kind == "GatewayClass" else {"namespace": "edge"})},
            "spec": spec,
        }
        for version, kind, spec in specs
    ]


class Gateways:
    def __init__(self, config: Path, redis: str, ports: list[int], admins: list[int]) -> None:
        self.config, self.redis, self.ports, self.admins = config, redis, ports, admins

    def ask(self, port: int, key: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/", headers={"x-key": key})
            return connection.getresponse().status
        finally:
            connection.close()

    def run(self, *words: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "tollhouse", "quota", *words], capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def top(self, *more: str) -> Any:
        admins = [word for admin in self.admins for word in ("--admin", f"127.0.0.1:{admin}")]
        code, text = self.run("top", *admins, "-o", "json", *more)
        assert code == 0, text
        return json.loads(text)


@pytest.fixture(scope="module", params=["", "2"], ids=["two gateways", "with workers"])
def gateways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    folder = tmp_path_factory.mktemp("quota")
    with servers.redis() as redis:
        url = redis.url + "?start=full"
        made, ports, admins = [], [], []
        try:
            for number in range(2):
                port, admin = servers.free_port(), servers.free_port()
                config = folder / str(number)
                config.mkdir()
                (config / "mesh.yaml").write_text(yaml.safe_dump_all(mesh(port)))
                words = ["gateway", "edge/a", "--config", str(config), "--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}"]
                words += ["--redis", url, "--access-log", "off", *(["--workers", request.param] if request.param else [])]
                ready = lambda admin=admin: servers.fetched(f"http://127.0.0.1:{admin}/readyz")  # noqa: E731
                process = servers.tollhouse(*words, ready=ready, name="gateway")
                made.append(process)
                process.start()
                ports.append(port)
                admins.append(admin)
            yield Gateways(folder / "0", url, ports, admins)
        finally:
            for process in made:
                process.close()


def test_who_is_refused_comes_first_and_no_secret_is_shown(gateways: Gateways) -> None:
    statuses = [gateways.ask(port, KEY) for _ in range(6) for port in gateways.ports]
    assert statuses.count(302) == 5 and statuses.count(429) == 7
    assert [gateways.ask(gateways.ports[0], "gold") for _ in range(8)] == [302] * 8
    first, second = gateways.top()
    assert first["limit"] == second["limit"] == "edge/a/per-tenant"
    assert first["refused"] == 7 and first["spent"] == 5 and first["gateways"] >= 2
    assert first["key"][0].startswith("a-lo...") and KEY not in json.dumps(first)
    assert second["key"] == ["gold"] and (second["refused"], second["spent"], second["burst"]) == (0, 8, 50)
    assert len(gateways.top("--most", "1")) == 1
    code, text = gateways.run("top", "--admin", f"127.0.0.1:{gateways.admins[0]}")
    assert code == 0 and text.splitlines()[0].split() == [
        "LIMIT",
        "KEY",
        "TOKENS/S",
        "IN",
        "USE",
        "SPENT",
        "REFUSED",
        "IN",
        "HAND",
        "GATEWAYS",
    ]


def test_a_refusal_is_told_as_its_author_wants(gateways: Gateways) -> None:
    waits = set()
    for _ in range(12):
        connection = http.client.HTTPConnection("127.0.0.1", gateways.ports[0], timeout=10)
        connection.request("GET", "/", headers={"x-key": "told"})
        answer = connection.getresponse()
        if answer.status == 429:
            said = json.loads(answer.read())
            assert said == {"limit": "per-tenant", "again": int(answer.headers["retry-after"]), "id": answer.headers["x-request-id"]}
            assert answer.headers["content-type"] == "application/json" and answer.headers["x-ratelimit-limit"] == "5"
            waits.add(said["again"])
        connection.close()
    assert len(waits) > 1 and max(waits) <= 720 + 60  # a token comes in twelve minutes
    with grpc.insecure_channel(f"127.0.0.1:{gateways.ports[0]}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/shop.Orders/Get")(b"", metadata=(("x-key", "told"),), timeout=10)
    problem: Any = caught.value
    assert problem.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    rich = status_pb2.Status.FromString(dict(problem.trailing_metadata())["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert rich.details[0].Unpack(retry) and 0 < retry.retry_delay.ToSeconds() <= 780


def test_what_is_left_of_a_limit(gateways: Gateways) -> None:
    where = ["--config", str(gateways.config), "--redis", gateways.redis, "-o", "json"]
    assert gateways.ask(gateways.ports[0], "x") == 302
    code, text = gateways.run("get", "edge/a/per-tenant", "x", *where)
    found = json.loads(text)
    assert code == 0 and found["burst"] == 5 and found["left"] + found["onLease"] == 4
    code, text = gateways.run("get", "edge/a/per-tenant", "gold", *where)
    assert code == 0 and json.loads(text)["burst"] == 50


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["edge/a/per-tenat", "x"], 1, "no QuotaPolicy that is in force has the limit edge/a/per-tenat; did you mean edge/a/per-tenant?"),
        (["edge/a/per-tenant"], 2, "has a bucket for each combination of 1 values (header:x-key), and 0 are given"),
        (["edge/a/per-tenant", "x", "--redis", "redis://127.0.0.1:1"], 1, "Redis can't be asked: "),
        (["edge/a/per-tenant", "x", "--redis", "http://x"], 2, "--redis: "),
    ],
)
def test_what_goes_wrong_is_said(gateways: Gateways, words: list[str], code: int, said: str) -> None:
    found = gateways.run("get", "--config", str(gateways.config), "--redis", gateways.redis, *words)
    assert found[0] == code and said in found[1]
    assert len(found[1].splitlines()) == 1


def test_a_page_where_nobody_answers(gateways: Gateways) -> None:
    code, text = gateways.run("top", "--admin", "127.0.0.1:1")
    assert code == 1 and "nobody answers at 127.0.0.1:1" in text

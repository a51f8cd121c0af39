"""HTTP/2 by clients that others wrote, in plaintext: by prior knowledge; and by `Upgrade: h2c`, which is never taken up nor passed on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from routes_world import Edge, gateway

pytestmark = pytest.mark.e2e
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: web}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  rules: [{backendRefs: [{name: v1, port: 80}]}]
"""


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with gateway(ROUTE) as running:
        yield running


def nghttp(edge: Edge, *arguments: str, stdin: bytes = b"") -> str:
    command = ["nghttp", "-t", "20", "-H", ":authority: shop.example", *arguments, f"http://127.0.0.1:{edge.port}/nghttp"]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def seen(edge: Edge, path: str) -> list[dict[str, Any]]:
    return [each for each in edge.services["v1"].seen if each["path"] == path]


def test_nghttp_by_prior_knowledge(edge: Edge, tmp_path: Any) -> None:
    before = len(seen(edge, "/nghttp"))
    shown = nghttp(edge, "-m", "20", "--no-dep")
    assert shown.count('"service": "v1"') == 20
    assert len(seen(edge, "/nghttp")) == before + 20
    body = tmp_path / "body"
    body.write_bytes(b"0123456789" * 50_000)
    answer = json.loads(nghttp(edge, "-d", str(body)))
    assert (answer["method"], answer["body"]) == ("POST", "0123456789" * 50_000)
    assert ":status: 200" in nghttp(edge, "-v", "-n", "-w", "16", "-W", "16", "-d", str(body))


def test_nghttp_asks_for_an_upgrade_in_vain(edge: Edge) -> None:
    command = ["nghttp", "-t", "20", "-u", f"http://127.0.0.1:{edge.port}/upgraded"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert b"HTTP Upgrade failed" in done.stdout + done.stderr
    for each in seen(edge, "/upgraded"):
        assert not {"upgrade", "http2-settings"} & set(each["headers"])


def test_curl_asks_for_an_upgrade_and_goes_on_without(edge: Edge) -> None:
    answer = edge.curl("/curl", "--http2", "-w", "%{http_version}", "-o", "/dev/null", "-d", "hello", "--no-include")
    assert answer.code == 0
    (arrived,) = seen(edge, "/curl")
    assert arrived["body"] == "hello"
    assert not {"upgrade", "http2-settings"} & set(arrived["headers"])
    assert "http2-settings" not in arrived["headers"].get("connection", "").lower()


def test_curl_by_prior_knowledge(edge: Edge) -> None:
    answer = edge.curl("/curl-h2", "--http2-prior-knowledge", "-d", "hello")
    assert (answer.status, answer.json["body"]) == (200, "hello")

"""`tollhouse pdp --http` behind real proxies: Envoy's `http_service`, nginx's `auth_request`, Caddy's forward auth."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from authz_world import Said, bootstrap, cluster
from routes_world import _Service

from tests import install, servers
from tests.servers import Process, free_port

pytestmark = pytest.mark.e2e
POLICY = """package shop.authz

http := input.attributes.request.http

default decision := {"allowed": false, "body": "not here\\n", "headers": {"x-why": "no"}}

decision := {"allowed": true, "headers": {"x-user": "ann"}, "response_headers_to_add": {"x-policy": "yes"}} if {
	http.method == "GET"
	input.parsed_path == ["orders", "7"]
	input.parsed_query.a == ["1"]
}

decision := {"allowed": false, "http_status": 401, "headers": {"www-authenticate": "Basic"}} if input.parsed_path == ["login"]

decision := {"allowed": false, "http_status": 200} if input.parsed_path == ["tricky"]

decision := {"allowed": true, "request_headers_to_remove": ["x-t"]} if input.parsed_path == ["remove"]

decision := {"allowed": true} if {
	http.method == "POST"
	input.parsed_body.amount < 10
}

decision := 7 if input.parsed_path == ["broken"]

other := true
"""


class World:
    """A decision point with its HTTP face, and a service."""

    def __init__(self, http: int, grpc: int, admin: int, process: Process, service: _Service) -> None:
        self.http, self.grpc, self.admin, self.process, self.service = http, grpc, admin, process, service
        self.upstream: int = service.server_address[1]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-http-authz-"))
    (folder / "policy.rego").write_text(POLICY)
    http, grpc, admin = free_port(), free_port(), free_port()
    process = servers.tollhouse(
        "pdp", "--policy", str(folder), "--decision", "data.shop.authz.decision", "--listen", f"127.0.0.1:{grpc}",
        "--http", f"127.0.0.1:{http}", "--admin", f"127.0.0.1:{admin}",
        ready=lambda: servers.fetched(f"http://127.0.0.1:{http}/readyz"), name="pdp-http",
    )  # fmt: skip
    service = _Service("v1")
    try:
        process.start()
        yield World(http, grpc, admin, process, service)
    finally:
        process.close()
        service.shutdown()
        service.server_close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def envoy(world: World) -> Iterator[int]:
    port = free_port()
    names = [{"exact": name, "ignore_case": True} for name in ("x-t", "content-type")]
    authz = {
        "transport_api_version": "V3",
        "with_request_body": {"max_request_bytes": 100, "allow_partial_message": True},
        "http_service": {
            "server_uri": {"uri": f"http://127.0.0.1:{world.http}", "cluster": "authz", "timeout": "5s"},
            "path_prefix": "/envoy",
            "authorization_response": {
                "allowed_upstream_headers": {"patterns": [{"exact": "x-user"}]},
                "allowed_client_headers": {"patterns": [{"exact": name} for name in ("x-why", "www-authenticate", "content-type")]},
                "allowed_client_headers_on_success": {"patterns": [{"exact": "x-policy"}]},
            },
        },
        "allowed_headers": {"patterns": names},
    }
    with servers.envoy(bootstrap(port, world.upstream, authz, cluster("authz", world.http, http2=False)), port):
        yield port


@contextlib.contextmanager
def nginx(world: World) -> Iterator[int]:
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-nginx-"))
    config = f"""
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; user root;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      auth_request /check;
      auth_request_set $user $upstream_http_x_user;
      proxy_set_header X-User $user;
      proxy_set_header Host $host;
      proxy_pass http://127.0.0.1:{world.upstream};
    }}
    location = /check {{
      internal;
      proxy_pass http://127.0.0.1:{world.http}/original;
      proxy_pass_request_body off;
      proxy_set_header Content-Length "";
      proxy_set_header Host $host;
      proxy_set_header X-Original-Method $request_method;
      proxy_set_header X-Original-URI $request_uri;
    }}
  }}
}}
"""
    path = folder / "nginx.conf"
    path.write_text(config)
    process = Process(
        [str(install.install("nginx")), "-e", "stderr", "-p", str(folder), "-c", str(path)],
        ready=lambda: servers.answers(port), name="nginx",
    )  # fmt: skip
    try:
        process.start()
        yield port
    finally:
        process.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def caddy(world: World) -> Iterator[int]:
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="tollhouse-caddy-"))
    path = folder / "Caddyfile"
    path.write_text(f"""{{
	admin off
	auto_https off
	storage file_system {folder}/storage
}}
http://shop.example:{port} {{
	bind 127.0.0.1
	forward_auth 127.0.0.1:{world.http} {{
		uri /for/shop.authz.decision/forwarded
		copy_headers x-user
	}}
	reverse_proxy 127.0.0.1:{world.upstream}
}}
""")
    process = Process(
        [str(install.install("caddy")), "run", "--config", str(path), "--adapter", "caddyfile"],
        ready=lambda: servers.answers(port), name="caddy", env={"HOME": str(folder), "XDG_DATA_HOME": str(folder)},
    )  # fmt: skip
    try:
        process.start()
        yield port
    finally:
        process.close()
        shutil.rmtree(folder, ignore_errors=True)


PROXIES = {"envoy": envoy, "nginx": nginx, "caddy": caddy}


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_asks_over_http(world: World, name: str) -> None:
    with PROXIES[name](world) as port:
        said = Said(port, "1", "/orders/7?a=1", [("x-user", "forged"), ("x-forwarded-method", "GET"), ("x-original-uri", "/orders/7?a=1")])
        assert said.upstream is not None, (said.status, said.body, world.process.output()[-2000:])
        assert said.upstream["headers"]["x-user"] == "ann"
        for method, path in (("GET", "/orders/7?a=2"), ("DELETE", "/orders/7?a=1"), ("GET", "/orders/8?a=1"), ("GET", "/tricky")):
            forged = [("x-forwarded-method", "GET"), ("x-forwarded-uri", "/orders/7?a=1"), ("x-original-uri", "/orders/7?a=1")]
            refused = Said(port, "2", path, [*forged, ("x-original-method", "GET")], method)
            assert refused.upstream is None, (method, path)
            assert refused.status == 403, (method, path, refused.body)
        if name == "nginx":  # of two words for one thing neither is believed
            assert Said(port, "6", "/orders/7?a=1", [("x-original-url", "http://shop.example/orders/7?a=1")]).status == 500
        login = Said(port, "3", "/login", [])
        assert (login.status, dict(login.headers)["www-authenticate"]) == (401, "Basic")
        assert Said(port, "4", "/broken", []).status == {"envoy": 403, "nginx": 500, "caddy": 503}[name]
        removed = Said(port, "5", "/remove", [("x-t", "1")])
        if name == "envoy":
            assert removed.upstream is not None
            assert "x-t" not in removed.upstream["headers"]
        else:
            assert removed.upstream is None, "what only Envoy can be told is an error elsewhere"


def test_an_envoy_has_the_body_judged_and_tells_the_client_more(world: World) -> None:
    with envoy(world) as port:
        kind = [("content-type", "application/json")]
        assert Said(port, "1", "/pay", kind, "POST", b'{"amount": 9}').upstream is not None
        assert Said(port, "2", "/pay", kind, "POST", b'{"amount": 10}').status == 403
        assert Said(port, "3", "/pay", kind, "POST", b'{"amount": 9, "note": "' + b"x" * 200 + b'"}').status == 403, "a part is not judged"
        said = Said(port, "4", "/orders/7?a=1", [])
        assert dict(said.headers)["x-policy"] == "yes"
        denied = Said(port, "5", "/nowhere", [])
        assert (denied.status, denied.body, dict(denied.headers)["x-why"]) == (403, "not here\n", "no")


def test_checks_over_http_are_counted(world: World) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{world.admin}/metrics", timeout=5) as page:
        assert b'tollhouse_pdp_checks_total{verdict="allow",cause=""}' in page.read()


def test_a_dry_run_allows_and_says_what_would_have_been() -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="tollhouse-dry-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "policy.rego").write_text(POLICY)
        http, grpc = free_port(), free_port()
        process = servers.tollhouse(
            "pdp", "--policy", str(folder), "--decision", "shop/authz/decision", "--listen", f"127.0.0.1:{grpc}",
            "--http", f"127.0.0.1:{http}", "--dry-run", ready=lambda: servers.answers(http), name="pdp-dry",
        )  # fmt: skip
        stack.callback(process.close)
        process.start()
        for path in ("/nowhere", "/broken"):
            with urllib.request.urlopen(f"http://127.0.0.1:{http}/envoy{path}", timeout=5) as answer:
                assert answer.status == 200
        servers.wait_for("the log", lambda: process.output().count("dry run: this would be") == 2)
        assert "dry run: this would be deny" in process.output()
        assert json.dumps("dry run: this would be error")[1:-1] in process.output()

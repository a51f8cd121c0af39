"""A real Envoy in the place of a gateway: it asks our decision point and our quota, with mTLS clients."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_world import EXAMPLE, Answer, Mesh, answer_of, shop, spiffe

from tests import servers

pytestmark = pytest.mark.e2e
DESCRIPTORS = """
domain: edge
descriptors:
  - key: tenant
    rate_limit: {unit: hour, requests_per_unit: 3}
  - key: tenant
    value: gold
    rate_limit: {unlimited: true}
"""
TYPE = "type.googleapis.com/envoy.extensions."


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """No gateway of ours: etcd, Redis, identities, a decision point for callers that name no decision, and the quota service."""
    with shop(services=(), gateways=()) as running:
        running.ports |= {name: servers.free_port() for name in ("authz", "alone", "echo")}
        descriptors = running.folder / "descriptors"
        descriptors.mkdir()
        (descriptors / "edge.yaml").write_text(DESCRIPTORS)
        authz, alone, quota, echo = (running.ports[name] for name in ("authz", "alone", "quota", "echo"))
        decision = ("--decision", "shop.authz.decision")
        running.run(
            "pdp-authz", "pdp", "--config", running.config, *decision, "--listen", f"127.0.0.1:{authz}",
            ready=lambda: servers.answers(authz),
        )  # fmt: skip
        running.run(
            "pdp-alone", "pdp", "--policy", str(EXAMPLE / "policy"), *decision, "--listen", f"127.0.0.1:{alone}",
            ready=lambda: servers.answers(alone),
        )  # fmt: skip
        # Nobody has spent anything yet, which nobody else can know of a new Redis: its buckets begin full.
        running.run(
            "quota", "quota", "--config", running.config, "--descriptors", str(descriptors), "--redis", f"{running.redis.url}?start=full",
            "--listen", f"127.0.0.1:{quota}", ready=lambda: servers.answers(quota),
        )  # fmt: skip
        running.run("echo", "echo", "--name", "echo", "--listen", f"127.0.0.1:{echo}", ready=lambda: servers.answers(echo))
        yield running


def bootstrap(mesh: Mesh, listeners: dict[int, tuple[str, str]]) -> str:
    """Listeners with mTLS, by port: which cluster decides, and which domain's limits count (with none, none do)."""
    identity = mesh.identity("edge-ingress")

    def path(name: str) -> dict[str, str]:
        return {"filename": str(identity / name)}

    tls = {
        "@type": f"{TYPE}transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_certificates": [{"certificate_chain": path("cert.pem"), "private_key": path("key.pem")}],
            "validation_context": {"trusted_ca": path("ca.pem")},
            "alpn_protocols": ["h2", "http/1.1"],
        },
    }
    caller = {"request_headers": {"descriptor_key": "identity", "header_name": "x-caller"}}
    limits = {
        "edge": [{"request_headers": {"descriptor_key": "tenant", "header_name": "x-tenant"}}],
        "tollhouse": [{"generic_key": {"descriptor_key": "limit", "descriptor_value": "shop/orders/per-caller"}}, caller],
    }

    def listener(port: int, decider: str, domain: str) -> dict[str, Any]:
        check = {
            "@type": f"{TYPE}filters.http.ext_authz.v3.ExtAuthzPerRoute",
            "check_settings": {"context_extensions": {"gateway": "edge/ingress"}},
        }
        route: dict[str, Any] = {
            "match": {"prefix": "/"},
            "route": {"cluster": "echo"},
            "typed_per_filter_config": {"authz": check},
        }
        authz = {
            "@type": f"{TYPE}filters.http.ext_authz.v3.ExtAuthz",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": decider}, "timeout": "2s"},
            "include_peer_certificate": True,
        }
        filters: list[dict[str, Any]] = [{"name": "authz", "typed_config": authz}]
        if domain:
            route["route"]["rate_limits"] = [{"actions": limits[domain]}]
            limit = {
                "@type": f"{TYPE}filters.http.ratelimit.v3.RateLimit",
                "domain": domain,
                "failure_mode_deny": True,
                "timeout": "2s",
                "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
                "rate_limit_service": {"transport_api_version": "V3", "grpc_service": {"envoy_grpc": {"cluster_name": "quota"}}},
            }
            filters.append({"name": "ratelimit", "typed_config": limit})
        filters.append({"name": "router", "typed_config": {"@type": f"{TYPE}filters.http.router.v3.Router"}})
        manager = {
            "@type": f"{TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "in",
            "normalize_path": True,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": filters,
        }
        if domain == "tollhouse":
            # Counted is whom the certificate names, whatever a client sends.
            mutation = {
                "@type": f"{TYPE}filters.http.header_mutation.v3.HeaderMutation",
                "mutations": {
                    "request_mutations": [
                        {
                            "append": {
                                "header": {"key": "x-caller", "value": "%DOWNSTREAM_PEER_URI_SAN%"},
                                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                            }
                        }
                    ]
                },
            }
            filters.insert(0, {"name": "who", "typed_config": mutation})
        return {
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
            "filter_chains": [
                {"transport_socket": {"name": "tls", "typed_config": tls}, "filters": [{"name": "http", "typed_config": manager}]}
            ],
        }

    def cluster(name: str, http2: bool) -> dict[str, Any]:
        where = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": mesh.ports[name]}}}}
        made: dict[str, Any] = {
            "name": name,
            "type": "STATIC",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [where]}]},
        }
        if http2:
            options = {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
            made["typed_extension_protocol_options"] = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
        return made

    static = {
        "listeners": [listener(port, *how) for port, how in listeners.items()],
        "clusters": [cluster("echo", False), *(cluster(name, True) for name in ("authz", "alone", "quota"))],
    }
    return yaml.safe_dump({"static_resources": static})


@pytest.fixture(scope="module")
def ports(mesh: Mesh) -> Iterator[dict[str, int]]:
    """The ports of Envoy's listeners."""
    made = {name: servers.free_port() for name in ("mesh", "alone", "descriptors", "policy")}
    how = {
        made["mesh"]: ("authz", ""),
        made["alone"]: ("alone", ""),
        made["descriptors"]: ("authz", "edge"),
        made["policy"]: ("authz", "tollhouse"),
    }
    with contextlib.ExitStack() as stack:
        envoy = stack.enter_context(servers.envoy(bootstrap(mesh, how), made["mesh"]))
        servers.wait_for("all listeners", lambda: all(servers.answers(port) for port in made.values()))
        assert envoy.pid
        yield made


def ask(mesh: Mesh, port: int, caller: str, method: str, path: str, *more: str) -> Answer:
    folder: Path = mesh.identity(f"shop-{caller}")
    command = ["curl", "-sS", "-i", "-X", method, "--max-time", "20", "--resolve", f"shop.example:{port}:127.0.0.1"]
    command += ["--cacert", str(folder / "ca.pem"), "--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem"), *more]
    done = subprocess.run([*command, f"https://shop.example:{port}{path}"], capture_output=True, timeout=30, check=False)
    return answer_of(done.stdout.decode(), done.returncode)


@pytest.mark.parametrize("listener", ["mesh", "alone"])
@pytest.mark.parametrize(
    ("caller", "method", "path", "status"),
    [
        ("web", "GET", "/catalog/1", 200),
        ("web", "POST", "/orders/1", 200),
        ("web", "POST", "/catalog/1", 403),
        ("batch", "GET", "/catalog/1", 200),
        ("batch", "GET", "/orders/1", 403),
        ("orders", "POST", "/payments/1", 200),
    ],
)
def test_envoy_lets_pass_whom_our_policy_does(
    mesh: Mesh, ports: dict[str, int], listener: str, caller: str, method: str, path: str, status: int
) -> None:
    answer = ask(mesh, ports[listener], caller, method, path)
    assert answer.status == status, answer
    if status == 200:
        assert answer.json["service"] == "echo"
    else:
        assert "no rule lets this caller do that here" in answer.body


def test_envoy_counts_by_the_descriptors_of_a_file(mesh: Mesh, ports: dict[str, int]) -> None:
    port = ports["descriptors"]
    answers = [ask(mesh, port, "web", "GET", "/catalog/1", "-H", "x-tenant: blue") for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[0].headers["x-ratelimit-limit"].startswith("3, 3;w=3600")
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers[:3]] == ["2", "1", "0"]
    assert 0 < int(answers[3].headers["retry-after"]) <= 1200
    assert answers[3].headers["ratelimit-policy"] == '"edge.tenant";q=3;w=3600'
    assert ask(mesh, port, "web", "GET", "/catalog/1", "-H", "x-tenant: red").status == 200, "another bucket"
    assert {ask(mesh, port, "web", "GET", "/catalog/1", "-H", "x-tenant: gold").status for _ in range(6)} == {200}
    assert ask(mesh, port, "batch", "GET", "/orders/1", "-H", "x-tenant: red").status == 403, "what is denied is not counted"


def test_envoy_counts_by_a_quota_policy_of_the_mesh(mesh: Mesh, ports: dict[str, int]) -> None:
    folder = mesh.identity("shop-web")
    command = ["curl", "-s", "--cacert", str(folder / "ca.pem"), "--cert", str(folder / "cert.pem"), "--key", str(folder / "key.pem")]
    command += ["--resolve", f"shop.example:{ports['policy']}:127.0.0.1", "-H", "x-caller: " + spiffe("orders"), "-o", "/dev/null"]
    url = f"https://shop.example:{ports['policy']}/orders/[1-60]"
    done = subprocess.run(
        [*command, "-w", "%{http_code} %header{retry-after} %{time_total}\\n", url], capture_output=True, text=True, check=True
    )
    lines = [line.split(" ") for line in done.stdout.splitlines()]
    statuses = [status for status, _, _ in lines]
    took = sum(float(seconds) for _, _, seconds in lines)
    assert set(statuses) == {"200", "429"}, statuses
    assert statuses.count("200") <= 20 + 10 * took + 1
    assert all(int(retry) >= 1 for status, retry, _ in lines if status == "429")
    for caller, method, path in (("batch", "GET", "/catalog/1"), ("orders", "POST", "/payments/1")):
        assert ask(mesh, ports["policy"], caller, method, path).status == 200, "another caller has a bucket of its own"

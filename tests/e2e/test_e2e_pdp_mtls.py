"""Decisions on the wire: gateways and the decision point under mTLS, and who else may not ask."""

from __future__ import annotations

import grpc
import pytest
from e2e_world import Mesh, shop, tollhouse
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse

from tests import servers

pytestmark = pytest.mark.e2e


def restarted(mesh: Mesh) -> None:
    """The PDP with an identity, and an ingress that asks it under mTLS."""
    folder = mesh.issue("pdp", "edge", ["pdp.shop.example"])
    for name in ("pdp", "gateway-ingress"):
        mesh.processes[name].stop()
    port = mesh.ports["pdp"]
    mesh.run(
        "pdp", "pdp", "--config", mesh.config, "--listen", f"127.0.0.1:{port}", "--identity", str(folder),
        ready=lambda: servers.answers(port),
    )  # fmt: skip
    mesh.gateway("ingress", "--pdp-name", "pdp.shop.example")


def check(mesh: Mesh, caller: str | None) -> grpc.StatusCode:
    """What somebody gets who asks the PDP directly."""
    target, name = f"127.0.0.1:{mesh.ports['pdp']}", (("grpc.ssl_target_name_override", "pdp.shop.example"),)
    bundle = (mesh.identity("shop-web") / "ca.pem").read_bytes()
    if caller is None:
        credentials = grpc.ssl_channel_credentials(bundle)
    else:
        folder = mesh.identity(caller)
        credentials = grpc.ssl_channel_credentials(bundle, (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes())
    with grpc.secure_channel(target, credentials, options=name) as channel:
        ask = channel.unary_unary(
            "/envoy.service.auth.v3.Authorization/Check",
            request_serializer=CheckRequest.SerializeToString,
            response_deserializer=CheckResponse.FromString,
        )
        try:
            ask(CheckRequest(), timeout=5, metadata=(("tollhouse-decision", "shop.authz.decision"),))
        except grpc.RpcError as problem:
            code: grpc.StatusCode = problem.code()
            return code
    return grpc.StatusCode.OK


def test_decisions_travel_under_mtls_and_only_gateways_may_ask() -> None:
    with shop(services=("catalog-v1", "catalog-v2"), gateways=("ingress",)) as mesh:
        restarted(mesh)
        assert mesh.curl("web", "GET", "/catalog/1").status == 200
        assert mesh.curl("web", "POST", "/catalog/1").status == 403
        assert check(mesh, "edge-ingress") is grpc.StatusCode.INVALID_ARGUMENT  # welcome; what it asks is no request
        assert check(mesh, "shop-web") is grpc.StatusCode.PERMISSION_DENIED
        assert check(mesh, None) is grpc.StatusCode.UNAVAILABLE

        # A renewed identity is used without a restart, on both sides.
        mesh.issue("pdp", "edge", ["pdp.shop.example"])
        mesh.issue("ingress", "edge", ["shop.example"])
        for number in range(5):
            assert mesh.curl("web", "PUT", f"/catalog/{number}").status == 403


def test_a_strict_mesh_asks_nobody_in_plaintext_on_another_machine() -> None:
    with shop(services=(), gateways=()) as mesh:
        command = ["gateway", "edge/ingress", "--config", mesh.config, "--identity", str(mesh.identity("edge-ingress"))]
        done = tollhouse(*command, "--pdp", "192.0.2.1:9191", "--admin", "off", check=False)
        assert done.returncode == 1
        assert "--pdp-name" in done.stderr
        assert "Traceback" not in done.stderr

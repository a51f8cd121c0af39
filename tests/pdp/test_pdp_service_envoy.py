"""A real Envoy that asks our decision point: what it makes of an allow, a denial and an error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import aiohttp.web
from engine_world import until
from grpc_world import service, shop

from tests import servers
from tests.servers import free_port

POLICY = """package shop.authz

http := input.attributes.request.http

decision := {"allowed": true, "headers": {"x-seen": http.headers["x-want"]}, "response_headers_to_add": {"x-policy": "yes"}} if {
	http.headers["x-want"] == "allow"
}

else := {"allowed": false, "http_status": 401, "headers": {"x-why": "no"}, "body": "denied\\n"} if http.headers["x-want"] == "deny"

else := {"allowed": true, "query_parameters_to_set": {"added": "1"}} if http.headers["x-want"] == "query"
"""


def bootstrap(port: int, upstream: int, pdp: int) -> str:
    """Two listeners' worth of routes on one: `/closed` refuses on an error of the decision point, the other listener lets pass."""

    def listener(number: int, open_on_error: bool) -> dict[str, Any]:
        authz = {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "transport_api_version": "V3",
            "failure_mode_allow": open_on_error,
            "grpc_service": {"envoy_grpc": {"cluster_name": "pdp"}, "timeout": "2s"},
        }
        router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
        hcm = {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "in",
            "route_config": {
                "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "up"}}]}]
            },
            "http_filters": [{"name": "authz", "typed_config": authz}, {"name": "router", "typed_config": router}],
        }
        return {
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": number}},
            "filter_chains": [{"filters": [{"name": "hcm", "typed_config": hcm}]}],
        }

    def cluster(name: str, number: int, http2: bool) -> dict[str, Any]:
        where = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": number}}}}
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
        "listeners": [listener(port, False), listener(port + 1, True)],
        "clusters": [cluster("up", upstream, False), cluster("pdp", pdp, True)],
    }
    return json.dumps({"static_resources": static})


def test_envoy_understands_our_answers() -> None:
    seen: list[tuple[str, dict[str, str]]] = []

    async def upstream(request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        seen.append((request.path_qs, dict(request.headers)))
        return aiohttp.web.Response(text="from the upstream\n")

    async def run() -> None:
        runner = aiohttp.web.ServerRunner(aiohttp.web.Server(upstream))
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        async with service(shop(POLICY), decision="shop.authz.decision") as (made, target):
            port = free_port()
            config = bootstrap(port, runner.addresses[0][1], int(target.rsplit(":", 1)[1]))
            envoy = servers.envoy(config, port)
            await asyncio.to_thread(envoy.__enter__)
            try:
                async with aiohttp.ClientSession() as session:

                    async def get(want: str, listener: int = port) -> tuple[int, str, Any]:
                        async with session.get(f"http://127.0.0.1:{listener}/orders", headers={"x-want": want}) as response:
                            return response.status, await response.text(), response.headers

                    status, body, headers = await get("allow")
                    assert (status, body, headers["x-policy"]) == (200, "from the upstream\n", "yes")
                    assert seen[-1][1]["x-seen"] == "allow"
                    for listener in (port, port + 1):
                        status, body, headers = await get("deny", listener)
                        assert (status, body, headers["x-why"]) == (401, "denied\n", "no")
                    assert (await get("query"))[0] == 200
                    assert seen[-1][0] == "/orders?added=1"
                    status, body, _ = await get("nothing that a rule knows")
                    assert (status, len(seen)) == (403, 2), "an error is refused where the author said so"
                    status, body, _ = await get("nothing that a rule knows", port + 1)
                    assert (status, body) == (200, "from the upstream\n"), "and passes where the author said so: it is no denial"
                    await until("all answered", lambda: made.point.pending == 0)
            finally:
                await asyncio.to_thread(envoy.__exit__, None, None, None)
        await runner.cleanup()

    asyncio.run(run())

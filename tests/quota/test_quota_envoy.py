from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from email.message import Message

from quota.descriptors import Descriptors
from quota.lessee import QuotaLessee
from quota.memory import MemoryStore
from quota.service import QuotaService
from tests import servers

LIMITS = """
domain: edge
descriptors:
  - key: user
    rate_limit: {unit: hour, requests_per_unit: 3}
"""
CONFIG = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: edge
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: /}}
                route: {{cluster: app}}
              rate_limits:
              - actions: [{{request_headers: {{descriptor_key: user, header_name: x-user}}}}]
          http_filters:
          - name: envoy.filters.http.ratelimit
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimit
              domain: edge
              failure_mode_deny: true
              timeout: 2s
              enable_x_ratelimit_headers: DRAFT_VERSION_03
              rate_limit_service:
                transport_api_version: V3
                grpc_service: {{envoy_grpc: {{cluster_name: quota}}}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {app}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: app
          route_config:
            virtual_hosts:
            - {{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, direct_response: {{status: 200}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: app
    type: STATIC
    load_assignment:
      cluster_name: app
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {app}}}}}}}}}]}}]
  - name: quota
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: quota
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {quota}}}}}}}}}]}}]
"""


def fetch(url: str, user: str) -> tuple[int, Message]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"x-user": user}), timeout=5) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as problem:
        return problem.code, problem.headers


def test_a_real_envoy_asks_the_service() -> None:
    async def main() -> None:
        lessee = QuotaLessee(MemoryStore(), holder="rls")
        service = QuotaService(lessee, Descriptors({"edge.yaml": LIMITS}))
        quota = await service.start("127.0.0.1:0")
        port = servers.free_port()
        with servers.envoy(CONFIG.format(port=port, app=servers.free_port(), quota=quota), port) as envoy:
            answers = [await asyncio.to_thread(fetch, envoy.url, "eve") for _ in range(5)]
            assert [status for status, _ in answers] == [200, 200, 200, 429, 429]
            assert answers[0][1]["x-ratelimit-limit"].startswith("3, 3;w=3600")
            assert answers[0][1]["x-ratelimit-remaining"] == "2"
            assert answers[3][1]["retry-after"] == "1200"
            assert answers[3][1]["ratelimit-policy"] == '"edge.user";q=3;w=3600'
            assert (await asyncio.to_thread(fetch, envoy.url, "bob"))[0] == 200
        await service.stop(0)
        await lessee.close()

    asyncio.run(main())

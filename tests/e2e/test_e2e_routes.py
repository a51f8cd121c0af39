"""HTTPRoute and GRPCRoute through a gateway process, as clients see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from e2e_world import tollhouse
from routes_world import Edge, gateway

from tests import servers

pytestmark = pytest.mark.e2e

ROUTES = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: web}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [shop.example]
  rules:
  - name: mirrored
    matches: [{path: {value: /mirrored}}]
    filters:
    - {type: RequestMirror, requestMirror: {backendRef: {name: v2, port: 80}}}
    - {type: RequestMirror, requestMirror: {backendRef: {name: v3, port: 80}}}
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-a, value: rule}]}}
    backendRefs: [{name: v1, port: 80}]
  - name: split
    matches: [{path: {value: /split}}]
    filters: [{type: URLRewrite, urlRewrite: {hostname: in.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /rule}}}]
    backendRefs:
    - {name: v1, port: 80, filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /backend}}}]}
    - {name: v2, port: 80}
    - {name: v3, port: 80, filters: [{type: RequestRedirect, requestRedirect: {hostname: three.example, statusCode: 307}}]}
    - {name: gone, port: 80}
    - {name: v3, port: 80, weight: 0}
  - name: zero
    matches: [{path: {value: /zero}}]
    backendRefs: [{name: v1, port: 80, weight: 0}]
  - name: again
    matches: [{path: {value: /again}}]
    retry: {codes: [500, 504], attempts: 3, backoff: 10ms}
    timeouts: {backendRequest: 500ms}
    backendRefs: [{name: v1, port: 80}]
  - name: late
    matches: [{path: {value: /late}}]
    timeouts: {request: 300ms}
    backendRefs: [{name: v1, port: 80}]
  - name: late-allowed
    matches: [{path: {value: /late/allowed}}]
    timeouts: {request: 0s, backendRequest: 0s}
    backendRefs: [{name: v1, port: 80}]
  - name: session
    matches: [{path: {value: /session}}]
    sessionPersistence: {sessionName: sid, absoluteTimeout: 1h}
    backendRefs: [{name: all, port: 80}, {name: v1, port: 80}]
  - name: session-header
    matches: [{path: {value: /session/header}}]
    sessionPersistence: {sessionName: x-session, type: Header}
    backendRefs: [{name: all, port: 80}]
  - name: limited
    matches: [{path: {value: /limited}}]
    filters: [{type: ExtensionRef, extensionRef: {group: tollhouse.dev, kind: QuotaPolicy, name: one}}]
    backendRefs: [{name: v1, port: 80}]
  - name: asked
    matches: [{path: {value: /asked/grpc}}]
    filters:
    - type: ExternalAuth
      externalAuth:
        {protocol: GRPC, backendRef: {name: g1, port: 80}, grpc: {allowedHeaders: [x-user]}, forwardBody: {maxSize: 100}}
    backendRefs: [{name: v1, port: 80}]
  - name: asked-http
    matches: [{path: {value: /asked/http}}]
    filters:
    - type: ExternalAuth
      externalAuth:
        {protocol: HTTP, backendRef: {name: v2, port: 80}, http: {path: /check, allowedHeaders: [x-user]}, forwardBody: {maxSize: 100}}
    backendRefs: [{name: v1, port: 80}]
  - name: asked-gone
    matches: [{path: {value: /asked/gone}}]
    filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: gone, port: 80}, grpc: {}}}]
    backendRefs: [{name: v1, port: 80}]
  - name: asked-nobody
    matches: [{path: {value: /asked/nobody}}]
    filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: empty, port: 80}, http: {}}}]
    backendRefs: [{name: v1, port: 80}]
  - name: cors
    matches: [{path: {value: /cors}, method: PUT}]
    filters:
    - type: CORS
      cors: {allowOrigins: ['https://*.shop.example'], allowMethods: [PUT], allowHeaders: ['*'], allowCredentials: true, maxAge: 600}
    backendRefs: [{name: v1, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: empty}
spec: {ports: [{port: 80}]}
---
apiVersion: tollhouse.dev/v1
kind: QuotaPolicy
metadata: {namespace: shop, name: one}
spec: {limits: [{name: hourly, tokens: 1, interval: 1h}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {namespace: shop, name: calls}
spec:
  parentRefs: [{namespace: edge, name: gw}]
  hostnames: [grpc.example]
  rules:
  - name: echo
    matches: [{method: {service: shop.v1.Orders, method: Echo}}]
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-a, value: rule}]}}
    - {type: RequestMirror, requestMirror: {backendRef: {name: g2, port: 80}}}
    backendRefs: [{name: g1, port: 80}]
  - matches: [{method: {service: shop.v1.Orders}}]
    backendRefs: [{name: g2, port: 80}]
  - matches: [{method: {service: shop.v1.Gone}}]
    backendRefs: [{name: gone, port: 80}]
  - matches: [{method: {method: Stream}}, {headers: [{name: version, value: two}]}]
    backendRefs: [{name: g2, port: 80}]
"""


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with gateway(ROUTES) as running:
        yield running


def test_copies_of_a_request_arrive_whole(edge: Edge) -> None:
    answer = edge.curl("/mirrored/1?x=y", "-d", "the body")
    assert answer.json["service"] == "v1"
    for name in ("v2", "v3"):
        servers.wait_for(f"the copy at {name}", lambda name=name: edge.services[name].seen)
        (copy,) = [seen for seen in edge.services[name].seen if seen["path"] == "/mirrored/1?x=y"]
        assert (copy["method"], copy["body"], copy["headers"]["x-a"]) == ("POST", "the body", "rule")
        assert copy["headers"]["host"] == f"shop.example:{edge.port}"
        servers.wait_for("the count", lambda name=name: f'cluster="shop/{name}:80",result="answered"' in edge.metrics())


def test_each_share_is_treated_as_its_backend_says(edge: Edge) -> None:
    seen = set()

    def all_seen() -> bool:
        answer = edge.curl("/split/a")
        if answer.status == 200:
            assert answer.json["headers"]["host"] == "in.example"
            seen.add(answer.json["path"])
        else:
            seen.add(str(answer.status))
            assert answer.status != 307 or answer.headers["location"] == f"http://three.example:{edge.port}/split/a"
        return len(seen) == 4

    servers.wait_for("all four shares", all_seen)
    assert seen == {"/backend/a", "/rule/a", "307", "500"}


def test_weights_that_are_all_zero(edge: Edge) -> None:
    assert edge.curl("/zero").status == 500


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("fail=500&times=3&id=a", 200),
        ("fail=500&times=4&id=b", 500),
        ("fail=502&times=1&id=c", 502),
    ],
)
def test_answers_that_are_tried_again(edge: Edge, query: str, status: int) -> None:
    answer = edge.curl(f"/again?{query}", "-d", "a body that is sent each time")
    assert answer.status == status
    assert answer.json["body"] == "a body that is sent each time"


def test_timeouts(edge: Edge) -> None:
    assert edge.curl("/again?delay=2").status == 504
    assert edge.curl("/late?delay=2").status == 504
    assert edge.curl("/late/allowed?delay=1").status == 200


def test_cors(edge: Edge) -> None:
    preflight = ["-X", "OPTIONS", "-H", "access-control-request-method: PUT", "-H", "access-control-request-headers: x-a"]
    answer = edge.curl("/cors/1", *preflight, "-H", "origin: https://www.shop.example")
    assert answer.status == 204
    said = {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}
    assert said == {
        "access-control-allow-origin": "https://www.shop.example",
        "access-control-allow-credentials": "true",
        "access-control-allow-methods": "PUT",
        "access-control-allow-headers": "x-a",
        "access-control-max-age": "600",
    }
    assert not [name for name in edge.curl("/cors/1", *preflight, "-H", "origin: https://evil.example").headers if "access" in name]
    answer = edge.curl("/cors/1", "-X", "PUT", "-H", "origin: https://www.shop.example")
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://www.shop.example")
    answer = edge.curl("/cors/1", "-X", "PUT", "-H", "origin: https://evil.example")
    assert (answer.status, "access-control-allow-origin" in answer.headers) == (200, False)
    assert not [seen for seen in edge.services["v1"].seen if seen["method"] == "OPTIONS"]


def test_a_client_stays_where_it_was(edge: Edge, tmp_path: Path) -> None:
    seen = set()
    for client in range(12):
        jar = str(tmp_path / f"jar-{client}")
        first = edge.curl("/session/1", "-c", jar)
        assert first.headers["set-cookie"].startswith("sid=")
        for _ in range(5):
            answer = edge.curl("/session/2", "-b", jar)
            assert answer.json["service"] == first.json["service"]
            assert "set-cookie" not in answer.headers
        seen.add(first.json["service"])
    assert len(seen) > 1
    assert "set-cookie" in edge.curl("/session/1", "-b", "sid=forged").headers


def test_a_session_by_header(edge: Edge) -> None:
    first = edge.curl("/session/header")
    token = first.headers["x-session"]
    for _ in range(6):
        assert edge.curl("/session/header", "-H", f"x-session: {token}").json["service"] == first.json["service"]


def test_a_quota_as_a_filter(edge: Edge) -> None:
    assert [edge.curl("/limited/1").status for _ in range(3)].count(429) >= 2


def test_an_authorization_service_is_asked_over_grpc(edge: Edge) -> None:
    answer = edge.curl("/asked/grpc/1?a=b", "-H", "x-user: ann", "-d", "hello")
    assert answer.status == 200
    assert answer.json["headers"]["x-checked"] == "ann by g1"
    assert answer.json["body"] == "hello"
    answer = edge.curl("/asked/grpc/1?a=b", "-H", "cookie: secret", "-d", "hello")
    assert answer.status == 401
    assert answer.body == "POST /asked/grpc/1?a=b [':authority', ':method', ':path', ':scheme'] hello"
    assert edge.curl("/asked/grpc/1", "-H", "x-user: ann", "-d", "x" * 101).status == 413


def test_an_authorization_service_is_asked_over_http(edge: Edge) -> None:
    answer = edge.curl("/asked/http/1?a=b", "-H", "x-user: ann", "-H", "cookie: secret", "-H", "authorization: Basic eA==", "-d", "hello")
    assert (answer.status, answer.json["service"], answer.json["body"]) == (200, "v1", "hello")
    assert answer.json["headers"]["x-seen-by"] == "v2"
    assert answer.json["headers"]["content-type"] == "application/x-www-form-urlencoded"
    (asked,) = [seen for seen in edge.services["v2"].seen if seen["path"] == "/check/asked/http/1?a=b"]
    assert (asked["method"], asked["body"]) == ("POST", "hello")
    assert asked["headers"] == {
        "host": f"shop.example:{edge.port}",
        "x-user": "ann",
        "authorization": "Basic eA==",
        "content-length": "5",
        "x-envoy-auth-partial-body": "false",
    }
    denied = edge.curl("/asked/http/2?fail=403&times=9&id=denied")
    assert (denied.status, denied.json["service"], denied.headers["x-seen-by"]) == (403, "v2", "v2")
    assert edge.curl("/asked/http/3?fail=502&times=9&id=broken").status == 503
    assert not [seen for seen in edge.services["v1"].seen if seen["path"].startswith(("/asked/http/2", "/asked/http/3"))]


@pytest.mark.parametrize(("path", "status"), [("/asked/gone", 500), ("/asked/nobody", 503)])
def test_without_its_authorization_service_nothing_passes(edge: Edge, path: str, status: int) -> None:
    assert edge.curl(path).status == status
    assert not [seen for seen in edge.services["v1"].seen if seen["path"] == path]


def test_grpc(edge: Edge) -> None:
    with edge.channel("grpc.example") as channel:

        def call(method: str, **metadata: str) -> bytes:
            found: bytes = channel.unary_unary(method)(b"hi", metadata=tuple(metadata.items()), timeout=20)
            return found

        assert call("/shop.v1.Orders/Echo") == b"g1 hi"
        assert call("/shop.v1.Orders/Other") == b"g2 hi"
        assert call("/any.Service/Any", version="two") == b"g2 hi"
        assert list(channel.stream_stream("/any.Service/Stream")(iter([b"a", b"b"]), timeout=20)) == [b"g2 a", b"g2 b"]
        for method, code in (
            ("/shop.v1.Orders/Fail", grpc.StatusCode.FAILED_PRECONDITION),
            ("/shop.v1.Gone/Any", grpc.StatusCode.UNAVAILABLE),
            ("/any.Service/Any", grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                call(method)
            assert raised.value.code() is code
        servers.wait_for("the copy", lambda: any(method == "/shop.v1.Orders/Echo" for method, _ in edge.calls["g2"].seen))
        (headers,) = [headers for method, headers in edge.calls["g1"].seen if method == "/shop.v1.Orders/Echo"]
        assert headers["x-a"] == "rule"


def test_named_rules_are_in_the_log_and_explained(edge: Edge) -> None:
    edge.curl("/again/named")
    servers.wait_for("the log", lambda: "/again/named" in edge.log.read_text())
    entry = next(json.loads(line) for line in edge.log.read_text().splitlines() if "/again/named" in line)
    assert entry["route_name"] == "shop/web#again"
    told = tollhouse(
        "explain", "--gateway", "edge/gw", "--config", str(edge.config), "GET", f"http://shop.example:{edge.port}/mirrored/1"
    ).stdout
    assert "shop/web#mirrored" in told
    assert told.count("a copy goes to") == 2


@pytest.mark.parametrize(("headers", "verdict", "code"), [(("-H", "x-user: ann"), "allow", 0), ((), "deny", 1)])
def test_explain_asks_the_authorization_service(edge: Edge, headers: tuple[str, ...], verdict: str, code: int) -> None:
    url = f"http://shop.example:{edge.port}/asked/grpc/1"
    told = tollhouse("explain", "--gateway", "edge/gw", "--config", str(edge.config), *headers, "GET", url, check=False)
    assert told.returncode == code, told.stderr
    assert f"shop/web externalAuth, shop/g1:80: {verdict}" in told.stdout

"""Whatever is wrong with those who decide, and with what they decide by: nobody gets through, the status, flag and metric say why, and
requests of other policies notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import yaml
from authz_world import Said
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from routes_world import Edge, gateway

from tests import servers

pytestmark = pytest.mark.e2e
REGO = """package shop.authz

path := input.attributes.request.http.path

default fine := false

fine if not startswith(path, "/fine/no")

login := {"allowed": false, "http_status": 401, "headers": {"www-authenticate": "Bearer"}} if path

endless if {
	some i in numbers.range(1, 1000000)
	some j in numbers.range(1, 1000000)
	i + j + count(path) < 0
}

memory := bits.lsh(count(path), 100000000000)

explodes := count({[i, j] |
	some i in numbers.range(1, 1000000)
	some j in numbers.range(1, 1000000)
	i + j + count(path) > 0
})

conflict := 1 if path
conflict := 2 if path

undefined if path == "nowhere"

word := path

unwritable := {"allowed": true, "headers": {"x-a": concat("", ["a", "\\r\\nx-b: ", path])}}

host := {"allowed": true, "headers": {"host": path}}
"""


class Servers(grpc.GenericRpcHandler):
    """An ext_authz server that does what its port's name says."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.asked = 0

    def service(self, details: Any) -> Any:
        if self.how == "unimplemented":
            return None
        serializer: Any = (lambda data: data) if self.how == "noise" else CheckResponse.SerializeToString
        return grpc.unary_unary_rpc_method_handler(
            self._check, request_deserializer=CheckRequest.FromString, response_serializer=serializer
        )

    def _check(self, request: CheckRequest, context: Any) -> Any:
        self.asked += 1
        if self.how == "noise":
            return b"\xff\xfe\xfd"
        if self.how == "slow" and request.attributes.HasField("source"):
            time.sleep(2)
        answer = CheckResponse()
        if self.how == "other":
            answer.dynamic_metadata.update({"tollhouse.dev": {"revision": "sha256:another"}})
        if self.how == "both":
            answer.denied_response.SetInParent()
        if self.how == "unwritable":
            answer.ok_response.headers.add().header.key = "x\r\ny"
        return answer


def listening(answer: bytes) -> tuple[int, Any]:
    """A port at which connections are accepted and get `answer`, and nothing after it."""
    server = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            held.append(connection)
            with contextlib.suppress(OSError):
                connection.sendall(answer)

    threading.Thread(target=accept, daemon=True).start()

    def close() -> None:
        server.close()
        for connection in held:
            connection.close()

    return server.getsockname()[1], close


SERVERS = ("slow", "noise", "unimplemented", "both", "unwritable", "other")
HALF_OPEN, GARBAGE = b"", b"\x00\x00\x04\x00\x00\x00\x00\x00\x00nonsense, and more of it than anybody could take for a frame of HTTP/2"

CASES: list[tuple[str, dict[str, Any], int, str, str, str]] = [
    # name, policy, status, flag, to, cause
    ("fine", {"decision": "shop.authz.fine", "place": "Local"}, 200, "-", "", ""),
    ("login", {"decision": "shop.authz.login", "place": "Local"}, 401, "UAEX", "", ""),
    ("endless", {"decision": "shop.authz.endless", "place": "Local"}, 503, "UAEE", "local", "timeout"),
    ("memory", {"decision": "shop.authz.memory", "place": "Local", "timeout": "10s"}, 503, "UAEE", "local", "crashed"),
    ("explodes", {"decision": "shop.authz.explodes", "place": "Local", "timeout": "3s"}, 503, "UAEE", "local", "timeout|crashed"),
    ("conflict", {"decision": "shop.authz.conflict", "place": "Local"}, 503, "UAEE", "local", "conflict"),
    ("undefined", {"decision": "shop.authz.undefined", "place": "Local"}, 503, "UAEE", "local", "undefined"),
    ("word", {"decision": "shop.authz.word", "place": "Local"}, 503, "UAEE", "local", "answer"),
    ("crlf", {"decision": "shop.authz.unwritable", "place": "Local"}, 503, "UAEE", "local", "answer"),
    ("host", {"decision": "shop.authz.host", "place": "Local"}, 503, "UAEE", "local", "answer"),
    ("missing", {"decision": "shop.authz.missing", "place": "Local"}, 503, "UAEE", "local", "unavailable|eval|undefined"),
    ("revision", {"decision": "shop.authz.fine"}, 503, "UAEE", "central", "unavailable|timeout"),
    ("absent", {"provider": "absent"}, 503, "UAEE", "provider", "unavailable"),
    ("half-open", {"provider": "half-open"}, 503, "UAEE", "provider", "timeout|unavailable"),
    ("garbage", {"provider": "garbage"}, 503, "UAEE", "provider", "unavailable|timeout"),
    ("slow", {"provider": "slow"}, 503, "UAEE", "provider", "timeout"),
    ("noise", {"provider": "noise"}, 503, "UAEE", "provider", "provider|internal"),
    ("unimplemented", {"provider": "unimplemented"}, 503, "UAEE", "provider", "provider"),
    ("both", {"provider": "both"}, 503, "UAEE", "provider", "provider"),
    ("unwritable", {"provider": "unwritable"}, 503, "UAEE", "provider", "provider"),
    ("open", {"provider": "absent", "failureMode": "Allow"}, 200, "-", "provider", "unavailable"),
    ("open-denied", {"decision": "shop.authz.login", "place": "Local", "failureMode": "Allow"}, 401, "UAEX", "", ""),
]


class World:
    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self.number = 0

    def ask(self, name: str) -> Said:
        self.number += 1
        return Said(self.edge.port, "1", f"/{name}/{self.number}", [])

    def flag(self, path: str) -> str:
        """The response flag of the one request to `path`."""
        found: list[dict[str, Any]] = []

        def logged() -> bool:
            lines = self.edge.log.read_text().splitlines()
            found[:] = [entry for line in lines if (entry := json.loads(line))["path"] == path]
            return bool(found)

        servers.wait_for("the access log", logged)
        (entry,) = found
        return str(entry["response_flags"])

    def errors(self) -> Counter[tuple[str, str]]:
        pattern = r'tollhouse_decision_errors_total\{to="([a-z]+)",cause="([a-z]+)"\} (\S+)'
        return Counter({(to, cause): int(float(value)) for to, cause, value in re.findall(pattern, self.edge.metrics())})


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        ports = {"absent": servers.free_port()}
        for name, answer in (("half-open", HALF_OPEN), ("garbage", GARBAGE)):
            ports[name], close = listening(answer)
            stack.callback(close)
        for name in SERVERS:
            server = grpc.server(ThreadPoolExecutor(8))
            server.add_generic_rpc_handlers((Servers(name),))
            ports[name] = server.add_insecure_port("127.0.0.1:0")
            server.start()
            stack.callback(server.stop, None)
        resources = []
        for name, said, *_ in CASES:
            spec = {**said, "provider": f"127.0.0.1:{ports[said['provider']]}"} if "provider" in said else said
            target = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": name}
            resources += [
                {
                    "apiVersion": "gateway.networking.k8s.io/v1",
                    "kind": "HTTPRoute",
                    "metadata": {"namespace": "shop", "name": name},
                    "spec": {
                        "parentRefs": [{"namespace": "edge", "name": "gw"}],
                        "hostnames": ["shop.example"],
                        "rules": [{"matches": [{"path": {"value": f"/{name}"}}], "backendRefs": [{"name": "v1", "port": 80}]}],
                    },
                },
                {
                    "apiVersion": "tollhouse.dev/v1",
                    "kind": "AccessPolicy",
                    "metadata": {"namespace": "shop", "name": name},
                    "spec": {"targetRefs": [target], "timeout": "700ms", **spec},
                },
            ]
        with gateway(yaml.safe_dump_all(resources), "--pdp", f"127.0.0.1:{ports['other']}", rego=REGO) as edge:
            made = World(edge)
            servers.wait_for("the policy", lambda: made.ask("fine").status == 200)
            yield made


@pytest.mark.parametrize(
    ("name", "status", "flag", "to", "cause"), [(case[0], *case[2:]) for case in CASES], ids=[case[0] for case in CASES]
)
def test_every_trouble_has_its_status_flag_and_metric(world: World, name: str, status: int, flag: str, to: str, cause: str) -> None:
    before = world.errors()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(lambda: [world.edge.curl(f"/fine/beside-{name}-{at}").status for at in range(5)])
        said = Said(world.edge.port, "1", f"/{name}/trouble", [])
        assert beside.result() == [200] * 5, "others notice nothing"
    assert said.status == status, (name, said.status, said.body)
    assert (said.upstream is not None) == (status == 200)
    assert world.flag(f"/{name}/trouble") == flag
    new = {place: count for place, count in (world.errors() - before).items() if place[0] == to}
    assert sum(new.values()) == (1 if to else 0), new
    assert {place[1] for place in new} <= set(cause.split("|")), new
    verdict = {200: "error" if to else "allow", 401: "deny", 503: "error"}[status]
    assert f'tollhouse_decisions_total{{policy="shop/{name}",verdict="{verdict}"' in world.edge.metrics()


def test_more_than_a_thousand_questions_at_once_are_bounded_and_hurt_nobody(world: World) -> None:
    """Nobody answers any of them: some are refused at once, all others in time, and what another policy allows passes meanwhile."""
    before = world.errors()
    many = 1100

    async def one(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.edge.port)
        writer.write(f"GET /half-open/{number} HTTP/1.1\r\nhost: shop.example\r\nconnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return int(answer.split()[1])

    async def run() -> tuple[list[int], int]:
        waiting = [asyncio.ensure_future(one(number)) for number in range(many)]
        beside = await asyncio.to_thread(lambda: world.edge.curl("/fine/while-many-wait").status)
        return await asyncio.gather(*waiting), beside

    statuses, beside = asyncio.run(run())
    assert Counter(statuses) == {503: many}
    assert beside == 200
    new = world.errors() - before
    assert sum(count for (to, _), count in new.items() if to == "provider") == many
    assert new["provider", "overloaded"] + new["provider", "unavailable"] + new["provider", "timeout"] == many
    assert world.ask("fine").status == 200
    assert "tollhouse_decisions_waiting 0" in world.edge.metrics()

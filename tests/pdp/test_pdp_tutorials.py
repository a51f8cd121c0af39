"""Policies as the tutorials of the OPA-Envoy plugin and of its users have them, written anew: they run here unchanged.

Each goes the whole way: it is checked against the input document's type, published, asked about requests, and its answers are what Envoy
would be told.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.protobuf.json_format import MessageToDict
from kept_world import a_worker, asking, policy

from mesh.policy import Revision
from mesh.questions import Asking
from pdp.answer import decision_of
from pdp.authoring import inspect
from pdp.check import check_response
from pdp.input import check_request, document, document_of_check
from pdp.publish import publish
from pdp.report import input_schema

SECRET = b"secret"


def token(claims: Mapping[str, Any], secret: bytes = SECRET, algorithm: str = "HS256") -> str:
    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    signed = part({"alg": algorithm, "typ": "JWT"}) + b"." + part(claims)
    return (signed + b"." + base64.urlsafe_b64encode(hmac.digest(secret, signed, hashlib.sha256)).rstrip(b"=")).decode()


def bearer(role: str, secret: bytes = SECRET, **claims: Any) -> tuple[bytes, bytes]:
    now = int(time.time())
    sub = base64.urlsafe_b64encode(b"alice").decode().rstrip("=")
    return b"authorization", f"Bearer {token({'role': role, 'sub': sub, 'nbf': now - 60, 'exp': now + 86_400, **claims}, secret)}".encode()


def asked(method: str, path: str, *headers: tuple[bytes, bytes], body: object = None, **fields: Any) -> Asking:
    raw, _, query = path.partition("?")
    more = [(b"content-type", b"application/json")] if body is not None else []
    text = json.dumps(body).encode() if body is not None else None
    fields = {"path": raw.encode(), "query": query.encode() if query else None, **fields}
    return asking(method=method.encode(), headers=[*headers, *more], body=text, **fields)


class Tutorial(NamedTuple):
    text: str
    decision: str
    answers: tuple[tuple[Asking, dict[str, Any]], ...]
    """Requests, and the plugin's answer to each as JSON of `CheckResponse`, without its `status`."""
    data: object = {}


OK: dict[str, Any] = {"okResponse": {}}
DENIED: dict[str, Any] = {"deniedResponse": {}}

MEMBERS = """package envoy.authz

import input.attributes.request.http as req

default allow := false

allow if {
	valid_token
	may
}

valid_token if {
	token.valid
	now := time.now_ns() / 1000000000
	token.claims.nbf <= now
	now < token.claims.exp
}

may if {
	req.method == "GET"
	token.claims.role in {"reader", "owner"}
	glob.match("/members/*", ["/"], req.path)
}

may if {
	req.method == "POST"
	token.claims.role == "owner"
	glob.match("/members", ["/"], req.path)
	lower(input.parsed_body.name) != base64url.decode(token.claims.sub)
}

token := {"valid": valid, "claims": claims} if {
	[_, encoded] := split(req.headers.authorization, " ")
	[valid, _, claims] := io.jwt.decode_verify(encoded, {"secret": "secret"})
}
"""

DECODED = """package envoy.authz

default allow := false

allow if {
	input.parsed_path[0] == "reports"
	claims.department == "finance"
	"read" in claims.scopes
}

claims := payload if {
	header := input.attributes.request.http.headers.authorization
	startswith(header, "Bearer ")
	[_, payload, _] := io.jwt.decode(substring(header, count("Bearer "), -1))
}
"""

OBJECT = """package envoy.authz

default allow := {
	"allowed": false,
	"headers": {"x-checked": "no"},
	"body": "Who goes there?",
	"http_status": 401,
}

allow := answer if {
	input.attributes.request.http.method == "GET"
	answer := {
		"allowed": true,
		"headers": {"x-checked": "yes", "x-checked-by": "the gate"},
		"response_headers_to_add": {"x-served-to": "a friend"},
		"request_headers_to_remove": ["x-internal", "x-debug"],
		"dynamic_metadata": {"tier": {"name": "gold", "level": 3}},
	}
}
"""

PIECES = """package envoy.authz

default permitted := false

permitted if input.parsed_query.key[0] == "open"

headers["x-permitted"] := "yes" if permitted

headers["location"] := "https://login.example/" if not permitted

status_code := 200 if {
	permitted
} else := 302

body := "Log in first" if not permitted

result["allowed"] := permitted

result["headers"] := headers

result["body"] := body

result["http_status"] := status_code

result["query_parameters_to_set"] := {"checked": "1"} if permitted

result["query_parameters_to_remove"] := ["key"] if permitted
"""

BASIC = """package istio.authz

import input.attributes.request.http as http_request

default allow := false

allow if {
	some role in data.user_roles[user]
	some permission in data.role_permissions[role]
	permission.method == http_request.method
	permission.path == http_request.path
}

user := name if {
	[_, encoded] := split(http_request.headers.authorization, " ")
	[name, _] := split(base64.decode(encoded), ":")
}
"""

SPIFFE = """package envoy.authz

default allow := false

allow if {
	input.attributes.request.http.path in {"/good/db", "/good/cache"}
	client == "spiffe://domain.test/backend"
}

client := id if {
	[_, _, uri] := split(input.attributes.request.http.headers["x-forwarded-client-cert"], ";")
	[_, id] := split(uri, "=")
}
"""

NETWORK = """package envoy.authz

allow if {
	input.attributes.destination.address.socketAddress.portValue == 8443
	net.cidr_contains("10.0.0.0/8", input.attributes.source.address.socketAddress.address)
	not blocked
}

default allow := false

blocked if {
	some prefix in ["/admin", "/debug"]
	startswith(input.attributes.request.http.path, prefix)
}
"""

RPC = """package envoy.authz

import rego.v1

default allow := false

allow if {
	input.parsed_path == ["shop.Orders", "Place"]
	input.attributes.request.http.headers["x-tenant"] in {"a", "b"}
}
"""

TREE = """package envoy.authz

import future.keywords

# path segments in rules, an employee and those whom they manage
allow := {"allowed": count(reasons) > 0, "headers": [{"x-reason": reason} | some reason in sort(reasons)]}

reasons contains "own" if {
	["salary", employee] = input.parsed_path
	employee == input.attributes.request.http.headers["x-user"]
}

reasons contains "manager" if {
	["salary", employee] = input.parsed_path
	input.attributes.request.http.headers["x-user"] in graph.reachable(data.managers, [employee])
}
"""


def option(key: str, value: str, **more: Any) -> dict[str, Any]:
    return {"header": {"key": key, "value": value}, **more}


def sets(key: str, value: str) -> dict[str, Any]:
    return option(key, value, appendAction="OVERWRITE_IF_EXISTS_OR_ADD")


BASIC_ALICE = (b"authorization", b"Basic " + base64.b64encode(b"alice:password"))
BASIC_BOB = (b"authorization", b"Basic " + base64.b64encode(b"bob:password"))
CERTIFICATE = (b"x-forwarded-client-cert", b'Hash=0;Subject="CN=x";URI=spiffe://domain.test/backend')

TUTORIALS = {
    "roles in a verified token, and the body": Tutorial(
        MEMBERS,
        "envoy.authz.allow",
        (
            (asked("GET", "/members/1", bearer("reader")), OK),
            (asked("GET", "/members", bearer("reader")), DENIED),
            (asked("GET", "/members/1/2", bearer("reader")), DENIED),
            (asked("GET", "/members/1"), DENIED),
            (asked("GET", "/members/1", bearer("reader", secret=b"other")), DENIED),
            (asked("GET", "/members/1", bearer("reader", exp=1)), DENIED),
            (asked("GET", "/members/1", bearer("guest")), DENIED),
            (asked("GET", "/members/1", (b"authorization", b"Bearer")), DENIED),
            (asked("POST", "/members", bearer("owner"), body={"name": "Bob"}), OK),
            (asked("POST", "/members", bearer("owner"), body={"name": "Alice"}), DENIED),
            (asked("POST", "/members", bearer("reader"), body={"name": "Bob"}), DENIED),
            (asked("POST", "/members", bearer("owner")), DENIED),
        ),
    ),
    "claims of a token that somebody else has verified": Tutorial(
        DECODED,
        "envoy.authz.allow",
        (
            (asked("GET", "/reports/1", bearer("x", department="finance", scopes=["read"])), OK),
            (asked("GET", "/reports/1", bearer("x", department="finance", scopes=["write"])), DENIED),
            (asked("GET", "/other", bearer("x", department="finance", scopes=["read"])), DENIED),
            (asked("GET", "/reports/1", (b"authorization", b"Bearer not.a.token")), DENIED),
        ),
    ),
    "an object as the answer": Tutorial(
        OBJECT,
        "envoy.authz.allow",
        (
            (
                asked("GET", "/"),
                {
                    "okResponse": {
                        "headers": [sets("x-checked", "yes"), sets("x-checked-by", "the gate")],
                        "headersToRemove": ["x-internal", "x-debug"],
                        "responseHeadersToAdd": [option("x-served-to", "a friend")],
                    },
                    "dynamicMetadata": {"tier": {"name": "gold", "level": 3.0}},
                },
            ),
            (
                asked("POST", "/"),
                {"deniedResponse": {"status": {"code": "Unauthorized"}, "headers": [option("x-checked", "no")], "body": "Who goes there?"}},
            ),
        ),
    ),
    "an answer that is put together from rules": Tutorial(
        PIECES,
        "envoy.authz.result",
        (
            (
                asked("GET", "/a?key=open&b=1"),
                {
                    "okResponse": {
                        "headers": [sets("x-permitted", "yes")],
                        "queryParametersToSet": [{"key": "checked", "value": "1"}],
                        "queryParametersToRemove": ["key"],
                    }
                },
            ),
            (
                asked("GET", "/a"),
                {
                    "deniedResponse": {
                        "status": {"code": "Found"},
                        "headers": [option("location", "https://login.example/")],
                        "body": "Log in first",
                    }
                },
            ),
        ),
    ),
    "users by name, roles and permissions in data": Tutorial(
        BASIC,
        "istio.authz.allow",
        (
            (asked("GET", "/productpage", BASIC_ALICE), OK),
            (asked("GET", "/api/v1/products", BASIC_ALICE), DENIED),
            (asked("GET", "/api/v1/products", BASIC_BOB), OK),
            (asked("POST", "/productpage", BASIC_BOB), DENIED),
            (asked("GET", "/productpage", (b"authorization", b"Basic !!")), DENIED),
        ),
        {
            "user_roles": {"alice": ["guest"], "bob": ["guest", "admin"]},
            "role_permissions": {
                "guest": [{"method": "GET", "path": "/productpage"}],
                "admin": [{"method": "GET", "path": "/api/v1/products"}],
            },
        },
    ),
    "a caller by the header of its certificate": Tutorial(
        SPIFFE,
        "envoy.authz.allow",
        (
            (asked("GET", "/good/db", CERTIFICATE), OK),
            (asked("GET", "/bad/db", CERTIFICATE), DENIED),
            (asked("GET", "/good/db", (b"x-forwarded-client-cert", b"URI=spiffe://domain.test/backend")), DENIED),
        ),
    ),
    "addresses": Tutorial(
        NETWORK,
        "envoy.authz.allow",
        ((asked("GET", "/a"), OK), (asked("GET", "/admin/a"), DENIED)),
    ),
    "methods of gRPC": Tutorial(
        RPC,
        "envoy.authz.allow",
        (
            (asked("POST", "/shop.Orders/Place", (b"x-tenant", b"a")), OK),
            (asked("POST", "/shop.Orders/Place", (b"x-tenant", b"c")), DENIED),
            (asked("POST", "/shop.Orders/List", (b"x-tenant", b"a")), DENIED),
        ),
    ),
    "a set of reasons, and a graph in data": Tutorial(
        TREE,
        "envoy.authz.allow",
        (
            (
                asked("GET", "/salary/ann", (b"x-user", b"ann")),
                {"okResponse": {"headers": [sets("x-reason", why) for why in ("manager", "own")]}},
            ),
            (asked("GET", "/salary/ann", (b"x-user", b"boss")), {"okResponse": {"headers": [sets("x-reason", "manager")]}}),
            (asked("GET", "/salary/boss", (b"x-user", b"ann")), DENIED),
        ),
        {"managers": {"ann": ["lead"], "lead": ["boss"], "boss": []}},
    ),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[CheckResponse]]:
    async def run() -> dict[str, list[CheckResponse]]:
        made = {}
        async with a_worker() as worker:
            for name, each in TUTORIALS.items():
                modules, data = {"policy.rego": each.text}, json.dumps(each.data).encode()
                await inspect(worker, modules, data, {"": input_schema()})
                revision = await publish(worker, modules, data, [each.decision])
                await worker.load(revision)
                made[name] = [_answer(revision, each.decision, one) for one in await _evaluate(worker, revision, each)]
        return made

    return asyncio.run(run())


async def _evaluate(worker: Any, revision: Revision, tutorial: Tutorial) -> list[Any]:
    shown = policy(body_limit=1000)
    mine = [document(one, shown) for one, _ in tutorial.answers]
    over_grpc = [document_of_check(check_request(one, shown)) for one, _ in tutorial.answers]
    first: list[Any] = await worker.evaluate(revision, tutorial.decision, mine)
    assert first == await worker.evaluate(revision, tutorial.decision, over_grpc), "as a gateway asks and as an Envoy does"
    return first


def _answer(revision: Revision, decision: str, evaluation: Any) -> CheckResponse:
    return check_response(decision_of(evaluation, decision, revision.digest))


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_s_policy_answers_as_the_plugin_does(name: str, answers: dict[str, list[CheckResponse]]) -> None:
    for (request, expected), answer in zip(TUTORIALS[name].answers, answers[name], strict=True):
        told = MessageToDict(answer)
        told.pop("status", None)
        told.get("dynamicMetadata", {}).pop("tollhouse.dev", None)
        if not told.get("dynamicMetadata", True):
            del told["dynamicMetadata"]
        assert told == expected, (request.head.method, request.head.target)
        assert answer.status.code == (0 if "okResponse" in expected else 16 if answer.denied_response.status.code == 401 else 7)


def test_what_the_tutorials_read_of_a_request() -> None:
    async def run() -> dict[str, tuple[Any, ...]]:
        found = {}
        async with a_worker() as worker:
            for name, each in TUTORIALS.items():
                revision = await publish(worker, {"policy.rego": each.text}, json.dumps(each.data).encode(), [each.decision])
                reads = revision.entry_points[each.decision].reads
                found[name] = (*sorted(".".join(map(str, path)) for path in reads.values), *reads.volatile, *reads.widened)
        return found

    http = "attributes.request.http"
    assert asyncio.run(run()) == {
        "roles in a verified token, and the body": (
            f"{http}.headers.authorization",
            f"{http}.method",
            f"{http}.path",
            "parsed_body.name",
            "io.jwt.decode_verify",
            "time.now_ns",
        ),
        "claims of a token that somebody else has verified": (f"{http}.headers.authorization", "parsed_path.0"),
        "an object as the answer": (f"{http}.method",),
        "an answer that is put together from rules": ("parsed_query.key.0",),
        "users by name, roles and permissions in data": (f"{http}.headers.authorization", f"{http}.method", f"{http}.path"),
        "a caller by the header of its certificate": (f"{http}.headers.x-forwarded-client-cert", f"{http}.path"),
        "addresses": (
            "attributes.destination.address.socketAddress.portValue",
            f"{http}.path",
            "attributes.source.address.socketAddress.address",
        ),
        "methods of gRPC": (f"{http}.headers.x-tenant", "parsed_path.0", "parsed_path.1"),
        "a set of reasons, and a graph in data": (f"{http}.headers.x-user", "parsed_path.0", "parsed_path.1"),
    }

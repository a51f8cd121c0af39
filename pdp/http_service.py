"""The decision point over plain HTTP: for Envoy's `http_service`, nginx's `auth_request`, and Traefik's and Caddy's forward auth.

The path says how the request in question is described, since each proxy has a way of its own, and believing two of them at once would let
a client speak for its proxy:

* `/envoy` + PATH -- the request itself, with its method, its path behind the prefix, its headers and body (Envoy's `path_prefix: /envoy`)
* `/forwarded` -- `x-forwarded-method`, `-uri`, `-host`, `-proto` and `-for` (Traefik, Caddy)
* `/original` -- `x-original-method` and `x-original-uri`, or `x-original-url` with scheme and host (nginx, ingress-nginx)

In front of each, `/for/DECISION` names the decision to make. What is described not at all or twice is an error.

An allow is 200 with the headers that the policy sets, for the proxy to copy; a denial its status, headers and body, and never a status of
success; an error is 503. `request_headers_to_remove` is for Envoy alone (`x-envoy-auth-headers-to-remove`), and nobody can be told of
changes of the query: an allow that asks for what its proxy can't do is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest

from identity.files import IdentitySource
from identity.svid import Identity
from mesh.questions import Decision, Verdict
from pdp.body import PARTIAL
from pdp.point import DecisionPoint

FORMS: Final = ("envoy", "forwarded", "original")
TO_REMOVE: Final = "x-envoy-auth-headers-to-remove"
"""Header of an answer by which Envoy is told what to take off the request."""
CAUSE: Final = "x-tollhouse-cause"
"""Header of an answer that is an error: what kind it is (`Decision.cause`)."""
MOST_BODY: Final = 1 << 20
_MOST_HEAD: Final = 64 * 1024
_PATIENCE: Final = 5.0
"""Seconds for a check, and for its body to come."""
_EXPECTED: Final = "x-envoy-expected-rq-timeout-ms"
_PLACE: Final = re.compile(r"(?:/for/(?P<decision>[A-Za-z0-9_.\-]{1,512}))?/(?P<form>envoy|forwarded|original)(?P<rest>[/?].*)?")
_URL: Final = re.compile(r"([a-z]+)://([^/?#]+)(.*)")
_OF_THE_CALL: Final = frozenset((_EXPECTED, "x-envoy-internal", "connection", "keep-alive", "te", "upgrade", "transfer-encoding"))
"""Headers that are about the check, not about the request in question."""


class Unclear(ValueError):
    """A call that does not say which request it is about."""


class PolicyHttp:
    """Answers checks over HTTP. Owned by one event loop; started and stopped by the wiring."""

    def __init__(self, point: DecisionPoint, *, callers: Callable[[], frozenset[str]] | None = None) -> None:
        """`callers`, under mTLS, gives the SPIFFE IDs that may ask; None lets everybody whose certificate is good."""
        self._point = point
        self._callers = callers
        self._runner: web.ServerRunner | None = None
        self._site: web.TCPSite | None = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewals: Callable[[], None] | None = None

    async def start(self, host: str, port: int, identity: IdentitySource | None = None) -> int:
        """Serves at `host` and `port` (0: any) and returns the port; under mTLS with an `identity`, whose renewals it follows. Raises
        OSError when it can't."""
        server = web.Server(
            self._answer, access_log=None, max_line_size=_MOST_HEAD, max_field_size=_MOST_HEAD, max_headers=256, auto_decompress=False
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.5)
        await self._runner.setup()
        await self._listen(host, port, identity.current if identity is not None else None)
        bound = int(self._runner.addresses[0][1])
        if identity is not None:
            self._renewals = identity.on_change(lambda new: self._later(host, bound, new))
        return bound

    async def stop(self) -> None:
        """Ends it."""
        if self._renewals is not None:
            self._renewals()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _listen(self, host: str, port: int, identity: Identity | None) -> None:
        assert self._runner is not None
        context = server_context(identity) if identity is not None else None
        site = web.TCPSite(self._runner, host, port, ssl_context=context, reuse_port=True)
        await site.start()
        # The old one takes no more connections once the new one does.
        self._site, old = site, self._site
        if old is not None:
            await old.stop()

    def _later(self, host: str, port: int, identity: Identity) -> None:
        async def renew() -> None:
            async with self._turn:
                if self._runner is not None:
                    await self._listen(host, port, identity)

        task = asyncio.get_running_loop().create_task(renew())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path in {"/healthz", "/readyz"}:
            return _plain(200 if self._point.ready else 503, "ready" if self._point.ready else "no policy revision is active yet")
        if self._callers is not None and not self._callers() & identities(request):
            self._point.refused("caller", "")
            return _plain(403, "the caller may not ask here")
        place = _PLACE.fullmatch(request.raw_path)
        if place is None:
            return _plain(404, "ask at /envoy, /forwarded or /original; docs/policy.md says which")
        form = place["form"]
        try:
            async with asyncio.timeout(_PATIENCE):
                body = await body_of(request) if form == "envoy" else b""
            check = check_of(form, request, place["rest"] or "", body)
        except Unclear as problem:
            return answer_of(self._point.refused("input", str(problem)), form)
        except TimeoutError:
            return answer_of(self._point.refused("input", "the body did not come in time"), form)
        decision = await self._point.decide(check, decision=place["decision"] or "", seconds=_seconds(request))
        return answer_of(decision, form)


def identities(request: web.BaseRequest) -> frozenset[str]:
    """The URIs in the caller's certificate."""
    transport = request.transport
    found = transport.get_extra_info("peercert") if transport is not None else None
    return frozenset(value for kind, value in (found or {}).get("subjectAltName", ()) if kind == "URI")


async def body_of(request: web.BaseRequest) -> bytes:
    """The call's body. Raises `Unclear` when it is too long."""
    gathered = bytearray()
    async for piece in request.content.iter_any():
        gathered += piece
        if len(gathered) > MOST_BODY:
            raise Unclear(f"the body is longer than {MOST_BODY} bytes")
    return bytes(gathered)


def check_of(form: str, request: web.BaseRequest, rest: str, body: bytes) -> CheckRequest:
    """The check that a call makes; `rest` is what is behind the prefix in its path. Raises `Unclear`."""
    said: dict[str, list[str]] = {}
    for raw_name, raw_value in request.raw_headers:
        said.setdefault(_text(raw_name).lower(), []).append(_text(raw_value))
    check = CheckRequest()
    http = check.attributes.request.http
    if form == "envoy":
        http.method, http.host = request.method, _one(said, "host")
        rest = _text(rest.encode("utf-8", "surrogateescape"))
        http.path = rest if rest.startswith("/") else "/" + rest
        http.scheme = _maybe(said, "x-forwarded-proto") or "http"
    elif form == "forwarded":
        http.method, http.path, http.host = (_one(said, f"x-forwarded-{name}") for name in ("method", "uri", "host"))
        http.scheme = _maybe(said, "x-forwarded-proto") or "http"
    else:
        http.method = _one(said, "x-original-method")
        http.scheme, http.host, http.path = _original(said)
    if not http.path.startswith("/"):
        raise Unclear(f"{http.path[:100]!r} is not a path")
    if http.scheme not in {"http", "https", "ws", "wss"}:
        raise Unclear(f"{http.scheme[:20]!r} is not a scheme")
    headers = {name: ("; " if name == "cookie" else ",").join(values) for name, values in said.items() if name not in _OF_THE_CALL}
    headers.pop("host", None)
    if form != "envoy":
        headers.pop("content-length", None)  # of the check, which has no body
    headers |= {":method": http.method, ":path": http.path, ":authority": http.host, ":scheme": http.scheme}
    http.headers.update(headers)
    http.id = headers.get("x-request-id", "")
    if body:
        http.size = len(body)
        try:
            http.body = body.decode()
        except UnicodeDecodeError:
            http.raw_body = body
        if headers.get(PARTIAL) != "true":
            http.headers["content-length"] = str(len(body))
    http_source(check, said)
    return check


def http_source(check: CheckRequest, said: dict[str, list[str]]) -> None:
    """Where the request came from, as the proxy says last in `x-forwarded-for`."""
    last = ",".join(said.get("x-forwarded-for", ())).rpartition(",")[2].strip()
    with contextlib.suppress(ValueError):
        check.attributes.source.address.socket_address.address = str(ipaddress.ip_address(last))


def _original(said: dict[str, list[str]]) -> tuple[str, str, str]:
    """Scheme, host and path of the request in nginx's words."""
    if "x-original-url" not in said:
        return _maybe(said, "x-forwarded-proto") or "http", _one(said, "host"), _one(said, "x-original-uri")
    if "x-original-uri" in said:
        raise Unclear("the call has both x-original-url and x-original-uri: say which request it is about once")
    url = _one(said, "x-original-url")
    parts = _URL.fullmatch(url)
    if parts is None:
        raise Unclear(f"{url[:100]!r} is not a URL")
    path = parts[3]
    return parts[1], parts[2], path if path.startswith("/") else "/" + path


def _one(said: dict[str, list[str]], name: str) -> str:
    values = said.get(name, [])
    if len(values) != 1 or not values[0]:
        raise Unclear(f"the call has {len(values)} headers {name}, not one: it does not say which request it is about")
    return values[0]


def _maybe(said: dict[str, list[str]], name: str) -> str:
    return _one(said, name) if name in said else ""


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _seconds(request: web.BaseRequest) -> float:
    expected = request.headers.get(_EXPECTED, "")
    return min(int(expected) * 0.00095, _PATIENCE) if re.fullmatch("[0-9]{1,6}", expected) else _PATIENCE


def answer_of(decision: Decision, form: str) -> web.Response:
    """A decision as an answer over HTTP."""
    if decision.verdict is Verdict.DENY:
        status = decision.status or 403
        # Whatever a policy says, a proxy must not take a denial for an allow.
        status = 403 if status < 300 else status
        return _response(status, decision.headers, decision.body or b"denied\n")
    if decision.verdict is Verdict.ALLOW:
        problem = ""
        if decision.query_set or decision.query_remove:
            problem = "the policy changes the query, which no proxy can be told over HTTP"
        if decision.headers_to_remove and form != "envoy":
            problem = "the policy removes headers, which only Envoy can be told over HTTP"
        if not problem:
            headers = [*decision.headers, *decision.response_headers]
            if decision.headers_to_remove:
                headers.append((TO_REMOVE.encode(), b",".join(decision.headers_to_remove)))
            return _response(200, headers, b"")
        decision = Decision(verdict=Verdict.ERROR, cause="answer", reason=problem)
    said = (decision.reason or "the policy could not be asked").encode("utf-8", "replace")[:2000]
    return _response(503, [(CAUSE.encode(), (decision.cause or "error").encode())], said + b"\n")


def _response(status: int, headers: list[tuple[bytes, bytes]] | tuple[tuple[bytes, bytes], ...], body: bytes) -> web.Response:
    response = web.Response(status=status, body=body)
    for name, value in headers:
        if name == b"content-type":
            response.headers.popall("Content-Type", None)
        response.headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
    if "Content-Type" not in response.headers:
        response.headers["Content-Type"] = "text/plain; charset=utf-8"
    return response


def _plain(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")


def server_context(identity: Identity) -> ssl.SSLContext:
    """mTLS for the port: our own certificate, and callers must show one that the trust bundle signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=identity.bundle.decode())
    # Python's ssl reads a key from a file alone.
    with tempfile.TemporaryDirectory(prefix="tollhouse-pdp-") as folder:
        chain = Path(folder) / "identity.pem"
        chain.touch(mode=0o600)
        chain.write_bytes(identity.key + b"\n" + identity.chain)
        context.load_cert_chain(chain)
    return context

"""The decision log of real gateways: what it holds, that the policy's masks are in it, and that requests do not feel it."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from e2e_traffic import Trickle, apply, ask
from e2e_world import EXAMPLE, Mesh, shop, spiffe, tollhouse

from tests.servers import free_port, wait_for

pytestmark = pytest.mark.e2e
MASKS = """package system.log

mask contains "/input/attributes/source/address"

mask contains {"op": "upsert", "path": "/input/attributes/request/http/headers/x-user", "value": "someone"} if {
	input.input.attributes.request.http.headers["x-user"]
}

drop if input.input.parsed_path[1] == "unlogged"
"""


HOURS = """package shop.hours

decision := {"allowed": input.parsed_path[1] != "closed", "reason": "the shop closes at six"}
"""


class Taker:
    """A server that takes uploads; or that takes the connection and says nothing."""

    def __init__(self) -> None:
        self.port = free_port()
        self.events: list[dict[str, Any]] = []
        self.stalls = False
        self._over = threading.Event()
        self._http: ThreadingHTTPServer | None = None

    def start(self) -> None:
        taker = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if taker.stalls:
                    taker._over.wait(60)
                    return
                taker.events += json.loads(gzip.decompress(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def kill(self) -> None:
        self._over.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None


@pytest.fixture(scope="module")
def taker() -> Iterator[Taker]:
    made = Taker()
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def mesh(taker: Taker) -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2"), gateways=()) as running:
        folder = running.folder / "masked"
        shutil.copytree(EXAMPLE / "policy", folder)
        (folder / "masks.rego").write_text(MASKS)
        tollhouse("policy", "publish", str(folder), "--config", running.config, "--activate", "--timeout", "0s")
        url = f"http://127.0.0.1:{taker.port}"
        running.gateway(
            "ingress", "--decision-log", str(log_of(running)), "--decision-log", url, "--decision-log-set", "buffer_limit=65536"
        )
        yield running


def log_of(mesh: Mesh) -> Path:
    return mesh.folder / "decisions.log"


def everything(mesh: Mesh) -> list[dict[str, Any]]:
    text = log_of(mesh).read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def logged(mesh: Mesh, request_id: str) -> list[dict[str, Any]]:
    return [event for event in everything(mesh) if event["custom"]["request_id"] == request_id]


def test_a_refused_request_is_found_by_the_id_that_its_client_got(mesh: Mesh, taker: Taker) -> None:
    headers = {"x-user": "ada", "authorization": "Bearer swordfish"}
    answer = ask(mesh, "batch", "/orders/7?token=swordfish", headers=headers)
    assert answer.status == 403
    name = answer.headers["x-request-id"]
    wait_for("the log", lambda: logged(mesh, name))
    (event,) = logged(mesh, name)
    assert "swordfish" not in json.dumps(event)
    assert event["result"]["allowed"] is False
    assert (event["custom"]["caller"], event["custom"]["response_code"]) == (spiffe("batch"), 403)
    assert event["bundles"]["tollhouse"]["revision"].startswith("sha256:")
    assert event["input"]["attributes"]["request"]["http"]["headers"]["x-user"] == "someone"
    assert event["erased"] == ["/input/attributes/source/address"]
    assert "/input/attributes/request/http/headers/authorization" in event["masked"]
    wait_for("the upload", lambda: [each for each in taker.events if each["decision_id"] == event["decision_id"]])


def test_kept_decisions_are_logged_and_what_the_policy_drops_is_not(mesh: Mesh) -> None:
    def kept() -> list[bool]:
        return [event["custom"]["kept"] for event in everything(mesh) if event["input"]["parsed_path"] == ["catalog", "kept"]]

    for _ in range(2):
        assert ask(mesh, "web", "/catalog/kept").status == 200
    wait_for("the log", lambda: len(kept()) == 2)
    assert kept() == [False, True]
    filtered = mesh.metric("ingress", "tollhouse_log_entries_filtered_total")
    assert ask(mesh, "web", "/catalog/unlogged").status == 200
    wait_for("the count", lambda: mesh.metric("ingress", "tollhouse_log_entries_filtered_total") == filtered + 1)


def test_the_reason_is_told_where_the_author_lets_it(mesh: Mesh) -> None:
    folder = mesh.folder / "reasons"
    shutil.copytree(mesh.folder / "masked", folder)
    (folder / "hours.rego").write_text(HOURS)
    tollhouse("policy", "publish", str(folder), "--config", mesh.config, "--activate", "--decision", "shop.hours.decision")
    policy = {"apiVersion": "tollhouse.dev/v1", "kind": "AccessPolicy", "metadata": {"namespace": "shop", "name": "open"}}
    target = {"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": "catalog"}
    spec = {"decision": "shop.hours.decision", "targetRefs": [target], "showReason": True}
    apply(mesh, {**policy, "spec": spec})
    wait_for("the reason", lambda: b"shop closes" in ask(mesh, "web", "/catalog/closed").body)


def test_the_log_answers_why_and_what_another_revision_would_say(mesh: Mesh) -> None:
    answer = ask(mesh, "batch", "/orders/9")
    name = answer.headers["x-request-id"]
    wait_for("the log", lambda: logged(mesh, name))
    said = tollhouse("policy", "why", name, "--log", str(log_of(mesh)), "--config", mesh.config).stdout
    assert f"GET /orders/9 of {spiffe('batch')}, at edge/ingress" in said
    assert "It was denied by the policy mesh (shop.authz.decision)" in said
    assert 'area == "catalog" is false (area is "orders")' in said or "did not hold" in said
    asked = tollhouse("policy", "why", name, "--admin", f"127.0.0.1:{mesh.ports['admin-ingress']}", "-o", "json").stdout
    assert json.loads(asked)["decisions"][0]["event"] == logged(mesh, name)[0]
    listed = json.loads(tollhouse("policy", "list", "--config", mesh.config, "-o", "json").stdout)
    active = next(each["name"] for each in listed if each["active"])
    replayed = tollhouse("policy", "replay", str(log_of(mesh)), "--against", active, "--config", mesh.config, "--fail-on-change")
    assert "0 lose access, 0 gain it" in replayed.stdout
    folder = mesh.folder / "nobody"
    folder.mkdir()
    (folder / "authz.rego").write_text("package shop.authz\n\n# METADATA\n# entrypoint: true\ndecision := false\n")
    found = tollhouse("policy", "diff", active[:20], str(folder), "--config", mesh.config, "--log", str(log_of(mesh)), "-o", "json")
    compared = json.loads(found.stdout)
    assert compared["replayed"]["counts"]["gains"] == 0
    assert {row["caller"] for row in compared["replayed"]["changes"] if row["change"] == "loses"} == {spiffe("web")}
    assert {each["path"]: each["change"] for each in compared["decisions"]}["shop.authz.decision"] == "changed"


def test_requests_do_not_feel_a_server_that_stalls_or_is_gone_and_what_is_lost_is_counted(mesh: Mesh, taker: Taker) -> None:
    def count(what: str) -> float:
        return mesh.metric("ingress", f"tollhouse_log_entries_{what}_total", log="decision", sink="http")

    taker.stalls = True
    with Trickle(mesh, "web", "/catalog/1", period=0.002) as trickle:
        wait_for("losses", lambda: count("dropped") > 0, seconds=60)
        trickle.more(50)
        taker.kill()
        trickle.more(50)
        lost = count("dropped")
        wait_for("more losses", lambda: count("dropped") > lost, seconds=60)
        taker.stalls = False
        taker.start()
        written = count("written")
        wait_for("uploads", lambda: count("written") > written + 10, seconds=90)
        trickle.more(20)
    assert set(trickle.statuses()) == {200}
    assert max(second[0] - first[0] for first, second in zip(trickle.seen, trickle.seen[1:], strict=False)) < 5
    file = mesh.metric("ingress", "tollhouse_log_entries_dropped_total", log="decision", sink="file")
    assert file == 0, "the file had all of them"

"""An incident, as the one on call lives through it: limits changed, lifted, blocked and reset on real gateways, etcd and Redis."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import servers
from tollhouse.main import main

GROUP = "gateway.networking.k8s.io"
LIMIT = "edge/a/per-key"
WHY = ["--reason", "a test"]


def mesh(ports: list[int]) -> list[dict[str, Any]]:
    """Two Gateways with one route, and a limit of five an hour for each key."""
    target = [{"group": GROUP, "kind": "HTTPRoute", "name": "a"}]
    limits = [{"name": "per-key", "per": [{"header": "x-key"}], "tokens": 5, "interval": "1h"}]
    policy = {"targetRefs": target, "limits": limits, "timeout": "5s"}
    found: list[tuple[str, str, str, dict[str, Any]]] = [
        (f"{GROUP}/v1", "GatewayClass", "c", {"controllerName": "tollhouse.dev/gateway-controller"}),
        ("tollhouse.dev/v1", "QuotaPolicy", "a", policy),
    ]
    redirect = {"filters": [{"type": "RequestRedirect", "requestRedirect": {"hostname": "there.example"}}]}
    found.append((f"{GROUP}/v1", "HTTPRoute", "a", {"parentRefs": [{"name": f"g{at}"} for at in range(len(ports))], "rules": [redirect]}))
    for at, port in enumerate(ports):
        spec = {"gatewayClassName": "c", "listeners": [{"name": "http", "port": port, "protocol": "HTTP"}]}
        found.append((f"{GROUP}/v1", "Gateway", f"g{at}", spec))
    return [
        {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, **({} if kind == "GatewayClass" else {"namespace": "edge"})},
            "spec": spec,
        }
        for version, kind, name, spec in found
    ]


class Fleet:
    """Two gateways on one etcd and one Redis."""

    def __init__(self, etcd: servers.Server, redis: servers.Server, folder: Path) -> None:
        self.config = etcd.url.replace("http://", "etcd://")
        self.etcd, self.redis, self.folder = etcd, redis, folder
        self.ports = [servers.free_port() for _ in range(2)]
        self.admins = [servers.free_port() for _ in range(2)]
        self.gateways: list[servers.Process] = []

    def start(self) -> None:
        manifest = self.folder / "mesh.yaml"
        manifest.write_text(yaml.safe_dump_all(mesh(self.ports)))
        done = subprocess.run(
            [sys.executable, "-m", "tollhouse", "apply", "-f", str(manifest), "--config", self.config], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        for at, admin in enumerate(self.admins):
            words = ["gateway", f"edge/g{at}", "--config", self.config, "--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}"]
            words += ["--redis", self.redis.url + "?start=full", "--access-log", str(self.folder / f"{at}.log")]
            ready = lambda admin=admin: servers.fetched(f"http://127.0.0.1:{admin}/readyz")  # noqa: E731
            process = servers.tollhouse(*words, ready=ready, name="gateway")
            self.gateways.append(process)
            process.start()

    def ask(self, key: str, at: int = 0) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[at], timeout=10)
        try:
            connection.request("GET", "/", headers={"x-key": key})
            return connection.getresponse().status
        finally:
            connection.close()

    def asked(self, key: str, times: int) -> list[int]:
        """Statuses at both gateways in turn."""
        return [self.ask(key, at % 2) for at in range(times)]

    def run(self, *words: str, config: bool = True) -> tuple[int, str, str]:
        """A command to its end, in this process: its exit code, what it prints, and what it complains of."""
        where = ["--config", self.config] if config else []
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["tollhouse", "quota", *words, *where])
            with pytest.raises(SystemExit) as ended:
                main()
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()

    def set(self, *words: str) -> Any:
        code, out, err = self.run("set", LIMIT, *words, *WHY, "-o", "json")
        assert code == 0, err
        return json.loads(out)

    def history(self) -> list[Any]:
        code, out, err = self.run("history", "-o", "json")
        assert code == 0, err
        found: list[Any] = json.loads(out)
        return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with servers.etcd() as etcd, servers.redis() as redis:
        made = Fleet(etcd, redis, tmp_path_factory.mktemp("fleet"))
        try:
            made.start()
            yield made
        finally:
            for process in made.gateways:
                process.close()


def test_who_uses_it_all_is_blocked_and_let_in_again(fleet: Fleet) -> None:
    assert fleet.asked("mallory", 8).count(302) == 5
    done = fleet.set("mallory", "--block", "--for", "1h")
    assert done["gateways"] == 2 and done["before"] == {"tokens": 5, "interval": 3600.0, "burst": 5} and done["after"] == {"blocked": True}
    assert fleet.asked("mallory", 4) == [429] * 4  # as soon as the command has returned, at each gateway
    assert fleet.asked("alice", 2) == [302, 302]
    done = fleet.set("mallory", "--lift")
    assert done["before"] == {"blocked": True} and done["until"] is None
    assert fleet.asked("mallory", 20) == [302] * 20
    done = fleet.set("mallory", "--undo")
    assert done["before"] == {"lifted": True} and done["after"]["tokens"] == 5
    assert fleet.asked("mallory", 4) == [429] * 4


def test_a_change_for_all_ends_by_itself(fleet: Fleet) -> None:
    done = fleet.set("--tokens", "100", "--for", "4s")
    ends = time.monotonic() + 4
    assert done["after"] == {"tokens": 100, "interval": 3600.0, "burst": 100} and done["values"] is None
    assert "302" not in {str(status) for status in fleet.asked("bob", 10) if status != 302}
    assert fleet.asked("carol", 2) == [302, 302]
    servers.wait_for("the end of the change", lambda: time.monotonic() > ends and 429 in fleet.asked("dave", 6))
    code, out, _ = fleet.run("get", LIMIT, "erin", "--redis", fleet.redis.url, "-o", "json")
    assert code == 0 and json.loads(out)["burst"] == 5 and json.loads(out)["changed"] is None


def test_what_is_lowered_is_not_spent_from_what_was_lent_before(fleet: Fleet) -> None:
    fleet.set("heavy", "--tokens", "4000", "--interval", "1s")
    assert fleet.asked("heavy", 300).count(302) > 250  # each gateway has tokens of it in hand now
    fleet.set("heavy", "--tokens", "2", "--interval", "1h")
    assert fleet.asked("heavy", 100).count(302) <= 4
    fleet.set("heavy", "--undo")


def test_a_secret_is_named_by_what_is_shown_of_it_and_written_down_nowhere(fleet: Fleet) -> None:
    secret = "a-key-that-nobody-is-to-read"
    assert fleet.asked(secret, 6).count(302) == 5
    admins = [word for admin in fleet.admins for word in ("--admin", f"127.0.0.1:{admin}")]
    _, out, _ = fleet.run("top", *admins, "-o", "json", config=False)
    (shown,) = [each["key"][0] for each in json.loads(out) if each["key"][0].startswith("a-ke")]
    assert fleet.set(shown, "--lift")["values"] == [shown]
    assert fleet.asked(secret, 8) == [302] * 8
    assert 429 in fleet.asked(shown, 8)  # who sends what is shown is somebody else
    assert fleet.set(secret, "--undo")["values"] == [shown]
    assert 429 in fleet.asked(secret, 2)
    assert secret not in json.dumps(fleet.history())


def test_every_change_is_in_the_history_with_who_and_why(fleet: Fleet) -> None:
    code, _, err = fleet.run("set", LIMIT, "zoe", "--tokens", "7", "--reason", "zoe has a sale")
    assert code == 0, err
    newest = fleet.history()[0]
    assert newest["action"] == "quota set" and newest["reason"] == "zoe has a sale" and "@" in newest["who"]
    (change,) = newest["changes"]
    (item,) = [each for each in change["after"]["changes"] if each.get("values") == ["zoe"]]
    assert (change["kind"], item["tokens"], item["reason"]) == ("QuotaChange", 7, "zoe has a sale")
    code, out, _ = fleet.run("history", "--limit", "1")
    assert code == 0 and f"{LIMIT}: zoe: as its QuotaPolicy has it -> tokens 7, interval 1h, burst 7" in out
    code, out, _ = fleet.run("get", LIMIT, "zoe", "--redis", fleet.redis.url, "-o", "json")
    assert code == 0 and json.loads(out)["changed"] == {"tokens": 7, "interval": 3600.0, "burst": 7, "until": None}
    fleet.set("zoe", "--undo")


def test_a_bucket_is_refilled_and_emptied(fleet: Fleet) -> None:
    assert fleet.asked("ruth", 8).count(302) == 5
    where = ["--redis", fleet.redis.url, "-o", "json"]
    code, out, err = fleet.run("reset", LIMIT, "ruth", "--reason", "it was our own test", *where)
    assert code == 0, err
    found = json.loads(out)
    assert found["before"] == 0 and found["left"] + found["onLease"] == 5 and found["gateways"] == 2
    assert fleet.asked("ruth", 8).count(302) == 5  # gateways knew that there would be no token for an hour
    newest = fleet.history()[0]
    assert (newest["action"], newest["reason"]) == ("quota refill", "it was our own test")
    code, out, _ = fleet.run("history", "--limit", "1")
    assert f"{LIMIT}: ruth: bucket reset" in out
    assert fleet.ask("sam") == 302
    code, out, err = fleet.run("reset", LIMIT, "sam", "--empty", *WHY, *where)
    assert code == 0 and json.loads(out)["left"] == 0, err
    assert fleet.asked("sam", 4).count(302) <= json.loads(out)["onLease"]


def test_a_bucket_that_nobody_could_be_told_of_holds_what_it_held(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    from tollhouse import quota_reset
    from tollhouse.output import Complaint

    def refuse(*_: Any) -> Any:
        raise Complaint("etcd says no")

    assert fleet.asked("tom", 6).count(302) == 5
    monkeypatch.setattr(quota_reset, "write_change", refuse)
    code, _, err = fleet.run("reset", LIMIT, "tom", *WHY, "--redis", fleet.redis.url)
    assert code == 1 and "etcd says no; nobody could be told, and so the bucket holds again what it held" in err
    code, out, _ = fleet.run("get", LIMIT, "tom", "--redis", fleet.redis.url, "-o", "json")
    assert json.loads(out)["left"] == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([LIMIT, "x", "--redis", "redis://127.0.0.1:1", *WHY], 1, "Redis can't be asked: "),
        ([LIMIT, "x", "--redis", "http://x", *WHY], 2, "--redis: "),
        ([LIMIT, "--redis", "redis://127.0.0.1:1", *WHY], 2, "(header:x-key), and 0 are given"),
        ([LIMIT, "a-ke...0123456789abcdef", "--redis", "redis://127.0.0.1:1", *WHY], 2, "a bucket in Redis is named by the values"),
        ([LIMIT, "x", "--redis", "redis://127.0.0.1:1"], 2, "Missing option '--reason'"),
    ],
)  # fmt: skip
def test_a_reset_that_is_wrong_changes_nothing(fleet: Fleet, words: list[str], code: int, said: str) -> None:
    before = len(fleet.history())
    found = fleet.run("reset", *words)
    assert found[0] == code and said in found[2]
    assert len(fleet.history()) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["edge/a/per-kay", "x", "--lift", *WHY], 1, f"has the limit edge/a/per-kay; did you mean {LIMIT}?"),
        ([LIMIT, "x", "y", "--lift", *WHY], 2, "has a bucket for each combination of 1 values (header:x-key), and 2 are given"),
        ([LIMIT, "x", *WHY], 2, "say one of --lift, --block and --undo, or other numbers: --tokens, --interval, --burst"),
        ([LIMIT, "x", "--lift", "--tokens", "1", *WHY], 2, "say one of --lift"),
        ([LIMIT, "x", "--tokens", "0", *WHY], 2, "0 is not in the range"),
        ([LIMIT, "x", "--tokens", "1", "--interval", "800h", *WHY], 2, "--interval: from 1ms to 744h (31 days)"),
        ([LIMIT, "x", "--lift", "--for", "0s", *WHY], 2, "--for: longer than nothing"),
        ([LIMIT, "x", "--lift", "--for", "1h", "--until", "2099-01-01T00:00:00Z", *WHY], 2, "--for and --until say the same"),
        ([LIMIT, "x", "--lift", "--until", "2020-01-01T00:00:00Z", *WHY], 2, "--until: that is over already"),
        ([LIMIT, "x", "--lift", "--until", "soon", *WHY], 2, '"soon" is not a date and time'),
        ([LIMIT, "x", "--lift"], 2, "Missing option '--reason'"),
        ([LIMIT, "x", "--lift", "--reason", "  "], 2, "say why, for those who read the audit log"),
        ([LIMIT, "x", "--lift", "--reason", "x" * 1001], 2, "has 1001 characters; at most 1000 are kept"),
        ([LIMIT, "nobody", "--undo", *WHY], 1, "has not been changed for nobody; there is nothing to undo"),
        ([LIMIT, "x", "--undo", "--for", "1m", *WHY], 2, "--undo holds from now on"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_changes_nothing(fleet: Fleet, words: list[str], code: int, said: str) -> None:
    before = len(fleet.history())
    found = fleet.run("set", *words)
    assert found[0] == code and said in found[2]
    assert len(fleet.history()) == before


def test_who_is_refused_is_shown_as_it_happens(fleet: Fleet) -> None:
    admins = [word for admin in fleet.admins for word in ("--admin", f"127.0.0.1:{admin}")]
    words = ["watch", *admins, "--every", "200ms", "--count", "8", "-o", "json"]
    with ThreadPoolExecutor(1) as clients:
        flood = clients.submit(lambda: [fleet.asked("walter", 12) for _ in range(200)])
        code, out, err = fleet.run(*words, config=False)
        flood.cancel()
    assert code == 0, err
    rows = [row for line in out.splitlines() for row in json.loads(line)["refused"] if row["key"] == ["walter"]]
    assert rows and rows[0]["limit"] == LIMIT and rows[0]["refusedPerSecond"] > 0 and rows[0]["gateways"] in {1, 2}
    assert {caller for row in rows for caller in row["callers"]} == {"nobody known"}
    code, out, _ = fleet.run("watch", *admins, "--every", "100ms", "--count", "1", config=False)
    assert code == 0 and out == ""


def test_a_request_is_explained_by_its_id_and_by_what_it_is(fleet: Fleet) -> None:
    secret = "a-key-that-must-not-be-told"
    fleet.asked(secret, 5)
    connection = http.client.HTTPConnection("127.0.0.1", fleet.ports[0], timeout=10)
    connection.request("GET", "/orders?token=x", headers={"x-key": secret})
    answer = connection.getresponse()
    assert answer.status == 429
    number = answer.headers["x-request-id"]
    admin = ["--admin", f"127.0.0.1:{fleet.admins[0]}"]
    code, out, err = fleet.run("explain", number, *admin, "-o", "json", config=False)
    (found,) = json.loads(out)
    assert code == 1 and (found["limit"], found["status"], found["flag"], found["path"]) == (LIMIT, 429, "RL", "/orders"), err
    (asked,) = found["limits"]
    assert asked["per"] == ["header x-key"] and not asked["admitted"] and asked["retryAfter"] > 60
    assert secret not in out and "token=x" not in out
    code, out, _ = fleet.run("explain", number, *admin, config=False)
    assert code == 1 and "refused it" in out and "429 RL: no token left of" in out
    log = fleet.folder / "0.log"
    servers.wait_for("the log", lambda: number in log.read_text())
    logged = [json.loads(line) for line in log.read_text().splitlines() if number in line]
    assert [each["refused_by_limit"] for each in logged] == [LIMIT]
    described = ["--gateway", "edge/g0", "-H", f"x-key: {secret}", "--redis", fleet.redis.url]
    code, out, err = fleet.run("explain", "GET", "http://shop.example/", *described, "-o", "json")
    told = json.loads(out)
    (step,) = [each for each in told["steps"] if each["name"] == "quota"]
    assert code == 1 and told["status"] == 429 and step["details"]["limit"] == LIMIT and not step["details"]["admitted"], err
    assert step["details"]["policy"] == "edge/a" and step["details"]["per"] == ["header x-key"] and secret not in out
    fleet.set(secret, "--tokens", "9", "--for", "1h")
    code, out, _ = fleet.run("explain", "GET", "http://shop.example/", *described)
    assert "9 each 3600 s, burst 9, cost 1; QuotaPolicy edge/a at the level route; changed by hand until" in out
    fleet.set(secret, "--lift")
    code, out, _ = fleet.run("explain", "GET", "http://shop.example/", *described)
    assert code == 0 and "not asked, lifted by hand" in out and "no limit refuses it" in out and secret not in out
    fleet.set(secret, "--undo")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["some-id"], 2, "who is to know that request? name gateways"),
        (["GET", "http://x.example/"], 2, "--gateway NAMESPACE/NAME: which gateway"),
        (["GET", "tcp://x.example:1", "--gateway", "edge/g0"], 2, "GET tcp://x.example:1: a connection has no method"),
        (["-", "tcp://x.example:1", "--gateway", "edge/g0"], 2, "tollhouse explain tells of the limits of connections, too"),
        (["GET", "http://x.example/", "--gateway", "edge/g9"], 1, "the configuration has no Gateway edge/g9"),
    ],
)
def test_what_can_not_be_explained_is_said(fleet: Fleet, words: list[str], code: int, said: str) -> None:
    found = fleet.run("explain", *words)
    assert found[0] == code and said in found[2]


def test_a_request_that_nobody_refused(fleet: Fleet) -> None:
    code, _, err = fleet.run("explain", "some-id", "--admin", f"127.0.0.1:{fleet.admins[0]}", config=False)
    assert code == 1 and "no limit refused the request some-id lately; the access log tells" in err


def test_a_gateway_that_does_not_follow_is_named(fleet: Fleet) -> None:
    os.kill(fleet.gateways[1].pid, signal.SIGSTOP)
    try:
        code, out, err = fleet.run("set", LIMIT, "slow", "--lift", *WHY, "--timeout", "1s")
        assert code == 1 and "after 1 s these gateways do not apply it yet: edge/g1" in err and "lifted" in out
    finally:
        os.kill(fleet.gateways[1].pid, signal.SIGCONT)
    servers.wait_for("the gateway to follow", lambda: fleet.asked("slow", 16) == [302] * 16)
    fleet.set("slow", "--undo")


def test_a_directory_has_changes_but_no_history(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump_all(mesh([18080])))
    command = [sys.executable, "-m", "tollhouse", "quota", "set", LIMIT, "x", "--block", *WHY, "--config", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and "a directory keeps no audit log" in done.stderr and "blocked" in done.stdout
    (found,) = [
        each for path in tmp_path.glob("**/*.yaml") for each in yaml.safe_load_all(path.read_text()) if each["kind"] == "QuotaChange"
    ]
    (item,) = found["spec"]["changes"]
    assert item["values"] == ["x"] and item["block"] and item["reason"] == "a test"
    code, _, err = fleet.run("history", "--config", str(tmp_path), config=False)
    assert code == 2 and "the history is kept in an etcd" in err

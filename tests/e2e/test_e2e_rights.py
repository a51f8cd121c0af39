"""Who may change what: a real etcd that knows its users by their certificates or passwords, and commands as each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from e2e_world import EXAMPLE, GATEWAYS, SERVICES, tollhouse, with_ports

from tests import servers
from tests.servers import Process, free_port, wait_for

pytestmark = pytest.mark.e2e
DECISION = ("--decision", "shop.authz.decision")
ACTIVE = """apiVersion: tollhouse.dev/v1
kind: AccessPolicy
metadata: {namespace: edge, name: more}
spec: {decision: shop.authz.decision, place: Local, targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: ingress}]}
"""

TABLE = """apiVersion: tollhouse.dev/v1
kind: QuotaOverrides
metadata: {namespace: shop, name: tenants}
spec: {rows: [{values: [a], tokens: 5}]}
"""


def issued(folder: Path, name: str, *more: str) -> Path:
    """A certificate by which etcd knows its bearer as `name`."""
    who = f"spiffe://shop.example/ns/ops/sa/{name}"
    tollhouse("ca", "issue", "--dir", str(folder / "ca"), who, "--out", str(folder / name), "--user", name, *more)
    return folder / name


def as_user(url: str, folder: Path) -> str:
    return f"{url.replace('https://', 'etcds://')}?ca={folder}/ca.pem&cert={folder}/cert.pem&key={folder}/key.pem"


@contextmanager
def guarded(folder: Path) -> Iterator[servers.Server]:
    """An etcd that takes connections with a certificate of our CA's alone."""
    tollhouse("ca", "init", "--trust-domain", "shop.example", "--dir", str(folder / "ca"))
    mine = issued(folder, "server", "--ip", "127.0.0.1")
    more = (f"--cert-file={mine}/cert.pem", f"--key-file={mine}/key.pem", f"--trusted-ca-file={mine}/ca.pem", "--client-cert-auth")
    with servers.etcd() as template:
        command, port = list(template.command), template.port
        template.stop()
    command = [each.replace("http://", "https://") if "client-urls" in each else each for each in command]
    with servers.running(servers.Server("etcd", port, [*command, *more], f"https://127.0.0.1:{port}")) as server:
        yield server


@contextmanager
def gateway(config: str, folder: Path) -> Iterator[tuple[Process, str]]:
    admin = f"127.0.0.1:{free_port()}"
    process = servers.tollhouse(
        "gateway", "edge/ingress", "--config", config, "--identity", str(folder), "--admin", admin,
        ready=lambda: servers.fetched(f"http://{admin}/metrics"), name="gateway",
    )  # fmt: skip
    try:
        process.start()
        yield process, admin
    finally:
        process.close()


def test_each_certificate_may_do_what_its_role_says(tmp_path: Path) -> None:
    folder = str(EXAMPLE / "policy")
    with guarded(tmp_path) as etcd:
        everybody = ("root", "ada", "ops", "dora", "tom", "looker", "ingress", "instance", "stranger")
        users = {name: as_user(etcd.url, issued(tmp_path, name)) for name in everybody}

        def run(who: str, *words: str, check: bool = True) -> tuple[int, str]:
            done = tollhouse(*words, "--config", users[who], check=check)
            return done.returncode, done.stdout + done.stderr

        wait_for("etcd", lambda: run("root", "get", check=False)[0] == 0)
        assert "created" in run("root", "etcd", "roles", "--apply", "--registrar", "shop/orders")[1]
        assert "created" not in run("root", "etcd", "roles", "--apply", "--registrar", "shop/orders")[1]
        for who, role in (
            ("ada", "tollhouse-policy"),
            ("ops", "tollhouse-operator"),
            ("dora", "tollhouse-data"),
            ("tom", "tollhouse-quota"),
            ("looker", "tollhouse-reader"),
            ("ingress", "tollhouse-gateway"),
            ("instance", "tollhouse-registrar:shop/orders"),
        ):
            run("root", "etcd", "user", who, "--role", role)
        run("root", "etcd", "enable")
        manifests = tmp_path / "shop"
        manifests.mkdir()
        for each in EXAMPLE.glob("*.yaml"):
            (manifests / each.name).write_text(each.read_text())
        with_ports(manifests, {port: free_port() for port in (*GATEWAYS.values(), *SERVICES.values())})
        run("ops", "apply", "-f", str(manifests))
        code, said = run("ada", "policy", "publish", folder, *DECISION)
        digest = said.split()[1].rstrip(":")
        run("ada", "policy", "activate", digest, "--reason", "first")
        extra = tmp_path / "more.yaml"
        extra.write_text(ACTIVE)
        run("ada", "apply", "-f", str(extra))

        again = tmp_path / "again"
        shutil.copytree(folder, again)
        (again / "authz.rego").write_text((again / "authz.rego").read_text() + "\nmore := 1\n")
        second = run("ada", "policy", "publish", str(again), *DECISION)[1].split()[1].rstrip(":")
        third = tmp_path / "third.yaml"
        third.write_text(ACTIVE.replace("Local", "Central"))
        changes = (
            ("policy", "activate", second),
            ("policy", "canary", second, "--percent", "5"),
            ("policy", "publish", folder, *DECISION, "--name", "mine"),
            ("apply", "-f", str(third)),
            ("delete", "AccessPolicy", "edge/more"),
            ("etcd", "user", "looker", "--role", "tollhouse-operator"),
        )
        for who, tried in (("looker", changes), ("ingress", changes[:1]), ("instance", changes[:1]), ("stranger", changes[:1])):
            for words in tried:
                code, said = run(who, *words, check=False)
                assert (code, "permission denied" in said) == (1, True), (who, words, said)
        code, said = run("ada", "delete", "HTTPRoute", "shop/orders", check=False)
        assert (code, "permission denied" in said) == (1, True), "who changes policy does not change routes"
        assert run("looker", "policy", "list")[0] == 0

        entries = json.loads(run("looker", "policy", "history", "-o", "json")[1])
        by = [
            (entry["action"], entry["user"], entry["who"].split()[0], [change["kind"] for change in entry["changes"]]) for entry in entries
        ]
        ada = "spiffe://shop.example/ns/ops/sa/ada"
        assert by[:4] == [
            ("publish", "ada", ada, ["PolicyRevision"]),
            ("apply", "ada", ada, ["AccessPolicy"]),
            ("activate", "ada", ada, ["ActivePolicy"]),
            ("publish", "ada", ada, ["PolicyRevision"]),
        ]
        assert {who for _, who, _, _ in by[4:]} == {"ops"}
        assert "AccessPolicy edge/more created" in run("looker", "policy", "history")[1]

        grants, table, limits = tmp_path / "grants.json", tmp_path / "table.yaml", tmp_path / "limits.yaml"
        grants.write_text('{"a": 1}')
        table.write_text(TABLE)
        quota = next(each for each in yaml.safe_load_all((manifests / "routes.yaml").read_text()) if each["kind"] == "QuotaPolicy")
        quota["spec"]["limits"][0]["tokens"] = 77
        limits.write_text(yaml.safe_dump(quota))
        limit = f"shop/orders/{quota['spec']['limits'][0]['name']}"
        data = ("policy", "data", "publish", str(grants), "--root", "shop/grants")
        amounts = (
            ("apply", "-f", str(table)),
            ("apply", "-f", str(limits)),
            ("quota", "set", limit, "--lift", "--reason", "an incident"),
        )
        for who, tried in (
            ("dora", (*changes[:5], *amounts)),
            ("tom", (*changes[:5], data)),
            ("ada", amounts),
            ("looker", (data, *amounts)),
            ("ingress", (data, *amounts)),
        ):
            for words in tried:
                code, said = run(who, *words, check=False)
                assert (code, "permission denied" in said) == (1, True), (who, words, said)
        run("dora", *data)
        for words in amounts:
            run("tom", *words)
        told = [
            (each["user"], {change["kind"] for change in each["changes"]})
            for log in ("policy", "quota")
            for each in json.loads(run("looker", log, "history", "-o", "json")[1])
        ]
        for expected in (("tom", {"QuotaOverrides"}), ("tom", {"QuotaPolicy"}), ("tom", {"QuotaChange"})):
            assert expected in told
        assert set().union(*(kinds for who, kinds in told if who == "dora")) == {"DataRevision", "ActiveData"}

        with gateway(users["ingress"], issued(tmp_path, "ingress", "--dns", "shop.example")):
            wait_for("the gateway's report", lambda: "edge/ingress" in run("looker", "status", check=False)[1])
            run("ada", "policy", "activate", second, "--timeout", "30s")


def test_what_was_changed_by_other_means_is_shown(tmp_path: Path) -> None:
    import asyncio

    from discovery.address import parse_etcd_url
    from discovery.etcd import Delete, Etcd, Put
    from discovery.keys import config_key
    from mesh.documents import Key

    password = tmp_path / "password"
    password.write_text("secret\n")
    with servers.etcd() as etcd:
        root = etcd.url.replace("http://", "etcd://root@") + f"?password-file={password}"
        tollhouse("etcd", "roles", "--apply", "--config", etcd.url)
        tollhouse("etcd", "enable", "--password-file", str(password), "--config", etcd.url)
        code = tollhouse("policy", "list", "--config", etcd.url, check=False)
        assert (code.returncode, "wants a user" in code.stderr) == (1, True)
        extra = tmp_path / "more.yaml"
        extra.write_text(ACTIVE)
        tollhouse("apply", "-f", str(extra), "--config", root)
        done = json.loads(tollhouse("policy", "history", "--config", root, "-o", "json").stdout)
        assert [(each["action"], each["user"]) for each in done] == [("apply", "root")]
        assert done[0]["changes"][0]["after"]["place"] == "Local"
        key = config_key(Key("tollhouse.dev", "AccessPolicy", "edge", "more"))

        async def behind(*operations: Put | Delete) -> None:
            client = Etcd(parse_etcd_url(root))
            await client.commit(operations)
            await client.close()

        asyncio.run(behind(Put(key, extra.read_bytes())))
        assert "AccessPolicy edge/more changed" in tollhouse("policy", "history", "--config", root).stdout
        asyncio.run(behind(Delete(key)))
        first = json.loads(tollhouse("policy", "history", "--config", root, "-o", "json").stdout)[0]
        assert (first["action"], first["changes"][0]["verb"]) == ("unknown", "deleted")

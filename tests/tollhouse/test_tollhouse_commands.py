"""The command line as its users meet it: help that teaches, errors of one line, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from identity.ca import Authority, write_identity
from tests import servers
from tollhouse.main import COMMANDS, cli

EXAMPLE = Path(__file__).resolve().parents[2] / "conf" / "examples" / "shop"


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tollhouse", *arguments], capture_output=True, text=True, timeout=60, check=False, input=stdin
    )


def everything(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for each in command.list_commands(context):
            inner = command.get_command(context, each)
            assert inner is not None
            yield from everything(inner, f"{name} {each}")


ALL = dict(everything(cli, "tollhouse"))


@pytest.mark.parametrize("name", ALL)
def test_every_command_says_what_it_does_with_an_example(name: str) -> None:
    command = ALL[name]
    assert command.help and command.help.strip().endswith("."), name
    if name != "tollhouse":
        assert command.epilog, name
        assert "Example:" in command.epilog, name
        assert f"{name} " in command.epilog, name
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"


def test_the_list_of_commands_is_complete() -> None:
    shown = run("--help").stdout
    for name, (_, short) in COMMANDS.items():
        assert name in shown
        assert short.split(",")[0] in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gatewya"], "did you mean 'gateway'"),
        (["gateway"], "Missing argument"),
        (["gateway", "ingress", "--config", "x"], "NAMESPACE/NAME"),
        (["gateway", "edge/ingress"], "--config"),
        (["gateway", "edge/ingress", "--config", str(EXAMPLE), "--limit", "bufer=1"], "did you mean buffer"),
        (["gateway", "edge/ingress", "--config", str(EXAMPLE), "--pdp", "nowhere"], "HOST:PORT"),
        (["gateway", "edge/ingress", "--config", str(EXAMPLE), "--address", "localhost"], "IP address"),
        (["gateway", "edge/ingress", "--config", "/nowhere/at/all"], "not a directory"),
        (["pdp"], "--config"),
        (["pdp", "--policy", str(EXAMPLE / "policy")], "--decision"),
        (["quota"], "--config"),
        (["echo", "--identity", "x"], "--gateway"),
        (["register", "shop/orders", "--config", str(EXAMPLE), "--address", "127.0.0.1", "--port", "1"], "etcd://"),
        (["register", "shop/orders", "--config", "etcd://127.0.0.1:1", "--address", "here", "--port", "1"], "IP address"),
        (["register", "shop/orders", "--config", "etcd://127.0.0.1:1", "--address", "127.0.0.1", "--port", "x"], "[NAME=]PORT"),
        (["get", "HTTPRout", "--config", str(EXAMPLE)], "did you mean HTTPRoute"),
        (["explain", "--gateway", "edge/ingress", "GET", "shop.example"], "not a URL"),
        (["explain", "--gateway", "edge/ingress", "GET", "tcp://shop.example:1"], "no method; write -"),
        (["explain", "--gateway", "edge/ingress", "-", "https://shop.example"], "goes with tcp://"),
        (["explain", "--gateway", "edge/ingress", "--body", "a", "-", "tls://shop.example:1"], "mean nothing for a connection"),
        (["explain", "--gateway", "edge/ingress", "--as", "web", "GET", "https://shop.example/"], "spiffe://"),
        (["policy", "activate", "x", "--config", str(EXAMPLE)], "etcd://"),
        (["get", "--config", "etcd://user:secret@127.0.0.1:1"], "password"),
    ],
)
def test_wrong_usage_is_told_in_words(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "--admin", "127.0.0.1:9"], "nobody answers"),
        (["get", "HTTPRoute", "shop/nothing", "--config", str(EXAMPLE)], "there is no HTTPRoute shop/nothing"),
        (["explain", "--gateway", "edge/ingres", "GET", "https://shop.example/"], "did you mean edge/ingress"),
        (["explain", "--gateway", "edge/ingress", "GET", "https://other.example/"], "no listener"),
        (["explain", "--gateway", "edge/ingress", "-", "tls://shop.example:8443"], "no listener"),
        (["ca", "issue", "spiffe://shop.example/ns/a/sa/b", "--dir", "/nowhere", "--out", "/nowhere"], "tollhouse ca init"),
        (["get", "--config", "etcd://127.0.0.1:9"], "etcd"),
    ],
)
def test_failures_are_one_line_that_says_what_to_do(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def identity(folder: Path, mode: int = 0o600) -> Path:
    write_identity(Authority.create("shop.example").issue("spiffe://shop.example/ns/edge/sa/ingress", dns=("shop.example",)), folder)
    (folder / "key.pem").chmod(mode)
    return folder


def test_what_a_gateway_cannot_start_with(tmp_path: Path) -> None:
    config = tmp_path / "config"
    shutil.copytree(EXAMPLE, config)
    command = ["gateway", "edge/ingress", "--config", str(config), "--admin", "off", "--access-log", "off"]
    exposed = run(*command, "--identity", str(identity(tmp_path / "exposed", 0o644)))
    assert (exposed.returncode, "chmod" in exposed.stderr or "0600" in exposed.stderr) == (1, True), exposed.stderr
    missing = run(*command, "--identity", str(tmp_path / "missing"))
    assert missing.returncode == 1
    assert "missing" in missing.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = config / "gateways.yaml"
        path.write_text(path.read_text().replace("port: 8443", f"port: {port}"))
        busy = run(*command, "--identity", str(identity(tmp_path / "good")))
    assert busy.returncode == 1
    assert f"127.0.0.1:{port}" in busy.stderr
    assert "another process listens there" in busy.stderr
    unknown = run(*["gateway", "edge/ingres", *command[2:]], "--identity", str(tmp_path / "good"))
    assert unknown.returncode == 1
    assert "did you mean edge/ingress" in unknown.stderr
    for done in (exposed, missing, busy, unknown):
        assert "Traceback" not in done.stderr


def test_resources_in_a_directory(tmp_path: Path) -> None:
    route = yaml.safe_load_all((EXAMPLE / "routes.yaml").read_text()).__next__()
    there = ["--config", str(tmp_path)]
    applied = run("apply", "-f", "-", *there, "-o", "json", stdin=yaml.safe_dump(route))
    assert applied.returncode == 0, applied.stderr
    assert json.loads(applied.stdout)["created"] == ["HTTPRoute shop/catalog"]
    shown = run("get", "httproutes", "shop/catalog", *there, "-o", "yaml")
    found = yaml.safe_load(shown.stdout)
    (parent,) = found.pop("status")["parents"]
    assert found == route
    assert [each["reason"] for each in parent["conditions"] if each["type"] == "Accepted"] == ["NoMatchingParent"]
    # What was shown can be applied as it is: a status is no part of what is stored.
    again = run("apply", "-f", "-", *there, "-o", "json", stdin=shown.stdout)
    assert json.loads(again.stdout)["unchanged"] == ["HTTPRoute shop/catalog"]
    assert run("delete", "HTTPRoute", "shop/catalog", *there).returncode == 0
    assert run("get", *there).stdout.strip() == "no resources"


def test_nothing_of_a_file_with_an_error_is_applied(tmp_path: Path) -> None:
    file = tmp_path / "mixed.yaml"
    good, bad = (
        yaml.safe_load_all((EXAMPLE / "routes.yaml").read_text()),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}},
    )
    bad["spec"] = {"ports": [{"port": 70000}], "porst": 1}
    file.write_text(yaml.safe_dump_all([next(good), bad]))
    store = tmp_path / "store"
    store.mkdir()
    done = run("apply", "-f", str(file), "--config", str(store))
    assert done.returncode == 1
    assert "mixed.yaml" in done.stderr
    assert "did you mean" in done.stderr
    assert "nothing was changed" in done.stderr
    assert not list(store.iterdir())


def test_validate_looks_at_the_policy_too(tmp_path: Path) -> None:
    good = tmp_path / "good"
    shutil.copytree(EXAMPLE, good)
    bank = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "shop", "name": "bank-ca"}, "data": {}}
    bank["data"] = {"ca.crt": Authority.create("outside.example").bundle.decode()}
    (good / "bank.yaml").write_text(yaml.safe_dump(bank))
    done = run("validate", "-f", str(good), "--strict")
    assert done.returncode == 0, done.stdout
    (good / "policy" / "authz.rego").write_text("package shop.authz\n\ndecision := {\n")
    done = run("validate", "-f", str(good))
    assert done.returncode == 1
    assert "policy/authz.rego:" in done.stdout


@pytest.mark.parametrize("form", ["json", "yaml", "table"])
def test_explain_tells_each_step_in_each_form(form: str) -> None:
    batch = "spiffe://shop.example/ns/shop/sa/batch"
    done = run("explain", "--gateway", "edge/ingress", "--as", batch, "-o", form, "POST", "https://shop.example/payments/./1")
    assert done.returncode == 1, done.stderr
    if form == "table":
        for part in ("/payments/./1 is read as /payments/1", "shop/payments#0", "deny", "revision sha256:", "depends on", "403 UAEX"):
            assert part in done.stdout
        assert "\x1b" not in done.stdout
        return
    value = json.loads(done.stdout) if form == "json" else yaml.safe_load(done.stdout)
    steps = {step["name"]: step["details"] for step in value["steps"]}
    assert (value["status"], value["flag"]) == (403, "UAEX")
    assert steps["path"]["path"] == "/payments/1"
    assert "input.parsed_path[0]" in steps["decision"]["depends_on"]
    assert steps["decision"]["revision"].startswith("sha256:")


def test_completion_completes() -> None:
    script = run("completion", "bash").stdout
    assert "complete" in script
    done = subprocess.run(
        [sys.executable, "-m", "tollhouse"],
        env={"_TOLLHOUSE_COMPLETE": "bash_complete", "COMP_WORDS": "tollhouse gat", "COMP_CWORD": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "gateway" in done.stdout


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = f"{sys.executable} -m tollhouse get --config {EXAMPLE} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("KIND")
    assert "Traceback" not in done.stderr


def test_resources_in_etcd() -> None:
    with servers.etcd() as etcd:
        there = ["--config", etcd.url.replace("http://", "etcd://")]
        assert run("apply", "-f", str(EXAMPLE), *there).returncode == 0
        listed = json.loads(run("get", "Gateway", *there, "-o", "json").stdout)
        assert {each["metadata"]["name"] for each in listed} == {"ingress", "eastwest", "egress"}
        published = run("policy", "publish", str(EXAMPLE / "policy"), *there, "--activate")
        assert published.returncode == 0, published.stderr
        revisions = json.loads(run("policy", "list", *there, "-o", "json").stdout)
        assert [each["active"] for each in revisions] == [True]
        assert run("policy", "activate", revisions[0]["name"][:14], *there).returncode == 0
        wrong = run("policy", "activate", "sha256-nothing", *there)
        assert wrong.returncode == 1
        assert revisions[0]["name"][:14] in wrong.stderr

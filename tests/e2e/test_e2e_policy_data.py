"""Data that change without the policy: over real processes, in force when the command returns, and rolled back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_traffic import apply, ask, attached, page, route, service
from e2e_world import EXAMPLE, Mesh, shop, tollhouse

pytestmark = pytest.mark.e2e
GRANTS = """package shop.granted

# What may be done is data's to say.
decision := {"allowed": true, "rule": "granted"} if input.attributes.request.http.method in data.shop.grants[input.parsed_path[1]]

else := {"allowed": false, "rule": "not granted"}

elsewhere := {"allowed": input.attributes.request.http.method in data.shop.other.methods}
"""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with shop(services=("catalog-v1", "catalog-v2"), gateways=("ingress",)) as running:
        apply(running, *service("one", [running.ports["catalog-v1"]], "catalog"))
        for name, decision, place in (
            ("central", "decision", "Central"),
            ("local", "decision", "Local"),
            ("other", "elsewhere", "Central"),
        ):
            apply(running, route(name, f"/catalog/{name}", "one"))
            apply(running, attached("AccessPolicy", name, name, decision=f"shop.granted.{decision}", place=place))
        folder = running.folder / "granted"
        shutil.copytree(EXAMPLE / "policy", folder)
        (folder / "granted.rego").write_text(GRANTS)
        rego = folder / "authz.rego"  # everybody may do anything, as far as the mesh is concerned
        rego.write_text(rego.read_text().replace("if count(allowing) > 0", "if true").replace("min(allowing)", '"any"'))
        tollhouse("policy", "publish", str(folder), "--config", running.config, "--activate")
        yield running


def data(mesh: Mesh, *words: str, check: bool = True) -> Any:
    return tollhouse("policy", "data", *words, "--config", mesh.config, check=check)


def publish(mesh: Mesh, value: Any, root: str, *more: str, check: bool = True) -> Any:
    path = mesh.folder / "data.json"
    path.write_text(json.dumps(value))
    return data(mesh, "publish", str(path), "--root", root, *more, check=check)


def methods(mesh: Mesh) -> tuple[int, int, int]:
    """What becomes of a POST that is decided centrally, locally, and by other data."""
    one, two, three = (ask(mesh, "web", f"/catalog/{name}/1", "POST").status for name in ("central", "local", "other"))
    return one, two, three


def asked(mesh: Mesh, name: str) -> float:
    return mesh.metric("ingress", "tollhouse_decisions_total", policy=f"shop/{name}", kept="false")


def test_data_are_in_force_when_the_command_returns_and_go_back(mesh: Mesh) -> None:
    assert methods(mesh) == (403, 403, 503), "a decision that is undefined without its data is an error"
    publish(mesh, {"methods": ["POST"]}, "shop/other")
    assert methods(mesh) == (403, 403, 200)
    other = asked(mesh, "other")
    publish(mesh, {"central": ["POST"], "local": ["POST"]}, "shop/grants", "--reason", "they may")
    for grants, expected in (({"central": ["POST"]}, (200, 403, 200)), ({"local": ["POST"]}, (403, 200, 200))) * 3:
        publish(mesh, grants, "shop/grants")
        assert methods(mesh) == expected
    assert asked(mesh, "other") == other, "what is kept of other data stays"
    data(mesh, "rollback", "shop/grants", "--reason", "not so")
    assert methods(mesh) == (200, 403, 200)
    data(mesh, "rollback", "shop/grants")
    assert methods(mesh) == (403, 200, 200)
    shown = json.loads(data(mesh, "show", "shop/grants").stdout)
    assert shown == {"local": ["POST"]}
    history = json.loads(data(mesh, "history", "shop/grants", "-o", "json").stdout)
    assert [each["action"] for each in history[:3]] == ["data rollback", "data rollback", "data publish"]
    assert (history[1]["reason"], history[-1]["reason"], history[-1]["before"]) == ("not so", "they may", "")
    listed = {each["root"]: each["revision"] for each in json.loads(data(mesh, "list", "-o", "json").stdout)}
    assert json.loads(page(mesh, "ingress", "/status"))["data"] == listed
    assert "data shop/grants" in tollhouse("policy", "history", "--config", mesh.config).stdout
    data(mesh, "delete", "shop/grants")
    assert methods(mesh) == (403, 403, 200)


def test_what_was_decided_is_explained_and_replayed_with_the_data_in_force(mesh: Mesh) -> None:
    publish(mesh, {"central": ["POST"]}, "shop/grants")
    event = {
        "path": "shop/granted/decision",
        "input": {"attributes": {"request": {"http": {"method": "POST"}}}, "parsed_path": ["catalog", "central", "1"]},
        "result": {"allowed": False, "rule": "not granted"},
        "custom": {"request_id": "one", "policy": "shop/central", "verdict": "deny"},
        "bundles": {"tollhouse": {"revision": "sha256:" + "0" * 64}},
    }
    log = mesh.folder / "decisions.log"
    log.write_text(json.dumps(event) + "\n")
    revision = json.loads(page(mesh, "ingress", "/status"))["policy"]
    for said in ("0 lose access, 1 gain it", "0 lose access, 0 gain it"):
        assert said in tollhouse("policy", "replay", str(log), "--against", revision, "--config", mesh.config).stdout
        publish(mesh, {}, "shop/grants")
    data(mesh, "delete", "shop/grants")


def test_what_clashes_or_overlaps_is_refused_and_changes_nothing(mesh: Mesh) -> None:
    publish(mesh, {"methods": ["POST"]}, "shop/other")
    before = json.loads(page(mesh, "ingress", "/status"))["data"]
    for value, root, why in (
        ({"more": 1}, "shop", "overlap"),
        ({"x": 1}, "shop/other/below", "overlap"),
        ([1], "", "all of data is an object"),
        ({}, "shop//x", "not a path"),
    ):
        done = publish(mesh, value, root, check=False)
        assert done.returncode != 0
        assert why in done.stderr
    folder = mesh.folder / "clashing"
    shutil.copytree(mesh.folder / "granted", folder)
    (folder / "shop" / "other").mkdir(parents=True)
    (folder / "shop" / "other" / "data.json").write_text('{"methods": []}')
    done = tollhouse("policy", "publish", str(folder), "--config", mesh.config, "--activate", check=False)
    assert done.returncode == 1
    assert "leaves no room for the data in force at shop/other" in done.stderr
    # Rules are where the data would be: no engine takes that, and nobody says that it is in force.
    done = publish(mesh, {"decision": True}, "shop/granted", "--timeout", "2s", check=False)
    assert done.returncode == 1
    assert "edge/ingress" in done.stderr
    assert json.loads(page(mesh, "ingress", "/status"))["data"] == before
    assert methods(mesh) == (403, 403, 200)
    data(mesh, "delete", "shop/granted")
    assert methods(mesh) == (403, 403, 200)


def test_a_start_has_the_data_and_none_without_them(mesh: Mesh, tmp_path: Path) -> None:
    publish(mesh, {"central": ["POST"]}, "shop/grants")
    for name in ("pdp", "gateway-ingress"):
        mesh.processes[name].stop()
        mesh.processes[name].start()
    assert methods(mesh) == (200, 403, 200)

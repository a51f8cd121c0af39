from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from quota_world import limit

from mesh.model import Descriptor, GatewayConfig, Listener, Match, Rule, Snapshot, VirtualHost
from quota.descriptor_file import DescriptorError
from quota.descriptors import Descriptors, PolicyLimits

SHOP = """
domain: shop
descriptors:
  - key: database
    value: users
    rate_limit: {unit: second, requests_per_unit: 500}
  - key: database
    rate_limit:
      unit: MINUTE
      requests_per_unit: 7
  - key: path
    value: /api/*
    rate_limit: {name: api, unit: hour, requests_per_unit: 30}
  - key: tier
    value: 1
    descriptors:
      - key: user
        rate_limit: {unit: day, requests_per_unit: 9}
        shadow_mode: true
        detailed_metric: true
      - key: user
        value: root
        rate_limit: {unlimited: true}
  - key: burst
    rate_limit: {name: burst, unit: year, requests_per_unit: 0, replaces: [{name: api}]}
"""


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("database", "users")], ("shop.database_users", 500, "second")),
        ([("database", "orders")], ("shop.database", 7, "minute")),
        ([("database", "")], ("shop.database", 7, "minute")),
        ([("path", "/api/a")], ("shop.path_/api/*", 30, "hour")),
        ([("path", "/ap")], None),
        ([("tier", "1"), ("user", "eve")], ("shop.tier_1.user_eve", 9, "day")),
        ([("tier", "1"), ("user", "root")], ("shop.tier_1.user_root", 0, "")),
        ([("tier", "1")], None),
        ([("tier", "2"), ("user", "eve")], None),
        ([("tier", "1"), ("user", "eve"), ("more", "x")], None),
        ([("database", "users"), ("more", "x")], None),
        ([("nothing", "x")], None),
    ],
)
def test_which_limit_a_descriptor_means(entries: list[tuple[str, str]], expected: tuple[str, int, str] | None) -> None:
    found = Descriptors({"shop.yaml": SHOP}).find("shop", entries, None)
    assert (found and (found.rule, found.requests, found.unit)) == expected


SHARED = """
domain: files
descriptors:
  - {key: open, value: docs/*, share_threshold: true, value_to_metric: true, rate_limit: {unit: hour, requests_per_unit: 10}}
  - {key: read, value: docs/*, rate_limit: {unit: hour, requests_per_unit: 10}}
  - key: user
    value_to_metric: true
    descriptors:
      - {key: act, value: see*, value_to_metric: true, descriptors: [{key: what, rate_limit: {unit: day, requests_per_unit: 1}}]}
      - key: act
        value: do*
        share_threshold: true
        descriptors: [{key: what, detailed_metric: true, rate_limit: {unit: day, requests_per_unit: 1}}]
"""


@pytest.mark.parametrize(
    ("entries", "rule", "key"),
    [
        ([("open", "docs/a")], "files.open_docs/*", ("open", "docs/*")),
        ([("read", "docs/a")], "files.read_docs/*", ("read", "docs/a")),
        ([("user", "eve"), ("act", "seen"), ("what", "x")], "files.user_eve.act_seen.what", ("user", "eve", "act", "seen", "what", "x")),
        ([("user", "eve"), ("act", "done"), ("what", "x")], "files.user_eve.act_do*.what_x", ("user", "eve", "act", "do*", "what", "x")),
    ],
)
def test_values_that_share_a_bucket_and_values_in_metrics(entries: list[tuple[str, str]], rule: str, key: tuple[str, ...]) -> None:
    found = Descriptors({"files.yaml": SHARED}).find("files", entries, None)
    assert found is not None and found.question is not None
    assert (found.rule, found.question.key) == (rule, key)


def test_values_have_buckets_of_their_own() -> None:
    limits = Descriptors({"shop.yaml": SHOP})
    found = [limits.find("shop", [("database", name)], None) for name in ("a", "b", "a")]
    keys = [one.question.key for one in found if one and one.question]
    assert keys[0] == keys[2] != keys[1]
    question = found[0].question if found[0] else None
    assert question is not None and (question.limit.tokens, question.limit.interval, question.limit.burst) == (7, 60.0, 7)


def test_flags_names_and_what_is_replaced() -> None:
    limits = Descriptors({"shop.yaml": SHOP})
    user = limits.find("shop", [("tier", "1"), ("user", "eve")], None)
    assert user is not None and user.shadow and user.question is not None and user.question.limit.shadow
    burst = limits.find("shop", [("burst", "x")], None)
    assert burst is not None and burst.name == "burst" and burst.replaces == {"api"}


def test_an_override_needs_the_domain_to_be_known() -> None:
    limits = Descriptors({"shop.yaml": SHOP})
    assert limits.find("other", [("a", "b")], (5, "hour")) is None
    found = limits.find("shop", [("a", "b")], (5, "hour"))
    assert found is not None and found.question is not None and (found.requests, found.question.limit.interval) == (5, 3600.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1: the file has to be a mapping"),
        ("a: [", "x.yaml:1: not YAML"),
        ("descriptors: []", "x.yaml:1: domain is missing"),
        ("domain: tollhouse", "domain tollhouse is that of QuotaPolicies"),
        ("domain: a\nlimits: []", "x.yaml:2: limits is not a field of the file; there are domain, descriptors"),
        ("domain: a\ndomain: b", "x.yaml:2: domain is there twice"),
        ("domain: a\ndescriptors: {}", "x.yaml:2: descriptors has to be a list"),
        ("domain: a\ndescriptors:\n- value: b", "x.yaml:3: a descriptor needs a key"),
        ("domain: a\ndescriptors:\n- key:", "x.yaml:3: key has to be a text"),
        ("domain: a\ndescriptors:\n- key: b\n- key: b", "x.yaml:4: a.b is there twice"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit:\n    unit: eon\n    requests_per_unit: 1", "x.yaml:5: unit eon: use one of"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit:\n    requests_per_unit: 1", "unit is missing"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit:\n    unit: day", "x.yaml:5: requests_per_unit is missing"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit: {unit: day, requests_per_unit: -1}", "x.yaml:4: requests_per_unit is from 0"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit: {unit: day, requests_per_unit: 1.5}", "has to be a whole number"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit: {unit: day, requests_per_unit: true}", "has to be a whole number"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit: {unlimited: true, unit: day}", "x.yaml:4: an unlimited rate_limit has neither"),
        ("domain: a\ndescriptors:\n- key: b\n  shadow_mode: true", "x.yaml:3: a.b: shadow_mode, quota_mode and detailed_metric"),
        ("domain: a\ndescriptors:\n- key: b\n  share_threshold: true", "x.yaml:4: a.b: share_threshold is for values that end in *"),
        ("domain: a\ndescriptors:\n- key: b\n  expires: 1", "x.yaml:4: expires is not a field of a descriptor"),
        ("domain: a\ndescriptors:\n- key: b\n  shadow_mode: true\n  quota_mode: true", "x.yaml:5: a.b: shadow_mode and quota_mode exclude"),
        ("domain: a\ndescriptors:\n- key: b\n  rate_limit: {name: n, unlimited: true, replaces: [{name: n}]}", "name of another"),
        ("domain: a\ndescriptors:\n- b", "x.yaml:3: a descriptor has to be a mapping"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_say_where(text: str, message: str) -> None:
    with pytest.raises(DescriptorError) as caught:
        Descriptors({"x.yaml": text})
    assert message in str(caught.value)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DescriptorError, match=r"no \.yaml file"):
        Descriptors.read(tmp_path)
    (tmp_path / "shop.yaml").write_text(SHOP)
    (tmp_path / "other.yml").write_text("domain: other\n")
    (tmp_path / ".hidden.yaml").write_text("nonsense")
    assert Descriptors.read(tmp_path).domains == ("other", "shop")
    (tmp_path / "twice.yaml").write_text("domain: shop\n")
    with pytest.raises(DescriptorError, match=r"twice\.yaml:1: domain shop is in another file"):
        Descriptors.read(tmp_path)


def snapshot() -> Snapshot:
    everything = limit("shop/orders/all", 10, 1.0, 20, cost=2)
    per = (Descriptor("header", "x-tenant"), Descriptor("constant", "gold"))
    tenant = msgspec.structs.replace(limit("shop/orders/tenant", 100, 90.0, 50), per=per)
    rule = Rule(name="shop/orders#0", route="HTTPRoute shop/orders", namespace="shop", limits=(everything, tenant))
    match = Match(rule=rule, path_kind="prefix", path=b"/orders", template="/orders/**")
    host = VirtualHost(hostname="*", prefix={b"/orders": (match,)})
    listener = Listener(name="web", port=80, protocol="HTTP", hosts={"*": host})
    return Snapshot(version="1", gateways={"shop/edge": GatewayConfig(namespace="shop", name="edge", listeners=(listener,))})


@pytest.mark.parametrize(
    ("domain", "entries", "expected"),
    [
        ("tollhouse", [("limit", "shop/orders/all")], ((), 2, 10, "second")),
        ("tollhouse", [("limit", "shop/orders/tenant"), ("header", "acme"), ("constant", "gold")], (("acme", "gold"), 1, 4000, "hour")),
        ("tollhouse", [("limit", "shop/orders/tenant"), ("header", "acme"), ("constant", "silver")], None),
        ("tollhouse", [("limit", "shop/orders/tenant"), ("constant", "gold"), ("header", "acme")], None),
        ("tollhouse", [("limit", "shop/orders/tenant")], None),
        ("tollhouse", [("limit", "shop/orders/none")], None),
        ("tollhouse", [("header", "shop/orders/all")], None),
        ("tollhouse", [], None),
        ("shop", [("limit", "shop/orders/all")], None),
    ],
)
def test_limits_of_quota_policies(domain: str, entries: list[tuple[str, str]], expected: tuple[object, ...] | None) -> None:
    found = PolicyLimits.of(snapshot()).find(domain, entries, None)
    assert (found and found.question and (found.question.key, found.question.cost, found.requests, found.unit)) == expected

"""Which bucket a request takes from, what it costs, whom a limit is not for, and who has other numbers."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import a_head, a_peer

from gateway.buckets import Bucket, bucket_for
from mesh.compile_quota import quota_limits
from mesh.model import MeshSettings
from mesh.peer import Caller
from mesh.questions import Asking, SlotQuestion, TokenQuestion
from mesh.quota_tables import table_of
from mesh.tokens import Bearer, KeySource, TokenRule

MESH = MeshSettings(trust_domain="shop.example")
WEB = "spiffe://shop.example/ns/shop/sa/web"


def bucket(**limit: Any) -> Bucket:
    (made,) = quota_limits("shop/orders", {"limits": [{"name": "a", "tokens": 10, **limit}]}, "route", {})
    return Bucket(made, MESH)


def asking(principal: str = WEB, claims: dict[str, Any] | None = None, **headers: str) -> Asking:
    head = a_head(b"/orders", headers=[(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()])
    if claims is not None:
        rule = TokenRule(name="shop/a#0", issuer="i", keys=KeySource(inline="{}"))
        head.bearer = Bearer(rule=rule, principal="i/s", claims=claims, headers=(), outputs=frozenset(), expires=0.0)
    return Asking(head, a_peer(), Caller(principal), "edge/gw", "https", "shop/orders#0", "/orders/**", "shop/orders", 0.0)


def key(made: Bucket, asked: Asking, address: str = "10.0.0.1") -> tuple[str, ...] | None:
    question = made.question(asked, address)
    return question.key if question is not None else None


@pytest.mark.parametrize(
    ("per", "asked", "values"),
    [
        (["identity", "route"], asking(), (WEB, "shop/orders")),
        ([{"cookie": "sid"}], asking(cookie="a=b; sid = x ;sid=y"), ("x",)),
        ([{"cookie": "sid"}], asking(cookie="sidx=1"), ("",)),
        ([{"cookie": "sid"}], asking(cookie="sid=" + "x" * 300), ("sha256:9b1f2d8b",)),
        ([{"claim": "tenant"}], asking(claims={"tenant": "blue"}), ("blue",)),
        ([{"claim": "tenant"}], asking(claims={"tenant": ["b", 1, {"z": 1, "a": 2}]}), ('["b",1,{"a":2,"z":1}]',)),
        ([{"claim": "tenant"}], asking(claims={}), ("",)),
        ([{"claim": "tenant"}], asking(tenant="forged"), ("",)),
        ([{"header": "X-Tenant"}, {"constant": "c"}], asking(x_tenant="blue"), ("blue", "c")),
        (["namespace", "method", "template", "service", "gateway"], asking(), ("shop", "GET", "/orders/**", "shop/orders", "edge/gw")),
        ([{"header": "x-tenant"}], asking(x_tenant="\x00\x1b[31m\t"), ("\x00\x1b[31m\t",)),
        ([{"header": "x-tenant"}], asking(x_tenant="x" * 100_000), ("sha256:",)),
        ([{"claim": "tenant"}], asking(claims={"tenant": "x" * 100_000}), ("sha256:",)),
        ([{"header": "x-tenant"}], asking(x_tenant="m\u00fcller"), ("m\u00fcller",)),
        ([{"claim": "tenant"}], asking(claims={"tenant": "m\u00fcller"}), ("m\u00fcller",)),
        (
            ["address", {"address": {"v4PrefixLength": 24}}, {"address": {"v6PrefixLength": 48}}],
            asking(),
            ("10.0.0.1", "10.0.0.0/24", "10.0.0.1/32"),
        ),
    ],
)
def test_the_name_of_a_bucket(per: list[Any], asked: Asking, values: tuple[str, ...]) -> None:
    found = key(bucket(per=per), asked)
    assert found is not None
    assert [one if not one.startswith("sha256:") else "sha256:" for one in found] == [
        one if not one.startswith("sha256:") else "sha256:" for one in values
    ]


def test_a_value_that_is_not_utf8_names_a_bucket_too() -> None:
    asked = asking()
    asked.head.headers.append((b"x-tenant", b"m\xfcller"))
    assert key(bucket(per=[{"header": "x-tenant"}]), asked) == ("m\u00fcller",)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.1.2.3", "10.1.2.0/24"),
        ("::ffff:10.1.2.3", "10.1.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("no address", "no address"),
    ],
)
def test_clients_of_one_network_share_a_bucket(address: str, network: str) -> None:
    assert key(bucket(per=[{"address": {"v4PrefixLength": 24, "v6PrefixLength": 64}}]), asking(), address) == (network,)


COSTS = {None: 2, "1": 1, "0": 1, "7": 7, "8": 8, "9": 8} | dict.fromkeys(("-1", "", "1e3", "4.5", "9" * 400, " 3", "\u00b2"), 8)


@pytest.mark.parametrize(("said", "cost"), COSTS.items())
def test_what_a_request_says_that_it_costs(said: str | None, cost: int) -> None:
    asked = asking() if said is None else asking(x_cost=said)
    question = bucket(cost=2, costFrom={"header": "X-Cost", "most": 8}).question(asked, "10.0.0.1")
    assert question is not None and question.cost == cost


EXEMPT = [
    {"identity": "spiffe://shop.example/ns/ops/sa/prober"},
    {"namespace": "monitoring"},
    {"address": "192.168.0.0/16"},
    {"address": "2001:db8::1"},
    {"claim": {"name": "plan", "value": "gold"}},
]


@pytest.mark.parametrize(
    ("asked", "address", "exempt"),
    [
        (asking(), "10.0.0.1", False),
        (asking("spiffe://shop.example/ns/ops/sa/prober"), "10.0.0.1", True),
        (asking("spiffe://shop.example/ns/ops/sa/prober2"), "10.0.0.1", False),
        (asking("spiffe://shop.example/ns/monitoring/sa/any"), "10.0.0.1", True),
        (asking("spiffe://elsewhere.example/ns/monitoring/sa/any"), "10.0.0.1", False),
        (asking(), "192.168.7.7", True),
        (asking(), "::ffff:192.168.7.7", True),
        (asking(), "2001:db8::1", True),
        (asking(), "2001:db8::2", False),
        (asking(), "no address", False),
        (asking(claims={"plan": "gold"}), "10.0.0.1", True),
        (asking(claims={"plan": "golden"}), "10.0.0.1", False),
        (asking(plan="gold"), "10.0.0.1", False),
    ],
)
def test_whom_a_limit_is_not_for(asked: Asking, address: str, exempt: bool) -> None:
    assert (bucket(exempt=EXEMPT).question(asked, address) is None) is exempt


def test_who_has_other_numbers_has_them_in_a_bucket_of_the_same_name() -> None:
    overrides = [{"values": ["gold"], "tokens": 100}, {"values": ["slow"], "interval": "1m"}, {"values": ["wide"], "burst": 50}]
    made = bucket(per=[{"header": "plan"}], overrides=overrides, burst=20)
    found = {}
    for plan in ("gold", "slow", "wide", "none"):
        question = made.question(asking(plan=plan), "10.0.0.1")
        assert question is not None and question.key == (plan,)
        found[plan] = (question.limit.name, question.limit.tokens, question.limit.interval, question.limit.burst)
    assert found == {
        "gold": ("shop/orders/a", 100, 1.0, 100),
        "slow": ("shop/orders/a", 10, 60.0, 20),
        "wide": ("shop/orders/a", 10, 1.0, 50),
        "none": ("shop/orders/a", 10, 1.0, 20),
    }


def test_a_table_gives_other_numbers_and_says_whom_a_limit_is_not_for() -> None:
    said = {"name": "a", "tokens": 10, "per": [{"header": "plan"}], "overrides": [{"values": ["gold"], "tokens": 100}]}
    (limit,) = quota_limits("shop/orders", {"limits": [said]}, "route", {})
    rows = [
        {"values": ["gold"], "tokens": 7},
        {"values": ["blue"], "tokens": 50, "interval": "1m"},
        {"values": ["wide"], "burst": 30},
        {"values": ["ours"], "exempt": True},
        {"values": ["a", "b"], "tokens": 3},
    ]
    made = Bucket(limit, MESH, table_of({"rows": rows}))
    found = {}
    for plan in ("gold", "blue", "wide", "ours", "none"):
        question = made.question(asking(plan=plan), "10.0.0.1")
        found[plan] = (question.limit.tokens, question.limit.interval, question.limit.burst) if question is not None else None
        again = made.question(asking(plan=plan), "10.0.0.1")
        assert question is None or (again is not None and again.limit is question.limit)  # nothing is made for each request
    assert found == {"gold": (100, 1.0, 100), "blue": (50, 60.0, 50), "wide": (10, 1.0, 30), "ours": None, "none": (10, 1.0, 10)}


def slot(asked: Asking, **limit: Any) -> TokenQuestion:
    (made,) = quota_limits("shop/orders", {"limits": [{"name": "a", "concurrency": 10, **limit}]}, "route", {})
    question = bucket_for(made, MESH).question(asked, "10.0.0.1")
    assert question is not None
    return question


def test_whose_share_of_a_concurrency_limit_a_request_is_and_what_is_held_back_from_it() -> None:
    shares = {"by": {"header": "x-tenant"}, "weights": [{"value": "gold", "weight": 3}]}
    reserve = {"percent": 25, "for": [{"namespace": "ops"}]}
    gold = slot(asking(x_tenant="gold"), shares=shares)
    assert isinstance(gold, SlotQuestion) and (gold.caller, gold.weight, gold.reserve, gold.key) == ("gold", 3, 0, ())
    other = slot(asking(x_tenant="x"), shares=shares, reserve=reserve)
    assert isinstance(other, SlotQuestion) and (other.caller, other.weight, other.reserve) == ("x", 1, 3)
    ops = slot(asking("spiffe://shop.example/ns/ops/sa/a"), reserve=reserve)
    assert isinstance(ops, SlotQuestion) and (ops.caller, ops.weight, ops.reserve) == ("", 1, 0)
    lowered = slot(asking(x_tenant="x"), per=["method"], reserve=reserve, overrides=[{"values": ["GET"], "concurrency": 1}])
    assert isinstance(lowered, SlotQuestion) and lowered.reserve == 0  # one slot is not held back from everybody
    assert type(slot(asking())) is TokenQuestion

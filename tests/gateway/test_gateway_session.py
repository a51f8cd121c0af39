"""Sessions: tokens that are made, taken and refused; and endpoints that are kept, over real connections."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from gateway_world import a_cluster, a_head, a_rule, pending_of, place_of
from hypothesis import given
from hypothesis import strategies as st
from upstream_world import World, cluster_of, ok, permit, run, serves, unused_port, upstream

from gateway.choice import Chooser
from gateway.place import Place
from gateway.plan import Permit, Plan
from gateway.session import SessionKeeper
from mesh.filters import Session
from mesh.model import Backend, Endpoint, Snapshot

KEY = b"k" * 32
COOKIE = Session(name=b"sid", key=KEY, path=b"/orders")
NOW = 1_700_000_000.0
ENDPOINTS = tuple(Endpoint(address=f"10.0.0.{number}", port=9000) for number in range(1, 5))
ONE, TWO = a_cluster("shop/one:80"), a_cluster("shop/two:80")
ONE = msgspec.structs.replace(ONE, endpoints=ENDPOINTS[:2])
TWO = msgspec.structs.replace(TWO, endpoints=ENDPOINTS[2:])
BACKENDS = (Backend(weight=1, cluster="shop/one:80", service="shop/one"), Backend(weight=0, cluster="shop/two:80", service="shop/two"))


def place_with(session: Session = COOKIE, **changes: Any) -> Place:
    return place_of(a_rule(session=session, backends=BACKENDS), clusters=(ONE, TWO), **changes)


def keeper(session: Session = COOKIE) -> SessionKeeper:
    snapshot = Snapshot(version="1", clusters={"shop/one:80": ONE, "shop/two:80": TWO})
    found = Chooser(a_rule(session=session, backends=BACKENDS), snapshot).sessions
    assert found is not None
    return found


def token(cluster: str, address: str, now: float = NOW, session: Session = COOKIE, port: int = 9000) -> bytes:
    _, value = keeper(session).header(cluster, (address, port), now, secure=False)
    return value if session.header else value.partition(b";")[0].partition(b"=")[2]


def plan_of(place: Place, *headers: tuple[bytes, bytes]) -> Plan:
    plan = pending_of(place, a_head(headers=headers)).plan
    assert isinstance(plan, Plan)
    assert plan.stay is not None
    return plan


def test_a_client_without_a_token_is_sent_anywhere_and_told() -> None:
    plan = plan_of(place_with())
    assert plan.stay is not None
    assert plan.stay.place is None
    (field,) = plan.stay.told([], "shop/one:80", ("10.0.0.1", 9000))
    assert field[0] == b"set-cookie"
    assert field[1].startswith(b"sid=")
    assert field[1].endswith(b"; Path=/orders; HttpOnly; Secure")


@pytest.mark.parametrize(("cluster", "address"), [("shop/one:80", "10.0.0.2"), ("shop/two:80", "10.0.0.3")])
def test_a_token_names_the_backend_and_the_endpoint_whatever_the_weights(cluster: str, address: str) -> None:
    cookie = b"a=b; sid=%s;c=d" % token(cluster, address)
    plan = plan_of(place_with(), (b"cookie", cookie))
    assert plan.stay is not None
    assert (plan.cluster.name, plan.stay.place) == (cluster, (address, 9000))
    assert plan.stay.told([(b"x", b"1")], cluster, (address, 9000)) == [(b"x", b"1")]
    assert len(plan.stay.told([], cluster, ("10.0.0.9", 9000))) == 1


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"x",
        b"A" * 39,
        b"A" * 40,
        b"!" * 39,
        token("shop/one:80", "10.0.0.2")[:-1],
        token("shop/one:80", "10.0.0.2") + b"AA",
        token("shop/one:80", "192.0.2.1"),
        token("shop/other:80", "10.0.0.2"),
        token("shop/one:80", "10.0.0.2", port=22),
        token("shop/one:80", "10.0.0.2", session=msgspec.structs.replace(COOKIE, key=b"z" * 32)),
        token("shop/one:80", "10.0.0.2", NOW + 3600),
    ],
)
def test_a_token_that_is_not_genuine_is_as_good_as_none(forged: bytes) -> None:
    assert plan_of(place_with(), (b"cookie", b"sid=" + forged)).stay.place is None  # type: ignore[union-attr]


@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_make_a_token(noise: bytes, encoded: bool) -> None:
    value = base64.urlsafe_b64encode(noise) if encoded else noise
    assert keeper().find(a_head(headers=[(b"cookie", b"sid=" + value)]), NOW) is None


@given(st.integers(0, 28), st.integers(1, 255))
def test_a_token_with_one_bit_changed_is_worth_nothing(at: int, change: int) -> None:
    raw = bytearray(base64.urlsafe_b64decode(token("shop/one:80", "10.0.0.2") + b"=="))
    raw[at % len(raw)] ^= change
    cookie = b"sid=" + base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=")
    assert keeper().find(a_head(headers=[(b"cookie", cookie)]), NOW) is None


def test_a_session_ends_with_its_lifetime() -> None:
    session = msgspec.structs.replace(COOKIE, lifetime=600.0)
    cookie = [(b"cookie", b"sid=" + token("shop/one:80", "10.0.0.2", session=session))]
    assert keeper(session).find(a_head(headers=cookie), NOW + 599) is not None
    assert keeper(session).find(a_head(headers=cookie), NOW + 600) is None


def test_a_permanent_cookie_says_for_how_long() -> None:
    session = msgspec.structs.replace(COOKIE, lifetime=600.0, permanent=True)
    _, value = keeper(session).header("shop/one:80", ("10.0.0.1", 9000), NOW, secure=False)
    assert value.endswith(b"; Path=/orders; HttpOnly; Max-Age=600")


def test_a_header_in_place_of_a_cookie() -> None:
    session = Session(name=b"x-session", header=True, key=KEY)
    given_ = token("shop/one:80", "10.0.0.2", session=session)
    plan = plan_of(place_with(session), (b"x-session", given_))
    assert plan.stay is not None
    assert plan.stay.place == ("10.0.0.2", 9000)
    assert plan.stay.told([], "shop/one:80", ("10.0.0.1", 9000))[0][0] == b"x-session"
    twice = plan_of(place_with(session), (b"x-session", given_), (b"x-session", given_))
    assert twice.stay is not None
    assert twice.stay.place is None


def test_a_token_says_nothing_of_the_endpoint() -> None:
    raw = base64.urlsafe_b64decode(token("shop/one:80", "10.0.0.2") + b"==")
    assert b"10.0" not in raw
    assert bytes((10, 0, 0, 2)) not in raw


def test_without_a_session_nothing_is_kept() -> None:
    plan = pending_of(place_of(a_rule()), a_head(headers=[(b"cookie", b"sid=x")])).plan
    assert isinstance(plan, Plan)
    assert plan.stay is None


# Over connections


def staying(cluster: Any, place: tuple[str, int] | None) -> Permit:
    asked = permit(cluster)
    plan = msgspec.structs.replace(asked.plan, stay=keeper().stay(place, NOW, secure=True))
    return msgspec.structs.replace(asked, plan=plan)


def test_the_endpoint_is_kept_while_it_is_fit() -> None:
    with upstream(serves(ok(b"a"))) as first, upstream(serves(ok(b"b"))) as second:

        async def conversation(world: World) -> None:
            cluster = cluster_of(first.endpoint(), second.endpoint())
            for upstream_, body in ((first, b"a"), (second, b"b")):
                for _ in range(4):
                    client = await world.ask(staying(cluster, ("127.0.0.1", upstream_.port)))
                    assert client.body == body
                    assert b"set-cookie" not in dict(client.headers)
            new = await world.ask(staying(cluster, None))
            assert dict(new.headers)[b"set-cookie"].startswith(b"sid=")

        run(conversation)


def test_an_endpoint_that_cannot_be_reached_is_left_and_the_client_told() -> None:
    with upstream(serves(ok(b"a"))) as first:

        async def conversation(world: World) -> None:
            gone = unused_port()
            cluster = cluster_of(first.endpoint(), Endpoint(address="127.0.0.1", port=gone, identities=("spiffe://x/y",)))
            client = await world.ask(staying(cluster, ("127.0.0.1", gone)))
            assert (client.status, client.outcome.attempts) == (200, 2)
            assert b"set-cookie" in dict(client.headers)
            gone_altogether = await world.ask(staying(cluster_of(first.endpoint(), name="shop/x:1"), ("192.0.2.1", 1)))
            assert b"set-cookie" in dict(gone_altogether.headers)

        run(conversation)

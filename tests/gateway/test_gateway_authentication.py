"""Tokens at the gateway: where they are found, what is refused, and what services and policies see."""

from __future__ import annotations

import gc
import random
from typing import Any

import msgspec
import pytest
from gateway_world import WEB, a_cluster, a_head, a_host, a_listener, a_match, a_peer, a_place, a_rule
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.authentication import Authenticated
from gateway.grpc_calls import trailers_of
from gateway.place import Place
from gateway.plan import Pending, Plan
from gateway.route import route
from identity.authenticator import KeysWanted, Tokens
from mesh.http import RequestHead
from mesh.jwks import parse_keys
from mesh.model import Backend, HeaderMatch
from mesh.refusals import InvalidToken, PolicyError
from mesh.tokens import Authentication, KeySource, TokenRule
from tests.tokens import ISSUER, NOW, jwks, mint

SECOND = "https://second.example"
TOKEN = mint("r1", now=NOW).encode()
OTHER = mint("r1", now=NOW, sub="bob").encode()
BAD = mint("r2", header={"kid": "r1"}, now=NOW).encode()


def rule(name: str = "edge/users#0", keys: str = "r1", **changes: Any) -> TokenRule:
    return TokenRule(**{"name": name, "issuer": ISSUER, "keys": KeySource(inline=jwks(keys)), **changes})


def place(*rules: TokenRule, service: tuple[TokenRule, ...] = (), broken: str = "", tokens: Tokens | None = None, **changes: Any) -> Place:
    made = a_rule()
    if service:
        (backend,) = made.backends
        made = a_rule(backends=(msgspec.structs.replace(backend, authentication=Authentication(service)),))
    found = a_place(a_listener(a_host(a_match(made), hostname="*")), **changes)
    return authenticated(found, Authentication(rules, broken), tokens)


def authenticated(found: Place, config: Authentication, tokens: Tokens | None = None) -> Place:
    gateway = msgspec.structs.replace(found.gateway, authentication=config)
    return Place(found.snapshot, gateway, found.listener, found.siblings, found.identity, tokens or Tokens())


def head(*headers: tuple[bytes, bytes], target: bytes = b"/orders/1", method: bytes = b"GET") -> RequestHead:
    return a_head(target, method, headers)


def routed(where: Place, made: RequestHead, principal: str = WEB, **options: Any) -> Any:
    return route(made, a_peer(principal), where, float(NOW), random.Random(1), **options)


def sent(where: Place, made: RequestHead, principal: str = WEB) -> dict[bytes, list[bytes]]:
    """What the service gets."""
    found = routed(where, made, principal)
    assert isinstance(found, Pending), found
    assert isinstance(found.plan, Plan)
    headers: dict[bytes, list[bytes]] = {}
    for name, value in found.plan.headers:
        headers.setdefault(name, []).append(value)
    return headers


def bearer(token: bytes = TOKEN) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + token


EVERYWHERE = rule(
    headers=((b"x-jwt", ""), (b"authorization", "Bearer "), (b"x-prefixed", "jwt:")), params=("t", "a b"), cookies=("session", "other")
)


@pytest.mark.parametrize(
    ("made", "principal"),
    [
        (head(), ""),
        (head(bearer()), "alice"),
        (head((b"authorization", b"bearer " + TOKEN)), "alice"),
        (head((b"authorization", b"BEARER   " + TOKEN)), "alice"),
        (head((b"authorization", b"Bearer\t" + TOKEN)), "alice"),
        (head((b"authorization", b"Bearer" + TOKEN)), ""),
        (head((b"authorization", b"Basic " + TOKEN)), ""),
        (head((b"authorization", b"Bearer")), ""),
        (head((b"authorization", TOKEN)), ""),
        (head((b"x-jwt", TOKEN)), "alice"),
        (head((b"x-prefixed", b"jwt:" + TOKEN)), "alice"),
        (head((b"x-prefixed", b"JWT:" + TOKEN)), ""),
        (head((b"x-else", TOKEN)), ""),
        (head(target=b"/orders?t=" + TOKEN), "alice"),
        (head(target=b"/orders?x=1&%74=" + TOKEN + b"&y"), "alice"),
        (head(target=b"/orders?a+b=" + TOKEN.replace(b".", b"%2E")), "alice"),
        (head(target=b"/orders?access_token=" + TOKEN), ""),
        (head((b"cookie", b"a=b; session=" + TOKEN + b"; c=d")), "alice"),
        (head((b"cookie", b"a=b"), (b"cookie", b"other=" + TOKEN)), "alice"),
        (head((b"cookie", b'other="' + TOKEN + b'"')), "alice"),
        (head((b"cookie", b"xsession=" + TOKEN)), ""),
        # The same token twice is one.
        (head(bearer(), (b"x-jwt", TOKEN), target=b"/orders?t=" + TOKEN), "alice"),
    ],
)
def test_where_a_token_is_found(made: RequestHead, principal: str) -> None:
    found = routed(place(EVERYWHERE), made)
    assert isinstance(found, Pending)
    assert (made.bearer.principal if made.bearer else "") == (f"{ISSUER}/{principal}" if principal else "")


def test_where_several_prefixes_fit_the_longest_is_meant() -> None:
    first = rule(headers=((b"x-jwt", ""),), params=())
    second = rule("edge/users#1", "r2", issuer=SECOND, headers=((b"x-jwt", "jwt "),), params=())
    token = mint("r2", now=NOW, iss=SECOND).encode()
    made = head((b"x-jwt", b"jwt " + token))
    assert isinstance(routed(place(first, second), made), Pending)
    assert made.bearer is not None
    assert made.bearer.rule is second
    assert isinstance(routed(place(first, second), head((b"x-jwt", token))), InvalidToken)
    assert isinstance(routed(place(first, second), head((b"x-jwt", TOKEN))), Pending)


def test_by_default_it_is_looked_for_in_two_places() -> None:
    for made in (head(bearer()), head(target=b"/orders?access_token=" + TOKEN)):
        routed(place(rule()), made)
        assert made.bearer is not None
    for made in (head((b"x-jwt", TOKEN)), head((b"cookie", b"access_token=" + TOKEN))):
        routed(place(rule()), made)
        assert made.bearer is None


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (head(bearer(BAD)), "Jwt verification fails"),
        (head(bearer(b"x")), "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        (head(bearer(TOKEN + b", Bearer " + TOKEN)), "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        (head((b"x-jwt", b"")), "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        (head((b"x-jwt", b"\xff\xfe.a.b")), "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        (head(target=b"/orders?t="), "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        (head(bearer(), (b"x-jwt", OTHER)), "Jwt is not the only one of the request"),
        (head(bearer(), bearer(OTHER)), "Jwt is not the only one of the request"),
        (head(bearer(), (b"x-jwt", BAD)), "Jwt is not the only one of the request"),
        (head(bearer(), target=b"/orders?t=" + OTHER), "Jwt is not the only one of the request"),
        (head(target=b"/orders?t=" + OTHER + b"&t=" + TOKEN), "Jwt is not the only one of the request"),
        (head((b"cookie", b"session=" + TOKEN + b"; session=" + OTHER)), "Jwt is not the only one of the request"),
        (head(bearer(mint("r1", now=NOW, iss=SECOND).encode())), "Jwt issuer is not configured"),
        (head(bearer(mint("r1", now=NOW, exp=1).encode())), "Jwt is expired"),
    ],
)
def test_what_is_refused(made: RequestHead, reason: str) -> None:
    found = routed(place(EVERYWHERE), made)
    assert isinstance(found, InvalidToken)
    assert (found.answer_status, found.flag, found.reason, found.told) == (401, "UAEX", reason, reason)
    realm = b'Bearer realm="https://shop.example' + made.path + b'", error="invalid_token"'
    assert found.headers == ((b"www-authenticate", realm),)
    assert TOKEN not in found.reason.encode() + found.headers[0][1]
    assert dict(trailers_of(found)) == {b"grpc-status": b"16", b"grpc-message": reason.encode()}


def test_a_token_for_somebody_else_is_forbidden() -> None:
    found = routed(place(rule(audiences=("me",))), head(bearer()))
    assert isinstance(found, InvalidToken)
    assert (found.answer_status, found.reason) == (403, "Audiences in Jwt are not allowed")
    assert dict(trailers_of(found))[b"grpc-status"] == b"7"


def test_a_realm_is_one_quoted_string() -> None:
    found = routed(place(rule()), head(bearer(BAD), target=b'/a"b'))
    assert dict(found.headers)[b"www-authenticate"] == b'Bearer realm="https://shop.example/a%22b", error="invalid_token"'


TELLING = rule(
    payload_header=b"x-payload",
    claim_headers=((b"x-user", ("sub",)), (b"x-forwarded-user", ("sub",)), (b"x-missing", ("missing",))),
    cookies=("session",),
    headers=((b"authorization", "Bearer "), (b"x-jwt", "")),
)
FORGED = ((b"x-user", b"mallory"), (b"x-user", b"eve"), (b"x-payload", b"e30"), (b"x-missing", b"root"), (b"x-forwarded-user", b"mallory"))


@pytest.mark.parametrize("principal", ["", WEB, "spiffe://shop.example/ns/edge/sa/eastwest"])
def test_headers_about_claims_are_never_the_clients(principal: str) -> None:
    made = head(*FORGED)
    got = sent(place(TELLING), made, principal)
    assert not {name for name, _ in FORGED} & got.keys()
    assert not {name for name, _ in FORGED} & {name for name, _ in made.headers}
    made = head(*FORGED, bearer())
    got = sent(place(TELLING), made, principal)
    assert (got[b"x-user"], got[b"x-payload"], got[b"x-forwarded-user"]) == ([b"alice"], [TOKEN.split(b".")[1]], [b"alice"])
    assert b"x-missing" not in got
    assert b"authorization" not in got
    # Policies see what the service gets.
    assert made.header(b"x-user") == b"alice"
    assert made.header(b"authorization") is None
    assert made.reserved == TELLING.outputs | {b"authorization", b"x-jwt"}


def test_what_is_left_of_a_request_without_its_token() -> None:
    got = sent(place(TELLING), head((b"authorization", b"Basic eA=="), (b"x-jwt", TOKEN), (b"cookie", b"a=b")))
    assert (got[b"authorization"], got[b"cookie"]) == ([b"Basic eA=="], [b"a=b"])
    assert b"x-jwt" not in got
    got = sent(place(TELLING), head((b"cookie", b"a=b; session=" + TOKEN + b"; c=d"), (b"cookie", b"session=" + TOKEN)))
    assert got[b"cookie"] == [b"a=b; c=d"]
    where = place(rule(params=("t",)))
    made = head(target=b"/orders?a=1&t=" + TOKEN + b"&b=2")
    found = routed(where, made)
    assert (found.plan.target, made.query, made.target) == (b"/orders?a=1&b=2", b"a=1&b=2", b"/orders?a=1&b=2")
    made = head(target=b"/orders?t=" + TOKEN)
    assert (routed(where, made).plan.target, made.query, made.target) == (b"/orders", None, b"/orders")


def test_a_token_is_forwarded_where_the_rule_says_so() -> None:
    where = place(msgspec.structs.replace(TELLING, forward=True, params=("t",)))
    got = sent(where, head(bearer(), *FORGED))
    assert (got[b"authorization"], got[b"x-user"]) == ([b"Bearer " + TOKEN], [b"alice"])
    assert sent(where, head((b"x-jwt", TOKEN)))[b"x-jwt"] == [TOKEN]
    made = head(target=b"/orders?t=" + TOKEN)
    assert routed(where, made).plan.target == b"/orders?t=" + TOKEN


def test_one_rule_forwards_and_another_does_not() -> None:
    second = rule("edge/users#1", "r2", issuer=SECOND, forward=True, claim_headers=((b"x-second", ("sub",)),))
    where = place(TELLING, second)
    got = sent(where, head(bearer(), *FORGED, (b"x-second", b"mallory")))
    assert b"authorization" not in got
    assert b"x-second" not in got
    token = mint("r2", now=NOW, iss=SECOND).encode()
    got = sent(where, head(bearer(token), *FORGED, (b"x-second", b"mallory")))
    assert (got[b"authorization"], got[b"x-second"]) == ([b"Bearer " + token], [b"alice"])
    assert b"x-user" not in got


PREFLIGHT = ((b"origin", b"https://app.example"), (b"access-control-request-method", b"PUT"))


def test_a_preflight_passes_and_brings_nothing_along() -> None:
    made = head(*PREFLIGHT, *FORGED, bearer(BAD), method=b"OPTIONS")
    got = sent(place(TELLING), made)
    assert made.bearer is None
    assert not {b"authorization", *(name for name, _ in FORGED)} & got.keys()
    assert isinstance(routed(place(TELLING), head(bearer(BAD), method=b"OPTIONS")), InvalidToken)
    assert isinstance(routed(place(TELLING), head(*PREFLIGHT, bearer(BAD))), InvalidToken)


def test_routes_go_by_what_the_token_says_and_not_by_what_the_client_says() -> None:
    admin = a_match(a_rule("shop/admin#0"), headers=(HeaderMatch(b"x-user", b"alice"),))
    plain = a_match(a_rule("shop/plain#0"))
    where = authenticated(a_place(a_listener(a_host(admin, plain, hostname="*"))), Authentication((TELLING,)))
    assert routed(where, head((b"x-user", b"alice"))).rule.name == "shop/plain#0"
    assert routed(where, head(bearer())).rule.name == "shop/admin#0"


def test_doing_it_twice_changes_nothing_more() -> None:
    where = place(TELLING, service=(rule("shop/own#0", "r2", issuer=SECOND, claim_headers=((b"x-own", ("sub",)),)),))
    made = head(bearer(), *FORGED, target=b"/orders?a=1")
    first = routed(where, made)
    seen, who = list(made.headers), made.bearer
    again = routed(where, made)
    assert sorted(made.headers) == sorted(seen)
    assert made.bearer is who
    # A stream that goes on is asked about again; that its token has ended meanwhile does not end it.
    assert isinstance(route(made, a_peer(), where, NOW + 1e6, random.Random(1)), Pending)
    assert made.bearer is who
    assert {name for name, _ in again.plan.headers} == {name for name, _ in first.plan.headers}


def test_a_broken_policy_lets_nothing_pass() -> None:
    found = routed(place(broken="RequestAuthentication edge/users can't be understood"), head())
    assert isinstance(found, PolicyError)
    assert found.answer_status == 503


def test_without_authentication_nothing_is_looked_at() -> None:
    made = head(bearer(BAD), (b"x-user", b"me"))
    found = routed(a_place(a_listener(a_host(a_match(a_rule()), hostname="*"))), made)
    assert isinstance(found, Pending)
    assert made.bearer is None
    assert made.header(b"authorization") == b"Bearer " + BAD


# Before a service

OWN = rule("shop/own#0", "r2", issuer=SECOND, claim_headers=((b"x-own", ("sub",)), (b"x-user", ("sub",))), headers=((b"x-own-jwt", ""),))
OWN_TOKEN = mint("r2", now=NOW, iss=SECOND, sub="carol").encode()


def test_tokens_before_a_service() -> None:
    where = authenticated(place(service=(OWN,)), Authentication())
    got = sent(where, head((b"x-own", b"mallory"), (b"x-user", b"mallory")))
    assert not {b"x-own", b"x-user"} & got.keys()
    made = head((b"x-own", b"mallory"), (b"x-own-jwt", OWN_TOKEN))
    got = sent(where, made)
    assert (got[b"x-own"], b"x-own-jwt" in got) == ([b"carol"], False)
    assert made.bearer is not None
    assert isinstance(routed(where, head((b"x-own-jwt", TOKEN))), InvalidToken)


def test_tokens_at_the_gateway_and_before_a_service() -> None:
    where = place(TELLING, service=(OWN,))
    made = head(bearer(), *FORGED, (b"x-own", b"mallory"))
    got = sent(where, made)
    assert (got[b"x-user"], b"x-own" in got) == ([b"alice"], False)
    assert made.bearer is not None
    assert made.bearer.rule is TELLING
    made = head(bearer(), *FORGED, (b"x-own-jwt", OWN_TOKEN))
    got = sent(where, made)
    assert (got[b"x-user"], got[b"x-own"]) == ([b"carol"], [b"carol"])
    assert made.bearer.rule is OWN  # type: ignore[union-attr]
    assert isinstance(routed(where, head(bearer(), (b"x-own-jwt", BAD))), InvalidToken)
    assert isinstance(routed(where, head(bearer(BAD), (b"x-own-jwt", OWN_TOKEN))), InvalidToken)


# Keys that are fetched


def test_keys_are_wanted_and_then_there() -> None:
    tokens = Tokens()
    remote = KeySource(uri="http://127.0.0.1/jwks")
    where = place(TokenRule(name="edge/users#0", issuer=ISSUER, keys=remote), tokens=tokens)
    made = head(bearer())
    wanted = routed(where, made)
    assert isinstance(wanted, KeysWanted)
    assert wanted.keys is tokens.store.of(remote)
    assert made.header(b"authorization") == b"Bearer " + TOKEN
    found = routed(where, made, waited=True)
    assert isinstance(found, InvalidToken)
    assert found.reason == "Jwks remote fetch is failed"
    wanted.keys.set = parse_keys(jwks("r1"))
    assert isinstance(routed(where, made, waited=True), Pending)


def test_keys_that_are_wanted_before_a_service_leave_the_request_as_it_was() -> None:
    tokens = Tokens()
    remote = KeySource(uri="http://127.0.0.1/jwks")
    own = TokenRule(name="shop/own#0", issuer=SECOND, keys=remote, headers=((b"x-own-jwt", ""),))
    where = place(TELLING, service=(own,), tokens=tokens)
    made = head(bearer(), *FORGED, (b"x-own-jwt", OWN_TOKEN))
    before = list(made.headers)
    assert isinstance(routed(where, made), KeysWanted)
    assert (made.headers, made.bearer) == (before, None)
    tokens.store.of(remote).set = parse_keys(jwks("r2"))
    found = routed(where, made)
    assert isinstance(found, Pending)
    assert made.bearer is not None
    assert made.bearer.rule is own
    # A bad one is not let in by the detour.
    made = head(bearer(), (b"x-own-jwt", BAD))
    assert isinstance(routed(where, made), InvalidToken)


FIELDS = st.sampled_from(
    [
        bearer(),
        bearer(OTHER),
        bearer(BAD),
        (b"authorization", b"Basic x"),
        (b"x-jwt", TOKEN),
        (b"x-jwt", BAD),
        (b"cookie", b"session=" + TOKEN + b"; a=b"),
        (b"cookie", b"a=b"),
        (b"x-own-jwt", OWN_TOKEN),
        (b"x-own-jwt", TOKEN),
        (b"x-own", b"mallory"),
        (b"accept", b"*/*"),
        *FORGED,
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(FIELDS, max_size=6), st.booleans(), st.booleans())
def test_whoever_gets_through_bears_one_token_and_no_name_of_their_own(fields: list[Any], forward: bool, own: bool) -> None:
    telling = msgspec.structs.replace(TELLING, forward=forward)
    where = place(telling, service=(OWN,) if own else ())
    made = head(*fields)
    found = routed(where, made)
    tokens = {value.removeprefix(b"Bearer ").removeprefix(b"session=").removesuffix(b"; a=b") for name, value in fields if b"." in value}
    if isinstance(found, InvalidToken):
        assert tokens
        return
    assert isinstance(found, Pending)
    who = made.bearer
    said = [value for name, value in found.plan.headers if name in TELLING.outputs or (own and name in OWN.outputs)]
    assert not {b"mallory", b"eve", b"root", b"e30"} & set(said)
    assert who is not None or not said
    seen = b" ".join(value for _, value in found.plan.headers)
    if not forward:
        assert TOKEN not in seen or (not own and any(name == b"x-own-jwt" for name, _ in fields))
    assert (who is not None) == any(
        (name in {b"authorization", b"x-jwt", b"cookie"} and b"." in value) or (own and name == b"x-own-jwt") for name, value in fields
    )


def test_the_authentication_of_an_old_configuration_is_forgotten() -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, Authenticated) for each in gc.get_objects())

    before = alive()
    for _ in range(3):
        routed(place(rule(), service=(OWN,)), head(bearer()))
    assert alive() == before


def test_backends_of_one_rule_have_authentications_of_their_own() -> None:
    backends = (
        Backend(weight=1, cluster="shop/orders:80", service="shop/orders", authentication=Authentication((OWN,))),
        Backend(weight=1, cluster="shop/web:80", service="shop/web"),
    )
    found = a_place(a_listener(a_host(a_match(a_rule(backends=backends)), hostname="*")), clusters=(a_cluster(), a_cluster("shop/web:80")))
    results = {type(route(head((b"x-own-jwt", BAD)), a_peer(), found, float(NOW), random.Random(seed))).__name__ for seed in range(20)}
    assert results == {"InvalidToken", "Pending"}

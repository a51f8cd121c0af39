"""Tokens that are believed and tokens that are not, by the words that tell which."""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.authenticator import Authenticator, KeptTokens, KeysWanted, Tokens
from identity.jwt import (
    AUDIENCE,
    EXPIRED,
    MOST_BYTES,
    NO_KEY,
    NO_KEYS,
    NOT_VERIFIED,
    NOT_YET,
    UNKNOWN_ISSUER,
    Bad,
    Token,
    bearer_of,
    normal,
    read_token,
)
from mesh.tokens import Bearer, KeySource, TokenRule
from tests.tokens import ISSUER, NOW, b64, claims_of, forged, jwk, jwks, key, mint, sign


def rule(*keys: Any, **changes: Any) -> TokenRule:
    return TokenRule(**{"name": "edge/users#0", "issuer": ISSUER, "keys": KeySource(inline=jwks(*(keys or ("r1",)))), **changes})


def judged(token: str, *rules: TokenRule, now: float = NOW, found: int = -1) -> Any:
    rules = rules or (rule(),)
    return Tokens().of(rules).judge(token.encode(), found & (1 << len(rules)) - 1, now)


def word(token: str, *rules: TokenRule, **options: Any) -> str:
    result = judged(token, *rules, **options)
    return "allowed" if isinstance(result, Bearer) else result.word


def minted(name: str = "r1", header: dict[str, Any] | None = None, payload: str | bytes = "", **claims: Any) -> str:
    return mint(name, header, payload, NOW, **claims)


ALL = rule("r1", "e1", "f1", "d1", "h1")


@pytest.mark.parametrize("name", ["r1", "e1", "f1", "d1", "h1"])
def test_every_kind_of_key(name: str) -> None:
    found = judged(minted(name), ALL)
    assert isinstance(found, Bearer)
    assert found.principal == f"{ISSUER}/alice"


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])
def test_every_algorithm_of_rsa(algorithm: str) -> None:
    assert word(minted(header={"alg": algorithm})) == "allowed"


def header_of(**fields: Any) -> dict[str, Any]:
    return {"alg": "RS256", "kid": "r1", **fields}


def public_pem() -> bytes:
    found: bytes = key("r1").as_pem(private=False)
    return found


@pytest.mark.parametrize(
    ("token", "what"),
    [
        # Algorithm confusion: what the token says of its algorithm never makes a key another one.
        (forged({"alg": "none"}), "malformed"),
        (forged({"alg": "None"}), "malformed"),
        (forged({"alg": "NONE", "kid": "r1"}, b"x"), "malformed"),
        (forged({"alg": ""}, b"x"), "malformed"),
        (forged({"kid": "r1"}, b"x"), "malformed"),
        (forged({"alg": ["RS256"], "kid": "r1"}, b"x"), "malformed"),
        (forged({"alg": "HS256", "kid": "r1"}, b"x"), "no_key"),
        (forged({"alg": "HS256"}, b"x"), "no_key"),
        (forged({"alg": "ES256", "kid": "r1"}, b"x" * 64), "no_key"),
        (forged({"alg": "EdDSA", "kid": "r1"}, b"x" * 64), "no_key"),
        (forged({"alg": "HS256K", "kid": "r1"}, b"x"), "malformed"),
        # Keys that the token brings along, or says where they are.
        (minted("r2", header_of(jwk=jwk("r2"))), "malformed"),
        (minted("r2", header_of(kid="r1", jku="https://evil.example/jwks.json")), "signature"),
        (minted("r2", header_of(kid="r1", x5u="https://evil.example/cert.pem")), "signature"),
        (minted("r2", header_of(kid="r1", x5c=["AA=="])), "signature"),
        (minted("r2", header_of(kid="../../r1")), "no_key"),
        (minted("r2", header_of(kid=7)), "malformed"),
        (minted("r2", header_of(kid={"a": 1})), "malformed"),
        (minted("r2", header_of(kid="r2")), "no_key"),
        (minted("r2", header_of(kid=None)), "signature"),
        (minted(header=header_of(crit=["exp"])), "malformed"),
        (minted(header=header_of(crit=[], b64=False)), "malformed"),
        (minted(header=header_of(b64=False)), "malformed"),
        # Times.
        (minted(exp=NOW - 59), "allowed"),
        (minted(exp=NOW - 60), "allowed"),
        (minted(exp=NOW - 61), "expired"),
        (minted(exp=0), "expired"),
        (minted(exp=None), "allowed"),
        (minted(exp=str(NOW + 100)), "malformed"),
        (minted(exp=True), "malformed"),
        (minted(exp=-1), "malformed"),
        (minted(exp=2**64), "malformed"),
        (minted(exp=2**63), "allowed"),
        (minted(exp=NOW + 0.5), "allowed"),
        (minted(exp=[NOW]), "malformed"),
        (minted(exp=None, payload=json.dumps({**claims_of(NOW), "exp": None})), "malformed"),
        (minted(nbf=NOW + 60), "allowed"),
        (minted(nbf=NOW + 61), "not_yet_valid"),
        (minted(nbf="soon"), "malformed"),
        (minted(iat=NOW + 10_000), "allowed"),
        (minted(iat="now"), "malformed"),
        # Issuer, subject and the like.
        (minted(iss="https://other.example"), "unknown_issuer"),
        (minted(iss=None), "unknown_issuer"),
        (minted(iss=ISSUER + "/"), "unknown_issuer"),
        (minted(iss=[ISSUER]), "malformed"),
        (minted(sub=7), "malformed"),
        (minted(sub=None), "allowed"),
        (minted(jti=7), "malformed"),
        (minted(aud=7), "malformed"),
        (minted(aud=["a", 7]), "malformed"),
        (minted(aud="anything"), "allowed"),
        # Shapes.
        ("", "malformed"),
        ("x", "malformed"),
        ("a.b", "malformed"),
        ("..", "malformed"),
        (minted() + ".x", "malformed"),
        (minted() + "=", "malformed"),
        (minted() + " ", "malformed"),
        (minted().replace(".", "..", 1), "malformed"),
        (minted().rpartition(".")[0] + ".", "malformed"),
        (b64("[]") + "." + b64("{}") + ".AA", "malformed"),
        (b64("{") + "." + b64("{}") + ".AA", "malformed"),
        (b64(b"\xff") + "." + b64("{}") + ".AA", "malformed"),
        (minted(payload="[]"), "malformed"),
        (minted(payload="null"), "malformed"),
        (minted(payload="not json"), "malformed"),
        (minted(payload=b'{"iss": "\xff"}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "sub": "alice", "sub": "root"}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": {{"b": 1, "b": 2}}}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": NaN}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": 1e999}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": {"9" * 400}}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": "\\ud800"}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": {"[" * 30 + "]" * 30}}}'), "allowed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": {"[" * 40 + "]" * 40}}}'), "malformed"),
        (minted(payload=f'{{"iss": "{ISSUER}", "a": {"[" * 9000 + "]" * 9000}}}'), "malformed"),
        (minted(pad="x" * MOST_BYTES), "malformed"),
        (sign("r1", "RS256", b64('{"alg":"RS256","alg":"RS256","kid":"r1"}') + "." + b64(claims_of(NOW))), "malformed"),
    ],
)
def test_what_becomes_of_a_token(token: str, what: str) -> None:
    assert word(token) == what


def test_the_public_key_is_no_secret() -> None:
    """The classic confusion: HMAC with the text of the public key."""
    for secret in (public_pem(), public_pem().strip(), jwks("r1").encode()):
        signed = b64({"alg": "HS256", "kid": "r1"}) + "." + b64(claims_of(NOW))
        signature = hmac.digest(secret, signed.encode(), "sha256")
        assert word(f"{signed}.{b64(signature)}") == "no_key"
        assert word(f"{signed}.{b64(signature)}", ALL) == "no_key"


def test_a_key_that_says_its_algorithm_is_good_for_no_other() -> None:
    only = rule(jwk("r1", alg="RS256"))
    assert word(minted(), only) == "allowed"
    assert word(minted(header={"alg": "RS384"}), only) == "no_key"
    assert word(minted(header={"alg": "PS256"}), only) == "no_key"


def test_signatures_have_one_form() -> None:
    token = minted()
    head, _, signature = token.rpartition(".")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = last[last.index(signature[-1]) ^ 1]
    assert word(f"{head}.{signature[:-1]}{other}") in {"malformed", "signature"}
    assert word(f"{head}.{signature[:-1]}") in {"malformed", "signature"}


@pytest.mark.parametrize(
    ("allowed", "audience", "what"),
    [
        (("a", "b"), "b", "allowed"),
        (("a", "b"), ["x", "a"], "allowed"),
        (("a",), "b", "audience"),
        (("a",), None, "audience"),
        (("a",), [], "audience"),
        (("https://a.example",), "a.example", "allowed"),
        (("a.example",), "http://a.example/", "allowed"),
        (("a.example",), "ftp://a.example", "audience"),
        (("a",), "A", "audience"),
    ],
)
def test_audiences(allowed: tuple[str, ...], audience: Any, what: str) -> None:
    assert word(minted(aud=audience), rule(audiences=allowed)) == what


def test_what_is_wrong_is_told_in_the_order_of_the_checks() -> None:
    strict = rule("r1", audiences=("a",))
    assert word(mint("r2", now=NOW, iss="x", exp=1), strict) == "unknown_issuer"
    assert word(mint("r2", now=NOW, exp=1), strict) == "expired"
    assert word(mint("r2", now=NOW), strict) == "audience"
    assert word(mint("r2", now=NOW, aud="a"), strict) == "no_key"
    assert word(mint("r2", header={"kid": "r1"}, now=NOW, aud="a"), strict) == "signature"


def test_only_the_wrong_audience_is_forbidden() -> None:
    every = (AUDIENCE, EXPIRED, NO_KEY, NO_KEYS, NOT_VERIFIED, NOT_YET, UNKNOWN_ISSUER)
    assert [bad for bad in every if bad.forbidden] == [AUDIENCE]


def test_several_rules_and_where_they_look() -> None:
    first, second = rule("r1"), rule("r2", issuer="https://second.example", name="edge/users#1")
    one, two = minted(), minted("r2", iss="https://second.example")
    assert judged(one, first, second).rule is first
    assert judged(two, first, second).rule is second
    assert word(two, first, second, found=1) == "unknown_issuer"
    assert word(minted("r2"), first, second) == "no_key"
    again = rule("r2", name="edge/again#0")
    assert judged(minted("r2"), first, again).rule is again
    anybody = rule("r2", issuer="")
    assert judged(two, anybody).principal == "https://second.example/alice"


def test_what_a_bearer_is_said_to_be() -> None:
    told = rule(
        payload_header=b"x-payload",
        claim_headers=(
            (b"x-sub", ("sub",)),
            (b"x-deep", ("a", "b")),
            (b"x-number", ("n",)),
            (b"x-half", ("h",)),
            (b"x-yes", ("yes",)),
            (b"x-list", ("roles",)),
            (b"x-none", ("none",)),
            (b"x-line", ("line",)),
            (b"x-spaces", ("spaces",)),
            (b"x-object", ("a",)),
            (b"x-null", ("null",)),
            (b"x-empty", ("empty",)),
            (b"x-through", ("sub", "b")),
        ),
        space_delimited=("scope", "words"),
    )
    token = minted(
        a={"b": "c"},
        n=7.0,
        h=0.5,
        yes=True,
        roles=["x", "y"],
        line="a\r\nx-admin: 1",
        spaces=" \té ",
        null=None,
        empty="",
        scope="read  write",
        words="a",
    )
    found = judged(token, told)
    assert dict(found.headers) == {
        b"x-payload": token.split(".")[1].encode(),
        b"x-sub": b"alice",
        b"x-deep": b"c",
        b"x-number": b"7",
        b"x-half": b"0.5",
        b"x-yes": b"true",
        b"x-list": b64('["x","y"]').encode(),
        b"x-spaces": "é".encode(),
        b"x-object": base64.b64encode(b'{"b":"c"}'),
    }
    assert found.outputs == {name for name, _ in told.claim_headers} | {b"x-payload"}
    assert found.claims["scope"] == ["read", "write"]
    assert found.claims["words"] == ["a"]
    assert found.metadata == {"envoy.filters.http.jwt_authn": {"payload": found.claims}}
    assert found.expires == NOW + 3600 + 60


def test_the_principal_needs_an_issuer_and_a_subject() -> None:
    assert judged(minted(sub=None)).principal == ""
    assert judged(minted(iss=None), rule(issuer="")).principal == ""


def test_a_verified_token_is_kept_whole_until_it_ends() -> None:
    kept = KeptTokens()
    tokens = Tokens(kept=kept)
    one = tokens.of((rule(),))
    token = minted(exp=NOW + 100).encode()
    first = one.judge(token, 1, NOW)
    assert isinstance(first, Bearer)
    assert one.judge(token, 1, NOW + 160.9) is first
    assert len(kept) == 1
    assert one.judge(token, 1, NOW + 161) is EXPIRED
    assert len(kept) == 0
    assert kept.bytes == 0
    assert isinstance(one.judge(token[:-9] + b"A" * 9, 1, NOW), Bad)
    assert isinstance(tokens.of((rule("r2"),)).judge(token, 1, NOW), Bad)


def test_a_kept_token_ends_with_its_keys() -> None:
    tokens = Tokens()
    wanted = rule(keys=KeySource(uri="http://127.0.0.1/jwks"))
    one = tokens.of((wanted,))
    keys = tokens.store.of(wanted.keys)
    from mesh.jwks import parse_keys

    assert isinstance(one.judge(minted().encode(), 1, NOW), KeysWanted)
    assert one.judge(minted().encode(), 1, NOW, waited=True) is NO_KEYS
    keys.set = parse_keys(jwks("r1"))
    token = minted().encode()
    assert isinstance(one.judge(token, 1, NOW), Bearer)
    keys.set = parse_keys(jwks("r2"))
    assert one.judge(token, 1, NOW, waited=True) is NO_KEY


def test_what_is_kept_is_bounded() -> None:
    kept = KeptTokens(most=3)
    one = Tokens(kept=kept).of((rule(),))
    made = [minted(n=number).encode() for number in range(5)]
    for token in made:
        one.judge(token, 1, NOW)
    assert len(kept) == 3
    assert kept.bytes == sum(map(len, made[2:]))
    assert kept.get((made[4], 1, 1), NOW) is not None
    small = KeptTokens(most_bytes=len(made[0]) * 2)
    other = Tokens(kept=small).of((rule(),))
    for token in made:
        other.judge(token, 1, NOW)
    assert len(small) == 2


def test_what_happens_is_counted_by_the_configured_issuer() -> None:
    told: list[tuple[str, str]] = []

    class Results:
        def judged(self, issuer: str, result: str) -> None:
            told.append((issuer, result))

    one = Tokens(results=Results()).of((rule(),))
    token = minted().encode()
    for each in (token, token, minted(iss="https://evil.example").encode(), b"x", minted(exp=1).encode()):
        one.judge(each, 1, NOW)
    assert told == [(ISSUER, "allowed"), (ISSUER, "kept"), ("", "unknown_issuer"), ("", "malformed"), (ISSUER, "expired")]


GOOD = minted()
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.characters(min_codepoint=1, max_codepoint=0x17F))
def test_a_token_with_another_character_is_not_believed(at: int, character: str) -> None:
    changed = GOOD[:at] + character + GOOD[at + 1 :]
    if changed != GOOD:
        result = Tokens().of((rule(),)).judge(changed.encode(), 1, NOW)
        assert isinstance(result, Bad)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="eyJ.abc-_=0", max_size=60).map(str.encode))
def test_whatever_is_sent_is_judged(token: bytes) -> None:
    assert isinstance(Tokens().of((rule(),)).judge(token, 1, NOW), Bad)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name not in {"iss", "sub", "exp", "nbf", "iat", "aud", "jti"}), JSON, max_size=5
    )
)
def test_claims_come_out_as_they_went_in(claims: dict[str, Any]) -> None:
    result = judged(minted(payload=json.dumps({**claims_of(NOW), **claims})), rule(space_delimited=()))
    assert isinstance(result, Bearer)
    assert result.claims == {**claims_of(NOW), **normal(claims)}


def test_verification_takes_no_more_than_a_moment() -> None:
    """Not a benchmark: what is hostile does not cost more than what is good, by orders of magnitude."""
    began = time.monotonic()
    for token in ("." * 30_000, "e" * 32_000 + ".e.e", b64("[" * 20_000) + ".e.e"):
        assert isinstance(read_token(token), Bad)
    assert time.monotonic() - began < 5.0


def test_reading_says_nothing_of_the_truth() -> None:
    token = read_token(mint("r2", now=NOW))
    assert isinstance(token, Token)
    assert bearer_of(token, rule()).principal == f"{ISSUER}/alice"


def test_an_authenticator_is_shared_by_equal_rules() -> None:
    tokens = Tokens()
    assert tokens.of((rule(),)) is tokens.of((rule(),))
    assert isinstance(tokens.of((rule(),)), Authenticator)

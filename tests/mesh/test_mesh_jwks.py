from __future__ import annotations

import json
from typing import Any

import pytest

from mesh.jwks import MOST_BYTES, MOST_KEYS, parse_keys, strict_json
from tests.tokens import b64, jwk, jwks

RSA = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}


@pytest.mark.parametrize(
    ("item", "algorithms"),
    [
        (jwk("r1"), RSA),
        (jwk("r1", alg="RS256"), {"RS256"}),
        (jwk("r1", use="sig", key_ops=["verify"]), RSA),
        (jwk("e1"), {"ES256"}),
        (jwk("f1"), {"ES384"}),
        (jwk("d1"), {"EdDSA", "Ed25519"}),
        (jwk("d1", alg="Ed25519"), {"EdDSA", "Ed25519"}),
        (jwk("h1"), {"HS256"}),
        (jwk("r1", kid=None), RSA),
        (jwk("r1", x5c=["AA=="], x5t="x", other={"a": 1}), RSA),
    ],
)
def test_a_key_is_good_for_the_algorithms_of_its_type(item: dict[str, Any], algorithms: set[str]) -> None:
    found = parse_keys(jwks(item))
    (made,) = found.keys
    assert made.algorithms == algorithms
    assert made.kid == item.get("kid", "")
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ("x", "it is not a mapping"),
        ({}, "its type or curve is not known here"),
        ({"kty": "RSA"}, "it is malformed"),
        ({"kty": "RSA", "n": 7, "e": "AQAB"}, "it is malformed"),
        (jwk("w1"), "it has 1024 bits; RSA keys need 2048 to 8192"),
        (jwk("r1", use="enc"), "its use is not sig"),
        (jwk("r1", key_ops=["sign"]), "its key_ops do not have verify"),
        (jwk("r1", kid=7), "its kid is not a string"),
        (jwk("r1", alg="HS256"), "its alg is not one of its type that is known here"),
        (jwk("e1", alg="RS256"), "its alg is not one of its type that is known here"),
        (jwk("e1", crv="P-384"), None),
        (jwk("e1", crv="secp256k1"), "its type or curve is not known here"),
        (jwk("e1", x=b64(b"\0" * 32)), None),
        (jwk("h1", k=b64(b"short")), "it has 5 bytes; HMAC keys need 32"),
        ({"kty": "oct", "k": 7}, "it is malformed"),
        ({"kty": "none"}, "its type or curve is not known here"),
    ],
)
def test_keys_that_verify_nothing_are_left_out(item: Any, why: str | None) -> None:
    found = parse_keys(json.dumps({"keys": [item, jwk("r2")]}))
    assert [made.kid for made in found.keys] == ["r2"]
    (left,) = found.left_out
    assert left.startswith("keys[0] is not used: ")
    if why is not None:
        assert left == f"keys[0] is not used: {why}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the key set can't be read: it is not JSON: Expecting value at position 0"),
        ("[]", 'the key set has no list "keys"'),
        ('{"keys": {}}', 'the key set has no list "keys"'),
        ('{"keys": []}', "the key set has no key that signatures can be verified by"),
        ('{"keys": [], "keys": []}', "the key set can't be read: a name is there twice"),
        ('{"keys": [{"kty": "x"}]}', "the key set has no key that signatures can be verified by (keys[0] is not used: its type"),
        ("[" * 5000, "the key set can't be read: it is nested too deeply"),
        (b"\xff", "the key set can't be read: it is not UTF-8"),
        (json.dumps({"keys": [{}] * (MOST_KEYS + 1)}), f"the key set has {MOST_KEYS + 1} keys; at most {MOST_KEYS} are allowed"),
        (" " * (MOST_BYTES + 1), f"the key set has more than {MOST_BYTES} bytes"),
    ],
)
def test_what_is_no_key_set(text: str | bytes, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_keys(text)
    assert str(caught.value).startswith(why)


def test_private_parts_are_not_looked_at() -> None:
    from tests.tokens import key

    (made,) = parse_keys(json.dumps({"keys": [key("r1").as_dict(private=True)]})).keys
    assert not made.key.is_private


def test_which_keys_fit_a_token() -> None:
    found = parse_keys(jwks("r1", "r2", "e1", jwk("r3", kid=None)))

    def fitting(kid: str, algorithm: str) -> list[str]:
        return [made.kid for made in found.fitting(kid, algorithm)]

    assert fitting("r1", "RS256") == ["r1", ""]
    assert fitting("r1", "ES256") == []
    assert fitting("e1", "ES256") == ["e1"]
    assert fitting("", "RS256") == ["r1", "r2", ""]
    assert fitting("x", "RS256") == [""]
    assert fitting("", "HS256") == []


def test_equal_sets_are_those_of_the_same_text() -> None:
    assert parse_keys(jwks("r1")) == parse_keys(jwks("r1"))
    assert parse_keys(jwks("r1")) != parse_keys(jwks("r2"))


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', b'"\xc3"'])
def test_json_with_two_meanings_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        strict_json(text)

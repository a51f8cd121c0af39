"""JSON Web Tokens (RFC 7519): what one says, and whether it is true. Pure: keys and the time are arguments.

Signatures are joserfc's business; what is around them is decided here, by RFC 8725 ("JSON Web Token Best Current Practices"):

* the algorithm is one of the key's own (`mesh.jwks`), never what the token alone says; `none` is no algorithm
* keys come from the configuration: a token that brings one along (`jwk`) is refused, and where it says that keys are (`jku`, `x5u`, `x5c`)
  is not looked at
* extensions that the token calls critical (`crit`), and payloads that are not base64url (`b64`), are refused
* base64url and JSON in their one form: no padding, no other characters, no name twice, no deep nesting

Checks come in Envoy's order (jwt_authn): issuer, time, audience, key, signature; what is wrong is told in the words of its
`jwt_verify_lib`, which people search for. A token without `exp` never ends, as there.
"""

from __future__ import annotations

import re
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from math import inf, isfinite
from typing import Any, Final

import msgspec
from joserfc.errors import JoseError
from joserfc.jws import JWSRegistry, deserialize_compact

from mesh.http import Header
from mesh.jwks import ALGORITHMS, KeySet, strict_json
from mesh.tokens import Bearer, TokenRule

MOST_BYTES: Final = 32768
"""Of a token."""
MOST_DEPTH: Final = 32
"""Of the payload's nesting."""
CLOCK_SKEW: Final = 60.0
"""Seconds by which clocks may differ, as in Envoy."""
_MOST_INTEGER: Final = 2**64
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_-]*")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")


class Bad(msgspec.Struct, frozen=True):
    """Why a token is not believed."""

    message: str
    """For the client; nothing of the token is in it."""
    word: str
    """For metrics."""
    forbidden: bool = False
    """The token is right and for somebody else (403, as in Envoy); otherwise 401."""


MALFORMED: Final = Bad("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections", "malformed")
TOO_LONG: Final = Bad(f"Jwt is longer than {MOST_BYTES} bytes", "malformed")
SEVERAL: Final = Bad("Jwt is not the only one of the request", "several")
UNKNOWN_ISSUER: Final = Bad("Jwt issuer is not configured", "unknown_issuer")
NOT_YET: Final = Bad("Jwt not yet valid", "not_yet_valid")
EXPIRED: Final = Bad("Jwt is expired", "expired")
AUDIENCE: Final = Bad("Audiences in Jwt are not allowed", "audience", forbidden=True)
NO_KEY: Final = Bad("Jwks doesn't have key to match kid or alg from Jwt", "no_key")
NO_KEYS: Final = Bad("Jwks remote fetch is failed", "keys_unavailable")
NOT_VERIFIED: Final = Bad("Jwt verification fails", "signature")


def _malformed(message: str) -> Bad:
    return Bad(message, "malformed")


class Token(msgspec.Struct, frozen=True, gc=False):
    """What a token says. Nothing of it is true before `verify`."""

    text: str
    algorithm: str
    kid: str
    payload: str
    """As it is written, base64url."""
    claims: dict[str, Any]
    issuer: str
    subject: str
    audiences: tuple[str, ...]
    not_before: float
    expires: float
    """Seconds since the epoch; infinite without one."""


def read_token(text: str) -> Token | Bad:
    """What `text` says if it is a token at all."""
    if len(text) > MOST_BYTES:
        return TOO_LONG
    parts = text.split(".")
    if len(parts) != 3:
        return MALFORMED
    header = _object(parts[0], "header")
    if isinstance(header, Bad):
        return header
    algorithm, kid = header.get("alg"), header.get("kid", "")
    if not isinstance(algorithm, str):
        return _malformed("Jwt header [alg] field is required and must be a string")
    if algorithm not in ALGORITHMS:
        return _malformed("Jwt header [alg] is not supported")
    if not isinstance(kid, str):
        return _malformed("Jwt header [kid] field is not a string")
    for name in ("crit", "b64", "jwk"):
        if name in header:
            return _malformed(f"Jwt header [{name}] is not supported")
    claims = _object(parts[1], "payload")
    if isinstance(claims, Bad):
        return claims
    if _decoded(parts[2]) is None:
        return _malformed("Jwt signature is an invalid Base64url encoded")
    return _token(text, algorithm, kid, parts[1], claims)


def _token(text: str, algorithm: str, kid: str, payload: str, claims: dict[str, Any]) -> Token | Bad:
    for name in ("iss", "sub", "jti"):
        if not isinstance(claims.get(name, ""), str):
            return _malformed(f"Jwt payload [{name}] field is not a string")
    times: dict[str, float] = {}
    for name in ("iat", "nbf", "exp"):
        if name in claims:
            value = claims[name]
            if isinstance(value, bool) or not isinstance(value, int | float):
                return _malformed(f"Jwt payload [{name}] field is not an integer")
            if not 0 <= value < _MOST_INTEGER:
                return _malformed(f"Jwt payload [{name}] field is not a positive 64 bit integer")
            times[name] = int(value)
    audience = claims.get("aud", [])
    audiences = [audience] if isinstance(audience, str) else audience
    if not isinstance(audiences, list) or not all(isinstance(each, str) for each in audiences):
        return _malformed("Jwt payload [aud] field is not a string or string list")
    return Token(
        text,
        algorithm,
        kid,
        payload,
        claims,
        claims.get("iss", ""),
        claims.get("sub", ""),
        tuple(audiences),
        times.get("nbf", 0.0),
        times.get("exp", inf),
    )


def _decoded(segment: str) -> bytes | None:
    """What a segment encodes, if it is written in the one form that there is."""
    if not segment or not _SEGMENT.fullmatch(segment):
        return None
    try:
        data = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        return None
    return data if urlsafe_b64encode(data).rstrip(b"=").decode() == segment else None


def _object(segment: str, what: str) -> dict[str, Any] | Bad:
    data = _decoded(segment)
    if data is None:
        return _malformed(f"Jwt {what} is an invalid Base64url encoded")
    try:
        found = normal(strict_json(data))
    except (ValueError, OverflowError):
        found = None
    return found if isinstance(found, dict) else _malformed(f"Jwt {what} is an invalid JSON")


def normal(value: Any, depth: int = MOST_DEPTH) -> Any:
    """JSON as `google.protobuf.Struct` has it, in which claims travel to decision points: numbers are doubles, those that are whole are
    integers again. Raises ValueError for what it can't hold."""
    if isinstance(value, str):
        value.encode()  # lone surrogates are no text
        return value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        number = float(value)
        if not isfinite(number):
            raise ValueError("a number is too large")
        return int(number) if number.is_integer() else number
    if not depth:
        raise ValueError("it is nested too deeply")
    if isinstance(value, list):
        return [normal(item, depth - 1) for item in value]
    return {normal(name): normal(item, depth - 1) for name, item in value.items()}


def check(token: Token, rule: TokenRule, now: float) -> Bad | None:
    """Whether a token, if it is genuine, is good for `rule` at `now` (seconds since the epoch)."""
    if rule.issuer and token.issuer != rule.issuer:
        return UNKNOWN_ISSUER
    second = int(now)
    if second + CLOCK_SKEW < token.not_before:
        return NOT_YET
    if second > token.expires + CLOCK_SKEW:
        return EXPIRED
    if rule.audiences and not _audience_allowed(token.audiences, rule.audiences):
        return AUDIENCE
    return None


def _audience_allowed(audiences: tuple[str, ...], allowed: tuple[str, ...]) -> bool:
    wanted = {sanitized(each) for each in allowed}
    return any(sanitized(each) in wanted for each in audiences)


def sanitized(audience: str) -> str:
    """An audience as it is compared: without scheme and a slash at its end, as Envoy does it."""
    for scheme in ("http://", "https://"):
        if audience.startswith(scheme):
            audience = audience[len(scheme) :]
            break
    return audience.removesuffix("/")


def verify(token: Token, keys: KeySet) -> Bad | None:
    """Whether one of `keys` has signed the token."""
    fitting = keys.fitting(token.kid, token.algorithm)
    if not fitting:
        return NO_KEY
    registry = _REGISTRIES[token.algorithm]
    for key in fitting:
        try:
            deserialize_compact(token.text, key.key, registry=registry)
        except (JoseError, ValueError, TypeError):
            continue
        return None
    return NOT_VERIFIED


def _registry(algorithm: str) -> JWSRegistry:
    registry = JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    registry.max_header_length = registry.max_payload_length = registry.max_signature_length = MOST_BYTES
    return registry


_REGISTRIES: Final = {name: _registry(name) for name in ALGORITHMS}


def bearer_of(token: Token, rule: TokenRule) -> Bearer:
    """What a verified token says to policies and to the upstream."""
    claims = dict(token.claims)
    for name in rule.space_delimited:
        value = claims.get(name)
        if isinstance(value, str):
            claims[name] = [word for word in value.split(" ") if word]
    headers: list[Header] = [(rule.payload_header, token.payload.encode())] if rule.payload_header else []
    for header, path in rule.claim_headers:
        said = _said(token.claims, path)
        if said:
            headers.append((header, said))
    return Bearer(
        rule=rule,
        principal=f"{token.issuer}/{token.subject}" if token.issuer and token.subject else "",
        claims=claims,
        headers=tuple(headers),
        outputs=rule.outputs,
        expires=token.expires + CLOCK_SKEW,
    )


def _said(claims: Any, path: tuple[str, ...]) -> bytes:
    """A claim as a header's value: text and numbers as they are, lists and objects as JSON in base64. Nothing for what is not there, and
    for what no header can say."""
    for name in path:
        if not isinstance(claims, dict) or name not in claims:
            return b""
        claims = claims[name]
    if isinstance(claims, bool):
        return b"true" if claims else b"false"
    if isinstance(claims, dict | list):
        return b64encode(msgspec.json.encode(claims))
    text = claims if isinstance(claims, str) else "" if claims is None else str(claims)
    # A line break would end the field.
    return text.strip(" \t").encode() if _VALUE.fullmatch(text) else b""

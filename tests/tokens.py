"""Tokens and keys for tests: minted by joserfc, or by hand where they are to be wrong.

mint("r1", sub="alice")   jwks("r1", "e1")
"""

from __future__ import annotations

import base64
import functools
import json
import time
import warnings
from typing import Any

from joserfc import jws
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

ISSUER = "https://issuer.example"
NOW = 1_700_000_000


@functools.cache
def key(name: str) -> Any:
    """A key by its id: `r...` RSA, `e...` P-256, `f...` P-384, `d...` Ed25519, `h...` an HMAC secret, `w...` a weak RSA key."""
    parameters = {"kid": name}
    if name[0] == "r":
        return RSAKey.generate_key(2048, parameters)
    if name[0] == "w":
        with warnings.catch_warnings(action="ignore"):
            return RSAKey.generate_key(1024, parameters)
    if name[0] in "ef":
        return ECKey.generate_key("P-256" if name[0] == "e" else "P-384", parameters)
    return OKPKey.generate_key("Ed25519", parameters) if name[0] == "d" else OctKey.generate_key(256, parameters)


ALGORITHMS = {"r": "RS256", "w": "RS256", "e": "ES256", "f": "ES384", "d": "EdDSA", "h": "HS256"}


def jwk(name: str, **changes: Any) -> dict[str, Any]:
    """The public part of a key; what is changed to None is left out."""
    found = {**key(name).as_dict(private=name[0] == "h"), **changes}
    return {field: value for field, value in found.items() if value is not None}


def jwks(*items: str | dict[str, Any]) -> str:
    """A key set."""
    return json.dumps({"keys": [jwk(item) if isinstance(item, str) else item for item in items]})


def b64(data: bytes | str | dict[str, Any]) -> str:
    if isinstance(data, dict):
        data = json.dumps(data)
    return base64.urlsafe_b64encode(data.encode() if isinstance(data, str) else data).rstrip(b"=").decode()


def claims_of(now: float | None = None, **claims: Any) -> dict[str, Any]:
    """The usual claims; those that are None are left out."""
    found = {"iss": ISSUER, "sub": "alice", "exp": int(time.time() if now is None else now) + 3600, **claims}
    return {name: value for name, value in found.items() if value is not None}


def mint(name: str = "r1", header: dict[str, Any] | None = None, payload: str | bytes = "", now: float | None = None, **claims: Any) -> str:
    """A token that the key `name` has signed; `payload` stands in place of the claims."""
    algorithm = (header or {}).get("alg") or ALGORITHMS[name[0]]
    head = {field: value for field, value in {"alg": algorithm, "kid": name, **(header or {})}.items() if value is not None}
    return sign(name, algorithm, b64(head) + "." + b64(payload or claims_of(now, **claims)))


def sign(name: str, algorithm: str, signed: str) -> str:
    """Signs a header and a payload whatever they are."""
    signature = jws.JWSRegistry.algorithms[algorithm].sign(signed.encode(), key(name))
    return f"{signed}.{b64(signature)}"


def forged(header: dict[str, Any], signature: bytes = b"", **claims: Any) -> str:
    """A token that nobody has signed."""
    return f"{b64(header)}.{b64(claims_of(**claims))}.{b64(signature)}"

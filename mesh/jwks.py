"""JSON Web Key Sets (RFC 7517): the keys that tokens' signatures are verified by. Pure.

A key is good for the algorithms of its type and curve and no others (RFC 8725 section 3.1), so a token can't choose how its key is used:
RSA and EC keys never verify an HMAC. What a set holds besides (keys for encryption, of unknown types, too weak ones) is left out, and
said. Only what is public of a key is looked at.
"""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Iterable
from typing import Any, Final

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

MOST_BYTES: Final = 1 << 20
"""Of a set."""
MOST_KEYS: Final = 256
LEAST_RSA: Final = 2048
"""Bits (RFC 7518 section 3.3)."""
MOST_RSA: Final = 8192

_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_EC: Final = {"P-256": ("ES256",), "P-384": ("ES384",), "P-521": ("ES512",)}
_OKP: Final = {"Ed25519": ("EdDSA", "Ed25519")}
_OCT: Final = {"HS256": 32, "HS384": 48, "HS512": 64}
"""Least bytes of a key (RFC 7518 section 3.2)."""
ALGORITHMS: Final = frozenset((*_RSA, *(name for names in (*_EC.values(), *_OKP.values()) for name in names), *_OCT))
"""Those that can be verified at all: `none` is not one of them."""

Key = RSAKey | ECKey | OKPKey | OctKey

# RFC 9864 prefers the name Ed25519 to EdDSA; issuers use both, and nobody who runs a gateway can change that.
warnings.filterwarnings("ignore", message="EdDSA is deprecated", module="joserfc")


class VerificationKey:
    """One key, and the algorithms that it is good for. Immutable."""

    __slots__ = ("algorithms", "key", "kid")

    def __init__(self, kid: str, algorithms: Iterable[str], key: Key) -> None:
        self.kid = kid
        """Empty for a key without an id."""
        self.algorithms = frozenset(algorithms)
        self.key = key


class KeySet:
    """The usable keys of a set. Immutable; compared by what it was made from."""

    __slots__ = ("digest", "keys", "left_out")

    def __init__(self, keys: tuple[VerificationKey, ...], left_out: tuple[str, ...], digest: bytes) -> None:
        self.keys = keys
        self.left_out = left_out
        """Why keys of the set are not used, one sentence each."""
        self.digest = digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeySet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def fitting(self, kid: str, algorithm: str) -> list[VerificationKey]:
        """The keys that may verify a token with this `kid` (empty: it has none) and algorithm. A key without an id fits any."""
        return [key for key in self.keys if algorithm in key.algorithms and (not kid or not key.kid or key.kid == kid)]


def strict_json(text: bytes | str) -> Any:
    """JSON without what two readers could take in two ways: names that are there twice, `NaN`, and bytes that are no UTF-8. Raises
    ValueError, with a sentence that shows nothing of the text."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise ValueError(f"it is not JSON: {problem.msg} at position {problem.pos}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(_name: str) -> Any:
    raise ValueError("it has a number that is not one")


def parse_keys(text: bytes | str) -> KeySet:
    """The set that `text` is. Raises ValueError when it is none, or has no key that could verify a signature."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > MOST_BYTES:
        raise ValueError(f"the key set has more than {MOST_BYTES} bytes")
    try:
        body = strict_json(data)
    except ValueError as problem:
        raise ValueError(f"the key set can't be read: {problem}") from None
    items = body.get("keys") if isinstance(body, dict) else None
    if not isinstance(items, list):
        raise ValueError('the key set has no list "keys"')  # noqa: TRY004 -- of what was read, not of an argument
    if len(items) > MOST_KEYS:
        raise ValueError(f"the key set has {len(items)} keys; at most {MOST_KEYS} are allowed")
    keys: list[VerificationKey] = []
    left_out: list[str] = []
    for index, item in enumerate(items):
        try:
            keys.append(_key(item))
        except (ValueError, TypeError, KeyError, JoseError) as problem:
            why = str(problem) if isinstance(problem, ValueError) else "it is malformed"
            left_out.append(f"keys[{index}] is not used: {why}")
    if not keys:
        raise ValueError("the key set has no key that signatures can be verified by" + (f" ({left_out[0]})" if left_out else ""))
    return KeySet(tuple(keys), tuple(left_out), hashlib.sha256(data).digest())


def _key(item: Any) -> VerificationKey:
    if not isinstance(item, dict):
        raise ValueError("it is not a mapping")  # noqa: TRY004 -- of what was read, not of an argument
    kid, use, operations, algorithm = item.get("kid", ""), item.get("use"), item.get("key_ops"), item.get("alg")
    if not isinstance(kid, str):
        raise ValueError("its kid is not a string")  # noqa: TRY004 -- of what was read, not of an argument
    if use not in (None, "sig"):
        raise ValueError("its use is not sig")
    if operations is not None and (not isinstance(operations, list) or "verify" not in operations):
        raise ValueError("its key_ops do not have verify")
    key, able = _material(item)
    if algorithm is not None:
        # The two names of one algorithm.
        same = _OKP["Ed25519"] if algorithm in _OKP["Ed25519"] else (algorithm,)
        able = tuple(name for name in able if name in same)
        if not able:
            raise ValueError("its alg is not one of its type that is known here")
    return VerificationKey(kid, able, key)


def _material(item: dict[str, Any]) -> tuple[Key, tuple[str, ...]]:
    """A key from the public members of `item`, and the algorithms of its type."""
    kind, curve = item.get("kty"), item.get("crv")
    if kind == "RSA":
        bits = int.from_bytes(_bytes(item["n"])).bit_length()
        if not LEAST_RSA <= bits <= MOST_RSA:
            raise ValueError(f"it has {bits} bits; RSA keys need {LEAST_RSA} to {MOST_RSA}")
        return RSAKey.import_key({"kty": "RSA", "n": item["n"], "e": item["e"]}), _RSA
    if kind == "EC" and curve in _EC:
        return ECKey.import_key({"kty": "EC", "crv": curve, "x": item["x"], "y": item["y"]}), _EC[curve]
    if kind == "OKP" and curve in _OKP:
        return OKPKey.import_key({"kty": "OKP", "crv": curve, "x": item["x"]}), _OKP[curve]
    if kind == "oct":
        size = len(_bytes(item["k"]))
        able = tuple(name for name, least in _OCT.items() if size >= least)
        if not able:
            raise ValueError(f"it has {size} bytes; HMAC keys need {_OCT['HS256']}")
        return OctKey.import_key({"kty": "oct", "k": item["k"]}), able
    raise ValueError("its type or curve is not known here")


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

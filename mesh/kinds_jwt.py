"""The schema of Istio's `RequestAuthentication` (security.istio.io). Limits and rules are those of its CRD."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

from mesh import formats
from mesh.attachment_istio import TARGETS, target_rule
from mesh.documents import FieldPath
from mesh.jwks import parse_keys
from mesh.schema import Duration, Faults, Fields, Flag, Items, Text

TAKEN: Final = frozenset(
    (
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "traceparent",
        "tracestate",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-forwarded-client-cert",
        "x-forwarded-for",
        "x-forwarded-proto",
        "x-request-id",
    )
)
"""Headers of the connection, of the framing, of who the caller is, and of traces: no claim is said in them."""


def _output(value: str) -> str:
    wrong = formats.header_name(value)
    if wrong:
        return wrong
    if "_" in value:
        return f"{formats.shown(value)} has an underscore, which requests may not have in a header's name; use '-'"
    return f"{formats.shown(value)} is the gateway's own to write; choose another name" if value.lower() in TAKEN else ""


def key_uri(value: str) -> str:
    """The address of a key set: an http or https URL."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        parts, port = None, None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not value.isprintable():
        return f"{formats.shown(value)} is not an address to fetch keys from; use http:// or https://"
    if parts.username is not None or parts.password is not None:
        return "has a password in it, which this is no place for"
    return ""


def _prefix(value: str) -> str:
    return "" if value.isascii() and value.isprintable() else "must be printable ASCII"


def _word(value: str) -> str:
    bad = not value.isascii() or not value.isprintable() or any(character in ' ";,=\\' for character in value)
    return f"{formats.shown(value)} is not the name of a cookie" if bad else ""


_NAMES: Final = Items(Text(least=1, most=256), most=64)


def _rule(rule: Any, path: FieldPath, faults: Faults) -> None:
    aliases = [name for name in ("jwksUri", "jwks_uri") if rule.get(name)]
    if len(aliases) > 1:
        faults.add((*path, "jwks_uri"), "is another name of jwksUri; keep one of the two")
    if rule.get("jwks") and aliases:
        faults.add((*path, aliases[0]), "does not go with jwks; keep one of the two")
    if rule.get("jwks"):
        try:
            parse_keys(rule["jwks"])
        except ValueError as problem:
            faults.add((*path, "jwks"), str(problem))
    elif not aliases:
        issuer = rule.get("issuer") or ""
        if not issuer:
            faults.add((*path, "issuer"), "is missing; without it jwks or jwksUri must say which keys to verify by")
        elif key_uri(issuer):
            message = f"the issuer {formats.shown(issuer)} is no URL to ask for its OpenID configuration"
            faults.add((*path, "jwksUri"), f"is missing, and so is jwks; {message}")
    if rule.get("timeout") is not None and not 0 < formats.decimal_seconds(rule["timeout"]) <= 60:
        faults.add((*path, "timeout"), "must be longer than nothing and at most 60s")
    names = [item["header"].lower() for item in rule.get("outputClaimToHeaders") or []]
    if rule.get("outputPayloadToHeader"):
        names.append(rule["outputPayloadToHeader"].lower())
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.add((*path, "outputClaimToHeaders"), f"the header {name} is to have two values; each needs a header of its own")


_JWT_RULE: Final = Fields(
    {},
    {
        "issuer": Text(most=2048),
        "audiences": Items(Text(least=1, most=2048), most=256),
        "jwksUri": Text(key_uri, most=2048),
        "jwks_uri": Text(key_uri, most=2048),
        "jwks": Text(most=1 << 20),
        "fromHeaders": Items(Fields({"name": Text(formats.header_name)}, {"prefix": Text(_prefix, most=256)}), most=64),
        "fromParams": _NAMES,
        "fromCookies": Items(Text(_word, least=1, most=256), most=64),
        "outputPayloadToHeader": Text(_output, most=256),
        "forwardOriginalToken": Flag(),
        "outputClaimToHeaders": Items(
            Fields({"header": Text(_output, most=256), "claim": Text(least=1, most=1024)}),
            most=64,
        ),
        "timeout": Duration(decimal=True),
        "spaceDelimitedClaims": Items(Text(least=1, most=256), most=64),
    },
    rule=_rule,
)


REQUEST_AUTHENTICATION: Final = Fields({}, {**TARGETS, "jwtRules": Items(_JWT_RULE, most=64)}, rule=target_rule)

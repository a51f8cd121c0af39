"""From RequestAuthentications to the rules by which tokens are verified at a Gateway, or before a Service.

All that hold at one place are one list of rules (istio.io, "Request authentication"). One that can't be understood has every request of
its place refused: whatever it was to verify, or to take off, would be believed otherwise.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mesh import formats
from mesh.attachment_istio import at_gateway, at_service, services_of
from mesh.compile_world import Name, Trouble, World
from mesh.documents import Document, Problem
from mesh.jwks import parse_keys
from mesh.tokens import NOT_AUTHENTICATED, Authentication, KeySource, TokenRule

KIND = "RequestAuthentication"
DEFAULT_TIMEOUT = 5.0
"""Seconds for one fetch of keys, as Istio has it."""


def gateway_authentication(world: World, gateway: Document, root: str) -> Authentication:
    """What holds at a Gateway."""
    good, bad = _all(world)
    return _authentication(at_gateway(good, gateway, root), at_gateway(bad, gateway, root))


def service_authentications(world: World) -> dict[Name, Authentication]:
    """What holds before Services, for those that a policy names."""
    good, bad = _all(world)
    names = {(document.key.namespace, service) for document in (*good, *bad) for service in services_of(document)}
    return {
        (namespace, name): _authentication(at_service(good, namespace, name), at_service(bad, namespace, name)) for namespace, name in names
    }


def _all(world: World) -> tuple[list[Document], list[Document]]:
    return list(world.of(KIND).values()), [document for document in world.bad.values() if document.key.kind == KIND]


def _authentication(good: list[Document], bad: list[Document]) -> Authentication:
    if not (good or bad):
        return NOT_AUTHENTICATED
    return Authentication(
        tuple(rule for document in good for rule in token_rules(document)),
        f"{bad[0].key} can't be understood, and nothing passes until it is put right or deleted" if bad else "",
    )


def token_rules(document: Document) -> tuple[TokenRule, ...]:
    """The rules of one policy that has passed its check."""
    own = f"{document.key.namespace}/{document.key.name}"
    rules = (document.body.get("spec") or {}).get("jwtRules") or []
    return tuple(_rule(f"{own}#{index}", body) for index, body in enumerate(rules))


def _rule(name: str, body: Any) -> TokenRule:
    issuer = body.get("issuer") or ""
    timeout = formats.decimal_seconds(body["timeout"]) if body.get("timeout") else DEFAULT_TIMEOUT
    uri = body.get("jwksUri") or body.get("jwks_uri") or ""
    if body.get("jwks"):
        keys = KeySource(inline=body["jwks"])
    elif uri:
        keys = KeySource(uri=uri, timeout=timeout)
    else:
        keys = KeySource(issuer=issuer.rstrip("/"), timeout=timeout)
    places: dict[str, Any] = {}
    if body.get("fromHeaders") or body.get("fromParams") or body.get("fromCookies"):
        places = {
            "headers": tuple((item["name"].lower().encode(), item.get("prefix") or "") for item in body.get("fromHeaders") or []),
            "params": tuple(body.get("fromParams") or ()),
            "cookies": tuple(body.get("fromCookies") or ()),
        }
    return TokenRule(
        name=name,
        issuer=issuer,
        keys=keys,
        audiences=tuple(body.get("audiences") or ()),
        forward=bool(body.get("forwardOriginalToken")),
        payload_header=(body.get("outputPayloadToHeader") or "").lower().encode(),
        claim_headers=tuple(
            (item["header"].lower().encode(), tuple(item["claim"].split("."))) for item in body.get("outputClaimToHeaders") or []
        ),
        space_delimited=tuple(sorted({"permission", "scope", *(body.get("spaceDelimitedClaims") or ())})),
        **places,
    )


def check_requests(world: World, ours: dict[Name, Document], http: Collection[str], root: str) -> tuple[Problem, ...]:
    """Policies that hold only at Gateways where no HTTP is spoken. `http`: those (`namespace/name`) where it is."""
    problems: list[Problem] = []
    for _, document in sorted(world.of(KIND).items()):
        held = [f"{name[0]}/{name[1]}" for name, gateway in ours.items() if at_gateway((document,), gateway, root)]
        if held and not services_of(document) and not set(held) & set(http):
            trouble = Trouble(document)
            trouble.warn((), f"no listener of {held[0]} is for HTTP, and tokens are looked for in requests only", "TargetNotFound")
            problems += trouble.found
    return tuple(problems)


def check_keys(world: World) -> tuple[Problem, ...]:
    """Keys that are written into policies and not used."""
    problems: list[Problem] = []
    for _, document in sorted(world.of(KIND).items()):
        trouble = Trouble(document)
        for index, rule in enumerate((document.body.get("spec") or {}).get("jwtRules") or []):
            for why in parse_keys(rule["jwks"]).left_out if rule.get("jwks") else ():
                trouble.warn(("spec", "jwtRules", index, "jwks"), why, "UnusableKey")
        problems += trouble.found
    return tuple(problems)

"""Who bears a token: the compiled rules of `RequestAuthentication`, and what a verified token says of a request."""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.http import Header

METADATA = "envoy.filters.http.jwt_authn"
"""Where a policy's input has the claims (`filterMetadata`), and under which name in it."""
PAYLOAD = "payload"


class KeySource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the keys of an issuer come from: exactly one of the first three is there."""

    inline: str = ""
    """The JWKS itself."""
    uri: str = ""
    """Where it is fetched."""
    issuer: str = ""
    """Whose OpenID configuration says where it is fetched (OpenID Connect Discovery 1.0)."""
    timeout: float = 5.0
    """Seconds for one fetch, discovery included."""

    @property
    def name(self) -> str:
        """For people and metrics."""
        return self.uri or (f"{self.issuer} (discovery)" if self.issuer else "inline")


class TokenRule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule of a `RequestAuthentication` (Istio's `JWTRule`)."""

    name: str
    """`namespace/policy#index`."""
    issuer: str
    """What `iss` must be; empty for anything."""
    keys: KeySource
    audiences: tuple[str, ...] = ()
    """One of which `aud` must have; empty for any or none."""
    headers: tuple[tuple[bytes, str], ...] = ((b"authorization", "Bearer "),)
    """Where a token is looked for: the header's name (lower case) and what is before the token in it."""
    params: tuple[str, ...] = ("access_token",)
    """Query parameters."""
    cookies: tuple[str, ...] = ()
    forward: bool = False
    """Whether the upstream gets the token, too."""
    payload_header: bytes = b""
    """A header for the upstream that has the payload, in base64url; empty for none."""
    claim_headers: tuple[tuple[bytes, tuple[str, ...]], ...] = ()
    """Headers for the upstream, and the path of the claim that each of them has."""
    space_delimited: tuple[str, ...] = ("permission", "scope")
    """Claims whose words are a list to policies."""

    @property
    def outputs(self) -> frozenset[bytes]:
        """The headers that only we may say something in."""
        return frozenset((*([self.payload_header] if self.payload_header else ()), *(name for name, _ in self.claim_headers)))


class Authentication(msgspec.Struct, frozen=True):
    """How tokens are verified at one place."""

    rules: tuple[TokenRule, ...] = ()
    broken: str = ""
    """Why no request may pass: a policy that holds here can't be understood."""


NOT_AUTHENTICATED = Authentication()


class Bearer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the verified token of a request says. Its owner is whoever verified it; nobody writes to `claims`."""

    rule: TokenRule
    principal: str
    """`issuer/subject`, Istio's request principal; empty when the token lacks one of them."""
    claims: dict[str, Any]
    """As policies see them (`input.attributes.metadataContext`): numbers are double precision floats or integers of that range."""
    headers: tuple[Header, ...] = ()
    """What the rule says of them to the upstream."""
    outputs: frozenset[bytes] = frozenset()
    """The names of the headers in which it may say something, whether it does or not."""
    expires: float = 0.0
    """Seconds since the epoch after which the token is not valid any more, clock skew included; infinite for one without an end."""

    @property
    def metadata(self) -> dict[str, Any]:
        """`filterMetadata` in a policy's input."""
        return {METADATA: {PAYLOAD: self.claims}}

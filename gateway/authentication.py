"""Finds the tokens of a request, has them verified, and says what becomes of its headers (Istio's `RequestAuthentication`).

A request without a token passes, and bears nobody's name; one with a token that is not believed is refused. A request has one token: with
two that differ nobody could say which of them a service would go by. The headers by which we tell services of the claims are taken off
every request, whether it has a token or not; the token itself is taken off unless its rule forwards it. The preflight of CORS carries no
token in the name of anybody: it passes without a look at one, which is taken off, too.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from gateway.cors import is_preflight
from identity.authenticator import KeysWanted, Tokens
from identity.jwt import SEVERAL, Bad
from mesh.http import Header, RequestHead
from mesh.refusals import InvalidToken, PolicyError, Refusal
from mesh.tokens import Authentication, Bearer

COOKIE: Final = b"cookie"
_SPACES: Final = (b" ", b"\t")
_QUOTABLE: Final = re.compile(rb"[!#-\[\]-~]*")
"""What stands in a quoted string as it is."""


class Checked(msgspec.Struct, frozen=True):
    """What is known of a request's token, and so what is to be done with its headers."""

    by: Authenticated
    bearer: Bearer | None
    strips: bool
    """The token is not for the upstream."""


class Authenticated:
    """The authentication of one place, prepared for requests."""

    __slots__ = ("_authenticator", "_broken", "_cookies", "_headers", "_nobody", "_outputs", "_params", "_reserved")

    def __init__(self, config: Authentication, tokens: Tokens) -> None:
        rules = config.rules
        self._broken = config.broken
        self._authenticator = tokens.of(rules)
        headers: dict[bytes, dict[bytes, int]] = {}
        params: dict[bytes, int] = {}
        cookies: dict[bytes, int] = {}
        for index, rule in enumerate(rules):
            bit = 1 << index
            for name, prefix in rule.headers:
                prefixes = headers.setdefault(name, {})
                prefixes[prefix.encode()] = prefixes.get(prefix.encode(), 0) | bit
            for param in rule.params:
                params[param.encode()] = params.get(param.encode(), 0) | bit
            for cookie in rule.cookies:
                cookies[cookie.encode()] = cookies.get(cookie.encode(), 0) | bit
        # One value holds one token: where several prefixes fit, it is what follows the longest.
        self._headers = {name: tuple(sorted(found.items(), key=lambda each: len(each[0]), reverse=True)) for name, found in headers.items()}
        """Prefixes and rules, by header; the longest prefix first."""
        self._params = params
        self._cookies = cookies
        self._outputs = frozenset(name for rule in rules for name in rule.outputs)
        self._reserved = self._outputs | self._headers.keys()
        self._nobody = Checked(self, None, False)

    def check(self, head: RequestHead, received: float, *, waited: bool = False) -> Checked | Refusal | KeysWanted:
        """What to make of a request, at `received` (seconds since the epoch). Nothing of it is changed."""
        if self._broken:
            return PolicyError(reason=self._broken)
        found = self.tokens(head)
        if not found:
            return self._nobody
        if is_preflight(head):
            return Checked(self, None, True)
        if len(found) > 1:
            return refusal(self._authenticator.refused(SEVERAL), head)
        token, rules = found.popitem()
        judged = self._authenticator.judge(token, rules, received, waited=waited)
        if isinstance(judged, Bearer):
            return Checked(self, judged, not judged.rule.forward)
        return refusal(judged, head) if isinstance(judged, Bad) else judged

    def tokens(self, head: RequestHead) -> dict[bytes, int]:
        """The tokens of a request, each with the rules (as bits) that look where it was found."""
        found: dict[bytes, int] = {}
        headers, cookies = self._headers, self._cookies
        for name, value in head.headers:
            places = headers.get(name)
            if places is not None:
                for prefix, rules in places:
                    token = after(value, prefix)
                    if token is not None:
                        found[token] = found.get(token, 0) | rules
                        break
            if cookies and name == COOKIE:
                for part in value.split(b";"):
                    cookie, _, text = part.strip().partition(b"=")
                    if cookie in self._cookies:
                        if len(text) > 1 and text[:1] == text[-1:] == b'"':
                            text = text[1:-1]  # RFC 6265 section 4.1.1
                        found[text] = found.get(text, 0) | self._cookies[cookie]
        if head.query and self._params:
            for part in head.query.split(b"&"):
                param, _, text = part.partition(b"=")
                rules = self._params.get(plain(param), 0)
                if rules:
                    text = plain(text)
                    found[text] = found.get(text, 0) | rules
        return found

    @property
    def outputs(self) -> frozenset[bytes]:
        """The headers that only we may say something in."""
        return self._outputs

    @property
    def reserved(self) -> frozenset[bytes]:
        """These, and those where tokens are looked for: none of them may come in trailers, where nobody has looked."""
        return self._reserved

    def edited(self, headers: list[Header], checked: Checked, reserved: frozenset[bytes]) -> list[Header]:
        """`headers` as they go on: another list unless nothing is changed. What is `reserved` is ours already."""
        gone, bearer = self._outputs, checked.bearer
        if reserved:
            gone -= reserved
        if bearer is not None and not bearer.outputs <= gone:
            gone |= bearer.outputs
        if not checked.strips:
            if not gone:
                return headers
            made = [field for field in headers if field[0] not in gone]
        else:
            # What is here to be looked at is a field or two, so the others are not asked about by a call.
            places = self._headers
            held = [field for field in headers if field[0] in places and self._has_token(field)]
            if len(held) == 1:
                token = held[0]
                made = [field for field in headers if field is not token and field[0] not in gone]
            else:
                made = [field for field in headers if field not in held and field[0] not in gone]
            if self._cookies:
                made = [kept for field in made if (kept := self._without_cookies(field)) is not None]
        if bearer is not None and bearer.headers:
            made += bearer.headers
        return made

    def rewrite_query(self, head: RequestHead) -> None:
        """Takes tokens out of the query."""
        if not head.query or not self._params:
            return
        parts = head.query.split(b"&")
        kept = [part for part in parts if plain(part.partition(b"=")[0]) not in self._params]
        if len(kept) < len(parts):
            head.query = b"&".join(kept) or None
            head.target = head.path if head.query is None else head.path + b"?" + head.query

    def _has_token(self, field: Header) -> bool:
        return any(after(field[1], prefix) is not None for prefix, _ in self._headers[field[0]])

    def _without_cookies(self, field: Header) -> Header | None:
        if field[0] != COOKIE:
            return field
        parts = field[1].split(b";")
        kept = [part for part in parts if part.strip().partition(b"=")[0] not in self._cookies]
        if len(kept) == len(parts):
            return field
        value = b";".join(kept).strip()
        return (COOKIE, value) if value else None


def after(value: bytes, prefix: bytes) -> bytes | None:
    """What follows `prefix` in a header's value; None where it does not begin so. `Bearer` may be written in any case (RFC 9110 section
    11.1): a service would take it for a token, too."""
    if prefix == b"Bearer ":
        return value[7:].lstrip(b" \t") if value[6:7] in _SPACES and value[:6].lower() == b"bearer" else None
    return value[len(prefix) :] if value.startswith(prefix) else None


def plain(text: bytes) -> bytes:
    """A part of a query, decoded."""
    return unquote_to_bytes(text.replace(b"+", b" ")) if b"%" in text or b"+" in text else text


def refusal(bad: Bad, head: RequestHead) -> InvalidToken:
    """What is told to the client: RFC 6750 section 3."""
    realm = head.scheme + b"://" + head.authority + head.path
    if not _QUOTABLE.fullmatch(realm):
        realm = head.scheme + b"://"
    challenge = b'Bearer realm="' + realm + b'", error="invalid_token"'
    return InvalidToken(
        code=403 if bad.forbidden else 0,
        reason=bad.message,
        told=bad.message,
        headers=((b"www-authenticate", challenge),),
    )

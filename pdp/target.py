"""A request target as the OPA-Envoy plugin takes it apart: `parsed_path`, `parsed_query`, and forms.

Follows Go's `net/url` (`url.Parse`, `URL.Query`, `url.ParseQuery`), which the plugin uses (`envoyauth/request.go`), in what it accepts and
in what it makes of it. Bytes that are no UTF-8 after decoding become U+FFFD, as they do in any JSON.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

Query = dict[str, list[str]]

_BROKEN: Final = re.compile("%(?![0-9A-Fa-f]{2})")
_PLAIN: Final = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@-][A-Za-z0-9._~!$&'()*+,;=:@/-]*)?")
"""Targets in which nothing stands for anything else."""
_CONTROL: Final = re.compile("[\x00-\x1f\x7f]")


class TargetError(ValueError):
    """A target that Go's `url.Parse` does not take."""


def split_target(target: str) -> tuple[list[str], Query]:
    """`parsed_path` and `parsed_query` of a target (`/a/b?c=d`). Raises `TargetError`."""
    if _PLAIN.fullmatch(target):
        return target[1:].split("/"), {}
    if _CONTROL.search(target):
        raise TargetError("the target has control characters")
    target = target.partition("#")[0]
    path, _, query = target.partition("?")
    if path.startswith("//") and not path.startswith("///"):
        authority, slash, rest = path[2:].partition("/")
        if _BROKEN.search(authority):
            raise TargetError("the target's authority has a broken escape")
        path = slash + rest
    elif not path.startswith("/") and ":" in path.partition("/")[0]:
        raise TargetError("the target is a whole URL, not a path")
    if _BROKEN.search(path):
        raise TargetError("the path has a broken escape")
    return unescape(path).lstrip("/").split("/"), parse_query(query, strict=False)


def parse_query(text: str, *, strict: bool) -> Query:
    """The values of each name, in their order. A pair that is broken is left out, or, with `strict`, is a `TargetError` (as in a form)."""
    found: Query = {}
    for pair in text.split("&") if text else ():
        if not pair:
            continue
        if ";" in pair or _BROKEN.search(pair):
            if strict:
                raise TargetError("a form has a broken escape or a semicolon")
            continue
        name, _, value = pair.partition("=")
        found.setdefault(unescape(name.replace("+", " ")), []).append(unescape(value.replace("+", " ")))
    return found


def unescape(text: str) -> str:
    """Percent-escapes decoded, once."""
    return unquote_to_bytes(text).decode("utf-8", "replace") if "%" in text else text

"""The forms that strings in a configuration may have. Each function says what is wrong, in one sentence; empty when nothing is.

Names are those of Kubernetes (RFC 1035 and 1123), durations those of Gateway API (GEP-2257), paths and header names those of RFC 3986
and 9110, expressions are RE2.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo

import re2

Format = Callable[[str], str]

_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SUBDOMAIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_PORT_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_DURATION: Final = re.compile(r"(?:[0-9]{1,5}(?:h|ms|m|s)){1,4}")
_DURATION_PART: Final = re.compile(r"([0-9]+)(h|ms|m|s)")
_DECIMAL: Final = re.compile(r"(?:(?:[0-9]{1,5}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(?:h|ms|m|s)){1,4}")
_DECIMAL_PART: Final = re.compile(r"([0-9.]+)(h|ms|m|s)")
_SECONDS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+")
_MATCH_VALUE: Final = re.compile(r"[!-~]+(?:[\t ][!-~]+)*")
_PATH: Final = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9a-fA-F]{2})+")
_SPIFFE: Final = re.compile(r"spiffe://([a-z0-9][a-z0-9._-]{0,254})((?:/[A-Za-z0-9._-]+)+)")
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,253}[a-z0-9])?")
_DECISION: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z_][A-Za-z0-9_-]*)+")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_LABEL_WORD: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_DNS: Final = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*"
_KIND: Final = re.compile(r"[a-zA-Z](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?")
_URI: Final = re.compile(r"[^:/?#]+://[^/?#]+[^?#]*(?:\?[^#]*)?(?:#.*)?")
_CONTROLLER: Final = re.compile(_DNS + r"/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+")
_LISTENER_PROTOCOL: Final = re.compile(r"[a-zA-Z0-9](?:[-a-zA-Z0-9]*[a-zA-Z0-9])?|" + _DNS + r"/[A-Za-z0-9]+")
_ADDRESS_TYPE: Final = re.compile(_DNS + r"/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+")
_FORBIDDEN: Final = ("//", "/./", "/../", "%2f", "%2F", "#")


def shown(value: str, most: int = 80) -> str:
    """`value` in quotes, cut when it is long, with control characters escaped."""
    text = value if len(value) <= most else value[:most] + "..."
    return '"' + text.encode("unicode_escape").decode("ascii").replace("\\\\", "\\") + '"' if not text.isprintable() else f'"{text}"'


def label(value: str) -> str:
    """A DNS label: names of namespaces, services and sections."""
    if _LABEL.fullmatch(value):
        return ""
    return (
        f"{shown(value)} is not a DNS label; use at most 63 lower-case letters, digits and '-', beginning and ending with a letter or digit"
    )


def subdomain(value: str) -> str:
    """A DNS name in lower case: the names of most resources."""
    if len(value) <= 253 and _SUBDOMAIN.fullmatch(value):
        return ""
    return (
        f"{shown(value)} is not a DNS name; use lower-case letters, digits, '-' and '.', at most 253, with a letter or digit at both ends"
    )


def port_name(value: str) -> str:
    """The name of a service's port."""
    if len(value) <= 63 and _PORT_NAME.fullmatch(value):
        return ""
    return f"{shown(value)} is not the name of a port; use at most 63 lower-case letters, digits and '-'"


def hostname(value: str) -> str:
    """A host's name, not an address; the first label may be `*`."""
    return exact_hostname(value[2:] if value.startswith("*.") else value)


def exact_hostname(value: str) -> str:
    """A host's name, not an address and without a wildcard."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        pass
    else:
        return f"{shown(value)} is an IP address; use a DNS name"
    if "*" in value:
        return f"{shown(value)} has a wildcard in the wrong place; only a whole first label may be '*', where a wildcard is allowed at all"
    wrong = subdomain(value)
    return f"{shown(value)} is not a host name; use lower-case letters, digits, '-' and '.'" if wrong else ""


def label_name(value: str) -> str:
    """The name of a label or annotation: an optional DNS name and `/`, then up to 63 characters."""
    prefix, slash, name = value.rpartition("/")
    if _LABEL_WORD.fullmatch(name) and len(name) <= 63 and not (slash and (subdomain(prefix) or not prefix)):
        return ""
    return f"{shown(value)} is not the name of a label; write it as in example.com/team or team"


def label_value(value: str) -> str:
    """The value of a label."""
    if not value or (len(value) <= 63 and _LABEL_WORD.fullmatch(value)):
        return ""
    return f"{shown(value)} can't be the value of a label; use at most 63 letters, digits, '-', '_' and '.'"


def kind(value: str) -> str:
    """The name of a kind of resource."""
    return "" if _KIND.fullmatch(value) else f"{shown(value)} is not the name of a kind; write it as in Service"


def absolute_uri(value: str) -> str:
    """A URI with a scheme and an authority (RFC 3986), as in a certificate's names."""
    return (
        ""
        if _URI.fullmatch(value)
        else f"{shown(value)} is not a URI with a scheme and a host; write it as in spiffe://example.org/ns/a/sa/b"
    )


def controller_name(value: str) -> str:
    """The name of a controller: a DNS name and a path."""
    if _CONTROLLER.fullmatch(value):
        return ""
    return f"{shown(value)} is not the name of a controller; write it as in tollhouse.dev/gateway-controller"


def listener_protocol(value: str) -> str:
    """The name of a listener's protocol: one word, or an implementation's own with its DNS name in front."""
    if _LISTENER_PROTOCOL.fullmatch(value):
        return ""
    return f"{shown(value)} is not the name of a protocol; write it as in HTTPS or example.com/bar"


def address_type(value: str) -> str:
    """The type of an address of a Gateway: one of Gateway API's, or an implementation's own with its DNS name in front."""
    if value in ("IPAddress", "Hostname", "NamedAddress") or _ADDRESS_TYPE.fullmatch(value):
        return ""
    return f"{shown(value)} is not a type of address; use IPAddress"


def duration(value: str) -> str:
    """A duration of Gateway API (GEP-2257)."""
    return "" if _DURATION.fullmatch(value) else f"{shown(value)} is not a duration; write it as in 500ms, 15s, 1m30s or 2h"


def seconds(value: str) -> float:
    """The seconds of a duration that `duration` accepts."""
    return round(sum(int(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(value)), 6)


def decimal_duration(value: str) -> str:
    """A duration as Go's `time.ParseDuration` reads it, and Kubernetes for Istio's kinds: Gateway API's, and with decimals."""
    return "" if _DECIMAL.fullmatch(value) else f"{shown(value)} is not a duration; write it as in 500ms, 1.5s, 1m30s or 2h"


def decimal_seconds(value: str) -> float:
    """The seconds of a duration that `decimal_duration` accepts."""
    return round(sum(float(number) * _SECONDS[unit] for number, unit in _DECIMAL_PART.findall(value)), 6)


def header_name(value: str) -> str:
    """The name of a header field (RFC 9110 section 5.1)."""
    if len(value) <= 256 and _TOKEN.fullmatch(value):
        return ""
    return f"{shown(value)} is not the name of a header; use letters, digits and '-' (no ':' in front, no spaces)"


def header_match_value(value: str) -> str:
    """The value that a header is compared with: visible ASCII, single spaces or tabs between words."""
    if _MATCH_VALUE.fullmatch(value):
        return ""
    return f"{shown(value)} can't be compared with a header's value; use visible ASCII characters, and single spaces between words"


def header_value(value: str) -> str:
    """The value of a header field: no control characters, nothing that could end the field."""
    if any((ch < " " and ch != "\t") or ch == "\x7f" or ord(ch) > 255 for ch in value):
        return f"{shown(value)} can't be the value of a header: it has control characters or some outside Latin-1"
    return f"{shown(value)} has white space at its beginning or end" if value != value.strip(" \t") else ""


_MATCHED: Final = "can never match: paths are normalised first, and have no {} then"
_SENT: Final = "is not a path to send anybody to: servers differ in what they make of {}"


def path(value: str) -> str:
    """An absolute path in its one form, as requests are compared with it."""
    return _whole_path(value, _MATCHED)


def new_path(value: str) -> str:
    """An absolute path that takes the place of a request's: in the form that no two servers understand in two ways."""
    return _whole_path(value, _SENT)


def _whole_path(value: str, wrong: str) -> str:
    if not value.startswith("/"):
        return f"{shown(value)} is not a path; begin it with '/'"
    if found := part_of_path(value, wrong):
        return found
    return f"{shown(value)} {wrong.format('dot segments')}" if value.endswith(("/..", "/.")) else ""


def part_of_path(value: str, wrong: str = _MATCHED) -> str:
    """A part of such a path. `wrong`: what is said of what could be understood in two ways."""
    for part in _FORBIDDEN:
        if part in value:
            return f"{shown(value)} {wrong.format(repr(part))}"
    if value and not _PATH.fullmatch(value):
        return f"{shown(value)} has characters that a path can't have as they are; write them as %XX"
    return ""


def expression(value: str) -> str:
    """An RE2 expression."""
    try:
        compiled(value)
    except re2.error as error:
        why = error.args[0] if error.args else "?"
        return f"{shown(value)} is not an RE2 expression: {why.decode() if isinstance(why, bytes) else why}"
    return ""


@functools.lru_cache(maxsize=4096)
def compiled(value: str) -> Any:
    """The RE2 expression, compiled. Raises `re2.error`."""
    options = re2.Options()
    options.max_mem = 1 << 20
    options.log_errors = False
    return re2.compile(value, options)


def spiffe_id(value: str) -> str:
    """A SPIFFE ID of a workload (SPIFFE-ID section 2)."""
    found = _SPIFFE.fullmatch(value) if len(value) <= 2048 else None
    if found and not {".", ".."} & set(found.group(2).split("/")):
        return ""
    return f"{shown(value)} is not a SPIFFE ID; write it as in spiffe://example.org/ns/shop/sa/web"


def trust_domain(value: str) -> str:
    """The name of a trust domain."""
    if _TRUST_DOMAIN.fullmatch(value):
        return ""
    return f"{shown(value)} is not a trust domain; write it as in example.org (without spiffe://)"


def ip_address(value: str) -> str:
    """An IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return f"{shown(value)} is not an IP address"
    return ""


def network(value: str) -> str:
    """A network in CIDR notation."""
    try:
        ipaddress.ip_network(value)
    except ValueError as error:
        return f"{shown(value)} is not a network ({error}); write it as in 10.0.0.0/8"
    return ""


def host_port(value: str) -> str:
    """`host:port`, the host being a name or an address (IPv6 in brackets)."""
    host, _, port = value.rpartition(":")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        return f"{shown(value)} is not an address; write it as in authz.example:9191"
    wrong = ip_address(host[1:-1]) if host.startswith("[") and host.endswith("]") else ip_address(host) and exact_hostname(host)
    return f"{shown(value)} is not an address; write it as in authz.example:9191" if wrong else ""


def decision(value: str) -> str:
    """The Rego path of a decision, below `data`."""
    if _DECISION.fullmatch(value) and value.partition(".")[0] not in ("data", "input"):
        return ""
    return f"{shown(value)} is not the path of a decision; write it as in shop.authz.decision"


def digest(value: str) -> str:
    """A digest as revisions have it."""
    return "" if _DIGEST.fullmatch(value) else f"{shown(value)} is not a digest; it begins with sha256: and 64 hex digits follow"


def bundle_url(value: str) -> str:
    """Where a bundle is fetched: an http or https URL without credentials."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return f"{shown(value)} is not a URL; write it as in https://bundles.example.com/shop.tar.gz"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not value.isprintable() or " " in value:
        return f"{shown(value)} is not the address of a bundle; write it as in https://bundles.example.com/shop.tar.gz"
    if parts.username is not None or parts.password is not None:
        return "has a password in it, which this is no place for: credentials are in files"
    if parts.fragment:
        return "has a fragment (#...), which no server is sent"
    if any(unquote(part) in (".", "..") for part in parts.path.split("/")):
        return "has . or .. in its path; write out where it leads"
    return ""


def usable_address(value: str, version: int = 0) -> str:
    """The IP address of one machine that can be connected to, of the given version (4, 6, or 0 for either)."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return f"{shown(value)} is not an IP address"
    if version and address.version != version:
        return f"{shown(value)} is not an IPv{version} address"
    if address.is_unspecified or address.is_multicast or value == "255.255.255.255" or "%" in value:
        return f"{shown(value)} is not the address of one machine"
    return ""


def duration_text(value: float) -> str:
    """A duration of Gateway API for `value` seconds, to the millisecond and at most 99,999 h."""
    left = round(min(max(value, 0.0), 99_999 * 3600.0) * 1000)
    parts = []
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def time_zone(text: str) -> str:
    """A name of the IANA's time zone database, such as Europe/Berlin."""
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):  # a folder of the database is an OSError
        return f"{shown(text)} is not a time zone; write it as in Europe/Berlin or UTC"
    return ""

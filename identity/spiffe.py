"""SPIFFE IDs: how a workload is named (SPIFFE-ID specification, sections 2.1 to 2.4).

`spiffe://<trust domain>/<path>`. Read strictly: what is not exactly in the one form of the specification is refused, never
brought into it, because IDs are compared as text everywhere else.
"""

from __future__ import annotations

import string

import msgspec

from identity.problems import IdentityError

SCHEME = "spiffe://"
MAX_BYTES = 2048
MAX_TRUST_DOMAIN = 255

_TRUST_DOMAIN = frozenset(string.ascii_lowercase + string.digits + ".-_")
_SEGMENT = frozenset(string.ascii_letters + string.digits + ".-_")


class SpiffeId(msgspec.Struct, frozen=True, gc=False):
    """One SPIFFE ID, taken apart. `str()` gives the one text that stands for it."""

    trust_domain: str
    path: str = ""
    """With its leading slash; empty for the ID of a trust domain itself (a CA's)."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}{self.path}"

    @property
    def namespace(self) -> str:
        """The namespace of `/ns/<namespace>/sa/<service account>`; empty for a path of another form."""
        return self._workload()[0]

    @property
    def service_account(self) -> str:
        """The service account of `/ns/<namespace>/sa/<service account>`; empty for a path of another form."""
        return self._workload()[1]

    def _workload(self) -> tuple[str, str]:
        parts = self.path.split("/")
        if len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa":
            return parts[2], parts[4]
        return "", ""

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Reads an ID. Raises `IdentityError` (reason `bad_spiffe_id`) that says which rule it breaks."""
        if not text.startswith(SCHEME):
            raise _bad(text, "it must begin with spiffe://, in lower case")
        if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise _bad(text[:64] + "...", f"it is longer than {MAX_BYTES} bytes")
        domain, slash, rest = text[len(SCHEME) :].partition("/")
        check_trust_domain(domain)
        if not slash:
            return cls(domain)
        for segment in rest.split("/"):
            if not segment:
                raise _bad(text, "its path has an empty segment or ends with a slash")
            if segment in {".", ".."}:
                raise _bad(text, "its path has a dot segment")
            if not _SEGMENT.issuperset(segment):
                raise _bad(text, "a path may hold letters, digits, '.', '-' and '_' alone (no query, fragment or escape)")
        return cls(domain, f"/{rest}")

    @classmethod
    def workload(cls, trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
        """`spiffe://<trust domain>/ns/<namespace>/sa/<service account>`; raises `IdentityError` as `parse` does."""
        if "/" in namespace or "/" in service_account:
            raise _bad(f"ns {namespace}, sa {service_account}", "a namespace or service account holds no slash")
        return cls.parse(f"{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}")


def check_trust_domain(domain: str) -> None:
    """Raises `IdentityError` (reason `bad_spiffe_id`) unless `domain` is a trust domain's name: no port, no upper case."""
    if not domain:
        raise _bad(domain, "a trust domain cannot be empty")
    if len(domain) > MAX_TRUST_DOMAIN:
        raise _bad(domain[:64] + "...", f"a trust domain is at most {MAX_TRUST_DOMAIN} characters long")
    if not _TRUST_DOMAIN.issuperset(domain):
        raise _bad(domain, "a trust domain may hold lower-case letters, digits, '.', '-' and '_' alone")


def _bad(text: str, why: str) -> IdentityError:
    return IdentityError("bad_spiffe_id", f"{text!r} is not a SPIFFE ID: {why}")

"""Certificates of Secrets that end: one that has is not served, the others are, and a listener without any accepts nothing."""

from __future__ import annotations

import pytest
from upstream_world import GATEWAY, ORDERS, authority

from identity.files import NoIdentity
from identity.problems import IdentityError
from identity.tls import server_context
from mesh.model import ListenerTls


def test_what_has_expired_is_not_served() -> None:
    short = authority().issue(GATEWAY, dns=["a.example"], lifetime=3600.0)
    long = authority().issue(ORDERS, dns=["b.example"], lifetime=7200.0)
    both = ListenerTls(certificates=((short.chain, short.key), (long.chain, long.key)))
    only = ListenerTls(certificates=((short.chain, short.key),))
    assert server_context(both, NoIdentity(), short.not_after - 1).sni_callback is not None
    assert server_context(both, NoIdentity(), short.not_after + 1).sni_callback is not None
    assert server_context(only, NoIdentity(), short.not_after - 1) is not None
    with pytest.raises(IdentityError) as problem:
        server_context(only, NoIdentity(), short.not_after + 1)
    assert problem.value.reason == "expired"

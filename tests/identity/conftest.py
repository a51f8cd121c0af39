"""The authority of the identity tests, and two workloads of it."""

from __future__ import annotations

import pytest
from identity_world import GATEWAY, WEB

from identity.ca import Authority
from identity.files import StaticIdentity


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create("shop.example")


@pytest.fixture(scope="session")
def gateway(authority: Authority) -> StaticIdentity:
    return StaticIdentity(authority.issue(GATEWAY, dns=["ingress.edge.example"]))


@pytest.fixture(scope="session")
def web(authority: Authority) -> StaticIdentity:
    return StaticIdentity(authority.issue(WEB))

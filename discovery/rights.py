"""Who may do what in etcd: roles for each kind of process and person, and the users that have them.

etcd gives rights by ranges of keys (etcd.io, "Role-based access control"), so what a role may do follows from `discovery.keys`. A user is
known by a password, or, where etcd runs with `--client-cert-auth`, by the common name of its client certificate. etcd holds to all this
once `enable` was called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from aetcd import rpc

from discovery.audit import AUDITED, LIMITS
from discovery.etcd import Etcd
from discovery.keys import AUDIT, AUDIT_QUOTA, AUDITS, CONFIG, GATEWAYS, ROOT, SERVICES, WATCHED, check_name, config_prefix, end_of

ROOT_NAME: Final = "root"
"""etcd's own role and user, which may do everything; without it authentication can't be enabled."""
READER: Final = "tollhouse-reader"
GATEWAY: Final = "tollhouse-gateway"
REGISTRAR: Final = "tollhouse-registrar"
DATA: Final = "tollhouse-data"
POLICY: Final = "tollhouse-policy"
QUOTA: Final = "tollhouse-quota"
OPERATOR: Final = "tollhouse-operator"


class Right(msgspec.Struct, frozen=True):
    """One range of keys that may be used."""

    start: bytes
    end: bytes
    write: bool = False
    """Read and write; else read."""


class Role(msgspec.Struct, frozen=True):
    """A role, and what it is for."""

    name: str
    purpose: str
    rights: tuple[Right, ...]


def _below(prefix: bytes | str, *, write: bool = False) -> Right:
    start = prefix.encode() if isinstance(prefix, str) else prefix
    return Right(start, end_of(start), write)


_WATCH: Final = Right(*WATCHED)
_ALL: Final = _below(ROOT)
ROLES: Final = (
    Role(READER, "the decision point, the quota service, and who only looks", (_ALL,)),
    Role(GATEWAY, "a gateway: reads the configuration, reports what it has in force", (_WATCH, _below(GATEWAYS, write=True))),
    Role(REGISTRAR, "registers instances of any service", (_below(SERVICES, write=True),)),
    Role(
        DATA,
        "publishes data that policy reads, and changes no policy",
        (
            _ALL,
            *(_below(config_prefix("tollhouse.dev", kind), write=True) for kind in ("ActiveData", "DataRevision")),
            _below(AUDIT, write=True),
        ),
    ),
    Role(
        POLICY,
        "changes who may call what: policy, its attachment, Istio's policies",
        (
            _ALL,
            *(_below(config_prefix(group, kind), write=True) for group, kind in sorted(AUDITED) if kind != "Mesh"),
            _below(AUDITS, write=True),
        ),
    ),
    Role(
        QUOTA,
        "changes limits: QuotaPolicies, and what is changed by hand in an incident",
        (_ALL, *(_below(config_prefix(group, kind), write=True) for group, kind in sorted(LIMITS)), _below(AUDIT_QUOTA, write=True)),
    ),
    Role(OPERATOR, "changes all of the configuration", (_ALL, _below(CONFIG, write=True), _below(AUDITS, write=True))),
)
"""In the order of what they may do."""


def registrar_of(namespace: str, service: str = "") -> Role:
    """A registrar's role for the services of one namespace, or for one service. Raises ValueError for what can't be a name."""
    for part in filter(None, (namespace, service)):
        check_name(part)
    if not namespace:
        raise ValueError("a registrar's role is for NAMESPACE or NAMESPACE/SERVICE")
    where = f"{namespace}/{service}" if service else namespace
    return Role(f"{REGISTRAR}:{where}", f"registers instances of {where}", (_below(f"{SERVICES}{where}/", write=True),))


class Made(msgspec.Struct, frozen=True):
    """What became of the roles."""

    created: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()


async def apply_roles(etcd: Etcd, roles: Sequence[Role]) -> Made:
    """Makes each role have exactly its rights, whatever it had before; users keep their roles. Raises EtcdError."""
    found: dict[str, list[str]] = {"created": [], "changed": [], "unchanged": []}
    there = set((await _auth(etcd, "RoleList", rpc.AuthRoleListRequest())).roles)
    for role in roles:
        new = role.name not in there
        if new:
            await _auth(etcd, "RoleAdd", rpc.AuthRoleAddRequest(name=role.name))
        held = {} if new else await _rights_of(etcd, role.name)
        wanted = {(right.start, right.end): _type(right) for right in role.rights}
        for start, end in held.keys() - wanted.keys():
            await _auth(etcd, "RoleRevokePermission", rpc.AuthRoleRevokePermissionRequest(role=role.name, key=start, range_end=end))
        more = [span for span, kind in wanted.items() if held.get(span) != kind]
        for start, end in more:
            perm = rpc.Permission(permType=wanted[start, end], key=start, range_end=end)
            await _auth(etcd, "RoleGrantPermission", rpc.AuthRoleGrantPermissionRequest(name=role.name, perm=perm))
        found["created" if new else "changed" if more or held.keys() - wanted.keys() else "unchanged"].append(role.name)
    return Made(**{name: tuple(names) for name, names in found.items()})


async def add_user(etcd: Etcd, name: str, roles: Sequence[str], password: str = "") -> tuple[str, ...]:
    """Makes a user, or one that there is already, have exactly `roles` of ours (others, it keeps). A new one without a `password` is known
    by its client certificate alone; one that there is keeps what password it has. Returns the roles of ours that it lost. Raises EtcdError.
    """
    options = rpc.AuthUserAddRequest(name=name, password=password)
    options.options.no_password = not password
    there = name in (await _auth(etcd, "UserList", rpc.AuthUserListRequest())).users
    held: set[str] = set()
    if there:
        held = set((await _auth(etcd, "UserGet", rpc.AuthUserGetRequest(name=name))).roles)
        if password:
            await _auth(etcd, "UserChangePassword", rpc.AuthUserChangePasswordRequest(name=name, password=password))
    else:
        await _auth(etcd, "UserAdd", options)
    for role in roles:
        if role not in held:
            await _auth(etcd, "UserGrantRole", rpc.AuthUserGrantRoleRequest(user=name, role=role))
    lost = sorted(role for role in held - set(roles) if role.split(":")[0] in OURS)
    for role in lost:
        await _auth(etcd, "UserRevokeRole", rpc.AuthUserRevokeRoleRequest(name=name, role=role))
    return tuple(lost)


async def enable(etcd: Etcd, password: str = "") -> None:
    """Makes etcd ask everybody who it is. The user `root` is made for that if there is none: with `password`, or, without, for the bearer
    of a client certificate with that common name. Raises EtcdError."""
    if ROOT_NAME not in (await _auth(etcd, "RoleList", rpc.AuthRoleListRequest())).roles:
        await _auth(etcd, "RoleAdd", rpc.AuthRoleAddRequest(name=ROOT_NAME))
    await add_user(etcd, ROOT_NAME, [ROOT_NAME], password)
    await _auth(etcd, "AuthEnable", rpc.AuthEnableRequest())


OURS: Final = frozenset(role.name for role in ROLES)


async def _rights_of(etcd: Etcd, role: str) -> Mapping[tuple[bytes, bytes], int]:
    answer = await _auth(etcd, "RoleGet", rpc.AuthRoleGetRequest(role=role))
    return {(bytes(each.key), bytes(each.range_end)): int(each.permType) for each in answer.perm}


def _type(right: Right) -> int:
    return int(rpc.Permission.READWRITE if right.write else rpc.Permission.READ)


async def _auth(etcd: Etcd, method: str, request: object) -> Any:
    """One call of etcd's Auth service. None is tried again by itself: etcd says no to what is there already."""
    return await etcd.call(lambda endpoint: getattr(endpoint.auth, method), request, again=False)

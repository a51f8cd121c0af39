"""`tollhouse etcd`: who may read and change what in an etcd, as roles and users of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tollhouse.output import Complaint, emit, example, format_option

if TYPE_CHECKING:
    from discovery.etcd import Etcd
    from discovery.rights import Right, Role

T = TypeVar("T")

CONFIG = click.option(
    "--config", required=True, help="The etcd, as one who may: etcds://HOST:PORT?ca=FILE&cert=FILE&key=FILE, etcd://root@HOST:PORT?..."
)
PASSWORD = click.option(
    "--password-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File with the password.  [default: known by a client certificate's common name]",
)
REGISTRARS = click.option(
    "--registrar",
    "registrars",
    multiple=True,
    metavar="NAMESPACE[/SERVICE]",
    help="A role for registering these alone, too; may be given again.",
)


@click.group(epilog=example("tollhouse etcd roles --config etcd://127.0.0.1:2379 --apply"))
def etcd() -> None:
    """Say who may read and change what in an etcd: by roles and users of its own.

    An etcd asks nobody who they are until `tollhouse etcd enable`. Users are known by a password, or, with etcd's --client-cert-auth, by
    the common name of their certificate (`tollhouse ca issue --user`).
    """


@etcd.command(epilog=example("tollhouse etcd roles --registrar shop/orders --config etcd://127.0.0.1:2379 --apply"))
@click.option("--config", default="", help="The etcd to put them into.")
@click.option("--apply", "and_apply", is_flag=True, help="Put them into the etcd; a role that is there gets just these rights.")
@REGISTRARS
@format_option
def roles(config: str, and_apply: bool, registrars: tuple[str, ...], form: str) -> None:
    """Show the roles and what each may do, or put them into an etcd."""
    from discovery.rights import ROLES, apply_roles, registrar_of

    wanted = list(ROLES)
    for name in registrars:
        namespace, _, service = name.partition("/")
        try:
            wanted.append(registrar_of(namespace, service))
        except ValueError as problem:
            raise Complaint(f"--registrar: {problem}", 2) from None
    if and_apply and not config:
        raise Complaint("--apply: say where: --config etcd://HOST:PORT", 2)
    if config and not and_apply:
        raise Complaint("--config: nothing is read from there; --apply puts the roles into it", 2)
    became: dict[str, str] = {}
    if and_apply:
        made = _with_etcd(config, lambda client: apply_roles(client, wanted))
        became = {name: word for word in ("created", "changed", "unchanged") for name in getattr(made, word)}
    rows = [
        [role.name, _span(right), "read, write" if right.write else "read", became.get(role.name, "")]
        for role in wanted
        for right in role.rights
    ]
    value = [{**_shown(role), **({"result": became[role.name]} if became else {})} for role in wanted]
    emit(form, value, rows, ["role", "keys", "may", "result" if became else ""])


@etcd.command(epilog=example("tollhouse etcd user ada --role tollhouse-policy --config etcd://127.0.0.1:2379"))
@click.argument("name")
@click.option("--role", "names", multiple=True, required=True, help="A role; may be given again. Other roles of ours are taken away.")
@PASSWORD
@CONFIG
def user(name: str, names: tuple[str, ...], password_file: Path | None, config: str) -> None:
    """Make a user with these roles, or give one that there is just these."""
    from discovery.rights import add_user

    password = _password(password_file)
    lost = _with_etcd(config, lambda client: add_user(client, name, names, password))
    by = "a password" if password else f"a client certificate with the common name {name}"
    click.echo(f"{name} has {', '.join(names)}, and is known by {by}" + (f"; it has lost {', '.join(lost)}" if lost else ""))


@etcd.command(epilog=example("tollhouse etcd enable --password-file root.password --config etcd://127.0.0.1:2379"))
@PASSWORD
@CONFIG
def enable(password_file: Path | None, config: str) -> None:
    """Have the etcd ask everybody who they are, from now on. The user root is made for it, if there is none."""
    from discovery.rights import enable as turn_on

    password = _password(password_file)
    _with_etcd(config, lambda client: turn_on(client, password))
    click.echo(
        "authentication is enabled; root is known by " + ("its password" if password else "a client certificate with the common name root")
    )


def _password(path: Path | None) -> str:
    """The password in a file. Raises `Complaint`."""
    if path is None:
        return ""
    try:
        text = path.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise Complaint(f"--password-file: {path} cannot be read: {problem}", 2) from None
    if not text:
        raise Complaint(f"--password-file: {path} is empty", 2)
    return text


def _with_etcd(config: str, work: Callable[[Etcd], Awaitable[T]]) -> T:
    """Does `work` with the etcd at `config`. Raises `Complaint`."""
    from discovery.etcd import EtcdError
    from tollhouse.parts import open_etcd, unreachable

    async def run() -> T:
        client = open_etcd(config)
        try:
            return await work(client)
        finally:
            await client.close()

    try:
        return asyncio.run(run())
    except EtcdError as problem:
        raise Complaint(unreachable(problem)) from None


def _span(right: Right) -> str:
    """A range of keys, for people."""
    from discovery.keys import end_of

    start = right.start.decode()
    return f"{start}*" if right.end == end_of(right.start) else f"{start} to {right.end.decode()}"


def _shown(role: Role) -> dict[str, Any]:
    rights = [{"start": each.start.decode(), "end": each.end.decode(), "write": each.write} for each in role.rights]
    return {"name": role.name, "purpose": role.purpose, "rights": rights}

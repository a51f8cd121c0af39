"""What command-line options hold: durations, addresses, names. Bad ones are refused by the parser, with what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gateway.limits import Limits

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType[float]):
    """Seconds, written `90d`, `24h`, `15m`, `10s`, `250ms` or `1h30m`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds that `value` says."""
        if isinstance(value, (int, float)):
            return float(value)
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", value)
        if not parts or "".join(number + unit for number, unit in parts) != value:
            self.fail(f"{value!r} is not a duration; write for example 24h, 15m, 10s or 250ms", param, ctx)
        return sum(float(number) * UNITS[unit] for number, unit in parts)


class Address(click.ParamType[tuple[str, int]]):
    """`HOST:PORT`, as a pair; `[::1]:80` for IPv6."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """The host and the port that `value` names."""
        if isinstance(value, tuple):
            return value
        host, _, port = value.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in host and not bracketed):
            self.fail(f"{value!r} is not HOST:PORT; write for example 127.0.0.1:15000, or [::1]:15000", param, ctx)
        return host.strip("[]"), int(port)


class Target(click.ParamType[str]):
    """`HOST:PORT`, kept as text; also `off` and the path of a socket where `also_off` says so."""

    name = "host:port"

    def __init__(self, *, also_off: bool = False) -> None:
        self.also_off = also_off

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The same text, checked."""
        if not (self.also_off and (value == "off" or value.startswith("/"))):
            ADDRESS.convert(value, param, ctx)
        return str(value)


class Targets(click.ParamType[tuple[str, ...]]):
    """Some `HOST:PORT` with commas between them."""

    name = "host:port[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Each of them."""
        if isinstance(value, tuple):
            return value
        found = tuple(part.strip() for part in value.split(",") if part.strip())
        for part in found:
            ADDRESS.convert(part, param, ctx)
        return found


class Named(click.ParamType[str]):
    """`NAMESPACE/NAME`."""

    name = "namespace/name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The same text, checked."""
        part = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
        if not re.fullmatch(f"{part}/{part}", value):
            self.fail(f"{value!r} is not NAMESPACE/NAME; write for example edge/ingress", param, ctx)
        return str(value)


class Limit(click.ParamType[tuple[str, float]]):
    """`NAME=VALUE`: one of `gateway.limits.Limits`, as a pair. Times as durations, sizes as bytes or with `Ki` or `Mi`."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The name and the number that `value` says."""
        import difflib

        from gateway.limits import Limits

        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        known = {field: type(getattr(Limits(), field)) for field in Limits.__struct_fields__}
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"
            self.fail(f"there is no limit {name!r}; {hint}", param, ctx)
        if known[name] is float:
            number: float = DURATION.convert(text if equals else "", param, ctx)
        else:
            found = re.fullmatch(r"(\d{1,12})(Ki|Mi)?", text)
            if not found:
                self.fail(f"{value!r}: write a whole number, for example {name}={getattr(Limits(), name)}", param, ctx)
            number = int(found[1]) * {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}[found[2] or ""]
        if number <= 0:
            self.fail(f"{value!r}: a limit is above 0", param, ctx)
        return name, number


def limits_of(pairs: Iterable[tuple[str, float]]) -> Limits:
    """The limits that `--limit` options make, the last one of a name counting."""
    from gateway.limits import Limits as Made

    return Made(**dict(pairs))  # type: ignore[arg-type]  # `Limit` has seen to the types


DURATION = Duration()
ADDRESS = Address()
TARGET = Target()
TARGETS = Targets()
ADMIN = Target(also_off=True)
NAMED = Named()
LIMIT = Limit()


def decision_log_choices(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the decision log: `decision_log` and `decision_log_set`, both of them tuples of text."""
    to = click.option(
        "--decision-log",
        multiple=True,
        metavar="FILE|-|URL|off",
        help="Log each decision in OPA's format: to a file, stdout, or a server (POST URL/logs); may be given again.  [default: off]",
    )
    more = click.option(
        "--decision-log-set",
        multiple=True,
        metavar="NAME=VALUE",
        help="which=refused, input=full, token=FILE, ca=FILE, upload_limit=BYTES or buffer_limit=BYTES; docs/policy.md has them all.",
    )
    return to(more(command))


JWKS_CA = click.option(
    "--jwks-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="CAs (PEM) of the servers that token keys are fetched from.  [default: the system's]",
)
"""Of each command that fetches keys."""

ADMINS = click.option(
    "--admin",
    "admins",
    multiple=True,
    default=("127.0.0.1:15000",),
    show_default=True,
    metavar="HOST:PORT",
    help="The admin page of a gateway; may be given again.",
)
"""The option of commands that put together what several gateways say."""

"""What command-line options hold: durations, addresses, names. Bad ones are refused by the parser, with what is expected."""

from __future__ import annotations

import re
from typing import Any

import click

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
        if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
            self.fail(f"{value!r} is not HOST:PORT; write for example 127.0.0.1:15000", param, ctx)
        return host.strip("[]"), int(port)


class Named(click.ParamType[str]):
    """`NAMESPACE/NAME`."""

    name = "namespace/name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The same text, checked."""
        part = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
        if not re.fullmatch(f"{part}/{part}", value):
            self.fail(f"{value!r} is not NAMESPACE/NAME; write for example edge/ingress", param, ctx)
        return str(value)


DURATION = Duration()
ADDRESS = Address()
NAMED = Named()

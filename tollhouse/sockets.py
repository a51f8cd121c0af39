"""Listening sockets that are handed over: by the parent of several workers, or by systemd (sd_listen_fds(3)).

A socket outlives the process that accepts from it, so connections that wait in its queue are lost by no restart.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping

Where = tuple[str, int]
"""IP address and port."""
Place = tuple[str, int, socket.SocketKind]
"""IP address, port, and whether it is for TCP (`SOCK_STREAM`) or UDP (`SOCK_DGRAM`)."""

VARIABLE = "TOLLHOUSE_SOCKETS"
"""File descriptors of listening sockets, separated by commas."""
BUNDLES = "TOLLHOUSE_BUNDLES_SOCKET"
"""File descriptor of the socket at which one of several workers serves bundles."""
BACKLOG = 4096
FIRST_FD = 3


def shown_address(host: str, port: int) -> str:
    """`HOST:PORT` as it is written in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(place: Place, *, shared: bool) -> socket.socket:
    """A listening (for UDP: a bound) socket at `place`; `shared`: one of several there: the kernel spreads what comes.

    Raises OSError with the address in it.
    """
    address, port, kind = place
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    try:
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        if kind == socket.SOCK_STREAM:
            made.listen(BACKLOG)
    except OSError as problem:
        made.close()
        raise OSError(problem.errno, problem.strerror or str(problem), f"{address}:{port}") from None
    made.setblocking(False)
    return made


def hand_over(sockets: Iterable[socket.socket]) -> tuple[dict[str, str], tuple[int, ...]]:
    """The environment and the file descriptors to give to a process that shall have `sockets`."""
    numbers = tuple(each.fileno() for each in sockets)
    return {VARIABLE: ",".join(map(str, numbers))}, numbers


def inherited(environ: Mapping[str, str] = os.environ) -> dict[Place, socket.socket]:
    """The listening sockets that this process was given. Raises ValueError for a variable that cannot be read."""
    numbers: list[int] = []
    if environ.get("LISTEN_PID") == str(os.getpid()):
        numbers += range(FIRST_FD, FIRST_FD + int(environ.get("LISTEN_FDS", "0")))
    if environ.get(VARIABLE):
        numbers += [int(text) for text in environ[VARIABLE].split(",")]
    found: dict[Place, socket.socket] = {}
    for number in numbers:
        made = socket.socket(fileno=number)
        made.setblocking(False)
        os.set_inheritable(number, False)
        name = made.getsockname()
        found[name[0], name[1], made.type] = made
    return found

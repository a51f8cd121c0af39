"""What a Redis that could not do what was asked means, for people and for the breaker.

Errors that a script runs into reach the client in two forms: since Redis 7 as they are, before that within a sentence about the script. So
they are known by their code word, wherever it is.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from redis.exceptions import RedisError, ResponseError

from quota.redis_server import NotAcknowledged, Refused


class Trouble(msgspec.Struct, frozen=True):
    """Why an ask got no answer."""

    kind: str
    """One of a few words, for metrics."""
    reason: str
    """For people: what is wrong, and what to do."""
    everyone: bool = True
    """Whether the server can't serve anybody just now: then it is left alone for a while. If not, it is about this bucket only."""


_KNOWN: Final = (
    (
        "wrong-type",
        "WRONGTYPE|TOLLHOUSE \\S+ holds",
        "{key} in Redis holds something that is no bucket: who writes there? delete it",
    ),
    ("resharding", "TRYAGAIN", "the slot of {key} is being moved to another node"),
    ("out-of-memory", "OOM|used memory > 'maxmemory'", "Redis is out of memory and takes no writes: raise its maxmemory"),
    ("read-only", "READONLY|read only replica", "Redis is a replica and takes no writes: name the master in the address, or the Sentinels"),
    ("not-saved", "MISCONF", "Redis takes no writes since it can't save its data (MISCONF): its log says why"),
    ("replicas", "NOREPLICAS|good replicas", "Redis takes no writes while too few replicas are there (min-replicas-to-write)"),
    ("busy", "BUSY|busy running a script", "Redis is busy with a script of somebody's: SCRIPT KILL ends it"),
    ("loading", "LOADING|loading the dataset", "Redis is still loading its data"),
    (
        "denied",
        "NOPERM|NOAUTH|WRONGPASS|[Nn]o permissions|can't run this command|Authentication required|invalid username-password|"
        "invalid password|without any password configured",
        "Redis denies it ({text}): docs/quota.md lists the rights that the user needs",
    ),
    ("cluster", "CLUSTERDOWN|MASTERDOWN|MOVED|ASK|no node has the slot|cluster is down", "the cluster can't serve the slot: {text}"),
)
"""Kind, what it is known by, and what is said of it."""
_PATTERNS: Final = tuple((kind, re.compile(rf"(?<![A-Za-z])(?:{words})"), said) for kind, words, said in _KNOWN)
_OF_A_BUCKET: Final = frozenset({"wrong-type", "resharding"})


def trouble(problem: BaseException, key: bytes = b"") -> Trouble:
    """Puts an answer or an exception into words. `key`: the bucket that was asked about, if it was one."""
    if isinstance(problem, TimeoutError):
        return Trouble("timeout", "Redis does not answer in time")
    text = str(problem) or type(problem).__name__
    if isinstance(problem, NotAcknowledged):
        return Trouble("replicas", text, everyone=False)
    if isinstance(problem, Refused):
        return Trouble("evicting", text)
    for kind, pattern, said in _PATTERNS:
        if pattern.search(text) or (kind == "loading" and type(problem).__name__ == "BusyLoadingError"):
            return Trouble(kind, said.format(key=key.decode("utf-8", "replace"), text=text), everyone=kind not in _OF_A_BUCKET)
    if isinstance(problem, ResponseError):
        return Trouble("other", text)
    if isinstance(problem, RedisError | OSError):
        return Trouble("connection", text)
    return Trouble("other", f"{type(problem).__name__}: {text}")

"""Conversations with codecs: what they say, in a form that can be written down and compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from gateway.codec.events import (
    BodyReceived,
    Codec,
    Ended,
    Event,
    GoAway,
    Informational,
    Refused,
    RequestReceived,
    Reset,
    ResponseReceived,
    Writable,
)
from mesh.http import Header, RequestHead

Said = tuple[Any, ...]


def said(event: Event) -> Said:
    """One event as a tuple: its name, its stream and what it carries."""
    number = event.stream
    match event:
        case RequestReceived(head=head):
            line = b" ".join((head.method, head.authority, head.target, head.version))
            return ("request", number, line, tuple(head.headers), head.body_length, event.ended, event.expects_continue)
        case ResponseReceived():
            return ("response", number, event.status, tuple(event.headers), event.version, event.body_length, event.ended)
        case Informational():
            return ("informational", number, event.status, tuple(event.headers))
        case BodyReceived():
            return ("body", number, event.data)
        case Ended():
            return ("end", number, None if event.trailers is None else tuple(event.trailers))
        case Reset():
            return ("reset", number, event.code, event.unprocessed)
        case Refused():
            return ("refused", number, event.refusal.answer_status)
        case Writable():
            return ("writable", number)
        case GoAway():
            return ("goaway", event.last)
    raise AssertionError(event)


def transcript(events: Iterable[Event]) -> list[Said]:
    """All events, with the pieces of each body joined."""
    out: list[Said] = []
    for event in events:
        one = said(event)
        if one[0] == "body":
            if not one[2]:
                continue
            if out and out[-1][0] == "body" and out[-1][1] == one[1]:
                out[-1] = ("body", one[1], out[-1][2] + one[2])
                continue
        out.append(one)
    return out


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """`data` cut at each of `cuts` (taken modulo its length)."""
    at = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(at)]


def feed(codec: Codec, parts: Iterable[bytes]) -> list[Event]:
    """What `codec` says of `parts`, one after the other."""
    return [event for part in parts for event in codec.receive(part)]


def head(
    method: bytes = b"GET", headers: Sequence[Header] = (), body_length: int = 0, target: bytes = b"/", authority: bytes = b"shop"
) -> RequestHead:
    """A request's head."""
    return RequestHead(method, b"https", authority, target, list(headers), b"HTTP/1.1", body_length, target)

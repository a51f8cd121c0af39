"""A request's body between its codec and the upstream's side: what is held, and whether more may come."""

from __future__ import annotations

from typing import Final

from gateway.codec.events import ServerCodec
from gateway.plan import Pending
from mesh.http import UNKNOWN_LENGTH, Header, RequestHead
from mesh.refusals import BodyTooLarge

DRAIN_MOST: Final = 64 * 1024
"""Bytes of an answered request that are read, to keep an HTTP/1.1 connection, before it is closed instead."""


class Body:
    """Owns the bytes that the upstream's side has not taken yet, and the flow-control credit for them. Other requests have none."""

    __slots__ = ("_codec", "_credit", "_number", "_pieces", "drained", "ended", "expects", "held", "passed", "trailers")

    def __init__(self, codec: ServerCodec, number: int, expects: bool) -> None:
        self._codec = codec
        self._number = number
        self._pieces: list[bytes] = []
        self._credit = 0
        self.expects = expects
        """The client waits for `100 Continue`."""
        self.held = 0
        """Bytes that wait."""
        self.drained = 0
        """Bytes that came after the answer, and were thrown away."""
        self.ended = False
        """All of it has come."""
        self.passed = False
        """Its end has been passed on."""
        self.trailers: list[Header] | None = None

    def keep(self, data: bytes, credit: int) -> None:
        """Holds `data`; its credit is given back when it is taken."""
        self._pieces.append(data)
        self.held += len(data)
        self._credit += credit

    def take(self) -> bytes:
        """All that is held; it counts as consumed."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.drop()
        return data

    def drop(self) -> None:
        """Lets go of what is held."""
        self._pieces = []
        self.held = 0
        if self._credit:
            self._codec.consumed(self._number, self._credit)
            self._credit = 0

    def thrown(self, data: bytes, credit: int) -> None:
        """`data` came and nobody is there to take it."""
        self.drained += len(data)
        if credit:
            self._codec.consumed(self._number, credit)

    def worth_draining(self, head: RequestHead, received: int) -> bool:
        """Whether so little of an answered request is missing, `received` bytes having come, that it is read to keep the connection."""
        if self.expects:
            return False  # it may never come
        return head.body_length == UNKNOWN_LENGTH or head.body_length - received <= DRAIN_MOST

    def let_continue(self, begun: bool) -> None:
        """Sends `100 Continue` to a client that waits for it, once, and not when it has `begun` anyway."""
        if self.expects:
            self.expects = False
            if not begun:
                self._codec.send_informational(self._number, 100, [])


def show(pending: Pending, body: bytes) -> BodyTooLarge | None:
    """Puts what was gathered of the body where the policies see it: all of it, or what they may see, or nothing and a refusal."""
    limit, asking = pending.body_limit, pending.asking
    if len(body) > limit and not pending.body_partial:
        return BodyTooLarge(reason=f"more than the {limit} bytes that a policy may be shown")
    asking.body = body[:limit]
    asking.body_complete = len(body) <= limit
    return None

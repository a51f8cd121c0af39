"""W3C Trace Context: a trace is passed on with this gateway as the new parent, or begun (w3.org/TR/trace-context, sections 3.2 and 4)."""

from __future__ import annotations

import random
from binascii import hexlify
from typing import Final

TRACEPARENT: Final = b"traceparent"
SAMPLED: Final = b"01"
"""Flags of a trace that begins here: whoever is called may record it."""

_HEX: Final = b"0123456789abcdef"
_NO_TRACE: Final = b"0" * 32
_NO_PARENT: Final = b"0" * 16
_FLAGS: Final = {b"%02x" % flags: b"%02x" % (flags & 0x03) for flags in range(256)}
"""Only the flags that have a meaning (sampled, random) are passed on."""


def identifiers(rng: random.Random) -> tuple[bytes, bytes, bytes]:
    """A fresh request id (a version 4 UUID, RFC 9562 section 5.4), trace id and parent id, from one draw."""
    digits = hexlify(rng.getrandbits(320).to_bytes(40, "big"))
    request_id = b"%b-%b-4%b-a%b-%b" % (digits[0:8], digits[8:12], digits[13:16], digits[17:20], digits[20:32])
    return request_id, digits[32:64], digits[64:80]


def passed_on(sent: bytes | None, trace_id: bytes, parent_id: bytes) -> tuple[bytes, bool]:
    """The `traceparent` for the upstream, and whether it goes on with the trace that was `sent` (its `tracestate` holds only then)."""
    if sent is not None and len(sent) >= 55 and sent[:55].translate(None, _HEX) == b"---" and sent[2] == sent[35] == sent[52] == 0x2D:
        version, trace, flags = sent[:2], sent[3:35], sent[53:55]
        later = version not in (b"00", b"ff") and sent[55:56] in (b"", b"-")
        if (later or (version == b"00" and len(sent) == 55)) and trace != _NO_TRACE and sent[36:52] != _NO_PARENT:
            return b"00-" + trace + b"-" + parent_id + b"-" + _FLAGS[flags], True
    return b"00-" + trace_id + b"-" + parent_id + b"-" + SAMPLED, False

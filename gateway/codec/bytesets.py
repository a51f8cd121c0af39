"""Whether bytes are all of one set: the cheapest test that Python has for it.

`text.translate(only(allowed)) == text` looks each byte up in a table made once, and gives back `text` itself when nothing changed. With
`delete`, `translate` builds a table of its own in every call; and `b"_" in text` raises a TypeError within, since it takes a number first.
"""

from __future__ import annotations


def only(allowed: bytes) -> bytes:
    """A table for `bytes.translate` that leaves `allowed` bytes as they are, and makes each other byte an allowed one, that is another."""
    return bytes(byte if byte in allowed else allowed[0] for byte in range(256))


def without(forbidden: bytes) -> bytes:
    """As `only`, for all bytes but `forbidden`."""
    return only(bytes(byte for byte in range(256) if byte not in forbidden))

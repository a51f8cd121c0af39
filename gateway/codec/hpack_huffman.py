"""HPACK's Huffman code (RFC 7541 section 5.2 and appendix B). The decoder goes by bytes, not bits, with steps that are worked out when
they are first needed."""

from __future__ import annotations

from typing import Any, Final

_LENGTHS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b080606060505050606060606060607080f060c0a"
    "0d06070707070707070707070707070707070707070707070807080d130d0e060f05060506050606060507070606060506070605050607070707070f0b0e0d1c"
    "14161414161616171617171717171817181816171817171717151617161717181615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a"
    "1e"
)
"""How many bits the code of each symbol has: the code is canonical, so that they say all of it."""
_EOS: Final = 256

_Row = list[Any]
"""A state of the decoder: for each byte that may come what it completes and the next state (None: not worked out), then its node."""


def _codes() -> list[str]:
    """The code of each symbol, in digits: in the order of their lengths they count up (appendix B)."""
    codes = [""] * 257
    code = length = 0
    for symbol in sorted(range(257), key=lambda symbol: (_LENGTHS[symbol], symbol)):
        code <<= _LENGTHS[symbol] - length
        length = _LENGTHS[symbol]
        codes[symbol] = format(code, f"0{length}b")
        code += 1
    return codes


_CODES: Final = _codes()
_SYMBOLS: Final = {code: symbol for symbol, code in enumerate(_CODES)}
_NODES: Final = {code[:length] for code in _CODES for length in range(len(code))}


class NotHuffman(ValueError):
    """Bytes that no encoder writes."""


def _row(node: str) -> _Row:
    return [*[None] * 256, node]


_rows: Final[dict[str, _Row]] = {"": _row("")}
_START: Final = _rows[""]


def _step(row: _Row, byte: int) -> tuple[bytes, _Row]:
    """Works one step out: 8 bits from a node of the tree. There are 256 nodes, so what is kept is bounded."""
    node: str = row[256]
    done = bytearray()
    for bit in format(byte, "08b"):
        node += bit
        if node not in _NODES:
            symbol = _SYMBOLS[node]
            if symbol == _EOS:
                raise NotHuffman("the end of a string within it")
            done.append(symbol)
            node = ""
    following = _rows.get(node)
    if following is None:
        following = _rows[node] = _row(node)
    step = row[byte] = (bytes(done), following)
    return step


def decode(data: bytes) -> bytes:
    """What `data` stands for. Raises `NotHuffman` for an end that is no padding: more than 7 bits, or not the first of EOS."""
    row = _START
    parts = []
    for byte in data:
        step = row[byte] or _step(row, byte)
        parts.append(step[0])
        row = step[1]
    node: str = row[256]
    if len(node) > 7 or "0" in node:
        raise NotHuffman("a string that ends within a symbol")
    return b"".join(parts)


def encode(data: bytes) -> bytes:
    """`data` in the code, padded to whole bytes."""
    if not data:
        return b""
    bits = "".join([_CODES[byte] for byte in data])
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")

"""What a plain YAML scalar means: one answer for reading and for printing.

Kubernetes' reading of YAML 1.1 (yaml.v2): `yes`, `no`, `on` and `off` are booleans, `010` is eight, and a number in JSON's spelling is a
number. Left out on purpose, because each is a string to everybody who writes configuration: sexagesimal numbers (`1:30`), dates, `y` and
`n`, and the infinities and not-a-number, which JSON doesn't have.
"""

from __future__ import annotations

import re
from typing import Final

Scalar = None | bool | int | float | str

_WORDS: Final[dict[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_NUMBER_BEGINS: Final = frozenset("+-.0123456789")
_INTEGER: Final = re.compile(r"([-+]?)(?:0b([01_]+)|0o?([0-7_]+)|0x([0-9a-fA-F_]+)|(0|[1-9][0-9_]*))")
_FLOAT: Final = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_LONGEST_NUMBER: Final = 400


def scalar(text: str) -> Scalar:
    """The value of the plain (unquoted) scalar `text`."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_BEGINS or len(text) > _LONGEST_NUMBER:
        return text
    found = _INTEGER.fullmatch(text)
    if found:
        sign, binary, octal, hexadecimal, decimal = found.groups()
        for digits, base in ((binary, 2), (octal, 8), (hexadecimal, 16), (decimal, 10)):
            clean = (digits or "").replace("_", "")
            if clean:
                return int(sign + clean, base)
        return text
    if _FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if number - number == 0:
            return number
    return text

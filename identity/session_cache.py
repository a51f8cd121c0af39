"""Switches OpenSSL's server-side session cache off, which the stdlib leaves on and has no setting for.

Without tickets a TLS 1.2 client may still resume by session ID, out of a cache of 20,000 sessions in each context: memory that idle clients
hold, and an identity that is not verified again. One call of OpenSSL's own turns it off; it is made through `ctypes` on the library
that the `ssl` module itself has loaded. Where that cannot be done, `SESSION_CACHE_OFF` is False and `peer_of` refuses resumed sessions.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys
from typing import Final

_SET_SESSION_CACHE_MODE: Final = 44
"""SSL_CTRL_SET_SESS_CACHE_MODE; the mode 0 is SSL_SESS_CACHE_OFF."""

_HEAD: Final = object.__basicsize__
"""`SSL_CTX *` is the first member after the object's head in every CPython up to the one that is checked for below."""


def _library() -> ctypes.CDLL | None:
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 15):
        return None
    try:
        library = ctypes.CDLL(_ssl.__file__)
        library.SSL_CTX_ctrl.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p)
        library.SSL_CTX_ctrl.restype = ctypes.c_long
        library.SSL_CTX_get_num_tickets.argtypes = (ctypes.c_void_p,)
        library.SSL_CTX_get_num_tickets.restype = ctypes.c_size_t
    except (AttributeError, OSError, TypeError):
        return None
    # The pointer is the right one if OpenSSL reads back from it what the stdlib wrote.
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    probe.num_tickets = 7
    return library if library.SSL_CTX_get_num_tickets(_pointer(probe)) == 7 else None


def _pointer(context: ssl.SSLContext) -> int | None:
    return ctypes.c_void_p.from_address(id(context) + _HEAD).value


_LIBRARY: Final = _library()

SESSION_CACHE_OFF: Final = _LIBRARY is not None
"""Whether `switch_off_session_cache` can do its work here."""


def switch_off_session_cache(context: ssl.SSLContext) -> None:
    """No session of `context` is kept from now on (nothing happens where it cannot be done: see the module)."""
    if _LIBRARY is not None:
        _LIBRARY.SSL_CTX_ctrl(_pointer(context), _SET_SESSION_CACHE_MODE, 0, None)

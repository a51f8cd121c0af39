"""Two settings of OpenSSL that the stdlib has no words for, made through `ctypes` on the library that the `ssl` module itself has loaded.

* The server-side session cache is switched off. Without tickets a TLS 1.2 client may still resume by session ID, out of a cache of 20,000
  sessions in each context: memory that idle clients hold, and an identity that is not verified again. Where it cannot be done,
  `SESSION_CACHE_OFF` is False and `peer_of` refuses resumed sessions.
* A client is asked for a certificate, and any is taken (Gateway API's `AllowInsecureFallback`); the stdlib knows only to end the handshake
  of one whose certificate is no good. Where it cannot be done, no certificate is asked for. Nobody is identified by it either way.
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


_Verify = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def _take_any(store: int | None, argument: int | None) -> int:
    """Every chain is good."""
    return 1


_ANY: Final = _Verify(_take_any)
"""Lives as long as the module: OpenSSL keeps its address."""


def _library() -> ctypes.CDLL | None:
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 15):
        return None
    try:
        library = ctypes.CDLL(_ssl.__file__)
        library.SSL_CTX_ctrl.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p)
        library.SSL_CTX_ctrl.restype = ctypes.c_long
        library.SSL_CTX_set_cert_verify_callback.argtypes = (ctypes.c_void_p, _Verify, ctypes.c_void_p)
        library.SSL_CTX_set_cert_verify_callback.restype = None
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


def ask_for_any_certificate(context: ssl.SSLContext) -> None:
    """Clients of `context` are asked for a certificate from now on, and whatever they show or do not show is taken (or, where it cannot be
    done, nothing changes: see the module)."""
    if _LIBRARY is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        _LIBRARY.SSL_CTX_set_cert_verify_callback(_pointer(context), _ANY, None)

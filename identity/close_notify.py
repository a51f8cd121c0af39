"""Ends one direction of a TLS connection: the close_notify alert is sent, and what the peer still sends can be read (RFC 8446 section 6.1).

The stdlib's `unwrap` calls OpenSSL's `SSL_shutdown` twice, and the second call breaks a connection whose peer is still sending
(`application data after close notify`). One call is what half-closing needs; it is made through `ctypes` on the library that the
`ssl` module itself has loaded, as in `identity.openssl`. Where that cannot be done, `unwrap` has to do.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys
from typing import Any, Final

_WANT_WRITE: Final = 3
"""SSL_ERROR_WANT_WRITE."""
_HEAD: Final = object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
"""`SSL *` is the second member after the object's head in every CPython up to the one that is checked for below."""


def _library() -> ctypes.CDLL | None:
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 15):
        return None
    try:
        library = ctypes.CDLL(_ssl.__file__)
        for name, arguments, result in (
            ("SSL_shutdown", (ctypes.c_void_p,), ctypes.c_int),
            ("SSL_get_error", (ctypes.c_void_p, ctypes.c_int), ctypes.c_int),
            ("SSL_get_servername", (ctypes.c_void_p, ctypes.c_int), ctypes.c_char_p),
            ("ERR_clear_error", (), None),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
    except (AttributeError, OSError, TypeError):
        return None
    # The pointer is the right one if OpenSSL reads back from it what the stdlib wrote.
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="probe.example")
    return library if library.SSL_get_servername(_pointer(probe._sslobj), 0) == b"probe.example" else None  # type: ignore[attr-defined]


def _pointer(sslobj: Any) -> int | None:
    return ctypes.c_void_p.from_address(id(sslobj) + _HEAD).value


_LIBRARY: Final = _library()

HALF_CLOSES: Final = _LIBRARY is not None
"""Whether what the peer sends after our close_notify can be read here."""


def send_close_notify(sock: ssl.SSLSocket) -> bool:
    """Sends the alert; False when the kernel has no room for it at the moment: call again when `sock` can be written to.

    A connection that has failed is left as it is: whoever reads it finds out.
    """
    if _LIBRARY is None:
        try:
            sock.unwrap()
        except ssl.SSLWantWriteError:
            return False
        except (OSError, ValueError):
            pass
        return True
    sslobj: Any = sock._sslobj  # type: ignore[attr-defined]
    if sslobj is None:
        return True
    pointer = _pointer(sslobj)
    _LIBRARY.ERR_clear_error()
    code = _LIBRARY.SSL_shutdown(pointer)
    again = code < 0 and _LIBRARY.SSL_get_error(pointer, code) == _WANT_WRITE
    _LIBRARY.ERR_clear_error()
    return not again

"""Backends and clients below HTTP that say what they saw: the same scripts for any proxy between them."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable

TIME = 20.0
RESET = "reset"
END = "end"
BIG = bytes(range(256)) * 4096


def reset(sock: socket.socket) -> None:
    """Ends a connection by a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def rest(sock: socket.socket) -> tuple[bytes, str]:
    """All that still comes, and how it ends."""
    got = bytearray()
    try:
        while piece := sock.recv(65536):
            got += piece
    except ConnectionError:
        return bytes(got), RESET
    return bytes(got), END


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes; fewer when it ends."""
    got = b""
    while len(got) < size and (piece := sock.recv(size - len(got))):
        got += piece
    return got


class Backend:
    """A TCP server; `serve` has each connection and says what it saw of it, which is in `seen`."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self.serve = serve
        self.seen: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._one, args=(self.listening.accept()[0],), daemon=True).start()

    def _one(self, sock: socket.socket) -> None:
        sock.settimeout(TIME)
        with sock:
            try:
                self.seen.put(self.serve(sock))
            except OSError as problem:
                self.seen.put(type(problem).__name__)


# -- backends


def echoes(sock: socket.socket) -> object:
    """Gives back what it gets, as it comes, to its end."""
    size, how = 0, END
    try:
        while piece := sock.recv(65536):
            size += len(piece)
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
    except ConnectionError:
        how = RESET
    return size, how


def says(name: bytes) -> Callable[[socket.socket], object]:
    """Says its name and ends, once the client has ended."""

    def serve(sock: socket.socket) -> object:
        sock.sendall(name)
        return rest(sock)

    return serve


def ends_first(sock: socket.socket) -> object:
    """Says something, ends its direction, and takes what still comes."""
    sock.sendall(b"all that I have")
    sock.shutdown(socket.SHUT_WR)
    return rest(sock)


def closes(sock: socket.socket) -> object:
    """Ends at once."""
    sock.shutdown(socket.SHUT_WR)
    return rest(sock)


def resets(sock: socket.socket) -> object:
    """Breaks the connection off at the first byte."""
    got = sock.recv(1)
    reset(sock)
    return got


def resets_later(sock: socket.socket) -> object:
    """Says something, and breaks the connection off once the client has it."""
    sock.sendall(b"so far")
    got = exactly(sock, 6)
    reset(sock)
    return got


def tls(name: bytes, context: ssl.SSLContext) -> Callable[[socket.socket], object]:
    """Says its name over TLS, and gives one line back."""

    def serve(sock: socket.socket) -> object:
        with context.wrap_socket(sock, server_side=True) as inside:
            inside.sendall(name)
            line = inside.recv(4096)
            inside.sendall(line)
            inside.unwrap()
        return line

    return serve


# -- clients: each has a connection and says what it saw


def sends(data: bytes) -> Callable[[socket.socket], object]:
    """Sends, while it reads, ends, and reads to the end."""

    def script(sock: socket.socket) -> object:
        def write() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        found = rest(sock)
        writer.join(TIME)
        return found

    return script


def waits(sock: socket.socket) -> object:
    """Says nothing and takes what comes until the end; then talks on, and ends."""
    found = rest(sock)
    with contextlib.suppress(OSError):
        sock.sendall(b"thank you")
        sock.shutdown(socket.SHUT_WR)
    return found


def answers_what_comes(sock: socket.socket) -> object:
    """Takes a piece, says so, and takes the rest."""
    first = exactly(sock, 6)
    with contextlib.suppress(OSError):
        sock.sendall(b"got it")
    return first, rest(sock)


def sends_one(sock: socket.socket) -> object:
    """Sends one byte and takes what comes."""
    try:
        sock.sendall(b"x")
    except ConnectionError:
        return b"", RESET
    return rest(sock)


def breaks_off(sock: socket.socket) -> object:
    """Sends, has it back, and breaks off."""
    sock.sendall(b"hello")
    got = exactly(sock, 5)
    reset(sock)
    return got


class Tls:
    """A TLS client by hand, so that what goes on the wire can be cut as one likes."""

    def __init__(self, context: ssl.SSLContext, name: str | None) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)

    def hello(self) -> bytes:
        """The ClientHello, in one record."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def run(self, sock: socket.socket, hello: list[bytes], data: bytes, ends: bool) -> object:
        """Sends the ClientHello in these pieces, then `data`; says whose certificate it saw, what came, and how it ended.

        ends: closes its direction by a close_notify, and takes the rest.
        """
        got = b""
        try:
            for piece in hello:
                sock.sendall(piece)
            self._do(sock, self.tls.do_handshake)
            certificate = self.tls.getpeercert() or {}
            names = sorted(value for _, value in certificate.get("subjectAltName", ()) if "://" not in value)
            self.tls.write(data)
            with contextlib.suppress(ssl.SSLWantReadError):
                if ends:
                    self.tls.unwrap()
            sock.sendall(self.outgoing.read())
            while piece := self._do(sock, lambda: self.tls.read(65536)):
                got += piece
        except ssl.SSLZeroReturnError:
            return names, got, "close_notify"
        except ssl.SSLEOFError:
            return (names, got, END) if got else "refused"
        except ConnectionError:
            return (names, got, RESET) if got else "refused"
        return names, got, END

    def _do(self, sock: socket.socket, what: Callable[[], bytes | None]) -> bytes | None:
        """Carries bytes until `what` is done."""
        while True:
            done = True
            try:
                found = what()
            except ssl.SSLWantReadError:
                done = False
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(self.outgoing.read())
            if done:
                return found
            if data := sock.recv(65536):
                self.incoming.write(data)
            else:
                self.incoming.write_eof()


def records(hello: bytes, size: int) -> bytes:
    """One record's handshake message in records of `size` bytes (RFC 8446, section 5.1: it may be in several)."""
    payload = hello[5:]
    pieces = (payload[at : at + size] for at in range(0, len(payload), size))
    return b"".join(hello[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)

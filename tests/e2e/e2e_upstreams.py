"""Services for the end-to-end tests that do what the example service doesn't: speak gRPC, read slowly, hold an answer back, vanish.

Each shows an identity of the mesh and takes connections only from those who have one.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

Handler = Callable[["Conversation"], None]


class Conversation:
    """One HTTP/1.1 request on a raw connection, read and answered by a test."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.rest = b""
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                raise EOFError
            head += data
        self.head, _, self.rest = head.partition(b"\r\n\r\n")
        self.path = self.head.split(b" ")[1].decode()

    def chunks(self, size: int = 65536) -> Iterator[bytes]:
        """What arrives after the head, until the peer sends no more."""
        if self.rest:
            yield self.rest
        with contextlib.suppress(OSError):
            while data := self.sock.recv(size):
                yield data

    def answer(self, body: bytes = b"", status: str = "200 OK", *more: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *more, "", ""]
        self.sock.sendall("\r\n".join(lines).encode() + body)

    def vanish(self, *, reset: bool = False) -> None:
        """Ends the connection without TLS's good-bye; with `reset` what was sent last may never arrive."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.sock.close()


@contextlib.contextmanager
def scripted(identity: Path, handler: Handler) -> Iterator[int]:
    """An HTTP/1.1 service with mTLS whose every connection is given to `handler` once its first head is there. Gives its port."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    tls.load_verify_locations(identity / "ca.pem")
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.set_alpn_protocols(["http/1.1"])
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)

    def converse(plain: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), tls.wrap_socket(plain, server_side=True) as sock:
            while sock.fileno() >= 0:
                handler(Conversation(sock))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listening.accept()
                threading.Thread(target=converse, args=(plain,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def said(data: bytes, context: grpc.ServicerContext) -> bytes:
    metadata = dict(context.invocation_metadata())
    context.set_trailing_metadata((("x-trailer", "sent"), ("x-caller", metadata.get("x-forwarded-client-cert", ""))))
    return b"said " + data


def counted(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    context.send_initial_metadata((("x-initial", "sent"),))
    for number in range(int(data)):
        yield b"%d" % number
    context.set_trailing_metadata((("x-trailer", "sent"),))


def summed(numbers: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((("x-trailer", "sent"),))
    return b"%d" % sum(len(each) for each in numbers)


def echoed(numbers: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for each in numbers:
        yield b"<" + each + b">"
    context.set_trailing_metadata((("x-trailer", "sent"),))


def failing(data: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((("x-trailer", "sent"),))
    context.abort(grpc.StatusCode.NOT_FOUND, "there is no " + data.decode())


def sleeping(data: bytes, context: grpc.ServicerContext) -> bytes:
    """Waits until the client gives up."""
    gone = threading.Event()
    context.add_callback(gone.set)
    gone.wait(20)
    CANCELLED.set()
    return data


CANCELLED = threading.Event()


class Methods(grpc.GenericRpcHandler):
    """Methods by the last segment of their path; messages are bytes."""

    def service(self, details: Any) -> Any:
        return {
            "Say": grpc.unary_unary_rpc_method_handler(said),
            "Count": grpc.unary_stream_rpc_method_handler(counted),
            "Sum": grpc.stream_unary_rpc_method_handler(summed),
            "Echo": grpc.stream_stream_rpc_method_handler(echoed),
            "Fail": grpc.unary_unary_rpc_method_handler(failing),
            "Sleep": grpc.unary_unary_rpc_method_handler(sleeping),
        }.get(details.method.rpartition("/")[2])


@contextlib.contextmanager
def grpc_service(identity: Path) -> Iterator[int]:
    """A gRPC service with mTLS. Gives its port."""
    pair = ((identity / "key.pem").read_bytes(), (identity / "cert.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], (identity / "ca.pem").read_bytes(), require_client_auth=True)
    server = grpc.server(ThreadPoolExecutor(8), handlers=[Methods()])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(0.2).wait()


class Uploads:
    """A service that reads an upload slowly for `slow` seconds and then as fast as it can, and answers with the number of bytes."""

    def __init__(self, slow: float) -> None:
        self.slow = slow
        self.read = 0

    def __call__(self, talk: Conversation) -> None:
        length = next(int(line.split(b":")[1]) for line in talk.head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        begun, self.read = time.monotonic(), 0
        for data in talk.chunks():
            self.read += len(data)
            if time.monotonic() - begun < self.slow:
                time.sleep(0.01)
            if self.read >= length:
                break
        talk.answer(b"%d" % self.read)

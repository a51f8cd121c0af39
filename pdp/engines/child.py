"""One worker process: spawned, asked, watched, reaped.

A `Child` knows its process, its socket, and what it has been asked. It decides nothing: who is asked what, and what happens
to open questions when it dies, is the pool's (`pdp.engines.worker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from mesh.policy import Revision
from pdp.engines import frames
from pdp.engines.engine import UNDEFINED, Done, Evaluation, Reason, failure, segments

_log = logging.getLogger(__name__)
_LINE = 400
_LINES = 30
_MOST_MICROSECONDS = (1 << 32) - 1


class Question:
    """One question on its way. Its owner is the pool."""

    __slots__ = ("deadline", "document", "done", "path", "revision", "suspect", "tries")

    def __init__(self, revision: Revision, path: str, document: bytes, deadline: float, done: Done) -> None:
        self.revision = revision
        self.path = path
        self.document = document
        self.deadline = deadline
        """On the loop's clock."""
        self.done: Done | None = done
        """None once it has its answer."""
        self.tries = 0
        """Workers that ended while they were in it, or that did not know its revision."""
        self.suspect = False
        """Whether a worker ended while it was in this and others: asked again alone, so that it is known who did it."""


class Parent(Protocol):
    """What a child tells its owner."""

    def answered(self, question: Question, answer: Evaluation) -> None:
        """`question` has an answer (it may have been given up already)."""

    def died(self, child: Child, why: str) -> None:
        """The child is gone; `child.open` are the questions that it left, `child.running()` those that it was in."""


class _Failure(msgspec.Struct):
    reason: Reason = "internal"
    message: str = ""


_failures = msgspec.json.Decoder(_Failure)


class Child(asyncio.Protocol):
    """A running worker."""

    def __init__(self, parent: Parent, loop: asyncio.AbstractEventLoop, threads: int) -> None:
        self._parent = parent
        self._loop = loop
        self._threads = threads
        self._reader = frames.Reader()
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._slots: mmap.mmap | None = None
        self._outgoing: list[bytes] = []
        self._numbers = 0
        self._queries: dict[tuple[str, str], int] = {}
        self._named = 0
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._lines = 0
        self._first_line = ""
        self._partial = b""
        self.open: dict[int, Question] = {}
        """Questions without an answer, oldest first."""
        self.loaded: set[str] = set()
        """Digests of the revisions that it holds."""
        self.loading: dict[str, asyncio.Task[None]] = {}
        """By digest: who brings a revision in."""
        self.solo = False
        """True while it is in a question that may end it, and is asked nothing else."""
        self.condemned = False
        """True once its owner has decided to end it because it hangs."""
        self.started = loop.time()
        self.gone = loop.create_future()
        """Done when the process has been reaped."""

    async def spawn(self, binary: Path, arguments: Sequence[str]) -> None:
        """Starts the process. Raises OSError when it can't be started."""
        ours, theirs = socket.socketpair()
        page = os.memfd_create("opa-worker-slots")
        try:
            os.ftruncate(page, 4 * self._threads)
            self._slots = mmap.mmap(page, 4 * self._threads)
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220 - our own binary; an exec takes a millisecond
                [str(binary), f"-fd={theirs.fileno()}", f"-slots={page}", f"-threads={self._threads}", *arguments],
                pass_fds=(theirs.fileno(), page),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={key: value for key, value in os.environ.items() if not key.startswith(("GO", "OPA_"))},
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(page)
        self._watch(self._process)
        ours.setblocking(False)
        await self._loop.create_connection(lambda: self, sock=ours)

    @property
    def pid(self) -> int:
        """The process's id; 0 before there is one."""
        return self._process.pid if self._process is not None else 0

    def ask(self, question: Question, now: float) -> None:
        """Sends a question. The child must hold its revision."""
        key = (question.revision.digest, question.path)
        query = self._queries.get(key)
        if query is None:
            query = self._name(key)
        number = self._next()
        self.open[number] = question
        left = int((question.deadline - now) * 1e6)
        self._send(frames.evaluate(number, query, min(max(left, 1), _MOST_MICROSECONDS), question.document))

    def command(self, text: bytes) -> asyncio.Future[bytes]:
        """Sends a command; its answer is JSON. Fails with ConnectionError when the child dies first."""
        reply: asyncio.Future[bytes] = self._loop.create_future()
        if self._transport is None or self._transport.is_closing():
            reply.set_exception(ConnectionError("the OPA worker is gone"))
            reply.exception()  # nobody need look at it
            return reply
        number = self._next()
        self._replies[number] = reply
        reply.add_done_callback(lambda _: self._replies.pop(number, None))
        self._send(frames.command(number, text))
        return reply

    def forget(self, digest: str) -> None:
        """The child shall no longer hold a revision."""
        self.loaded.discard(digest)
        for key in [key for key in self._queries if key[0] == digest]:
            del self._queries[key]
        self.command(msgspec.json.encode({"op": "unload", "revision": digest}))

    def running(self) -> list[Question]:
        """The questions that its threads are in, or were in when it died."""
        if self._slots is None:
            return []
        slots = struct.unpack(f"={self._threads}I", self._slots[:])
        return [self.open[slot - 1] for slot in slots if slot - 1 in self.open]

    def close(self) -> None:
        """Ends it by closing its socket, as the end of the parent would."""
        if self._transport is not None:
            self._transport.close()
        else:
            self.kill()

    def kill(self) -> None:
        """Ends it now."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def _next(self) -> int:
        self._numbers = (self._numbers + 1) & 0x7FFFFFFF
        return self._numbers

    def _name(self, key: tuple[str, str]) -> int:
        self._named += 1
        query = self._queries[key] = self._named
        self._send(frames.name_query(query, msgspec.json.encode({"revision": key[0], "path": segments(key[1])})))
        return query

    def _send(self, data: bytes) -> None:
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(data)

    def _flush(self) -> None:
        out, self._outgoing = self._outgoing, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours to write to."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=64 << 20)

    def data_received(self, data: bytes) -> None:
        """Answers have come."""
        try:
            received = self._reader.feed(data)
        except frames.FrameError as problem:
            _log.warning("OPA worker %d sent %s; ending it", self.pid, problem)
            self.kill()
            return
        open_questions, answered = self.open, self._parent.answered
        for number, kind, payload in received:
            question = open_questions.pop(number, None)
            if question is not None:
                answered(question, _evaluation(kind, payload))
            elif (reply := self._replies.get(number)) is not None and not reply.done():
                reply.set_result(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed, by its end or by ours: the process is on its way out."""
        del exc
        self.kill()

    # The process

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        exited = os.pidfd_open(process.pid)
        self._loop.add_reader(exited, self._exited, exited, process)
        assert process.stderr is not None
        stderr = process.stderr.fileno()
        os.set_blocking(stderr, False)
        self._loop.add_reader(stderr, self._read_stderr, stderr)

    def _exited(self, pidfd: int, process: subprocess.Popen[bytes]) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        code = process.wait()
        if process.stderr is not None:
            self._read_stderr(process.stderr.fileno())
            self._loop.remove_reader(process.stderr.fileno())
            process.stderr.close()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        for reply in list(self._replies.values()):
            if not reply.done():
                reply.set_exception(ConnectionError("the OPA worker died"))
                reply.exception()
        how = f"signal {-code}" if code < 0 else f"status {code}"
        self._parent.died(self, f"{how}: {self._first_line}" if self._first_line else how)
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        if not self.gone.done():
            self.gone.set_result(None)

    def _read_stderr(self, stderr: int) -> None:
        try:
            data = os.read(stderr, 16384)
        except (BlockingIOError, OSError):
            return
        if not data:
            self._loop.remove_reader(stderr)
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_LINE:]
        for line in lines:
            self._lines += 1
            text = line[:_LINE].decode(errors="replace").strip()
            self._first_line = self._first_line or text
            if self._lines <= _LINES and text:
                _log.warning("OPA worker %d: %s", self.pid, text)


def _evaluation(kind: int, payload: bytes) -> Evaluation:
    if kind == frames.RESULT:
        return Evaluation("result", payload)
    if kind == frames.UNDEFINED:
        return UNDEFINED
    try:
        failed = _failures.decode(payload)
    except msgspec.DecodeError:
        return failure("internal", "the OPA worker's answer can't be read")
    return failure(failed.reason, failed.message)

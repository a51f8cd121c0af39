"""The worker for commands: check, plan, test, format. Apart from the workers that answer questions, since a command may take seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from pdp.engines.child import Child, Question
from pdp.engines.engine import EngineUnavailable, Evaluation, PolicyProblem

_IDLE: Final = 20.0
"""Seconds that the worker is kept after the last command."""


class Clerk:
    """Runs one command at a time, in a worker that is started when it is needed. Owned by the pool."""

    def __init__(self, binary: Path, arguments: Sequence[str]) -> None:
        self._binary = binary
        self._arguments = arguments
        self._child: Child | None = None
        self._why = ""
        self._lock = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None

    async def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:  # noqa: ASYNC109 - the worker is ended after it
        """The answer to a command. Raises `EngineUnavailable`."""
        text = encoded(request)
        async with self._lock:
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            child = await self._ready()
            try:
                answer = await asyncio.wait_for(child.command(text), timeout)
            except TimeoutError:
                self._child = None
                await end(child, kindly=False)
                raise EngineUnavailable(f"the OPA worker took longer than {timeout:.0f} s for {request.get('op')}") from None
            except ConnectionError as problem:
                self._child = None
                await child.gone
                raise EngineUnavailable(f"the OPA worker ended while it was in {request.get('op')} ({self._why})") from problem
            except asyncio.CancelledError:
                self._child = None
                child.kill()  # nobody waits for what it does
                raise
            self._idle = asyncio.get_running_loop().call_later(_IDLE, self._rest)
        return msgspec.json.decode(answer, type=dict[str, Any])

    async def close(self) -> None:
        """Ends the worker, if there is one; returns when it has been reaped."""
        if self._idle is not None:
            self._idle.cancel()
        child, self._child = self._child, None
        if child is not None:
            await end(child)

    def answered(self, question: Question, answer: Evaluation) -> None:
        """It is asked no questions."""

    def died(self, child: Child, why: str) -> None:
        """The worker has ended."""
        self._why = why
        if self._child is child:
            self._child = None

    async def _ready(self) -> Child:
        if self._child is None:
            child = Child(self, asyncio.get_running_loop(), 1)
            try:
                await child.spawn(self._binary, self._arguments)
            except OSError as problem:
                raise EngineUnavailable(f"the OPA worker {self._binary} can't be started: {problem}") from problem
            self._child = child
        return self._child

    def _rest(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


async def end(child: Child, *, kindly: bool = True) -> None:
    """Ends a worker and returns when it has been reaped."""
    if kindly:
        child.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(child.gone), 2.0)
            return
    child.kill()
    await child.gone


def encoded(request: dict[str, Any]) -> bytes:
    """A command's text. `data` may be given as the bytes of its JSON."""
    data = request.get("data")
    if isinstance(data, bytes | bytearray):
        request = {**request, "data": msgspec.Raw(data or b"{}")}
    return msgspec.json.encode(request)


class _Problems(msgspec.Struct):
    problems: tuple[PolicyProblem, ...] = ()


def problems_in(answer: bytes) -> tuple[PolicyProblem, ...]:
    """What is wrong with a policy, by a command's answer."""
    return msgspec.json.decode(answer, type=_Problems).problems

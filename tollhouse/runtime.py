"""What every long-running process has in common: the reactor, the signals, readiness, the end.

SIGTERM and SIGINT ask for a clean end (a second one does not wait), SIGHUP reloads files.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from tollhouse.output import Complaint

log = logging.getLogger("tollhouse")


class Runtime:
    """One process at run time. Its owner is `run`; processes wait for `stopping` and register what SIGHUP reloads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.stopping = asyncio.Event()
        self.reloads: list[Callable[[], object]] = []
        """Called in order on SIGHUP."""

    def on_reload(self, action: Callable[[], object]) -> None:
        """Registers what SIGHUP does."""
        self.reloads.append(action)

    def reload(self) -> None:
        """Reloads everything; one part that fails does not keep the others from it."""
        log.info("reloading files")
        for action in self.reloads:
            try:
                action()
            except Exception:
                log.exception("reloading failed")

    def stop(self) -> None:
        """Asks for a clean end; the second time, ends at once."""
        if self.stopping.is_set():
            os._exit(1)
        self.stopping.set()


def run(process: Callable[[Runtime], Awaitable[None]], verbose: bool = False, *, quiet: bool = False) -> None:
    """Runs one process on Twisted's asyncio reactor until its coroutine returns. `verbose` logs more, `quiet` warnings and errors only.

    Raises `Complaint` where the process did, and SystemExit(1) after any other failure, which is logged.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for name in ("asyncio", "grpc"):
        logging.getLogger(name).setLevel(logging.WARNING)

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    from twisted.internet.asyncioreactor import AsyncioSelectorReactor
    from twisted.internet.main import installReactor

    reactor = AsyncioSelectorReactor(loop)
    installReactor(reactor)
    runtime = Runtime(loop)
    failures: list[BaseException] = []

    async def whole() -> None:
        try:
            await process(runtime)
        except BaseException as problem:  # handed to the caller of run, whatever it is
            failures.append(problem)
        finally:
            reactor.stop()

    def begin() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, runtime.stop)
        loop.add_signal_handler(signal.SIGHUP, runtime.reload)
        tasks.append(loop.create_task(whole()))

    tasks: list[asyncio.Task[None]] = []
    reactor.callWhenRunning(begin)
    reactor.run(installSignalHandlers=False)
    sys.stdout.flush()
    for problem in failures:
        if isinstance(problem, Complaint):
            raise problem
        if isinstance(problem, OSError):
            raise Complaint(explain_os_error(problem)) from problem
        if not isinstance(problem, (SystemExit, asyncio.CancelledError)):
            log.error("ended by a failure", exc_info=problem)
        sys.exit(1)


def explain_os_error(problem: OSError) -> str:
    """An operating system's error in words that say what to do."""
    import errno

    what = problem.filename or ""
    text = problem.strerror or str(problem)
    if what and problem.errno:
        text = os.strerror(problem.errno)
    remedy = {
        errno.EADDRINUSE: "another process listens there; end it or choose another port",
        errno.EACCES: "missing rights; ports below 1024 need CAP_NET_BIND_SERVICE, files need to be readable by this user",
        errno.EPERM: "missing rights",
        errno.EADDRNOTAVAIL: "this machine does not have that address",
        errno.ENOENT: "there is no such file",
        errno.EMFILE: "too many open files; raise LimitNOFILE",
    }.get(problem.errno or 0, "")
    return ": ".join(part for part in (str(what), text) if part) + (f" ({remedy})" if remedy else "")

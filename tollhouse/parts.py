"""The parts list: which source, engine, store and log a process is made of. Everything that is chosen by an option is chosen here."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discovery.address import parse_etcd_url
from discovery.directory import DirectorySource
from discovery.etcd import Etcd
from discovery.etcd_source import EtcdSource
from discovery.source import Source
from identity.authenticator import Tokens
from identity.files import IdentityFiles, IdentitySource, NoIdentity
from identity.jwks import KeyStore
from identity.jwks_fetch import JwksFetcher
from identity.problems import IdentityError
from mesh.policy import Revision
from pdp.build import WorkerBuildError, worker_binary
from pdp.engines.engine import Done, Engine, EngineUnavailable, failure
from pdp.engines.worker import WorkerPool
from pdp.publish import publish
from quota.bucket import Ask
from quota.memory import MemoryStore
from quota.store import Store
from telemetry.record import Telemetry
from telemetry.tokens import TokenMetrics, show_keys
from tollhouse.opa_servers import OpaOptions, open_opa
from tollhouse.output import Complaint
from tollhouse.runtime import Runtime

if TYPE_CHECKING:
    from tollhouse.bundling import BundleOptions

log = logging.getLogger("tollhouse")

BEGINNING = Ask("beginning", 1, 0, 0, 0, 0, (), (), 0, 1, 1_000_000, 1.0, 1, peek=True)
"""Looks at a bucket that nobody uses."""
ETCD_SCHEMES = ("etcd://", "etcds://", "http://", "https://")


def is_etcd(config: str) -> bool:
    """Whether `--config` names an etcd rather than a directory."""
    return config.startswith(ETCD_SCHEMES)


def open_etcd(url: str) -> Etcd:
    """A client for the etcd at `url`. Raises `Complaint`."""
    try:
        return Etcd(parse_etcd_url(url))
    except ValueError as problem:
        raise Complaint(f"--config: {problem}", 2) from None


def open_directory(config: str) -> Path:
    """The configuration directory. Raises `Complaint` when it is none."""
    path = Path(config)
    if not path.is_dir():
        raise Complaint(f"--config: {config} is not a directory; name a directory of YAML files, or etcd://HOST:PORT", 2)
    return path


def unreachable(problem: Exception) -> str:
    """An etcd's failure in words that say what to do."""
    text = str(problem)
    return f"{text}; is an etcd running there?" if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text else text


class Configuration:
    """Where the configuration comes from: a source, and the etcd client if it is an etcd's."""

    def __init__(self, config: str, state: Path | None) -> None:
        """`state`: where the last good state of an etcd is kept for a start without it."""
        self.etcd: Etcd | None = None
        self.source: Source
        if is_etcd(config):
            self.etcd = open_etcd(config)
            self.source = EtcdSource(self.etcd, state_file=state / "configuration" if state is not None else None)
        else:
            self.source = DirectorySource(open_directory(config))

    def reload(self) -> None:
        """SIGHUP: a directory is read again at once; an etcd is watched anyway."""
        if isinstance(self.source, DirectorySource):
            self.source.reload()

    async def close(self) -> None:
        """Ends the etcd client."""
        if self.etcd is not None:
            await self.etcd.close()


def open_identity(directory: Path | None, runtime: Runtime) -> IdentitySource:
    """The process's identity, watched and reloaded; one that names nobody without a directory. Raises `Complaint`."""
    if directory is None:
        return NoIdentity()
    try:
        files = IdentityFiles(directory)
    except IdentityError as problem:
        raise Complaint(str(problem)) from None
    files.watch(runtime.loop)
    runtime.on_reload(files.reload)
    return files


def open_tokens(roots: Path | None, telemetry: Telemetry | None = None) -> tuple[Tokens, JwksFetcher]:
    """What verifies the tokens of requests, and what fetches keys for it: over TLS by the CAs in `roots` (PEM), or the system's. Raises
    `Complaint`."""
    try:
        fetcher = JwksFetcher(roots)
    except OSError as problem:
        raise Complaint(f"--jwks-ca: {roots} cannot be used: {problem.strerror or problem}; name a file of PEM certificates", 2) from None
    metrics = TokenMetrics(telemetry) if telemetry is not None else None
    clock = asyncio.get_running_loop().time
    tokens = Tokens(KeyStore(fetcher, clock=clock, counts=metrics), results=metrics)
    if telemetry is not None:
        show_keys(telemetry, tokens.store.state, lambda: len(tokens.kept))
    return tokens, fetcher


def open_store(redis: str | None) -> Store:
    """Where quota's buckets are: Redis, or this process's memory. Raises `Complaint`."""
    if not redis:
        return MemoryStore()
    from quota.redis_store import RedisStore

    try:
        store = RedisStore(redis)
    except ValueError as problem:
        raise Complaint(f"--redis: {problem}", 2) from None
    # A Redis that has just begun fills its buckets from one lease after its beginning: let that be now, not at the first request.
    store.ask("beginning", BEGINNING, lambda _: None)
    return store


def look_at_port(listen: str) -> None:
    """Whether `HOST:PORT` can be listened at: gRPC does not say why it cannot. Raises OSError."""
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
            probe.listen()
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror or str(problem), listen) from None


def holder() -> str:
    """A name for this process as a lessee of tokens, and as an instance of a gateway: no two have the same."""
    return f"{socket.gethostname()[:63]}-{os.getpid()}-{os.urandom(4).hex()}"


class LazyPool:
    """OPA workers that are started when they are first needed: a gateway that only asks a PDP never has any.

    It is a `pdp.engines.engine.Engine`, and a `pdp.publish.Checker`.
    """

    def __init__(
        self,
        workers: int = 1,
        *,
        threads: int = 2,
        allow: Collection[str] = (),
        forbid: Collection[str] = (),
        telemetry: Telemetry | None = None,
    ) -> None:
        self._telemetry = telemetry
        self._workers = workers
        self._threads = threads
        self._allow = tuple(allow)
        self._forbid = tuple(forbid)
        self._pool: WorkerPool | None = None
        self._starting = asyncio.Lock()

    @property
    def pool(self) -> WorkerPool | None:
        """The pool, if it runs."""
        return self._pool

    async def start(self) -> WorkerPool:
        """Starts the workers if they do not run yet. Raises `EngineUnavailable`."""
        async with self._starting:
            if self._pool is None:
                try:
                    binary = await asyncio.get_running_loop().run_in_executor(None, lambda: worker_binary(progress=log.info))
                except WorkerBuildError as problem:
                    raise EngineUnavailable(str(problem)) from None
                pool = WorkerPool(
                    binary=binary,
                    workers=self._workers,
                    threads=self._threads,
                    allow_builtins=self._allow,
                    forbid_builtins=self._forbid,
                    telemetry=self._telemetry,
                )
                await pool.start()
                self._pool = pool
            return self._pool

    async def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """As `pdp.publish.Checker`."""
        return await (await self.start()).command(request)

    def evaluate(self, revision: Revision, path: str, document: bytes, timeout: float, done: Done) -> None:
        """As `Engine.evaluate`."""
        if self._pool is None:
            done(failure("unavailable", "the OPA workers are still being started"))
        else:
            self._pool.evaluate(revision, path, document, timeout, done)

    async def load(self, revision: Revision) -> None:
        """As `Engine.load`."""
        await (await self.start()).load(revision)

    async def close(self) -> None:
        """As `Engine.close`."""
        if self._pool is not None:
            await self._pool.close()

    async def compile(self, modules: Mapping[str, str], data: bytes, decisions: Collection[str]) -> Revision:
        """As `tollhouse.keeper.Compile`."""
        return await publish(self, modules, data, decisions)


async def open_engine(
    opa: OpaOptions, bundles: BundleOptions, pool: LazyPool, identity: IdentitySource | None = None, telemetry: Telemetry | None = None
) -> Engine:
    """Who evaluates: the user's OPA servers, or our workers. `bundles` says where the servers fetch theirs if they do, under the
    certificate of `identity`, if there is one. Raises `Complaint`."""
    return await open_opa(opa, bundles, pool, identity, telemetry) if opa else pool


def state_directory(state: Path | None) -> Path | None:
    """`state`, made if it is not there, for this user only. Raises `Complaint`."""
    if state is not None:
        try:
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as problem:
            raise Complaint(f"--state: {state} cannot be made: {problem.strerror}; name a directory that can be written") from None
    return state

"""envoyproxy/ratelimit as a process: a peer to measure beside, and an oracle to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench import build
from tests import servers


def ratelimit(folder: Path, redis: int, files: Mapping[str, str], **settings: str) -> servers.Server:
    """The server, not started; it speaks gRPC in plaintext at its `port`. `folder`: for its configuration; `redis`: a port; `files`: YAML
    by the file's name; `settings`: more of its variables."""
    port, debug, http = servers.free_port(), servers.free_port(), servers.free_port()
    config = folder / "runtime" / "ratelimit" / "config"
    config.mkdir(parents=True)
    for name, text in files.items():
        (config / name).write_text(text)
    env = {
        "REDIS_SOCKET_TYPE": "tcp",
        "REDIS_URL": f"127.0.0.1:{redis}",
        "RUNTIME_ROOT": str(folder / "runtime"),
        "RUNTIME_SUBDIRECTORY": "ratelimit",
        "RUNTIME_WATCH_ROOT": "false",
        "USE_STATSD": "false",
        "LOG_LEVEL": "error",
        "GRPC_HOST": "127.0.0.1",
        "GRPC_PORT": str(port),
        "DEBUG_HOST": "127.0.0.1",
        "DEBUG_PORT": str(debug),
        "HOST": "127.0.0.1",
        "PORT": str(http),
        **settings,
    }
    return servers.Server("ratelimit", port, [str(build.binary("ratelimit"))], f"127.0.0.1:{port}", env=env)

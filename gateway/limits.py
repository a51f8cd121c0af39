"""How much of everything a gateway takes, in one place. Where Envoy has advice for the edge, it is its number."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one worker. Times in seconds, sizes in bytes. What is beyond one ends with the refusal or event named beside it."""

    connections: int = 10_000
    """Client connections of a listening port; more wait in the kernel's queue until one ends."""
    handshakes: int = 1_000
    """Connections of a port that are still in their TLS handshake; beyond it the oldest of them ends (`crowded_out`)."""
    handshake_steps: int = 4
    """Handshake steps in one turn of the event loop (about a millisecond each), so that a storm of them delays no request for long."""
    handshake_timeout: float = 10.0
    """From accept to the end of the handshake (`timeout`)."""
    head: int = 60 * 1024
    """Of a request's or an answer's head (431, flag DPE; or 502, UPE)."""
    fields: int = 100
    """Header fields of a head (431, DPE; or 502, UPE)."""
    target: int = 16 * 1024
    """Of a request target (414, DPE)."""
    head_timeout: float = 60.0
    """From the first byte of a request to the end of its head (408, flag DT)."""
    idle_connection: float = 3600.0
    """A client connection without a request: it is closed."""
    idle_when_full: float = 10.0
    """The same, while its port has all the connections that it takes: nobody may keep the others out by doing nothing."""
    idle_upstream: float = 60.0
    """An upstream connection without a request: it is closed."""
    flows: int = 4_096
    """Flows of datagrams of a UDP port; beyond it those that are not answered, or not used for `idle_when_full`, make room, and else new
    ones are dropped."""
    idle_flow: float = 60.0
    """A flow without a datagram in either direction: it is forgotten."""
    idle_stream: float = 300.0
    """A request on which nothing moves in either direction (408 or 504 if nothing was answered, flag SI)."""
    idle_tunnel: float = 3600.0
    """A WebSocket or a tunnel through which nothing moves in either direction (flag SI). Once one side has ended its direction it is
    `idle_stream`."""
    stream_recheck: float = 300.0
    """The age of a request in progress at which its policies are asked again, and again after as long (the flag is the denial's)."""
    buffer: int = 32 * 1024
    """Of body held for one stream and direction, and of bytes written for a connection, before its source is not read from any more."""
    pipelined: int = 64 * 1024
    """Of requests sent ahead of an answer on HTTP/1.1 before the connection is not read from any more."""
    streams: int = 100
    """Concurrent streams of an HTTP/2 connection."""
    linger: float = 2.0
    """A connection that the gateway ends is read from for so long, so that the client sees the last answer."""
    resolve_timeout: float = 2.0
    """For a name of an endpoint to be resolved."""
    resolve_ttl: float = 5.0
    """For how long a resolved name is used."""
    requests: int = 20_000
    """Requests in progress in a worker (503, flag OM)."""
    retry_buffer: int = 64 * 1024
    """Of a request's body that is kept for another try when its rule has a `retry`; a longer one is sent once."""
    mirrors: int = 512
    """Copies of requests (RequestMirror) in progress in a worker; further ones are not sent (counted as `busy`)."""
    mirror_buffer: int = 64 * 1024
    """Of a body held for a copy whose upstream is slower than the request's own; beyond it the copy is given up (`overflow`)."""

"""The scenarios: what is asked, through what, of whom, and who takes part."""

from __future__ import annotations

from dataclasses import dataclass

from bench.contenders import ALL, BARE, BY_AREA, HTTP1, HTTP2, POLICY, RPC, WEBSOCKET, Contender, Speech


@dataclass(frozen=True)
class Scenario:
    """One kind of load."""

    name: str
    arguments: tuple[str, ...]
    """What `tool load` is told."""
    requests: int
    """In each round; or messages, if that is the `unit`."""
    callers: str = "c000*"
    """A glob of the identities that ask."""
    policy: str = POLICY
    speech: Speech = HTTP1
    """What is spoken towards the upstream."""
    contenders: tuple[type[Contender], ...] = ALL
    unit: str = "request"
    size: int = 0
    """Bytes of body that each moves, when they are what is interesting."""
    cold: bool = False
    """Contenders are started for each round, and are measured from their first connection on."""
    held: bool = False
    """Connections and streams are open, and have been used once, before anything is measured."""
    paced: bool = False
    """It is measured at a constant rate as well."""


def scenarios(requests: int, callers: int) -> list[Scenario]:
    """All of them, with about `requests` requests in a round: fewer where each is a lot of work, more where it is little."""
    many = ("-connections", "32", "-workers", "32")
    small, large, body = "128", str(16 * 1024), 100 * 1024
    return [
        Scenario("HTTP/1.1, repeating requests, 32 connections", many, requests, paced=True),
        Scenario("HTTP/2, repeating requests, 32 connections", (*many, "-kind", "h2"), requests),
        Scenario("HTTP/2 to HTTP/2, repeating requests, 32 connections", (*many, "-kind", "h2"), requests, speech=HTTP2, held=True),
        Scenario(
            "gRPC unary, 128 bytes each way, 32 connections", (*many, "-kind", "grpc", "-upload", small), requests, speech=RPC, held=True
        ),
        *(
            Scenario(name, arguments, count, speech=speech, contenders=BARE, unit="message", held=True)
            for name, arguments, count, speech in (
                (
                    "gRPC streaming, 128 bytes, 32 streams with one message on its way",
                    ("-kind", "stream", "-connections", "32", "-upload", small),
                    requests,
                    RPC,
                ),
                (
                    "gRPC streaming, 128 bytes, one stream with 64 messages on their way",
                    ("-kind", "stream", "-connections", "1", "-window", "64", "-upload", small),
                    requests * 4,
                    RPC,
                ),
                (
                    "WebSocket echo, 128 bytes, 32 WebSockets",
                    ("-kind", "websocket", "-connections", "32", "-upload", small),
                    requests * 2,
                    WEBSOCKET,
                ),
                (
                    "WebSocket echo, 16 kB, 32 WebSockets",
                    ("-kind", "websocket", "-connections", "32", "-upload", large),
                    requests,
                    WEBSOCKET,
                ),
            )
        ),
        *(
            Scenario(
                f"100 kB {what}, {name}, 32 connections",
                (*many, "-kind", kind, f"-{option}", str(body)),
                requests // 4,
                speech=speech,
                contenders=BARE,
                size=body,
                held=True,
            )
            for name, kind, speech in (("HTTP/1.1", "h1", HTTP1), ("HTTP/2 to HTTP/2", "h2", HTTP2))
            for what, option in (("answers", "answer"), ("uploads", "upload"))
        ),
        *(
            Scenario(
                f"HTTP/1.1, {callers} callers, 100,000 paths (Zipf 1.1), from a cold start, policy reads {what}",
                ("-connections", str(callers), "-workers", "32", "-paths", "100000"),
                requests * 2,
                callers="c*",
                policy=policy,
                cold=True,
            )
            for what, policy in (("the first segment of the path", BY_AREA), ("the whole path", POLICY))
        ),
    ]

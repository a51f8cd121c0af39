"""Framing, sans-io: bytes in, events out; orders in, bytes out. HTTP/1.1 and HTTP/2 give the same events (`gateway.codec.events`).

* `h1_server`, `h1_client` -- HTTP/1.1 (RFC 9112); `h1` is the syntax that both share
* `h2_server`, `h2_client` -- HTTP/2 (RFC 9113) by the `h2` library; `h2` is what both share
"""

"""A model of traffic: what `tollhouse policy check` counts hits with when it is given no inputs.

50 callers (a few of them busy), 1,000 paths in three areas, mostly GET, from 200 addresses, each with the headers of a browser or a
service; every request has an id, a trace, a time and a port of its own. It is the same each time.
"""

from __future__ import annotations

import random
from typing import Any, Final

from mesh.http import HTTP11, RequestHead
from mesh.model import DecisionPolicy
from mesh.peer import Caller, Peer
from mesh.questions import Asking
from pdp.input import document_tree

REQUESTS: Final = 8000
_POLICY: Final = DecisionPolicy(name="model", level="mesh", decision="model")
_BEGIN: Final = 1_767_225_600.0


def documents(count: int = REQUESTS) -> list[Any]:
    """Input documents of `count` requests, in the order in which they come."""
    rng = random.Random(1)  # noqa: S311 -- a model
    callers = [f"spiffe://shop.example/ns/shop/sa/caller-{number}" for number in range(50)]
    weights = [1.0 / (1 + number) for number in range(50)]
    agents = [f"agent/{number}".encode() for number in range(12)]
    made = []
    for number in range(count):
        caller = rng.choices(callers, weights)[0]
        area = rng.choice((b"orders", b"orders", b"catalog", b"payments"))
        method = rng.choices((b"GET", b"POST", b"DELETE"), (85, 13, 2))[0]
        identity = b"%032x" % rng.getrandbits(128)
        path = b"/%s/%d" % (area, rng.randrange(250))
        query = b"page=%d" % rng.randrange(5) if rng.random() < 0.1 else None
        headers = [
            (b"user-agent", rng.choice(agents)),
            (b"accept", b"application/json"),
            (b"authorization", b"Bearer token-of-" + caller[-2:].encode()),
            (b"x-request-id", identity),
            (b"traceparent", b"00-%s-%016x-01" % (identity, rng.getrandbits(64))),
        ]
        target = path if query is None else path + b"?" + query
        head = RequestHead(method, b"https", b"shop.example", target, headers, HTTP11, 0, path, query)
        address, port = f"10.0.0.{rng.randrange(200)}", rng.randrange(20000, 60000)
        peer = Peer(principal=caller, address=address, port=port, local_address="10.0.0.250", local_port=8443)
        route, template = f"shop/{area.decode()}#0", f"/{area.decode()}/**"
        when = _BEGIN + number / 100
        asking = Asking(head, peer, Caller(caller), "edge/ingress", "https", route, template, f"shop/{area.decode()}", when)
        made.append(document_tree(asking, _POLICY))
    return made

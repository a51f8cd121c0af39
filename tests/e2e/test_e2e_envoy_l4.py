"""Below HTTP: what clients and backends see of each other through the gateway is what they see through an Envoy that was told the same.

How a connection ends that is refused before a backend was there is nowhere said: Envoy closes it, the gateway resets it.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy_l4 import BIGGEST, bootstrap
from l4_scripts import (
    BIG,
    END,
    RESET,
    TIME,
    Backend,
    Tls,
    answers_what_comes,
    breaks_off,
    closes,
    echoes,
    ends_first,
    records,
    resets,
    resets_later,
    says,
    sends,
    sends_one,
    tls,
    waits,
)

from identity.ca import Authority
from tests import servers

pytestmark = pytest.mark.e2e
GROUP = "gateway.networking.k8s.io"
Body = dict[str, Any]
TCP: dict[str, dict[str, int]] = {
    "echo": {"echo": 1},
    "ends": {"ends": 1},
    "closes": {"closes": 1},
    "resets": {"resets": 1},
    "later": {"later": 1},
    "closed": {"closed": 1},
    "missing": {"missing": 1},
    "zero": {"echo": 0},
    "weights": {"one": 2, "two": 1, "three": 0},
    "partly": {"one": 1, "missing": 1},
}
"""A listener each: the weights of its route's backends."""
TLS: dict[str, dict[str, int]] = {
    "a.pass.example": {"pass-a": 1},
    "*.pass.example": {"pass-any": 1},
    "*.deep.pass.example": {"pass-deep": 1},
    "end.example": {"echo": 1},
    "*.end.example": {"one": 1},
    "gone.example": {"missing": 1},
}
"""A listener each on one port; `end.example` and what is below end here."""


class Worlds:
    """A gateway and an Envoy before the same backends. `ports`: by listener, the gateway's and Envoy's."""

    def __init__(self, backends: dict[str, Backend], ports: dict[str, tuple[int, int]], roots: bytes) -> None:
        self.backends, self.ports = backends, ports
        self.context = ssl.create_default_context(cadata=roots.decode())

    def both(self, listener: str, script: Callable[[socket.socket], object], backend: str = "") -> list[object]:
        """What the client saw, and the backend, through each."""
        found: list[object] = []
        for port in self.ports[listener]:
            while backend and not self.backends[backend].seen.empty():
                self.backends[backend].seen.get()
            try:
                sock = socket.create_connection(("127.0.0.1", port), TIME)
            except ConnectionResetError:  # before the client's own kernel knew that there was one
                found.append((b"", RESET))
                continue
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                seen = script(sock)
            found.append((seen, self.backends[backend].seen.get(timeout=TIME)) if backend else seen)
        return found


def certificates(authority: Authority, *dns: str) -> tuple[str, str, ssl.SSLContext]:
    """A chain, its key, and a server's context with them."""
    made = authority.issue("spiffe://shop.example/ns/shop/sa/x", dns=dns)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as pair:
        pair.write(made.chain + b"\n" + made.key)
        pair.flush()
        context.load_cert_chain(pair.name)
    return made.chain.decode(), made.key.decode(), context


def resource(version: str, kind: str, name: str, **more: Any) -> Body:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, **more.pop("metadata", {})}, **more}


def a_service(name: str, port: int, protocol: str = "TCP") -> list[Body]:
    return [
        resource("v1", "Service", name, spec={"ports": [{"port": 1, "protocol": protocol}]}),
        resource(
            "discovery.k8s.io/v1",
            "EndpointSlice",
            name,
            metadata={"labels": {"kubernetes.io/service-name": name}},
            addressType="IPv4",
            ports=[{"port": port, "protocol": protocol}],
            endpoints=[{"addresses": ["127.0.0.1"]}],
        ),
    ]


def a_route(kind: str, listener: str, weights: dict[str, int], **more: Any) -> Body:
    refs = [{"name": name, "port": 1, "weight": weight} for name, weight in weights.items()]
    spec = {"parentRefs": [{"name": "gw", "sectionName": listener}], "rules": [{"backendRefs": refs}], **more}
    return resource(f"{GROUP}/v1", kind, listener, spec=spec)


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    authority = Authority.create("shop.example")
    *pair, _ = certificates(authority, "end.example", "*.end.example")
    datagrams = udp_backend()
    backends = {name: Backend(says(name.encode())) for name in ("one", "two", "three")}
    backends |= {"echo": Backend(echoes), "ends": Backend(ends_first), "closes": Backend(closes)}
    backends |= {"resets": Backend(resets), "later": Backend(resets_later)}
    for name, dns in (("pass-a", "a.pass.example"), ("pass-any", "*.pass.example"), ("pass-deep", "*.deep.pass.example")):
        backends[name] = Backend(tls(name.encode(), certificates(authority, dns)[2]))
    at = {name: ("TCP", backend.port) for name, backend in backends.items()} | {"closed": ("TCP", servers.free_port())}
    at["datagrams"] = ("UDP", datagrams.getsockname()[1])
    ports = {name: (servers.free_port(), servers.free_port()) for name in (*TCP, "tls", "udp")}
    listeners: list[Body] = [{"name": name, "port": ports[name][0], "protocol": "TCP"} for name in TCP]
    resources = [resource(f"{GROUP}/v1", "GatewayClass", "tollhouse", spec={"controllerName": "tollhouse.dev/gateway-controller"})]
    resources += [a_route("TCPRoute", name, weights) for name, weights in TCP.items()]
    theirs: dict[str, Body] = {}
    for number, (host, weights) in enumerate(TLS.items()):
        ends = host.endswith("end.example")
        settings: Body = {"mode": "Terminate", "certificateRefs": [{"name": "pair"}]} if ends else {"mode": "Passthrough"}
        listeners.append({"name": f"t{number}", "port": ports["tls"][0], "protocol": "TLS", "hostname": host, "tls": settings})
        resources.append(a_route("TLSRoute", f"t{number}", weights, hostnames=[host]))
        theirs[host] = {"weights": weights, **({"pair": pair} if ends else {})}
    listeners.append({"name": "udp", "port": ports["udp"][0], "protocol": "UDP"})
    resources.append(a_route("UDPRoute", "udp", {"datagrams": 1}))
    resources.append(resource(f"{GROUP}/v1", "Gateway", "gw", spec={"gatewayClassName": "tollhouse", "listeners": listeners}))
    secret = {"tls.crt": pair[0], "tls.key": pair[1]}
    resources.append(resource("v1", "Secret", "pair", type="kubernetes.io/tls", stringData=secret))
    for name, (protocol, port) in at.items():
        resources += a_service(name, port, protocol)
    config = bootstrap(
        {ports[name][1]: weights for name, weights in TCP.items()}, (ports["tls"][1], theirs), {ports["udp"][1]: "datagrams"}, at
    )
    admin = servers.free_port()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "all.yaml").write_text(yaml.safe_dump_all(resources))
        process = servers.tollhouse(
            "gateway", "default/gw", "--config", str(folder), "--address", "127.0.0.1", "--admin", f"127.0.0.1:{admin}",
            ready=lambda: servers.fetched(f"http://127.0.0.1:{admin}/readyz"), name="gateway-l4",
        )  # fmt: skip
        stack.callback(process.close)
        process.start()
        stack.enter_context(servers.envoy(config, ports["zero"][1]))
        for backend in backends.values():
            stack.callback(backend.listening.close)
        stack.callback(datagrams.close)
        yield Worlds(backends, ports, authority.bundle)


@pytest.mark.parametrize(
    ("listener", "script", "sees"),
    [
        ("echo", sends(b""), ((b"", END), (0, END))),
        ("echo", sends(b"hello"), ((b"hello", END), (5, END))),
        ("echo", sends(BIG), ((BIG, END), (len(BIG), END))),
        ("ends", waits, ((b"all that I have", END), (b"thank you", END))),
        ("closes", waits, ((b"", END), (b"thank you", END))),
        ("resets", sends_one, ((b"", RESET), b"x")),
        ("later", answers_what_comes, ((b"so far", (b"", RESET)), b"got it")),
        ("echo", breaks_off, (b"hello", (5, RESET))),
    ],
    ids=["nothing", "a little", "much", "the backend ends first", "the backend ends at once", "reset", "reset later", "the client resets"],
)
def test_tcp(worlds: Worlds, listener: str, script: Callable[[socket.socket], object], sees: object) -> None:
    ours, theirs = worlds.both(listener, script, listener)
    assert ours == theirs
    assert ours == sees


@pytest.mark.parametrize("listener", ["closed", "missing", "zero"])
def test_connections_to_nowhere(worlds: Worlds, listener: str) -> None:
    for data, how in worlds.both(listener, sends_one):  # type: ignore[misc]
        assert data == b""
        assert how in (END, RESET)


@pytest.mark.parametrize(("listener", "names"), [("weights", {b"one", b"two"}), ("partly", {b"one", b""})])
def test_weights(worlds: Worlds, listener: str, names: set[bytes]) -> None:
    found: list[set[bytes]] = [set(), set()]
    for _ in range(60):  # with a share of a third, one in 30 thousand million runs would miss one
        for seen, each in zip(found, worlds.both(listener, sends(b"")), strict=True):
            seen.add(each[0])  # type: ignore[index]
    assert found == [names, names]


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("a.pass.example", b"pass-a"),
        ("A.Pass.Example", b"pass-a"),
        ("b.pass.example", b"pass-any"),
        ("c.b.pass.example", b"pass-any"),
        ("b.deep.pass.example", b"pass-deep"),
        ("deep.pass.example", b"pass-any"),
        ("pass.example", None),
        ("x.example", None),
        ("gone.example", None),
        (None, None),
        ("end.example", b""),
        ("x.end.example", b"one"),
    ],
)
@pytest.mark.parametrize("cut", ["whole", "bytes", "records", "records in pieces"])
def test_tls(worlds: Worlds, name: str | None, who: bytes | None, cut: str) -> None:
    context = worlds.context
    if name is None or name.count(".") > 2:
        context = ssl.create_default_context(cadata=worlds.context.get_ca_certs(binary_form=True)[0])  # type: ignore[arg-type]
        context.check_hostname = False

    def script(sock: socket.socket) -> object:
        client = Tls(context, name)
        hello = client.hello()
        if cut.startswith("records"):
            hello = records(hello, 40)
        size = {"bytes": 1, "records in pieces": 17}.get(cut, len(hello))
        pieces = [hello[at : at + size] for at in range(0, len(hello), size)]
        return client.run(sock, pieces, b" hello", ends=True)

    ours, theirs = worlds.both("tls", script)
    assert ours == theirs
    if who is None:
        assert ours == "refused"
    else:
        assert isinstance(ours, tuple)
        assert ours[1:] == (who + (b" hello" if who != b"one" else b""), "close_notify")


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nhost: a.pass.example\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x80\x2e\x01\x03\x01" + b"\0" * 41],
)
def test_what_is_not_tls_reaches_nobody(worlds: Worlds, data: bytes) -> None:
    for data_back, how in worlds.both("tls", sends(data)):  # type: ignore[misc]
        # An alert, perhaps; whoever speaks HTTP is told so by the gateway.
        assert data_back[:1] in (b"", b"\x15") or data_back.startswith(b"HTTP/1.1 400 ")
        assert how in (END, RESET)


# -- datagrams

DATAGRAMS: queue.SimpleQueue[tuple[bytes, int]] = queue.SimpleQueue()
"""What the backend got, and from which port."""


def udp_backend() -> socket.socket:
    """Gives datagrams back; those that begin with `twice` twice, and those that begin with `never` not."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, address = sock.recvfrom(65535)
                DATAGRAMS.put((data, address[1]))
                for _ in range({b"twice": 2, b"never": 0}.get(data[:5], 1)):
                    sock.sendto(b"udp:"[: BIGGEST - len(data)] + data, address)

    threading.Thread(target=serve, daemon=True).start()
    return sock


def flow(port: int, *sent: bytes) -> object:
    """One client: what it got for each datagram, what the backend got, and from how many ports."""
    seen = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIME)
        sock.connect(("127.0.0.1", port))
        arrived, sources = [], set()
        for data in sent:
            sock.send(data)
            got, source = DATAGRAMS.get(timeout=TIME)
            arrived.append(got)
            sources.add(source)
            seen += [sock.recv(65535) for _ in range({b"twice": 2, b"never": 0}.get(data[:5], 1))]
    return seen, arrived, len(sources)


@pytest.mark.parametrize(
    "sent", [(b"hello",), (b"a", b"b", b"c"), (b"never", b"twice", b"a"), (b"",), (b"x" * 9000, b"y" * BIGGEST)], ids=str
)
def test_udp(worlds: Worlds, sent: tuple[bytes, ...]) -> None:
    ours, theirs = (flow(port, *sent) for port in worlds.ports["udp"])
    assert ours == theirs
    assert isinstance(ours, tuple)
    assert (ours[1], ours[2]) == (list(sent), 1)


def test_udp_clients_are_told_apart(worlds: Worlds) -> None:
    for port in worlds.ports["udp"]:
        sources = set()
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(8)]
            for number, sock in enumerate(socks):
                sock.settimeout(TIME)
                sock.connect(("127.0.0.1", port))
                sock.send(b"%d" % number)
                data, source = DATAGRAMS.get(timeout=TIME)
                assert data == b"%d" % number
                sources.add(source)
            assert [sock.recv(99) for sock in socks] == [b"udp:%d" % number for number in range(8)]
        assert len(sources) == 8

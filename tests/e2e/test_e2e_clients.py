"""Real clients, and bad ones: curl, h2load and gRPC; uploads and drains; certificates that are not good; bytes that are not HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from e2e_traffic import Connection, Trickle, apply, ask, context, exchange, route, service
from e2e_upstreams import CANCELLED, Conversation, Uploads, grpc_service, scripted
from e2e_world import DOMAIN, HOSTS, Mesh, answer_of, shop, spiffe

from identity.ca import Authority
from tests.servers import wait_for

pytestmark = pytest.mark.e2e
MEGABYTE = 1 << 20
UPLOAD = 1024 * MEGABYTE


class Script:
    """The scripted service: what it does with a request is told by the request's path."""

    def __init__(self) -> None:
        self.held = threading.Event()
        """Set: a request to `/catalog/script/hold` has arrived."""
        self.release = threading.Event()
        self.gone = threading.Event()
        """Set: a client's upload to `/orders/partial` ended before it was whole."""
        self.uploads = Uploads(slow=1.5)

    def __call__(self, talk: Conversation) -> None:
        path = talk.path
        if path.startswith("/orders/upload"):
            self.uploads(talk)
        elif path.startswith("/orders/partial"):
            for _ in talk.chunks():
                pass
            self.gone.set()
            talk.vanish()
        elif path.startswith("/catalog/script/hold"):
            self.held.set()
            self.release.wait(20)
            talk.answer(b"held")
        elif path.startswith("/catalog/script/half"):
            talk.sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 400)
            talk.vanish()
        elif path.startswith("/catalog/script/none"):
            talk.vanish(reset=True)
        elif path.startswith("/catalog/script/nonsense"):
            talk.sock.sendall(b"HTTP/9.9 what\r\n\r\n")
            talk.vanish()
        elif path.startswith("/catalog/script/trailers"):
            talk.sock.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 294\r\n\r\n")
        else:
            talk.answer(b"fine")


SCRIPT = Script()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(shop(services=("catalog-v1",), gateways=("ingress",)))
        script = stack.enter_context(scripted(running.identity("shop-catalog"), SCRIPT))
        calls = stack.enter_context(grpc_service(running.identity("shop-orders")))
        apply(
            running,
            *service("one", [running.ports["catalog-v1"]], "catalog"),
            *service("script", [script], "catalog"),
            *service("calls", [calls], "orders"),
            *service("calls-always", [calls], "orders", "kubernetes.io/h2c"),
            route("one", "/catalog/one", "one"),
            route("writes", "/orders/one", "one"),
            route("script", "/catalog/script", "script"),
            route("script-writes", "/orders/upload", "script"),
            route("script-partial", "/orders/partial", "script"),
            route("calls", "/orders/calls", "calls"),
            route("calls-always", "/orders/always", "calls-always"),
        )
        wait_for("the routes", lambda: ask(running, "web", "/orders/one").status == 200)
        yield running


# -- clients that behave


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(mesh: Mesh, version: str) -> None:
    answer = mesh.curl("web", "GET", "/catalog/one", version)
    assert answer.status == 200
    assert answer.json["service"] == "catalog-v1"
    posted = mesh.curl("web", "POST", "/orders/one", version, "-H", "expect: 100-continue", "--data-binary", "x" * 3000)
    assert posted.json["bodyBytes"] == 3000


def test_an_expectation_is_met_before_the_body_is_sent(mesh: Mesh) -> None:
    with raw(mesh) as sock:
        sock.sendall(b"POST /orders/one HTTP/1.1\r\nhost: shop.example\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n")
        assert received(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"hello")
        answer = received(sock, b"}\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"body":"hello"' in answer


def test_a_chunked_upload_with_trailers_arrives_whole(mesh: Mesh) -> None:
    with raw(mesh) as sock:
        sock.sendall(b"POST /orders/one HTTP/1.1\r\nhost: shop.example\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n")
        for _ in range(50):
            sock.sendall(b"3e8;ignored=1\r\n" + b"y" * 1000 + b"\r\n")
        sock.sendall(b"0\r\nx-sum: 77\r\n\r\n")
        shown = json.loads(received(sock, b"}\n").partition(b"\r\n\r\n")[2].split(b"\n")[0].strip())
    assert shown["bodyBytes"] == 50_000
    assert shown["trailers"] == {"x-sum": "77"}


def test_trailers_of_an_answer_arrive(mesh: Mesh) -> None:
    with raw(mesh) as sock:
        sock.sendall(b"GET /catalog/script/trailers HTTP/1.1\r\nhost: shop.example\r\nte: trailers\r\n\r\n")
        answer = received(sock, b"x-sum: 294\r\n\r\n")
    assert answer.endswith(b"0\r\nx-sum: 294\r\n\r\n")
    assert b"abc" in answer


def test_nghttp_by_alpn_with_a_client_certificate(mesh: Mesh, tmp_path: Path) -> None:
    who = mesh.identity("shop-web")
    body = tmp_path / "body"
    body.write_bytes(b"z" * MEGABYTE)
    url = f"https://127.0.0.1:{mesh.ports['ingress']}/orders/one"
    command = ["nghttp", "-t", "20", "-y", f"--cert={who / 'cert.pem'}", f"--key={who / 'key.pem'}", "-m", "3"]
    command += ["-H", ":authority: shop.example"]
    done = subprocess.run([*command, "-d", str(body), url], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.count(f'"bodyBytes":{MEGABYTE}') == 3, done.stdout[:2000] + done.stderr[:2000]


@pytest.mark.parametrize("version", ["h2", "http/1.1"])
def test_h2load(mesh: Mesh, version: str) -> None:
    # h2load shows no client certificate: its requests go by a tunnel that does.
    with tunnel(mesh, version) as port:
        how = ["--h1"] if version == "http/1.1" else ["-m", "10"]
        command = ["h2load", "-n", "2000", "-c", "10", *how, f"--connect-to=127.0.0.1:{port}", "http://shop.example/catalog/one"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "2000 total, 2000 started, 2000 done, 2000 succeeded, 0 failed, 0 errored" in done.stdout, done.stdout + done.stderr
    assert "status codes: 2000 2xx" in done.stdout


@contextlib.contextmanager
def tunnel(mesh: Mesh, alpn: str) -> Iterator[int]:
    """A port of this machine's that leads to the ingress over mTLS, shown as `web`."""
    tls = context(mesh.identity("shop-web"), alpn)
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def carry(source: Any, target: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = tls.wrap_socket(socket.create_connection(("127.0.0.1", mesh.ports["ingress"])), server_hostname="shop.example")
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


@pytest.fixture(scope="module")
def channel(mesh: Mesh) -> Iterator[grpc.Channel]:
    folder = mesh.identity("shop-web")
    parts = ((folder / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
    options = [("grpc.ssl_target_name_override", "shop.example")]
    with grpc.secure_channel(f"127.0.0.1:{mesh.ports['ingress']}", grpc.ssl_channel_credentials(*parts), options) as made:
        yield made


@pytest.mark.parametrize("prefix", ["/orders/calls", "/orders/always"])
def test_grpc(channel: grpc.Channel, prefix: str) -> None:
    answer, call = channel.unary_unary(f"{prefix}/Say").with_call(b"hello", timeout=10)
    assert answer == b"said hello"
    trailers = dict(call.trailing_metadata())
    assert trailers["x-trailer"] == "sent"
    assert f"URI={spiffe('web')}" in trailers["x-caller"]
    stream = channel.unary_stream(f"{prefix}/Count")(b"200", timeout=10)
    assert dict(stream.initial_metadata())["x-initial"] == "sent"
    assert [int(each) for each in stream] == list(range(200))
    assert dict(stream.trailing_metadata())["x-trailer"] == "sent"
    assert channel.stream_unary(f"{prefix}/Sum")(iter([b"x" * 10_000] * 50), timeout=10) == b"500000"
    both = channel.stream_stream(f"{prefix}/Echo")(iter([b"a", b"b", b"c"]), timeout=10)
    assert list(both) == [b"<a>", b"<b>", b"<c>"]
    with pytest.raises(grpc.RpcError) as told:
        channel.unary_unary(f"{prefix}/Fail")(b"such thing", timeout=10)
    assert (told.value.code(), told.value.details()) == (grpc.StatusCode.NOT_FOUND, "there is no such thing")
    assert dict(told.value.trailing_metadata())["x-trailer"] == "sent"


def test_grpc_back_and_forth_message_by_message(channel: grpc.Channel) -> None:
    turns: list[bytes] = []
    turn = threading.Semaphore(1)

    def questions() -> Iterator[bytes]:
        for number in range(20):
            assert turn.acquire(timeout=10)
            yield b"%d" % number

    for each in channel.stream_stream("/orders/calls/Echo")(questions(), timeout=20):
        turns.append(each)
        turn.release()
    assert turns == [b"<%d>" % number for number in range(20)]


def test_a_grpc_client_that_gives_up_is_heard_of_by_the_service(channel: grpc.Channel) -> None:
    CANCELLED.clear()
    with pytest.raises(grpc.RpcError) as told:
        channel.unary_unary("/orders/calls/Sleep")(b"", timeout=0.5)
    assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert CANCELLED.wait(10)


def test_a_grpc_client_is_refused_in_its_own_words(mesh: Mesh, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as told:
        channel.unary_unary("/payments/Say")(b"", timeout=10)
    assert (told.value.code(), told.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "Policy does not allow this request.")
    assert mesh


# -- much, slow and half


def test_a_large_upload_to_a_slow_service_is_not_held_in_memory(mesh: Mesh) -> None:
    pid = mesh.processes["gateway-ingress"].pid
    assert ask(mesh, "web", "/orders/upload", "POST", b"warm").body == b"4"
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = memory(pid, "VmRSS")
    block = bytes(256 * 1024)
    connection = Connection(mesh, "web", timeout=60)
    answer = exchange(connection, "POST", "/orders/upload", (block for _ in range(UPLOAD // len(block))), {"content-length": str(UPLOAD)})
    connection.close()
    assert (answer.status, answer.body) == (200, b"%d" % UPLOAD)
    assert memory(pid, "VmHWM") - before < 20 * MEGABYTE


def test_nor_is_one_over_http2(mesh: Mesh, tmp_path: Path) -> None:
    size = 128 * MEGABYTE
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(size)
    pid = mesh.processes["gateway-ingress"].pid
    assert mesh.curl("web", "POST", "/orders/upload", "--http2", "-d", "warm").body == "4"
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = memory(pid, "VmRSS")
    answer = mesh.curl("web", "POST", "/orders/upload", "--http2", "-T", str(tmp_path / "zeros"))
    assert (answer.status, answer.body) == (200, str(size))
    assert memory(pid, "VmHWM") - before < 20 * MEGABYTE


def memory(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_a_client_that_vanishes_in_its_upload_takes_the_upstream_request_with_it(mesh: Mesh) -> None:
    SCRIPT.gone.clear()
    with raw(mesh) as sock:
        sock.sendall(b"POST /orders/partial/1 HTTP/1.1\r\nhost: shop.example\r\ncontent-length: 100000\r\n\r\n" + b"x" * 20_000)
        wait_for("it to be in progress", lambda: mesh.metric("ingress", "tollhouse_upstream_active", cluster="shop/script:443") >= 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert SCRIPT.gone.wait(10)
    assert mesh.logged("ingress", "/orders/partial/1")["response_flags"] == "DC"


def test_an_upstream_that_vanishes_in_its_answer_is_never_taken_for_a_whole_one(mesh: Mesh) -> None:
    with raw(mesh) as sock:
        sock.sendall(b"GET /catalog/script/half/1 HTTP/1.1\r\nhost: shop.example\r\n\r\n")
        answer = everything(sock)
    assert b"content-length: 1000" in answer.lower()
    assert len(answer.partition(b"\r\n\r\n")[2]) <= 400
    assert mesh.logged("ingress", "/catalog/script/half/1")["response_flags"] == "UC"
    assert mesh.curl("web", "GET", "/catalog/script/half/2", "--http2").code == 92, "HTTP/2: the stream is reset"


@pytest.mark.parametrize(("path", "flag"), [("/catalog/script/none/1", "UC"), ("/catalog/script/nonsense/1", "UPE")])
def test_an_upstream_that_does_not_answer_is_a_502(mesh: Mesh, path: str, flag: str) -> None:
    assert ask(mesh, "web", path).status == 502
    assert mesh.logged("ingress", path)["response_flags"] == flag


def test_a_head_that_comes_byte_by_byte_holds_up_nobody(mesh: Mesh) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(raw(mesh)) for _ in range(20)]
        request = b"GET /catalog/one HTTP/1.1\r\nhost: shop.example\r\n\r\n"
        for at in range(len(request) - 1):
            for sock in slow:
                sock.sendall(request[at : at + 1])
            if at % 10 == 0:
                assert ask(mesh, "web", "/catalog/one").seconds < 2.0
        for sock in slow:
            sock.sendall(request[-1:])
            assert received(sock, b"}\n").startswith(b"HTTP/1.1 200 ")


# -- not HTTP


@contextlib.contextmanager
def raw(mesh: Mesh, caller: str = "web") -> Iterator[ssl.SSLSocket]:
    plain = socket.create_connection(("127.0.0.1", mesh.ports["ingress"]), timeout=10)
    with context(mesh.identity(f"shop-{caller}")).wrap_socket(plain, server_hostname="shop.example") as sock:
        yield sock


def received(sock: ssl.SSLSocket, until: bytes) -> bytes:
    data = b""
    while until not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    return data


def everything(sock: ssl.SSLSocket) -> bytes:
    data = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


HOST = b"host: shop.example\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /orders/one HTTP/1.1\r\n" + HOST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /orders/one HTTP/1.1\r\n" + HOST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc", 400),
        (b"POST /orders/one HTTP/1.1\r\n" + HOST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"x-nul: a\x00b\r\n\r\n", 400),
        (b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"x-bare: a\nx-smuggled: b\r\n\r\n", 400),
        (b"GET /catalog/one HTTP/1.1\nhost: shop.example\n\n", 400),
        (b"GET /catalog/one HTTP/1.1\r\n\r\n", 400),
        (b"GET /catalog/one HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"x-folded: a\r\n b\r\n\r\n", 400),
        (b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"x-large: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"".join(b"x-%d: y\r\n" % n for n in range(200)) + b"\r\n", 431),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_what_is_not_a_request_is_refused_and_ends_the_connection(mesh: Mesh, request_: bytes, status: int) -> None:
    with raw(mesh) as sock:
        sock.sendall(request_ + b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"\r\n")
        answer = everything(sock)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert answer.count(b"HTTP/1.1 ") == 1, "nothing after it is taken for a request"


def test_plain_http_on_a_tls_port_is_told_so(mesh: Mesh) -> None:
    before = mesh.metric("ingress", "tollhouse_handshake_failures_total", reason="plain_http")
    done = subprocess.run(
        ["curl", "-s", "-i", "--max-time", "10", f"http://127.0.0.1:{mesh.ports['ingress']}/catalog/one"], capture_output=True, check=False
    )
    assert answer_of(done.stdout.decode(), done.returncode).status == 400
    assert mesh.metric("ingress", "tollhouse_handshake_failures_total", reason="plain_http") == before + 1


# -- who it is


def forged(authority: Authority, folder: Path, uris: list[str], begin: float = -3600.0, end: float = 3600.0) -> Path:
    """A client certificate by `authority` with these URI SANs, valid from and to so many seconds from now, written as an identity."""
    authority.save(folder)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    names = [x509.UniformResourceIdentifier(uri) for uri in uris] or [x509.DNSName("web.shop.example")]
    usage = dict.fromkeys(
        (
            "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
            "encipher_only", "decipher_only",
        ),
        False,
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=begin))
        .not_valid_after(now + timedelta(seconds=end))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .sign(signer, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(*plain))
    return folder


def refused(mesh: Mesh, identity: Path | None) -> bool:
    """Whether a connection with this identity gets no answer."""
    tls = ssl.create_default_context(cafile=str(mesh.identity("shop-web") / "ca.pem"))
    if identity is not None:
        tls.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    try:
        plain = socket.create_connection(("127.0.0.1", mesh.ports["ingress"]), timeout=10)
        with tls.wrap_socket(plain, server_hostname="shop.example") as sock:
            sock.sendall(b"GET /catalog/one HTTP/1.1\r\n" + HOST + b"\r\n")
            return not sock.recv(1)
    except (ssl.SSLError, ConnectionError):
        return True


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("expired", "expired"),
        ("not yet", "not_yet_valid"),
        ("other authority", "unknown_ca"),
        ("two identities", "two_uris"),
        ("no identity", "no_spiffe_id"),
        ("other domain", "foreign_trust_domain"),
        ("nobody", "no_certificate"),
    ],
)
def test_a_certificate_that_is_not_good_is_refused_and_counted_by_why(mesh: Mesh, tmp_path: Path, who: str, reason: str) -> None:
    web = [spiffe("web")]
    made = {
        "good": lambda: forged(mesh.authority, tmp_path / "good", web),
        "expired": lambda: forged(mesh.authority, tmp_path, web, -7200, -3600),
        "not yet": lambda: forged(mesh.authority, tmp_path, web, 3600, 7200),
        "other authority": lambda: forged(Authority.create(DOMAIN), tmp_path, web),
        "two identities": lambda: forged(mesh.authority, tmp_path, [spiffe("web"), spiffe("orders")]),
        "no identity": lambda: forged(mesh.authority, tmp_path, []),
        "other domain": lambda: forged(mesh.authority, tmp_path, ["spiffe://other.example/ns/shop/sa/web"]),
        "nobody": lambda: None,
    }
    before = mesh.metric("ingress", "tollhouse_handshake_failures_total", reason=reason)
    assert refused(mesh, made[who]())
    wait_for("the metric", lambda: mesh.metric("ingress", "tollhouse_handshake_failures_total", reason=reason) == before + 1)
    assert not refused(mesh, made["good"]()), "the same certificate without the fault"


# -- the gateway itself


def serial(mesh: Mesh) -> str:
    with raw(mesh) as sock:
        shown = sock.getpeercert()
        assert shown
        return str(shown["serialNumber"])


def test_a_certificate_that_was_replaced_on_disk_is_served_without_a_restart(mesh: Mesh) -> None:
    before, pid = serial(mesh), mesh.processes["gateway-ingress"].pid
    kept = Connection(mesh, "web")
    assert exchange(kept, "GET", "/catalog/one").status == 200
    mesh.issue("ingress", "edge", HOSTS["ingress"])
    wait_for("the new certificate", lambda: serial(mesh) != before)
    assert exchange(kept, "GET", "/catalog/one").status == 200, "a connection goes on"
    kept.close()
    assert ask(mesh, "web", "/catalog/one").status == 200, "its services take the new one, too"
    assert mesh.processes["gateway-ingress"].pid == pid
    assert mesh.processes["gateway-ingress"].process.poll() is None


def test_a_gateway_that_is_told_to_end_finishes_what_it_has_begun(mesh: Mesh) -> None:
    gateway = mesh.processes["gateway-ingress"]
    SCRIPT.held.clear()
    SCRIPT.release.clear()
    held: list[Any] = []
    asking = threading.Thread(target=lambda: held.append(ask(mesh, "web", "/catalog/script/hold")))
    with Trickle(mesh, "web", "/catalog/one", period=0.005) as trickle, Trickle(mesh, "batch", "/catalog/one", period=0.005) as other:
        asking.start()
        assert SCRIPT.held.wait(10)
        trickle.more(10)
        other.more(10)
        gateway.signal(signal.SIGTERM)
        wait_for("new connections to be refused", lambda: not listens(mesh))
        assert gateway.process.poll() is None, "it waits for the one that is in progress"
        SCRIPT.release.set()
        asking.join(10)
        assert gateway.process.wait(15) == 0
    assert [(each.status, each.body) for each in held] == [(200, b"held")]
    for each in (trickle, other):
        answers = each.statuses()
        assert answers.pop(200) >= 10
        refusals = sum(count for got, count in answers.items() if isinstance(got, str) and got.startswith("ConnectionRefusedError"))
        # A client that sends on a kept connection in the moment in which it is closed finds it closed: once, and is free to ask again.
        assert sum(answers.values()) - refusals <= 1, answers
        assert not [got for got in answers if isinstance(got, int)], "no status but 200"
    gateway.start()
    assert ask(mesh, "web", "/catalog/one").status == 200


def listens(mesh: Mesh) -> bool:
    try:
        socket.create_connection(("127.0.0.1", mesh.ports["ingress"]), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True

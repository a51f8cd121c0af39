"""The decision log: its format, what it never shows, its masks, and what becomes of it when nobody takes it."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from telemetry_world import WEB, a_decision_log, an_outcome, of, the_document

from mesh.policy import Revision
from mesh.questions import Verdict
from telemetry import decision_log
from telemetry.decision_event import event_json
from telemetry.decision_log import DecisionLog, Sink
from telemetry.log_upload import LogUpload, UploadOptions, check_url
from telemetry.masks import MaskError, apply, masks_of
from telemetry.record import Telemetry


def until(what: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def logged(tmp_path: Path, *outcomes: Any, **options: Any) -> list[dict[str, Any]]:
    log = a_decision_log(tmp_path / "decisions.log", **options)
    for outcome in outcomes:
        log.record(outcome)
    log.close()
    return events(tmp_path / "decisions.log")


def test_an_event_has_the_fields_of_opas(tmp_path: Path) -> None:
    outcome = an_outcome(verdict=Verdict.DENY)
    outcome.trace = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
    (event,) = logged(tmp_path, outcome)
    assert event["labels"] == {"id": "one", "gateway": "edge/eastwest", "listener": "https"}
    assert len(event["decision_id"]) == 36
    assert event["trace_id"] == "a" * 32
    assert event["bundles"] == {"tollhouse": {"revision": "sha256:1"}}
    assert event["path"] == "shop/authz/decision"
    assert event["result"] == {"allowed": False, "reason": "because", "rule": "web_reads"}
    assert event["requested_by"] == "127.0.0.1:5"
    assert event["timestamp"] == "2023-11-14T22:13:20.123Z"
    assert "error" not in event
    custom = event["custom"]
    assert (custom["request_id"], custom["policy"], custom["level"]) == ("1111-2222", "shop/main", "mesh")
    assert (custom["kept"], custom["shadow"], custom["caller"]) == (True, False, WEB)


def test_an_error_has_no_result(tmp_path: Path) -> None:
    (event,) = logged(tmp_path, an_outcome(verdict=Verdict.ERROR))
    assert "result" not in event
    assert event["error"] == {"code": "error", "message": "because"}


@pytest.mark.parametrize(("which", "expected"), [("all", ["allow", "deny", "error"]), ("refused", ["deny", "error"])])
def test_it_can_be_of_refusals_alone(tmp_path: Path, which: Any, expected: list[str]) -> None:
    found = logged(tmp_path, *(an_outcome(verdict=verdict) for verdict in (*Verdict, None)), which=which)
    assert [event["custom"]["verdict"] for event in found] == expected


SECRET_HEADERS = [
    (b"authorization", b"Bearer secret"),
    (b"cookie", b"id=secret"),
    (b"proxy-authorization", b"Basic secret"),
    (b"x-forwarded-client-cert", b"Hash=secret"),
    (b"x-jwt", b"jwt eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.c2VjcmV0secret"),
    (b"x-tenant", b"blue"),
]


def test_secrets_are_not_written_and_what_was_hidden_is_listed(tmp_path: Path) -> None:
    outcome = an_outcome(headers=SECRET_HEADERS)
    outcome.decisions[0][0].asking.body = b"password=secret"
    (event,) = logged(tmp_path, outcome)
    assert "secret" not in json.dumps(event)
    http = event["input"]["attributes"]["request"]["http"]
    assert http["headers"] == {
        ":path": "/catalog/1?**",
        "authorization": "**",
        "cookie": "**",
        "proxy-authorization": "**",
        "x-forwarded-client-cert": "**",
        "x-jwt": "**",
        "x-tenant": "blue",
    }
    assert (http["path"], http["body"], event["input"]["parsed_body"]) == ("/catalog/1?**", "**", "**")
    below = "/input/attributes/request/http"
    assert set(event["masked"]) == {
        *(f"{below}/headers/{name.decode()}" for name, _ in SECRET_HEADERS[:5]),
        f"{below}/path",
        f"{below}/headers/:path",
        f"{below}/body",
        "/input/parsed_query/token",
        "/input/parsed_body",
    }


def test_a_request_without_secrets_has_nothing_hidden(tmp_path: Path) -> None:
    (event,) = logged(tmp_path, an_outcome(query=None))
    assert "masked" not in event


def test_all_of_it_is_written_when_told_so(tmp_path: Path) -> None:
    (event,) = logged(tmp_path, an_outcome(headers=SECRET_HEADERS), full=True)
    assert event["input"]["attributes"]["request"]["http"]["headers"]["authorization"] == "Bearer secret"
    assert "masked" not in event


def test_an_event_is_one_line_of_plain_ascii() -> None:
    text = event_json({"a": "ü\u2028\x7f\n😀", "b": 1.5})
    assert text.isascii()
    assert not any(byte < 0x20 or byte == 0x7F for byte in text)
    assert json.loads(text) == {"a": "ü\u2028\x7f\n😀", "b": 1.5}


# Masks; that they are OPA's own is tests/tollhouse/test_tollhouse_masks.py


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("all", "not a set of masks"),
        ([1], "not a path or an object"),
        ([""], "is not a path"),
        (["input/a"], "is not a path"),
        (["/labels/id"], "not below one of"),
        (["/input/%zz"], "broken escape"),
        ([{"op": "erase", "path": "/input/a"}], "not remove or upsert"),
        ([{"path": "/input/a"}], "not remove or upsert"),
        ([{"op": "upsert", "path": 1, "value": 2}], "not a string"),
    ],
)
def test_what_is_no_mask_is_said(said: Any, problem: str) -> None:
    with pytest.raises(MaskError, match=problem):
        masks_of(said)


def test_masks_erase_and_replace() -> None:
    event: dict[str, Any] = {"input": {"a": [1, 2, {"b": 3}], "c": "x"}, "result": {"d": 1}}
    said = ["/input/a/0", "/input/missing", {"op": "upsert", "path": "/input/c", "value": "**"}, {"op": "remove", "path": "/result"}]
    apply(masks_of(said), event)
    assert event == {"input": {"a": [2, {"b": 3}], "c": "**"}, "erased": ["/input/a/0", "/result"], "masked": ["/input/c"]}


def test_what_the_policy_drops_and_what_could_not_be_masked_is_counted(tmp_path: Path) -> None:
    log = a_decision_log(tmp_path / "decisions.log")
    telemetry = Telemetry(decision_log=log)
    log.masker = lambda found: [None, ValueError("no"), *found[2:]]
    hold = threading.Event()
    log._work, work = lambda batch: (hold.wait(10), work(batch)), log._work  # type: ignore[assignment,misc]
    for _ in range(3):
        log.record(an_outcome())
    hold.set()
    until(lambda: log.filtered + log.failed + log.written == 3)
    log.close()
    page = telemetry.page()
    assert of(page, "tollhouse_log_entries_filtered_total", log="decision") == log.filtered >= 1
    assert of(page, "tollhouse_log_entries_failed_total", log="decision", sink="queue") == log.failed >= 1
    assert len(events(tmp_path / "decisions.log")) == log.written


def test_the_newest_refusals_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "MOST_RECENT", 3)
    log = a_decision_log(tmp_path / "decisions.log")
    telemetry = Telemetry(decision_log=log)
    for number in range(5):
        for verdict in Verdict:
            outcome = an_outcome(verdict=verdict)
            outcome.request_id = b"%d" % number
            log.record(outcome)
    log.close()
    found = json.loads(telemetry.refusals())["events"]
    assert [(each["custom"]["request_id"], each["custom"]["verdict"]) for each in found] == [("3", "error"), ("4", "deny"), ("4", "error")]
    assert json.loads(Telemetry().refusals()) == {"events": []}


def test_a_kept_decision_is_of_the_revision_in_force(tmp_path: Path) -> None:
    outcome = an_outcome()
    asked, decision = outcome.decisions[0]
    outcome.decisions = [(msgspec.structs.replace(asked, revision=Revision(digest="sha256:new")), decision)]
    (event,) = logged(tmp_path, outcome)
    assert event["bundles"]["tollhouse"]["revision"] == "sha256:new"


# Uploads


class Server:
    """Takes uploads; `status` is what it answers, or None to answer nothing."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.limit = 1 << 30
        self.batches: list[list[dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.tries = 0
        self.stop = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                server.tries += 1
                status = server.status
                if status is None:
                    server.stop.wait(60)
                    return
                if len(body) > server.limit:
                    status = 413
                if status == 200:
                    server.batches.append(json.loads(gzip.decompress(body)))
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.paths.append(self.path)
                self.send_response(status)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for batch in self.batches for event in batch]

    def close(self) -> None:
        self.stop.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@contextmanager
def uploading(url: str, **options: Any) -> Iterator[LogUpload]:
    made = LogUpload(UploadOptions(url=url, **options))
    made._gather = lambda: None  # type: ignore[method-assign]
    try:
        yield made
    finally:
        made.close()


def test_events_are_uploaded_as_opa_does(server: Server, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("swordfish\n")
    upload = LogUpload(UploadOptions(url=server.url + "/tenant/", token=str(token)))
    log = DecisionLog([Sink(upload)], the_document)
    for _ in range(40):
        log.record(an_outcome())
    log.close()
    assert len(server.events) == 40
    assert len({event["decision_id"] for event in server.events}) == 40
    assert set(server.paths) == {"/tenant/logs"}
    assert server.headers[0]["content-encoding"] == "gzip"
    assert server.headers[0]["authorization"] == "Bearer swordfish"
    assert (upload.written, upload.failed, upload.dropped) == (40, 0, 0)


def test_batches_stay_below_the_limit_of_an_upload(server: Server) -> None:
    import random

    source = random.Random(1)
    with uploading(server.url, upload_limit=4096) as upload:
        for _ in range(50):
            upload.offer(json.dumps({"noise": source.randbytes(500).hex()}).encode())
        until(lambda: upload.written == 50)
    assert all(len(gzip.compress(json.dumps(batch).encode())) < 5000 for batch in server.batches)
    assert len(server.batches) >= 8


def test_an_event_that_is_too_large_is_counted_and_holds_nothing_up(server: Server) -> None:
    import random

    with uploading(server.url, upload_limit=4096) as upload:
        upload.offer(json.dumps({"noise": random.Random(1).randbytes(9000).hex()}).encode())
        upload.offer(b'{"small":1}')
        until(lambda: upload.written == 1)
        assert upload.failed == 1
    assert server.events == [{"small": 1}]


def test_a_server_that_takes_less_gets_smaller_batches(server: Server) -> None:
    server.limit = 60
    with uploading(server.url) as upload:
        for number in range(16):
            upload.offer(b'{"number":%d}' % number)
        until(lambda: upload.written == 16)
    assert sorted(event["number"] for event in server.events) == list(range(16))
    assert len(server.batches) > 1


def test_a_batch_that_is_refused_is_tried_again(server: Server) -> None:
    server.status = 503
    with uploading(server.url) as upload:
        upload.offer(b"{}")
        until(lambda: server.tries >= 2)
        assert "503" in upload.problem
        server.status = 200
        until(lambda: upload.written == 1)
        assert upload.problem == ""


def test_a_server_that_stalls_holds_nobody_and_what_finds_no_room_is_counted(server: Server) -> None:
    server.status = None
    with uploading(server.url, buffer_limit=65536) as upload:
        began = time.monotonic()
        item = b'{"x":"' + b"y" * 1000 + b'"}'
        taken = sum(upload.offer(item) for _ in range(5000))
        assert time.monotonic() - began < 5
        assert taken <= 65536 // len(item)
        assert upload.dropped == 5000 - taken
        upload.close(0.1)
    assert upload.written == 0


def test_what_is_left_at_the_end_is_counted_as_lost() -> None:
    upload = LogUpload(UploadOptions(url="http://127.0.0.1:9"))
    for _ in range(10):
        upload.offer(b"{}")
    until(lambda: upload.problem)
    upload.offer(b"{}")
    upload.close(10)
    assert upload.failed + upload.dropped == 11


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://x", "not the URL of a server"),
        ("http://", "not the URL of a server"),
        ("http://user:pw@x", "may have no user"),
        ("http://x/?a=b", "query"),
        ("http://x:99999", "Port out of range"),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_url(url)

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_world import GATEWAY, WEB, a_decision_log, an_outcome, of

from mesh.questions import Decision, FieldChange, Verdict
from telemetry.access_log import AccessLog, fields_of
from telemetry.record import Telemetry
from telemetry.text import json_line, moment
from telemetry.writer import LineWriter


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_a_request_is_a_line(tmp_path: Path) -> None:
    telemetry = Telemetry(AccessLog(str(tmp_path / "access.log")), a_decision_log(tmp_path / "decisions.log"))
    telemetry.record(an_outcome())
    telemetry.close()
    (line,) = lines(tmp_path / "access.log")
    assert line["start_time"] == "2023-11-14T22:13:20.123Z"
    assert (line["method"], line["path"], line["protocol"]) == ("GET", "/catalog/1", "HTTP/1.1")
    assert (line["response_code"], line["response_flags"], line["response_code_details"]) == (200, "-", "via_upstream")
    assert (line["duration"], line["upstream_service_time"]) == (3.1, 2.1)
    assert (line["user_agent"], line["x_forwarded_for"], line["request_id"]) == ("curl/8", "192.0.2.1", "1111-2222")
    assert (line["caller"], line["via"], line["downstream_peer_principal"]) == (WEB, GATEWAY, GATEWAY)
    assert line["policy"] == [{"policy": "shop/main", "verdict": "allow", "kept": True, "shadow": False}]
    assert line["quota"] == [{"limit": "shop/orders/caller", "admitted": True, "shadow": False, "error": None}]
    (decision,) = lines(tmp_path / "decisions.log")
    assert decision["path"] == "shop/authz/decision"
    assert decision["result"] == {"allowed": True, "reason": "because", "rule": "web_reads"}
    assert decision["custom"]["request_id"] == "1111-2222"
    assert decision["input"]["attributes"]["source"]["principal"] == WEB
    page = telemetry.page()
    assert of(page, "tollhouse_log_entries_written_total", log="access") == 1
    assert (tmp_path / "access.log").stat().st_mode & 0o007 == 0


def test_what_an_answer_says_for_the_logs_is_in_them(tmp_path: Path) -> None:
    telemetry = Telemetry(AccessLog(str(tmp_path / "access.log")), a_decision_log(tmp_path / "decisions.log"))
    outcome = an_outcome()
    question, _ = outcome.decisions[0]
    changes = (FieldChange(b"x-a", b"1", "if_absent"),)
    said = Decision(verdict=Verdict.ALLOW, metadata='{"tier":"gold","who":"\u00e9"}'.encode(), changes=changes, query_set=(("a", "1"),))
    outcome.decisions[0] = (question, said)
    telemetry.record(outcome)
    telemetry.close()
    (line,) = lines(tmp_path / "access.log")
    assert line["policy"][0]["metadata"] == {"tier": "gold", "who": "\u00e9"}
    (decision,) = lines(tmp_path / "decisions.log")
    assert decision["result"] == {
        "allowed": True,
        "header_changes": [{"header": "x-a", "value": "1", "action": "if_absent"}],
        "query_parameters_to_set": {"a": "1"},
        "dynamic_metadata": {"tier": "gold", "who": "\u00e9"},
    }


def test_the_query_is_logged_only_when_told(tmp_path: Path) -> None:
    assert b"secret" not in json_line(fields_of(an_outcome()))
    assert fields_of(an_outcome(), query=True)["path"] == "/catalog/1?token=secret"
    unread = an_outcome()
    assert unread.head is not None
    unread.head.path = b""
    assert fields_of(unread)["path"] == "/catalog/1"


def test_a_request_that_was_never_read_is_a_line_too() -> None:
    outcome = an_outcome(verdict=None, admitted=None)
    outcome.head = None
    outcome.caller = None
    line = json.loads(json_line(fields_of(outcome)))
    assert (line["method"], line["path"], line["caller"], line["policy"]) == (None, None, GATEWAY, [])


@settings(max_examples=200)
@given(st.binary(max_size=60), st.binary(max_size=60), st.text(max_size=20))
def test_whatever_a_client_sends_is_one_line_of_plain_ascii(path: bytes, agent: bytes, sni: str) -> None:
    outcome = an_outcome(path=b"/" + path, headers=[(b"user-agent", agent), (b"x-forwarded-for", path)], method=agent)
    outcome.reason = sni
    line = json_line(fields_of(outcome, query=True))
    assert line.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    json.loads(line)


def test_a_value_is_cut() -> None:
    outcome = an_outcome(headers=[(b"user-agent", b"x" * 50_000)])
    assert len(json_line(fields_of(outcome))) < 5000


def test_sampling_keeps_all_that_went_wrong(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "access.log"), every=10)
    for _ in range(100):
        log.record(an_outcome())
        log.record(an_outcome(status=429, flag="RL"))
    log.writer.close()
    flags = [line["response_flags"] for line in lines(tmp_path / "access.log")]
    assert (flags.count("-"), flags.count("RL")) == (10, 100)


def test_a_full_pipe_holds_nobody_and_drops_are_counted() -> None:
    reading, writing = os.pipe()
    log: LineWriter[bytes] = LineWriter(f"/proc/self/fd/{writing}", lambda item: item, queue=64)
    os.close(writing)
    item = b"x" * 1000 + b"\n"
    began = time.monotonic()
    taken = 0
    while log.dropped < 100:
        taken += log.offer(item)
        assert time.monotonic() - began < 20
        time.sleep(0)
    data = b""
    while data.count(b"\n") < taken:
        data += os.read(reading, 65536)
    assert set(data.split(b"\n")[:-1]) == {item[:-1]}
    log.close()
    os.close(reading)
    assert log.written == taken


def test_large_heads_do_not_pile_up() -> None:
    reading, writing = os.pipe()
    log = AccessLog(f"/proc/self/fd/{writing}")
    os.close(writing)
    big = an_outcome(headers=[(b"x", b"y" * 50_000)])
    while len(log.writer) <= 512:
        log.record(an_outcome())
    dropped = log.writer.dropped
    log.record(big)
    assert log.writer.dropped == dropped + 1
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 16), b"")])
    drain.start()
    log.writer.close(10)
    drain.join(10)
    os.close(reading)


def test_a_moved_file_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log: LineWriter[bytes] = LineWriter(str(path), lambda item: item)
    log.offer(b"one\n")
    until(lambda: log.written == 1)
    path.rename(tmp_path / "old.log")
    log.reopen()
    until(path.exists)
    log.offer(b"two\n")
    log.close()
    assert ((tmp_path / "old.log").read_bytes(), path.read_bytes()) == (b"one\n", b"two\n")


def test_a_place_that_cannot_be_opened_again_keeps_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log: LineWriter[bytes] = LineWriter(str(tmp_path / "logs" / "x.log"), lambda item: item)
    (tmp_path / "logs").rename(tmp_path / "moved")
    log.reopen()
    until(lambda: log.problem)
    log.offer(b"one\n")
    log.close()
    assert (tmp_path / "moved" / "x.log").read_bytes() == b"one\n"


def test_a_full_disk_is_counted_and_said() -> None:
    log: LineWriter[bytes] = LineWriter("/dev/full", lambda item: item)
    log.offer(b"one\n")
    until(lambda: log.failed)
    assert "/dev/full" in log.problem
    log.close()


def test_an_item_that_cannot_be_shown_costs_only_itself(tmp_path: Path) -> None:
    log: LineWriter[bytes] = LineWriter(str(tmp_path / "x.log"), lambda item: item + b"" if item else 1 / 0)  # type: ignore[return-value]
    for item in (b"a\n", b"", b"b\n"):
        log.offer(item)
    log.close()
    assert (tmp_path / "x.log").read_bytes() == b"a\nb\n"
    assert (log.failed, log.written) == (1, 2)


def test_a_log_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        AccessLog(str(tmp_path / "nowhere" / "x.log"))


def test_nothing_is_lost_between_sleep_and_wake(tmp_path: Path) -> None:
    log: LineWriter[bytes] = LineWriter(str(tmp_path / "x.log"), lambda item: item)
    for at in range(200):
        log.offer(b"%d\n" % at)
        time.sleep(0.0005 * (at % 7))
    until(lambda: log.written == 200)
    log.close()
    assert (tmp_path / "x.log").read_bytes().split() == [b"%d" % at for at in range(200)]


def test_a_moment_is_rfc_3339() -> None:
    assert moment(0) == "1970-01-01T00:00:00.000Z"
    assert moment(1_700_000_000.9999) == "2023-11-14T22:13:20.999Z"

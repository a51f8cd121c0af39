from __future__ import annotations

import random
import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.trace import identifiers, passed_on

TRACE = b"0af7651916cd43dd8448eb211c80319c"
PARENT = b"b7ad6b7169203331"
NEW = (b"1" * 32, b"2" * 16)
BEGUN = (b"00-" + NEW[0] + b"-" + NEW[1] + b"-01", False)


@pytest.mark.parametrize(
    ("sent", "flags"),
    [
        (b"00-" + TRACE + b"-" + PARENT + b"-01", b"01"),
        (b"00-" + TRACE + b"-" + PARENT + b"-00", b"00"),
        (b"00-" + TRACE + b"-" + PARENT + b"-ff", b"03"),
        (b"01-" + TRACE + b"-" + PARENT + b"-01", b"01"),
        (b"cc-" + TRACE + b"-" + PARENT + b"-01-what-comes-later", b"01"),
    ],
)
def test_a_trace_goes_on_with_a_new_parent(sent: bytes, flags: bytes) -> None:
    assert passed_on(sent, *NEW) == (b"00-" + TRACE + b"-" + NEW[1] + b"-" + flags, True)


@pytest.mark.parametrize(
    "sent",
    [
        None,
        b"",
        b"00-" + TRACE + b"-" + PARENT,
        b"00-" + TRACE + b"-" + PARENT + b"-01-more",
        b"00-" + TRACE + b"-" + PARENT + b"-011",
        b"ff-" + TRACE + b"-" + PARENT + b"-01",
        b"cc-" + TRACE + b"-" + PARENT + b"-01.",
        b"00-" + b"0" * 32 + b"-" + PARENT + b"-01",
        b"00-" + TRACE + b"-" + b"0" * 16 + b"-01",
        b"00-" + TRACE.upper() + b"-" + PARENT + b"-01",
        b"00_" + TRACE + b"-" + PARENT + b"-01",
        b"0-0" + TRACE + b"-" + PARENT + b"-01",
    ],
)
def test_a_trace_that_cannot_be_read_is_begun_anew(sent: bytes | None) -> None:
    assert passed_on(sent, *NEW) == BEGUN


@given(st.binary(max_size=80) | st.text("0123456789abcdef-", min_size=50, max_size=60).map(str.encode))
def test_whatever_is_sent_the_upstream_gets_a_good_one(sent: bytes) -> None:
    trace, _ = passed_on(sent, *NEW)
    assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", trace)


@given(st.integers())
def test_identifiers_are_uuids_and_hex(seed: int) -> None:
    request_id, trace_id, parent_id = identifiers(random.Random(seed))
    made = uuid.UUID(request_id.decode())
    assert (made.version, made.variant) == (4, uuid.RFC_4122)
    assert re.fullmatch(rb"[0-9a-f]{32}", trace_id)
    assert re.fullmatch(rb"[0-9a-f]{16}", parent_id)

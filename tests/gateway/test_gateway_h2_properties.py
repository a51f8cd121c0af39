"""HTTP/2: whatever comes, a codec holds; and what one side writes, the other one reads."""

from __future__ import annotations

from typing import Any

from codec_h2_world import GET, OK, POST, PREFACE, Peer, data, goaway, ping, raw, rst, window
from codec_h2_world import settings as settings_frame
from codec_world import head, pieces, transcript
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.codec.events import BodyReceived, Ended, Event, Refused, RequestReceived, ResponseReceived, Writable
from gateway.codec.h2 import CONNECTION_WINDOW, STREAM_WINDOW
from gateway.codec.h2_client import MAX_STREAMS, H2Client
from gateway.codec.h2_server import H2Server

stream = st.sampled_from([0, 1, 1, 1, 2, 3, 5, 7, 2**31 - 1])
number = st.sampled_from([0, 1, 5, 100, 16384, 65535, 2**31 - 1, 2**31, 2**32 - 1])
fields = st.lists(
    st.tuples(
        st.sampled_from([b"a", b"A", b"", b":path", b"cookie", b"content-length", b"te", b"connection", b"host", b"expect", b"\xff"]),
        st.sampled_from([b"", b"0", b"3", b"shop", b"trailers", b"a\r\nb", b"100-continue", b"\0"]),
    ),
    max_size=4,
)
orders = st.sampled_from(["head", "end", "body", "trailers", "early", "info", "reset", "drain", "take", "eof"])
frames = st.one_of(
    st.tuples(st.just("head"), stream, st.sampled_from([GET, POST, OK, ()]), fields, st.booleans(), st.sampled_from([1, 5, 16384])),
    st.tuples(st.just("data"), stream, st.integers(0, 200), st.booleans(), st.one_of(st.none(), st.integers(0, 255))),
    st.tuples(st.just("rst"), stream, number),
    st.tuples(st.just("window"), stream, number),
    st.tuples(st.just("settings"), st.lists(st.tuples(st.integers(0, 10), number), max_size=4)),
    st.tuples(st.just("goaway"), st.integers(0, 8)),
    st.tuples(st.just("ping")),
    st.tuples(st.just("raw"), st.integers(0, 12), st.integers(0, 255), stream, st.binary(max_size=40)),
    st.tuples(st.just("bytes"), st.binary(max_size=30)),
    st.tuples(st.just("order"), orders, stream),
)  # fmt: skip


def written(peer: Peer, frame: tuple[Any, ...]) -> bytes:
    kind, *rest = frame
    if kind == "head":
        where, first, more, ended, cut = rest
        return peer.head(where, (*first, *more), ended=ended, cut=cut)
    if kind == "data":
        return data(rest[0], b"x" * rest[1], ended=rest[2], padding=rest[3])
    makers: dict[str, Any] = {"rst": rst, "window": window, "goaway": goaway, "ping": ping, "raw": raw}
    if kind == "settings":
        return settings_frame(*rest[0])
    return rest[0] if kind == "bytes" else makers[kind](*rest)


def obey(codec: H2Server | H2Client, what: str, where: int) -> None:
    if what in ("head", "early", "info") and isinstance(codec, H2Server):
        if what == "info":
            codec.send_informational(where, 103, [(b"a", b"b")])
        else:
            codec.send_head(where, 200, [(b"a", b"b")], what == "early")
    elif what == "body":
        codec.send_body(where, b"y" * 1000, False)
    elif what == "end":
        codec.send_body(where, b"", True)
    elif what == "trailers":
        codec.send_trailers(where, [(b"t", b"u")])
    elif what == "reset":
        codec.reset(where, 8)
    elif what == "drain" and isinstance(codec, H2Server):
        codec.drain()
    elif what == "take":
        codec.take()
    elif what == "eof":
        codec.eof()
    assert codec.window(where) >= 0


@settings(max_examples=500, deadline=None)
@given(st.lists(frames, max_size=40), st.booleans())
def test_nothing_raises(script: list[tuple[Any, ...]], at_server: bool) -> None:
    codec: H2Server | H2Client = H2Server(b"https", max_streams=2) if at_server else H2Client()
    peer = Peer(codec, client=at_server)
    if isinstance(codec, H2Client):
        for _ in range(2):
            codec.request(head(b"POST", body_length=-1), [], b"/", b"shop", False)
    known: set[int] = set() if at_server else {1, 3}
    over: set[int] = set()
    broken = False
    for frame in script:
        if frame[0] == "order":
            obey(codec, frame[1], frame[2])
            continue
        for event in codec.receive(written(peer, frame)):
            assert not broken
            if isinstance(event, RequestReceived):
                assert event.stream not in known
                known.add(event.stream)
            if isinstance(event, RequestReceived | ResponseReceived) and event.ended:
                over.add(event.stream)
            elif isinstance(event, Ended):
                assert event.stream in known
                assert event.stream not in over
                over.add(event.stream)
            elif isinstance(event, BodyReceived):
                assert event.stream in known - over
                codec.consumed(event.stream, event.credit)
            elif isinstance(event, Refused):
                over.add(event.stream)
                broken = not event.stream
        assert codec.streams <= 2
        assert codec.closing or not broken
    codec.take()
    codec.eof()
    assert (codec.streams, codec.closing) == (0, True)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 300), max_size=5))
def test_no_bytes_raise(after: bytes, cuts: list[int]) -> None:
    for codec in (H2Server(b"https"), H2Client()):
        for part in pieces((PREFACE if isinstance(codec, H2Server) else b"") + after, cuts):
            codec.receive(part)
        codec.take()
        codec.eof()


@settings(max_examples=200, deadline=None)
@given(st.lists(frames.filter(lambda frame: frame[0] != "order"), max_size=20), st.lists(st.integers(0, 5000), max_size=8), st.booleans())
def test_cuts_change_nothing(script: list[tuple[Any, ...]], cuts: list[int], all_of_them: bool) -> None:
    first, second = H2Server(b"https"), H2Server(b"https")
    peer = Peer(first)
    Peer(second)
    sent = b"".join(written(peer, frame) for frame in script)
    whole = transcript(first.receive(sent))
    parts = pieces(sent, range(len(sent)) if all_of_them else cuts)
    cut = transcript(event for part in parts for event in second.receive(part))
    assert cut == whole
    assert first.closing == second.closing
    assert first.take() == second.take()


# What one side writes the other one reads

name = st.text("abcxyz-09", min_size=1, max_size=6).map(lambda text: b"x-" + text.encode())
value = st.binary(max_size=12).map(lambda some: bytes(c for c in some if 0x20 <= c != 0x7F).strip())
headers = st.lists(st.tuples(name, value), max_size=4)
body = st.lists(st.integers(1, 40_000), max_size=5)


class Ends:
    """Two codecs that talk to each other, by pieces."""

    def __init__(self, size: int) -> None:
        self.client = H2Client()
        self.server = H2Server(b"https")
        self.size = size
        self.heard: dict[str, list[Event]] = {"client": [], "server": []}
        self.unsent: dict[tuple[str, int], bytes] = {}

    def talk(self) -> None:
        """Until neither has any more to say."""
        while True:
            there, back = self.client.take(), self.server.take()
            if not there and not back:
                return
            for codec, name_, sent in ((self.server, "server", there), (self.client, "client", back)):
                for at in range(0, len(sent), self.size):
                    for event in codec.receive(sent[at : at + self.size]):
                        if isinstance(event, BodyReceived):
                            codec.consumed(event.stream, event.credit)
                        if isinstance(event, Writable):
                            self.send(codec, name_, event.stream)
                        else:
                            self.heard[name_].append(event)

    def send(self, codec: H2Client | H2Server, who: str, where: int) -> None:
        """As much as there is room for."""
        left = self.unsent.get((who, where), b"")
        while left and (room := codec.window(where)):
            codec.send_body(where, left[:room], False)
            left = left[room:]
        self.unsent[who, where] = left
        if not left:
            codec.send_trailers(where, [(b"x-end", b"1")])


@settings(max_examples=100, deadline=None)
@given(headers, body, body, st.sampled_from([50, 3000, 100_000]), st.booleans())
def test_what_one_side_writes_the_other_one_reads(
    some: list[tuple[bytes, bytes]], there: list[int], back: list[int], size: int, declared: bool
) -> None:
    ends = Ends(size)
    client, server = ends.client, ends.server
    question = [b"".join(b"%c" % (at + n) * amount for at, amount in enumerate(there)) for n in range(2)]
    answer = [b"".join(b"%c" % (at + n + 100) * amount for at, amount in enumerate(back)) for n in range(2)]
    for n in range(2):
        length = len(question[n]) if declared else -1
        where = client.request(head(b"POST", body_length=length), some, b"/a?b", b"shop", False)
        ends.unsent["client", where] = question[n]
        ends.send(client, "client", where)
    ends.talk()
    for n, where in enumerate((1, 3)):
        mine = transcript(event for event in ends.heard["server"] if event.stream == where)
        extra = [(b"content-length", b"%d" % len(question[n]))] if declared and question[n] else []
        assert mine[0][2:4] == (b"POST shop /a?b HTTP/2", (*some, *extra))
        assert mine[1:] == [*([("body", where, question[n])] if question[n] else []), ("end", where, ((b"x-end", b"1"),))]
        server.send_informational(where, 103, some)
        server.send_head(where, 200, some, False)
        ends.unsent["server", where] = answer[n]
        ends.send(server, "server", where)
    ends.talk()
    for n, where in enumerate((1, 3)):
        mine = transcript(event for event in ends.heard["client"] if event.stream == where)
        assert mine[:2] == [("informational", where, 103, tuple(some)), ("response", where, 200, tuple(some), b"HTTP/2", -1, False)]
        assert mine[2:] == [*([("body", where, answer[n])] if answer[n] else []), ("end", where, ((b"x-end", b"1"),))]
    for codec, whole in ((client, MAX_STREAMS * STREAM_WINDOW), (server, CONNECTION_WINDOW)):
        assert (codec.streams, codec.closing) == (0, False)
        assert codec._room + codec._owed == whole

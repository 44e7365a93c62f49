"""Frames: whatever way they are cut on the wire they arrive whole, and nothing but `ProtocolError` comes of garbage."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptd.errors import ProtocolError
from ckptd.protocol import codec
from ckptd.protocol.codec import Decoder, encode

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
_FRAMES = st.dictionaries(st.text(max_size=8), _VALUES, max_size=5)


def frame_of(body: bytes) -> bytes:
    """A frame around any bytes."""
    return struct.pack(">I", len(body)) + body


@settings(max_examples=80, deadline=None)
@given(st.lists(_FRAMES, max_size=6), st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_any_chunking_decodes_to_the_same(frames: list[dict[str, Any]], sizes: list[int]) -> None:
    """However the bytes of some frames are cut into pieces, the decoder returns those frames in that order."""
    stream = b"".join(encode(frame) for frame in frames)
    decoder = Decoder()
    found: list[dict[str, Any]] = []
    at = 0
    for size in itertools.cycle(sizes):
        if at >= len(stream):
            break
        found += decoder.feed(stream[at : at + size])
        at += size
    assert found == frames
    assert decoder.pending_bytes == 0


def test_byte_by_byte() -> None:
    """A frame is returned with its last byte and not before; until then its bytes are counted as pending."""
    decoder = Decoder()
    stream = encode({"type": "done"}) + encode({"type": "hello"})
    returned = [(at, decoder.feed(stream[at : at + 1])) for at in range(len(stream))]
    ends = [(at, frames) for at, frames in returned if frames]
    assert ends == [(len(encode({"type": "done"})) - 1, [{"type": "done"}]), (len(stream) - 1, [{"type": "hello"}])]
    decoder.feed(stream[:5])
    assert decoder.pending_bytes == 5


def test_a_frame_is_readable_json() -> None:
    """On the wire a frame is a big-endian length and UTF-8 JSON, so that a person can read a trace of it."""
    data = encode({"type": "done", "text": "ä"})
    assert struct.unpack(">I", data[:4]) == (len(data) - 4,)
    assert json.loads(data[4:].decode()) == {"type": "done", "text": "ä"}


# --- what is refused --------------------------------------------------------------------------------------------


def test_an_oversized_frame_is_refused_by_its_length() -> None:
    """A peer that announces too much is refused at once, before a byte of it is waited for or kept."""
    decoder = Decoder()
    with pytest.raises(ProtocolError, match=f"{codec.MAX_FRAME_BYTES + 1} bytes"):
        decoder.feed(struct.pack(">I", codec.MAX_FRAME_BYTES + 1))
    small = Decoder(max_frame_bytes=10)
    assert small.feed(encode({"a": 1234})) == [{"a": 1234}]  # exactly at the limit
    with pytest.raises(ProtocolError, match="over 10"):
        small.feed(encode({"a": 12345}))


def test_an_oversized_frame_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no peer would accept is refused where it is written."""
    monkeypatch.setattr(codec, "MAX_FRAME_BYTES", 100)
    assert encode({"text": "x" * 80})
    with pytest.raises(ProtocolError, match="over the limit of 100"):
        encode({"text": "x" * 100})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"{",
        b'{"a":1',
        b'{"a":1}}',
        b"\xff\xfe{}",
        b'{"a":"\xff"}',
        b"{'a': 1}",
        b"[" * 100_000,
        b"\x80\x04N.",
    ],
    ids=["empty", "word", "open", "cut", "long", "bom", "not utf-8", "single quotes", "deep", "pickle"],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    """Everything that is no JSON text is a `ProtocolError`."""
    with pytest.raises(ProtocolError, match="not JSON"):
        Decoder().feed(frame_of(body))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 309, "-1" + "0" * 309])
def test_numbers_that_nobody_can_count_with_are_refused(number: str) -> None:
    """NaN, infinity and what no float has room for are refused, whatever Python's parser says of them.

    Behind the first, comparisons would go wrong; a whole number that large overflows where it meets a float.
    """
    with pytest.raises(ProtocolError, match="not JSON"):
        Decoder().feed(frame_of(b'{"seconds":%s}' % number.encode()))


def test_json_is_utf_8() -> None:
    """JSON in another encoding is refused: both sides must read the same bytes the same way."""
    for encoding in ("utf-16", "utf-32-le"):
        with pytest.raises(ProtocolError):
            Decoder().feed(frame_of('{"a": 1}'.encode(encoding)))


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"', b"true", b'[{"type":"done"}]'])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    """A message is an object; other JSON is a `ProtocolError`."""
    with pytest.raises(ProtocolError, match="not an object"):
        Decoder().feed(frame_of(body))


def _endless() -> dict[str, Any]:
    frame: dict[str, Any] = {}
    frame["self"] = frame
    return frame


def _deep() -> dict[str, Any]:
    frame: dict[str, Any] = {}
    for _ in range(100_000):
        frame = {"a": frame}
    return frame


@pytest.mark.parametrize(
    "frame", [{"a": object()}, {"a": b"bytes"}, {"a": float("nan")}, {"a": float("inf")}, {(1, 2): 3}, _endless()],
    ids=["object", "bytes", "nan", "inf", "tuple key", "endless"],
)  # fmt: skip
def test_what_json_can_not_hold_is_refused(frame: dict[str, Any]) -> None:
    """A frame with something in it that JSON does not have is a `ProtocolError` where it is written."""
    with pytest.raises(ProtocolError, match="can't be written as JSON"):
        encode(frame)


def test_too_deep_a_frame_is_refused() -> None:
    """Nesting beyond what can be written is a `ProtocolError`, not a crash of the recursion limit."""
    frame = _deep()
    try:
        with pytest.raises(ProtocolError, match="can't be written as JSON"):
            encode(frame)
    finally:
        while frame:  # taking it apart level by level; the interpreter would recurse
            frame = frame.pop("a")


# --- fuzz -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=5))
@example([struct.pack(">I", 3) + b"1e9"])
def test_random_bytes_raise_only_protocol_errors(pieces: list[bytes]) -> None:
    """Random bytes give frames, or a `ProtocolError`, and never another exception."""
    decoder = Decoder(max_frame_bytes=1000)
    try:
        for piece in pieces:
            assert all(isinstance(frame, dict) for frame in decoder.feed(piece))
    except ProtocolError:
        return
    assert decoder.pending_bytes <= 1004


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40) | _VALUES.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_random_bodies_raise_only_protocol_errors(bodies: list[bytes]) -> None:
    """Well-formed lengths around random bytes or random JSON give frames, or a `ProtocolError`."""
    decoder = Decoder()
    for body in bodies:
        try:
            frames = decoder.feed(frame_of(body))
        except ProtocolError:
            return
        assert [type(frame) for frame in frames] == [dict]

"""Streams: buffers end to end, read from anywhere and where they lie."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import InvariantError
from ckptd.storage.addresses import address_of
from ckptd.storage.stream import Buffers, Stream, piece, stream_of


class _Endless:
    """Anything that has a size and can be read is a stream."""

    size_bytes = 10

    def read_into(self, offset: int, into: memoryview) -> None:
        into[:] = bytes(range(offset, offset + len(into)))


@given(st.lists(st.binary(max_size=20), max_size=8), st.data())
def test_buffers_read_like_one(parts: list[bytes], data: st.DataObject) -> None:
    """Any range of any buffers is what it would be if they were one, and nothing around it is written."""
    stream, whole = Buffers(parts), b"".join(parts)
    assert stream.size_bytes == len(whole)
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    room = memoryview(bytearray(b"#" * (end - begin + 2)))
    stream.read_into(begin, room[1:-1])
    assert room[1:-1] == whole[begin:end]
    assert (room[0], room[-1]) == (ord("#"), ord("#"))
    assert piece(stream, begin, end) == whole[begin:end]
    lying = stream.view(begin, end)
    assert lying is None or lying == whole[begin:end]


def test_a_view_is_the_buffer_itself() -> None:
    """Bytes that one buffer holds are not copied, those over a border can't be seen in place."""
    first, second = bytearray(b"01234"), bytearray(b"56789")
    stream = Buffers([memoryview(first), b"", memoryview(second)])
    for begin, end, owner, at in ((0, 5, first, 0), (1, 3, first, 1), (5, 10, second, 0), (7, 7, second, 2)):
        view = stream.view(begin, end)
        assert view is not None
        assert len(view) == end - begin
        if view:
            assert address_of(view) == address_of(memoryview(owner)) + at
        assert piece(stream, begin, end) == view
    assert stream.view(4, 6) is None
    assert piece(stream, 4, 6) == b"45"
    second[0] = ord("x")
    assert piece(stream, 4, 6) == b"4x"


@pytest.mark.parametrize("parts", [[], [b""], [b"", memoryview(b"")]])
def test_nothing_is_a_stream_too(parts: list[bytes | memoryview]) -> None:
    """No buffers, and buffers without bytes, are a stream of nothing."""
    stream = Buffers(parts)
    assert (stream.size_bytes, list(stream.parts), piece(stream, 0, 0)) == (0, [], b"")
    stream.read_into(0, memoryview(bytearray(0)))


def test_more_than_there_is_can_not_be_read() -> None:
    """A range outside the stream is a bug of the caller, not a read of other memory."""
    stream = Buffers([b"0123", b"4567"])
    for offset, count in ((0, 9), (8, 1), (-1, 1), (9, 0)):
        with pytest.raises(InvariantError):
            stream.read_into(offset, memoryview(bytearray(count)))


def test_buffers_of_any_item_are_bytes() -> None:
    """A view of larger items counts its bytes."""
    stream = Buffers([memoryview(bytearray(8)).cast("I"), b"x"])
    assert stream.size_bytes == 9
    assert piece(stream, 4, 9) == b"\0\0\0\0x"


def test_everything_that_is_put_becomes_a_stream() -> None:
    """One buffer, several, and a stream, which stays what it is."""
    endless = _Endless()
    assert stream_of(endless) is endless
    assert isinstance(endless, Stream)
    buffers = Buffers([b"ab"])
    assert stream_of(buffers) is buffers
    for data, wanted in ((b"ab", b"ab"), (memoryview(b"ab"), b"ab"), ([b"a", memoryview(b"b")], b"ab"), ((), b"")):
        stream = stream_of(data)
        assert piece(stream, 0, stream.size_bytes) == wanted
    assert piece(endless, 3, 6) == bytes((3, 4, 5))


def test_many_threads_read_at_once() -> None:
    """A stream can be read from anywhere by any thread, and other threads run while it copies."""
    parts = [bytes([number]) * 100_000 for number in range(20)]
    stream, whole, begun = Buffers(parts), b"".join(parts), threading.Barrier(8)

    def work(number: int) -> bool:
        begun.wait(10)
        return all(
            piece(stream, begin, begin + 150_000) == whole[begin : begin + 150_000]
            for begin in range(number * 1000, len(whole) - 150_000, 90_000)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))

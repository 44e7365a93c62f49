"""What the engine draws its bytes from: parts of a stream, lent where they lie or read into memory that goes round."""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Iterator

from ckptd.storage.stream import Buffers, Stream
from ckptd.storage.tier import Pace

_LET_GO_DEADLINE_S = 30.0
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Waiting:
    """A pace, and how long it has kept us waiting."""

    def __init__(self, pace: Pace | None) -> None:
        self._pace = pace
        self.seconds = 0.0

    def __call__(self, size_bytes: int) -> None:
        """Wait until so many bytes may be moved."""
        if self._pace is not None:
            begin_s = time.monotonic()
            self._pace(size_bytes)
            self.seconds += time.monotonic() - begin_s


class Parts:
    """An iterator over the parts of a stream, for one put.

    The engine asks for a part when it has room in flight for one, holds on to its memory while it is sent, and copies
    nothing. So a part that one buffer holds is lent, any other is read into a room of our own, which is used again as
    soon as the engine has let go of it: a memoryview tells, since it can't be released before.
    """

    def __init__(self, stream: Stream, part_bytes: int, pace: Pace) -> None:
        self._stream = stream
        self._part_bytes = part_bytes
        self._pace = pace
        self._at = 0
        self._lent: deque[tuple[memoryview, mmap.mmap | None]] = deque()
        self.error: BaseException | None = None
        """What reading the stream raised; the engine would say something else when its clean-up fails as well."""

    @property
    def size_bytes(self) -> int:
        """How many bytes all parts have."""
        return self._stream.size_bytes

    def __iter__(self) -> Iterator[memoryview]:
        """Return itself."""
        return self

    def __next__(self) -> memoryview:
        """Return the next part."""
        begin, end = self._at, min(self._at + self._part_bytes, self._stream.size_bytes)
        if begin == end:
            raise StopIteration
        try:
            self._pace(end - begin)
            part, room = self._part(begin, end)
        except BaseException as error:
            self.error = error
            raise
        self._at = end
        self._lent.append((part, room))
        return part

    def _part(self, begin: int, end: int) -> tuple[memoryview, mmap.mmap | None]:
        lying = self._stream.view(begin, end) if isinstance(self._stream, Buffers) else None
        if lying is not None:
            return lying, None
        room = self._free_room() or mmap.mmap(-1, self._part_bytes, _PRIVATE)  # whole pages, as O_DIRECT wants them
        part = memoryview(room)[: end - begin]
        self._stream.read_into(begin, part)
        return part, room

    def _free_room(self) -> mmap.mmap | None:
        """Return memory of a part that was sent; parts are not always over in their order."""
        for _ in range(len(self._lent)):
            part, room = self._lent.popleft()
            if not _let_go(part):
                self._lent.append((part, room))
            elif room is not None:
                return room
        return None

    def settle(self) -> None:
        """Wait until the engine holds nothing any more: it may after a failure, and the bytes are their owner's."""
        deadline_s = time.monotonic() + _LET_GO_DEADLINE_S
        while self._lent and time.monotonic() < deadline_s:
            if _let_go(self._lent[0][0]):
                self._lent.popleft()
            else:
                time.sleep(0.001)


def _let_go(part: memoryview) -> bool:
    try:
        part.release()
    except BufferError:
        return False
    return True

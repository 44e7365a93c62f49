"""The reading engine: brings the wanted bytes of many tensors to where they belong, each leaf checked on its way.

A request is a stretch of a file with all leaves in it that are wanted, small gaps included, so ten thousand small
tensors that lie side by side cost a few dozen requests. Threads serve the requests; all the heavy calls of a thread
(reading, copying, digesting) release the GIL. Small leaves of a request are checked and copied in whole lists: one by
one, ten thousand of them would spend more time in the interpreter than in memory.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import repeat
from operator import add, itemgetter, sub
from typing import NamedTuple

import xxhash

from ckptd.errors import DamagedError, invariant
from ckptd.storage import flight
from ckptd.storage.addresses import view_at
from ckptd.storage.digest import LEAF_BYTES, digest
from ckptd.storage.manifest import Chunk
from ckptd.storage.source import REQUEST_BYTES, Place, Reader, Source, open_source

_GAP_BYTES = 64 * 2**10
"""A gap that is read rather than skipped: reading it costs less than a request of its own."""
_BLOCK_BYTES = 256 * 2**10
"""How much is copied before it is digested: it is still in the core's own cache then, which costs a sixth of digesting
it from memory. Measured with 128 KiB to 4 MiB; this is the fastest."""

_SMALL_BYTES = 64 * 2**10
"""Leaves up to this size are looked at in lists. A copy of one is over before another thread could have the GIL."""

_BEGIN = itemgetter(0)
_move_small = ctypes.PyDLL(None).memmove  # which keeps the GIL: letting go of it takes as long as a small copy
_move_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_small.restype = None


class Want(NamedTuple):
    """A range of a chunk's bytes, and where it belongs."""

    tensor: str
    """Its name, for errors."""
    chunk: Chunk
    begin: int
    end: int
    """Relative to the chunk's first byte."""
    into: int | Callable[[int, memoryview], None]
    """The address in main memory of byte `begin`; or a function that gets every byte of the range exactly once, in
    parts: the offset relative to the chunk's first byte, and the bytes. It is called from any thread, with bytes that
    were checked, and the view is valid only during the call."""


_Leaf = tuple[int, int, str | None, int | None, Want]
"""Where a leaf begins and ends in the file, its digest, and the address that its first byte belongs to, which is None
unless all of it goes to memory. A plain tuple: making ten thousand of any class takes longer than reading them."""


class _Request(NamedTuple):
    source: Source
    begin: int
    end: int
    leaves: list[_Leaf]


def read(wants: Sequence[Want], files: Mapping[str, int], *, threads: int, direct: bool) -> None:
    """Read all wanted bytes to where they belong, and check every leaf of which any is wanted.

    `files` are descriptors by the name that chunks use. With `direct` files on disk are read past the page cache
    where that is possible. Raises `DamagedError` that names the tensor and the file, when bytes are not what was
    stored or the file ends too early, and `StoreError` when they can't be read; what was delivered until then is of
    no use. When it returns or raises, no thread touches anything any more.
    """
    with ExitStack() as stack:
        requests: list[_Request] = []
        for file, leaves in _by_file(wants).items():
            source = stack.enter_context(open_source(file, files[file], direct=direct))
            requests += _requests(source, leaves)
        flight.run(requests, _serving, threads)


def _by_file(wants: Iterable[Want]) -> dict[str, list[_Leaf]]:
    found: dict[str, list[_Leaf]] = {}
    for want in wants:
        _, chunk, begin, end, into = want
        _, _, _, _, _, file, first, last, stored, _ = chunk
        size_bytes = last - first
        if not 0 <= begin < end <= size_bytes:
            invariant(0 <= begin == end <= size_bytes, "what is wanted lies in the chunk")
            continue
        leaves = found.get(file)
        if leaves is None:
            leaves = found[file] = []
        if size_bytes > LEAF_BYTES:
            leaves.extend(_touched(want, size_bytes))
        else:
            target = into if end - begin == size_bytes and isinstance(into, int) else None
            leaves.append((first, last, stored, target, want))
    return found


def _touched(want: Want, size_bytes: int) -> Iterator[_Leaf]:
    """Yield the leaves of a large chunk in which something is wanted."""
    tensor, chunk, wanted_begin, wanted_end, into = want
    if chunk.digest is not None and len(chunk.leaves) != -(-size_bytes // LEAF_BYTES):
        raise DamagedError(f"the manifest has no digests of the leaves of tensor {tensor!r} in {chunk.file}")
    for number in range(wanted_begin // LEAF_BYTES, -(-wanted_end // LEAF_BYTES)):
        begin = number * LEAF_BYTES
        end = min(begin + LEAF_BYTES, size_bytes)
        stored = chunk.leaves[number] if chunk.digest is not None else None
        whole = wanted_begin <= begin and end <= wanted_end
        target = into + begin - wanted_begin if whole and isinstance(into, int) else None
        yield chunk.begin + begin, chunk.begin + end, stored, target, want


def _requests(source: Source, leaves: list[_Leaf]) -> Iterator[_Request]:
    """Put leaves that lie close together into one request."""
    leaves.sort(key=_BEGIN)
    begin = end = 0
    group: list[_Leaf] = []
    for leaf in leaves:
        first, last = leaf[0], leaf[1]
        if group and (first > end + _GAP_BYTES or last > begin + REQUEST_BYTES):
            yield _Request(source, begin, end, group)
            group = []
        if not group:
            begin = end = first
        group.append(leaf)
        end = max(end, last)
    if group:
        yield _Request(source, begin, end, group)


def _serving() -> Callable[[_Request], None]:
    """Return what one thread does with each request."""
    reader = Reader()

    def serve(request: _Request) -> None:
        source, begin, end, leaves = request
        place = reader.read(source, begin, end, leaves[0][3] if len(leaves) == 1 else None)
        if place.end < end:
            short = next(leaf for leaf in leaves if leaf[1] > place.end)
            raise _damaged(short, f"the file ends at byte {os.fstat(source.descriptor).st_size}")
        origin = place.address - begin
        if len(leaves) > 1:
            leaves = _take_small(place, origin, leaves)
        checked: tuple[int, int, str | None] | None = None
        for leaf in leaves:
            first, last, stored, target, _ = leaf
            unchecked = stored is not None and checked != (first, last, stored)
            address = origin + first
            if unchecked and last - first > _BLOCK_BYTES and target is not None and target != address:
                _copy_checked(leaf, address, target)
            else:
                view = place.view[first - place.begin : last - place.begin]
                if unchecked and digest(view) != stored:
                    raise _differs(leaf)
                if target is None:
                    _deliver(leaf, address, view)
                elif target != address:
                    ctypes.memmove(target, address, last - first)
            checked = (first, last, stored)

    return serve


def _take_small(place: Place, origin: int, leaves: list[_Leaf]) -> list[_Leaf]:
    """Check and copy the leaves that are small and go to memory whole; returns the others."""
    small = [leaf for leaf in leaves if leaf[1] - leaf[0] <= _SMALL_BYTES and leaf[3] is not None]
    if not small:
        return leaves
    begins, ends, stored, targets, _ = zip(*small, strict=True)
    if any(stored):
        at = map(slice, map(sub, begins, repeat(place.begin)), map(sub, ends, repeat(place.begin)))
        found = tuple(map(digest, map(place.view.__getitem__, at)))
        if found != stored:
            for leaf, value in zip(small, found, strict=True):
                if leaf[2] not in (None, value):
                    raise _differs(leaf)
    deque(map(_move_small, targets, map(add, begins, repeat(origin)), map(sub, ends, begins)), maxlen=0)
    if len(small) == len(leaves):
        return []
    return [leaf for leaf in leaves if leaf[1] - leaf[0] > _SMALL_BYTES or leaf[3] is None]


def _copy_checked(leaf: _Leaf, source: int, target: int) -> None:
    """Copy a leaf in blocks, each digested while it is in the core's cache."""
    begin, end, stored, _, _ = leaf
    view = view_at(target, end - begin)
    state = xxhash.xxh3_128()
    for at in range(0, end - begin, _BLOCK_BYTES):
        block = view[at : at + _BLOCK_BYTES]
        ctypes.memmove(target + at, source + at, len(block))
        state.update(block)
    if state.hexdigest() != stored:
        raise _differs(leaf)


def _deliver(leaf: _Leaf, address: int, view: memoryview) -> None:
    """Hand over what is wanted of a leaf whose bytes are `view`, at `address`, when that is not all of it to memory."""
    first, last, _, _, (_, chunk, wanted_begin, wanted_end, into) = leaf
    start = first - chunk.begin
    begin, end = max(wanted_begin - start, 0), min(wanted_end - start, last - first)
    if isinstance(into, int):
        ctypes.memmove(into + start + begin - wanted_begin, address + begin, end - begin)
    else:
        into(start + begin, view[begin:end])


def _differs(leaf: _Leaf) -> DamagedError:
    return _damaged(leaf, f"bytes {leaf[0]} to {leaf[1]} are not what was stored (their digest differs)")


def _damaged(leaf: _Leaf, how: str) -> DamagedError:
    want = leaf[4]
    return DamagedError(
        f"tensor {want.tensor!r} in {want.chunk.file} is damaged: {how}",
        hint="`ckptctl verify` names everything that is damaged",
    )

"""The reading engine: brings the wanted bytes of many tensors to where they belong, each leaf checked on its way.

A request is a stretch of a file with all leaves in it that are wanted, small gaps included, so ten thousand small
tensors that lie side by side cost a few hundred requests. Threads serve the requests; all the heavy calls of a
thread (reading, copying, digesting) release the GIL.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import xxhash

from ckptd.errors import DamagedError, invariant
from ckptd.storage import flight
from ckptd.storage.digest import LEAF_BYTES, digest
from ckptd.storage.direct import view_at
from ckptd.storage.manifest import Chunk
from ckptd.storage.source import REQUEST_BYTES, Reader, Source, open_source

_GAP_BYTES = 64 * 2**10
"""A gap that is read rather than skipped: reading it costs less than a request of its own."""
_BLOCK_BYTES = 256 * 2**10
"""How much is copied before it is digested: it is still in the core's own cache then, which costs a sixth of digesting
it from memory. Measured with 128 KiB to 4 MiB; this is the fastest."""

_PLACE = itemgetter(0, 1)


@dataclass(slots=True)
class Want:
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


class _Leaf(NamedTuple):
    begin: int
    end: int
    """In the file."""
    digest: str | None
    want: Want


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
        chunk, begin, end = want.chunk, want.begin, want.end
        size_bytes = chunk.end - chunk.begin
        invariant(0 <= begin <= end <= size_bytes, "what is wanted lies in the chunk")
        if begin == end:
            continue
        leaves = found.get(chunk.file)
        if leaves is None:
            leaves = found[chunk.file] = []
        if size_bytes <= LEAF_BYTES:
            leaves.append(_Leaf(chunk.begin, chunk.end, chunk.digest, want))
        else:
            leaves.extend(_touched(want, size_bytes))
    return found


def _touched(want: Want, size_bytes: int) -> Iterator[_Leaf]:
    """Yield the leaves of a large chunk in which something is wanted."""
    chunk = want.chunk
    if chunk.digest is not None and len(chunk.leaves) != -(-size_bytes // LEAF_BYTES):
        raise DamagedError(f"the manifest has no digests of the leaves of tensor {want.tensor!r} in {chunk.file}")
    for number in range(want.begin // LEAF_BYTES, -(-want.end // LEAF_BYTES)):
        begin = chunk.begin + number * LEAF_BYTES
        digests = chunk.leaves[number] if chunk.digest is not None else None
        yield _Leaf(begin, min(begin + LEAF_BYTES, chunk.end), digests, want)


def _requests(source: Source, leaves: list[_Leaf]) -> Iterator[_Request]:
    """Put leaves that lie close together into one request."""
    leaves.sort(key=_PLACE)
    begin = end = 0
    group: list[_Leaf] = []
    for leaf in leaves:
        if group and (leaf[0] > end + _GAP_BYTES or leaf[1] > begin + REQUEST_BYTES):
            yield _Request(source, begin, end, group)
            group = []
        if not group:
            begin = end = leaf[0]
        group.append(leaf)
        end = max(end, leaf[1])
    if group:
        yield _Request(source, begin, end, group)


def _serving() -> Callable[[_Request], None]:
    """Return what one thread does with each request."""
    reader = Reader()

    def serve(request: _Request) -> None:
        source, begin, end, leaves = request
        place = reader.read(source, begin, end, _whole(leaves[0]) if len(leaves) == 1 else None)
        if place.end < end:
            short = next(leaf for leaf in leaves if leaf.end > place.end)
            raise _damaged(short, f"the file ends at byte {os.fstat(source.descriptor).st_size}")
        checked: tuple[int, int, str | None] | None = None
        for leaf in leaves:
            first, last, stored, _ = leaf
            unchecked = stored is not None and checked != (first, last, stored)
            address, target = place.address + first - begin, _whole(leaf)
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


def _whole(leaf: _Leaf) -> int | None:
    """Return the address that the leaf's first byte belongs to, if all of it goes to memory; None otherwise."""
    want = leaf.want
    start, origin = leaf.begin - want.chunk.begin, want.begin
    if isinstance(want.into, int) and origin <= start and leaf.end - want.chunk.begin <= want.end:
        return want.into + start - origin
    return None


def _copy_checked(leaf: _Leaf, source: int, target: int) -> None:
    """Copy a leaf in blocks, each digested while it is in the core's cache."""
    size_bytes = leaf.end - leaf.begin
    view = view_at(target, size_bytes)
    state = xxhash.xxh3_128()
    for at in range(0, size_bytes, _BLOCK_BYTES):
        block = view[at : at + _BLOCK_BYTES]
        ctypes.memmove(target + at, source + at, len(block))
        state.update(block)
    if state.hexdigest() != leaf.digest:
        raise _differs(leaf)


def _deliver(leaf: _Leaf, address: int, view: memoryview) -> None:
    """Hand over what is wanted of a leaf whose bytes are `view`, at `address`, when that is not all of it to memory."""
    want = leaf.want
    start = leaf.begin - want.chunk.begin
    begin, end = max(want.begin - start, 0), min(want.end - start, leaf.end - leaf.begin)
    if isinstance(want.into, int):
        ctypes.memmove(want.into + start + begin - want.begin, address + begin, end - begin)
    else:
        want.into(start + begin, view[begin:end])


def _differs(leaf: _Leaf) -> DamagedError:
    return _damaged(leaf, f"bytes {leaf.begin} to {leaf.end} are not what was stored (their digest differs)")


def _damaged(leaf: _Leaf, how: str) -> DamagedError:
    return DamagedError(
        f"tensor {leaf.want.tensor!r} in {leaf.want.chunk.file} is damaged: {how}",
        hint="`ckptctl verify` names everything that is damaged",
    )

"""Tensors in one piece: what a checkpoint comes to when the ranks' parts are put together, and how that is done.

Memory is bounded: each file of the store is read once, in order, leaf by leaf, and each leaf is checked before it is
written where it belongs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from ckptd.storage.boxes import Shape, runs
from ckptd.storage.image import ITEM_BYTES, VALUES_NAME
from ckptd.storage.manifest import JOB, Chunk, Manifest
from ckptd.storage.ranges import RangeReader, read_checked
from ckptd.storage.tier import Tier


class Whole(NamedTuple):
    """A tensor in one piece, and the chunks that make it up."""

    name: str
    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]
    rank: int | None = None
    """Whose it is; None for a tensor of the job, and for one that all ranks have alike."""

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)


class Move(NamedTuple):
    """A chunk, and where it goes: into the tensor `whole`, which begins at byte `begin` of a file that is there."""

    chunk: Chunk
    path: Path
    begin: int
    whole: Whole


def wholes(loaded: Manifest) -> Iterator[Whole]:
    """Yield the tensors of a checkpoint in one piece: each once, or for each rank that has it when those differ.

    The values, which are no tensor, are left out.
    """
    for tensor in loaded.tensors.values():
        if tensor.name == VALUES_NAME:
            continue
        chunks, first = tensor.chunks, tensor.chunks[0]
        looks = {(chunk.dtype, chunk.shape, chunk.digest) for chunk in chunks}
        if tensor.placement == JOB:
            yield Whole(tensor.name, first.dtype, tensor.shape or (), chunks)
        elif len(looks) == 1 and len(chunks) == loaded.world_size:
            yield Whole(tensor.name, first.dtype, first.shape, chunks[:1])
        else:
            for chunk in chunks:
                yield Whole(tensor.name, chunk.dtype, chunk.shape, (chunk,), chunk.shard)


def moves(whole: Whole, path: Path, begin: int) -> Iterator[Move]:
    """Yield what has to be moved for a tensor to begin at byte `begin` of a file."""
    for chunk in whole.chunks:
        yield Move(chunk, path, begin, whole)


def put_together(tier: Tier, job: str, needed: Iterable[Move]) -> None:
    """Make all moves; raises `DamagedError` or `NotFoundError` when bytes are not what was committed.

    One file is open at a time: there may be several for each rank, and more than a process may have open.
    """
    by_file: dict[str, list[Move]] = {}
    for move in needed:
        by_file.setdefault(move.chunk.file, []).append(move)
    for file, of_file in sorted(by_file.items()):
        reader = RangeReader(tier, f"{job}/{file}")
        for move in sorted(of_file, key=lambda move: move.chunk.begin):
            _make(reader, move)


def _make(reader: RangeReader, move: Move) -> None:
    descriptor = os.open(move.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _copy(reader, move, descriptor)
    finally:
        os.close(descriptor)


def _copy(reader: RangeReader, move: Move, descriptor: int) -> None:
    """Copy a chunk's bytes to where its elements lie in the whole tensor."""
    chunk, item_bytes = move.chunk, ITEM_BYTES[move.whole.dtype]
    places = runs(move.whole.shape, chunk.offset, chunk.shape)
    at = left = 0  # of the run under way: where it goes on, and its bytes that are still to come
    for leaf in read_checked(reader, chunk, move.whole.name):
        done = 0
        while done < len(leaf):
            if not left:
                first, count = next(places)
                at, left = move.begin + first * item_bytes, count * item_bytes
            part = leaf[done : done + left]
            write_at(descriptor, part, at)
            at, left, done = at + len(part), left - len(part), done + len(part)


def write_at(descriptor: int, data: memoryview, at: int) -> None:
    """Write all of `data` at byte `at` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)

"""Putting bytes of a stored box where a tensor keeps them, for tensors that are not simply contiguous in main memory.

Bytes arrive in any order, a leaf or less at a time, from several threads. torch shares copies of more than
`_SERIAL_ELEMENTS` with the threads of OpenMP, of which each of our threads would get a team of its own: copies stay
below.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from ckptd.storage.boxes import Box, Shape, intersect

_SERIAL_ELEMENTS = 32_767
_STAGING_BYTES = 4 * 2**20


class Scatter:
    """Copies what it is called with into `target`, which is the box `part` of a chunk of the shape `chunk_shape`."""

    def __init__(self, target: Tensor, chunk_shape: Shape, part: Box) -> None:
        self._target = target
        self._chunk_shape = chunk_shape
        self._part = part

    def __call__(self, offset: int, data: memoryview) -> None:
        """Copy those of the chunk's bytes from `offset` on that lie in the part; the others are gaps."""
        dtype = self._target.dtype
        elements = torch.frombuffer(data, dtype=dtype)
        first = offset // dtype.itemsize
        for box, begin in boxes_between(self._chunk_shape, first, first + len(elements)):
            shared = intersect(*box, *self._part)
            if shared is not None:
                at = begin - first
                source = elements[at : at + prod(box.shape)].view(box.shape)
                _copy(_narrow(self._target, self._part, shared), _narrow(source, box, shared))


def boxes_between(shape: Shape, begin: int, end: int) -> Iterator[tuple[Box, int]]:
    """Cut the elements [begin, end) of a row-major tensor into boxes, each with the number of its first element.

    There are few: the rest of a row, the whole rows, the start of a row, and the same within each of both rows.
    """
    if begin >= end:
        return
    if not shape:
        yield Box((), ()), 0
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:
        yield from _within_row(shape, first - 1, begin, end)
        return
    yield from _within_row(shape, first - 1, begin, first * row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])), first * row
    yield from _within_row(shape, last, last * row, end)


def _within_row(shape: Shape, index: int, begin: int, end: int) -> Iterator[tuple[Box, int]]:
    at = index * prod(shape[1:])
    for box, first in boxes_between(shape[1:], begin - at, end - at):
        yield Box((index, *box.offset), (1, *box.shape)), at + first


def _narrow(tensor: Tensor, box: Box, part: Box) -> Tensor:
    """Return the view of `part` in a tensor that is `box`, both seen from the same corner."""
    for dim, (at, size) in enumerate(zip(part.offset, part.shape, strict=True)):
        if size != box.shape[dim]:
            tensor = tensor.narrow(dim, at - box.offset[dim], size)
    return tensor


def _copy(target: Tensor, source: Tensor) -> None:
    if target.is_cuda:
        _STAGING.upload(target, source)
    else:
        for into, piece in _pieces(target, source, _SERIAL_ELEMENTS):
            into.copy_(piece)


def _pieces(target: Tensor, source: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut two tensors of one shape alike, into pieces of at most `limit` elements."""
    count = target.numel()
    if count <= limit:
        yield target, source
        return
    dim = next(dim for dim, size in enumerate(target.shape) if size > 1)
    rows = max(1, limit * target.shape[dim] // count)
    for begin in range(0, target.shape[dim], rows):
        size = min(rows, target.shape[dim] - begin)
        yield from _pieces(target.narrow(dim, begin, size), source.narrow(dim, begin, size), limit)


class _Staging(threading.local):
    """A thread's two page-locked buffers: one is filled while the device reads the other."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Any]] = []

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy into a tensor on a CUDA device; done when the device's stream is."""
        stream: Any = torch.cuda.current_stream(target.device)
        for into, piece in _pieces(target, source, _STAGING_BYTES // target.dtype.itemsize):
            buffer, event = self._take()
            event.synchronize()
            staged = buffer[: piece.numel() * piece.dtype.itemsize].view(piece.dtype).view(piece.shape)
            for stage, part in _pieces(staged, piece, _SERIAL_ELEMENTS):
                stage.copy_(part)
            into.copy_(staged, non_blocking=True)
            event.record(stream)

    def _take(self) -> tuple[Tensor, Any]:
        if not self._buffers:
            cuda: Any = torch.cuda
            self._buffers = [
                (torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=True), cuda.Event()) for _ in range(2)
            ]
        self._buffers.reverse()
        return self._buffers[0]


_STAGING = _Staging()

"""Which bytes of a checkpoint's chunks go where in a tensor: the plan of a restore, as `Want`s of the reading engine.

Bytes that lie one after another on both sides are wanted at an address, so the engine puts them straight into the
tensor. The rest (columns of a matrix, other memory orders, other devices) is handed to a `Scatter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import prod

from torch import Tensor

from ckptd.errors import DamagedError
from ckptd.storage.boxes import Box, Shape, intersect, runs
from ckptd.storage.manifest import Chunk
from ckptd.storage.reading import Want
from ckptd_integrations.torch.local_boxes import LocalBox
from ckptd_integrations.torch.scattering import Scatter

GAP_BYTES = 64 * 1024
"""Reading through a gap smaller than this is cheaper than another request; runs at least so long get an address."""


def whole(shape: Shape) -> tuple[LocalBox, ...]:
    """Return the boxes of a tensor that is all here."""
    start = (0,) * len(shape)
    return (LocalBox(start, start, shape),) if all(shape) else ()


def transfers(name: str, chunks: Sequence[Chunk], target: Tensor, boxes: Iterable[LocalBox]) -> Iterator[Want]:
    """Yield what has to be read so that `boxes` of the tensor `name` end up in `target`, the local tensor.

    `target` has the dtype of the chunks. Raises `DamagedError` when the chunks don't cover a box.
    """
    target, boxes = _once(target, boxes)
    in_order = target.is_cpu and target.is_contiguous()
    for box in boxes:
        missing = prod(box.shape)
        for chunk in chunks:
            part = intersect(chunk.offset, chunk.shape, box.global_offset, box.shape)
            if part is not None:
                missing -= prod(part.shape)
                in_chunk = Box(_minus(part.offset, chunk.offset), part.shape)
                at = tuple(map(sum, zip(part.offset, _minus(box.local_offset, box.global_offset), strict=True)))
                yield from _transfer(name, chunk, in_chunk, target, at, in_order=in_order)
        if missing:
            raise DamagedError(
                f"the chunks of tensor {name!r} do not make up the whole",
                hint="restore from another copy or an earlier checkpoint",
            )


def _transfer(name: str, chunk: Chunk, part: Box, target: Tensor, at: Shape, *, in_order: bool) -> Iterator[Want]:
    item = target.dtype.itemsize
    if in_order:
        stored = runs(chunk.shape, part.offset, part.shape)
        placed = runs(tuple(target.shape), at, part.shape)
        first, again = next(stored), next(placed)
        count = min(first[1], again[1])
        if count * item >= GAP_BYTES or count == prod(part.shape):
            base = target.data_ptr()
            pairs = zip(_cut(first, stored, count), _cut(again, placed, count), strict=True)
            for begin, place in pairs:
                yield Want(name, chunk, begin * item, (begin + count) * item, base + place * item)
            return
    view = target.detach()
    for dim, (begin, size) in enumerate(zip(at, part.shape, strict=True)):
        view = view.narrow(dim, begin, size)
    scatter = Scatter(view, chunk.shape, part)
    for begin, end in spans(chunk.shape, part, GAP_BYTES // item):
        yield Want(name, chunk, begin * item, end * item, scatter)


def _cut(first: tuple[int, int], others: Iterable[tuple[int, int]], count: int) -> Iterator[int]:
    """Cut runs, all as long as the first, into pieces of `count` elements; yields where each begins."""
    for begin, size in (first, *others):
        yield from range(begin, begin + size, count)


def spans(shape: Shape, box: Box, gap: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of elements of a row-major tensor that cover a box, through all gaps shorter than `gap`."""
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    size, outer = 1, len(shape)
    while outer and (box.shape[outer - 1] == 1 or strides[outer - 1] - size < gap):
        outer -= 1
        size += (box.shape[outer] - 1) * strides[outer]
    first = sum(begin * stride for begin, stride in zip(box.offset, strides, strict=True))
    steps = (range(0, count * stride, stride) for count, stride in zip(box.shape[:outer], strides, strict=False))
    for step in product(*steps):
        begin = first + sum(step)
        yield begin, begin + size


def _once(target: Tensor, boxes: Iterable[LocalBox]) -> tuple[Tensor, list[LocalBox]]:
    """Return a view and its boxes in which each element lies once: an expanded tensor has one where it shows many."""
    boxes = list(boxes)
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:
            target = target.detach().narrow(dim, 0, 1)
            boxes = [
                box._replace(shape=(*box.shape[:dim], 1, *box.shape[dim + 1 :]))
                for box in boxes
                if box.local_offset[dim] == 0
            ]
    return target, boxes


def _minus(left: Shape, right: Shape) -> Shape:
    return tuple(a - b for a, b in zip(left, right, strict=True))

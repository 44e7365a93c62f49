"""Boxes of tensors: which part two of them share, and where a part's elements lie in a row-major tensor.

A box begins at `offset` and is of `shape`, one number per dimension of its tensor. A tensor of no dimension is one
element, and so is the only box of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A part of a tensor."""

    offset: Shape
    shape: Shape


def intersect(offset_a: Shape, shape_a: Shape, offset_b: Shape, shape_b: Shape) -> Box | None:
    """Return the box that two boxes of one tensor share; None when they share no element."""
    offset = tuple(map(max, offset_a, offset_b))
    ends = [
        min(at_a + size_a, at_b + size_b)
        for at_a, size_a, at_b, size_b in zip(offset_a, shape_a, offset_b, shape_b, strict=True)
    ]
    shape = tuple(end - begin for begin, end in zip(offset, ends, strict=True))
    return Box(offset, shape) if all(size > 0 for size in shape) else None


def runs(shape: Shape, offset: Shape, box_shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield (first element, number of elements) of each contiguous run of a box in a row-major tensor of `shape`.

    Runs come in the row-major order of the box, so they are also the box's own elements one after another; dimensions
    that the box covers whole make runs longer, not more.
    """
    if not all(box_shape):
        return
    strides = [prod(shape[at + 1 :]) for at in range(len(shape))]
    first = sum(begin * stride for begin, stride in zip(offset, strides, strict=True))
    split = len(shape)
    while split and box_shape[split - 1] == shape[split - 1]:
        split -= 1
    outer = max(split - 1, 0)  # the dimensions before `split - 1` are stepped through, those from it on are one run
    count = prod(box_shape[outer:])
    for steps in product(
        *(range(0, size * stride, stride) for size, stride in zip(box_shape[:outer], strides, strict=False))
    ):
        yield first + sum(steps), count

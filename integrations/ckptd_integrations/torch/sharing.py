"""Who captures what of tensors that several ranks hold alike: each computes the same answer, and none asks another.

The tensors are laid end to end in the order of their names and cut into as many parts of the same size as there are
ranks. Nothing but names, shapes and element sizes counts, which are the same on all of them. A tensor that a cut goes
through is cut between two rows of its first dimension that has any, so that every part is a box and lies contiguous in
a contiguous tensor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

SLACK = 64
"""A cut so close to a tensor's edge, as a fraction of a rank's share, goes to the edge: a few bytes more for one rank
are nothing beside a chunk more in the manifest."""


class Shareable(NamedTuple):
    """A tensor, or a box of one, that several ranks hold alike; names differ."""

    name: str
    shape: tuple[int, ...]
    item_bytes: int

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements."""
        return self.item_bytes * prod(self.shape)


class Rows(NamedTuple):
    """What one rank captures of a tensor: indexes from `begin` to `end` of its dimension `split_dim`."""

    number: int
    """Which of the tensors."""
    begin: int
    end: int


class _Cut(NamedTuple):
    position: int
    """In the order of names."""
    row: int


def split_dim(shape: Sequence[int]) -> int | None:
    """Return the dimension along which a tensor is cut, None when it is a single element."""
    return next((dim for dim, size in enumerate(shape) if size > 1), None)


def share_out(tensors: Sequence[Shareable], ranks: int, rank: int) -> list[Rows]:
    """Return what `rank` of `ranks` captures; all ranks together capture every element once."""
    order = sorted(range(len(tensors)), key=lambda index: tensors[index].name)
    ordered = [tensors[index] for index in order]
    begins = [0, *accumulate(tensor.size_bytes for tensor in ordered)]
    total_bytes = begins[-1]
    slack_bytes = total_bytes // ranks // SLACK
    first = _cut(ordered, begins, total_bytes * rank // ranks, slack_bytes)
    last = _cut(ordered, begins, total_bytes * (rank + 1) // ranks, slack_bytes)
    return [Rows(order[position], begin, end) for position, begin, end in _between(ordered, first, last)]


def _cut(ordered: Sequence[Shareable], begins: Sequence[int], at: int, slack_bytes: int) -> _Cut:
    position = bisect_right(begins, at) - 1
    if position == len(ordered):
        return _Cut(position, 0)
    tensor = ordered[position]
    before, after = at - begins[position], begins[position + 1] - at
    if before <= slack_bytes:
        return _Cut(position, 0)
    if after <= slack_bytes:
        return _Cut(position + 1, 0)
    rows = _rows(tensor)
    row_bytes = tensor.size_bytes // rows
    row = (2 * before + row_bytes) // (2 * row_bytes)  # the nearest
    return _Cut(position + 1, 0) if row == rows else _Cut(position, row)


def _between(ordered: Sequence[Shareable], first: _Cut, last: _Cut) -> Iterator[tuple[int, int, int]]:
    for position in range(first.position, min(last.position + 1, len(ordered))):
        begin = first.row if position == first.position else 0
        end = last.row if position == last.position else _rows(ordered[position])
        if begin < end and ordered[position].size_bytes:
            yield position, begin, end


def _rows(tensor: Shareable) -> int:
    dim = split_dim(tensor.shape)
    return 1 if dim is None else tensor.shape[dim]


def window(step: int, total_bytes: int, window_bytes: int) -> tuple[int, int]:
    """Return from where to where the witness of `step` looks at `total_bytes`: another place for each step."""
    mixed = (step + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF  # splitmix64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    begin = (mixed ^ mixed >> 31) % (max(0, total_bytes - window_bytes) + 1)
    return begin, min(total_bytes, begin + window_bytes)

"""Boxes of tensors, against brute force over every element."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.storage.boxes import Box, Shape, intersect, runs

_SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    """A box inside a tensor of `shape`, empty ones and whole ones included."""
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offset, tuple(draw(st.integers(0, size - begin)) for size, begin in zip(shape, offset, strict=True)))


def elements(box: Box) -> list[Shape]:
    """The indices of a box's elements, in row-major order."""
    return list(product(*(range(begin, begin + size) for begin, size in zip(box.offset, box.shape, strict=True))))


def flat(index: Shape, shape: Shape) -> int:
    """The place of an element in a row-major tensor."""
    return sum(at * prod(shape[dim + 1 :]) for dim, at in enumerate(index))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_intersection_is_what_both_have(data: st.DataObject) -> None:
    """Two boxes share exactly the elements that are in both, and None means that there are none."""
    shape = data.draw(_SHAPES)
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    shared = set(elements(a)) & set(elements(b))
    found = intersect(*a, *b)
    assert (set() if found is None else set(elements(found))) == shared
    assert (found is None) == (not shared)
    assert intersect(*b, *a) == found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_runs_are_the_elements_of_the_box(data: st.DataObject) -> None:
    """Runs give the box's elements in its own row-major order, each once, and no two runs could be one."""
    shape = data.draw(_SHAPES)
    box = data.draw(boxes_in(shape))
    found = list(runs(shape, *box))
    assert [first + at for first, count in found for at in range(count)] == [
        flat(index, shape) for index in elements(box)
    ]
    assert all(before + count < after for (before, count), (after, _) in pairwise(found))


@pytest.mark.parametrize(
    ("shape", "offset", "box", "wanted"),
    [
        ((), (), (), [(0, 1)]),
        ((4, 6), (0, 0), (4, 6), [(0, 24)]),
        ((4, 6), (1, 0), (2, 6), [(6, 12)]),
        ((4, 6), (1, 2), (2, 3), [(8, 3), (14, 3)]),
        ((4, 6), (1, 2), (0, 3), []),
        ((2, 3, 4), (1, 1, 0), (1, 2, 4), [(16, 8)]),
        ((10**6, 10**6), (7, 0), (10**6 - 7, 10**6), [(7 * 10**6, (10**6 - 7) * 10**6)]),
    ],
)
def test_known_runs(shape: Shape, offset: Shape, box: Shape, wanted: list[tuple[int, int]]) -> None:
    """Rows lie in one run, columns in one for each row, and the size of a tensor costs nothing."""
    assert list(runs(shape, offset, box)) == wanted

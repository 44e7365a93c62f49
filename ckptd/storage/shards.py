"""The images of a snapshot, entry by entry: what follows from their layouts alone, worked out once.

Layouts are mostly what they were at the last flush. So all that a flush does for each of 10,000 entries is done in C,
over whole columns of what is kept here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import compress, repeat
from operator import add, not_
from typing import NamedTuple

from ckptd.storage import image
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.image import VALUES_NAME, Layout
from ckptd.storage.manifest import ShardContent
from ckptd.storage.reuse import Content, Entry, kind
from ckptd.storage.template import Template
from ckptd.types import TensorSpan


class Leaves(NamedTuple):
    """The leaves of some entries of an image, in file order."""

    entries: Sequence[Entry]
    """Of each leaf its entry."""
    parts: Sequence[slice]
    """Of each leaf where it lies in the image."""
    several: Mapping[Entry, int]
    """The number of leaves of those entries that may have more than one."""

    def split(self, chosen: Collection[Entry]) -> tuple[Leaves, Leaves]:
        """Return the leaves of `chosen` entries, and those of all others."""
        is_chosen = list(map(chosen.__contains__, self.entries))
        return self._only(is_chosen), self._only(map(not_, is_chosen))

    def _only(self, wanted: Iterable[bool]) -> Leaves:
        wanted = list(wanted)
        return Leaves(list(compress(self.entries, wanted)), list(compress(self.parts, wanted)), self.several)


class Columns(NamedTuple):
    """The entries of an image whose bytes may also lie elsewhere: all but the values and what is empty."""

    entries: list[Entry]
    kinds: list[str]

    def contents(self, digests: Mapping[Entry, str]) -> dict[Entry, Content]:
        """Return what makes their bytes the same as others', of those entries that `digests` has."""
        found = list(map(digests.get, self.entries, repeat("")))
        return dict(compress(zip(self.entries, map(add, found, self.kinds), strict=True), found))


class Shards:
    """How the images of a snapshot are laid out, by rising rank."""

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self.layouts = layouts
        self.entries = {rank: [Entry(rank, span.name) for span in layout.spans] for rank, layout in layouts.items()}
        """Everything by rank, in file order."""
        self.spans: Mapping[Entry, TensorSpan] = {
            entry: span
            for rank, layout in layouts.items()
            for entry, span in zip(self.entries[rank], layout.spans, strict=True)
        }
        self.leaves = {rank: _leaves(self.entries[rank], layout) for rank, layout in layouts.items()}
        self.columns = {rank: _columns(self.entries[rank], layout) for rank, layout in layouts.items()}

    @cached_property
    def template(self) -> Template:
        """The text of manifests; raises `StateError` when the ranks' images don't fit together."""
        return Template(
            [
                ShardContent(rank, replace(layout, spans=layout.spans[:-1]), layout.image_bytes, None, {})
                for rank, layout in self.layouts.items()
            ]
        )

    def split_leaves(self, chosen: Collection[Entry]) -> tuple[Mapping[int, Leaves], Mapping[int, Leaves]]:
        """Return the leaves of `chosen` entries by rank, and those of all others."""
        if not chosen:
            return {}, self.leaves
        split = {rank: leaves.split(chosen) for rank, leaves in self.leaves.items()}
        return {rank: two[0] for rank, two in split.items()}, {rank: two[1] for rank, two in split.items()}

    def contents(self, digests: Mapping[Entry, str]) -> dict[Entry, Content]:
        """Return what can be compared, of those entries that `digests` has."""
        found: dict[Entry, Content] = {}
        for columns in self.columns.values():
            found |= columns.contents(digests)
        return found


def shards_of(images: Mapping[int, memoryview], before: Shards) -> Shards:
    """Return the shards of images; what is still as it was `before` is not read again."""
    layouts = {rank: _layout(data, before.layouts.get(rank)) for rank, data in sorted(images.items())}
    if layouts.keys() == before.layouts.keys() and all(layouts[rank] is before.layouts[rank] for rank in layouts):
        return before
    return Shards(layouts)


def _layout(data: memoryview, before: Layout | None) -> Layout:
    if before is None or len(data) < before.image_bytes or bytes(data[: len(before.header)]) != before.header:
        return image.parse(data)
    return before


def _leaves(entries: Sequence[Entry], layout: Layout) -> Leaves:
    several: dict[Entry, int] = {}
    owners: list[Entry] = []
    parts: list[slice] = []
    for entry, span in zip(entries, layout.spans, strict=True):
        begins = range(span.begin, span.end, LEAF_BYTES) or [span.begin]
        owners += [entry] * len(begins)
        parts += [slice(begin, min(begin + LEAF_BYTES, span.end)) for begin in begins]
        if len(begins) > 1:
            several[entry] = len(begins)
    return Leaves(owners, parts, several)


def _columns(entries: Sequence[Entry], layout: Layout) -> Columns:
    columns = Columns([], [])
    for entry, span in zip(entries, layout.spans, strict=True):
        if span.end > span.begin and span.name != VALUES_NAME:
            columns.entries.append(entry)
            columns.kinds.append(kind(span.dtype, span.end - span.begin))
    return columns

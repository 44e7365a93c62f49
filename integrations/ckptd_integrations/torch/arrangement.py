"""What goes into this rank's image: of each tensor everything, this rank's share, or the boxes of a local tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from ckptd.client.framework import Membership
from ckptd.storage.image import ITEM_BYTES
from ckptd.types import Piece
from ckptd_integrations.torch.local_boxes import local_boxes
from ckptd_integrations.torch.meshes import Sharers, is_first, lacks_dims, sharers_of, used_dims
from ckptd_integrations.torch.sharing import Shareable, share_out, split_dim
from ckptd_integrations.torch.tensors import TensorTable, refuse

Shape = tuple[int, ...]


class Part(NamedTuple):
    """An entry of the image: a box of a tensor of the table."""

    entry: str
    number: int
    """Which of the table's tensors."""
    begin: Shape
    """Where the box begins in the table's tensor."""
    shape: Shape
    piece: Piece | None


class Alike(NamedTuple):
    """A box of a tensor that several ranks hold alike, and that they share out among themselves."""

    number: int
    label: str
    """The same on all ranks that hold it."""
    begin: Shape
    shape: Shape
    whole: Shape
    """The global tensor's shape, and where in it the box lies."""
    offset: Shape


class Arrangement(NamedTuple):
    """The entries of an image, and what of them is shared with other ranks, each group with its own sharers."""

    parts: list[Part]
    groups: list[list[Alike]]


def arrange(
    table: TensorTable, replicated: Sequence[bool], membership: Membership, *, whole: bool = False
) -> Arrangement:
    """Return what this rank captures of `table`, where `replicated` says which plain tensors all ranks hold alike.

    With `whole`, nothing is shared out: this rank captures all of those as its own, and of replicas of a DTensor's
    local part the first captures it. Raises `StateError` naming a DTensor that is not what its placements say.
    """
    parts: list[Part] = []
    groups: dict[Sharers, list[Alike]] = {}
    used = used_dims(table.dtensors.values())
    everyone = Sharers(membership.world_size, membership.rank, None)
    for index, (name, tensor) in enumerate(zip(table.names, table.tensors, strict=True)):
        shape = tuple(tensor.shape)
        origin = (0,) * len(shape)
        dtensor = table.dtensors.get(index)
        sharers: Sharers | None = None
        boxes = [Alike(index, name, origin, shape, shape, origin)]
        if dtensor is not None:
            if not (whole and lacks_dims(dtensor)):
                sharers = sharers_of(dtensor, membership.world_size, used, alike=replicated[index])
            if sharers is not None:
                sharers, boxes = _of_dtensor(index, name, table, dtensor, sharers)
        elif replicated[index] and membership.world_size > 1 and all(shape) and not whole:
            sharers = everyone
        if sharers is None:
            parts.append(Part(name, index, origin, shape, None))
        elif sharers.ranks > 1 and not whole:
            groups.setdefault(sharers, []).extend(boxes)
        elif sharers.rank == 0:
            parts += [_part(box, box.begin, box.shape) for box in boxes]
    for sharers, alike in groups.items():
        parts += _shares(table, sharers, alike)
    return Arrangement(list(_with_names(table.names, parts)), list(groups.values()))


def _part(box: Alike, begin: Shape, shape: Shape) -> Part:
    offset = tuple(at + here - first for at, here, first in zip(box.offset, begin, box.begin, strict=True))
    name = box.label
    return Part(name, box.number, begin, shape, Piece(name, box.whole, offset))


def _shares(table: TensorTable, sharers: Sharers, alike: Sequence[Alike]) -> Iterator[Part]:
    offers = [Shareable(f"{box.label}\n{box.offset}", box.shape, ITEM_BYTES[table.dtypes[box.number]]) for box in alike]
    for rows in share_out(offers, sharers.ranks, sharers.rank):
        box = alike[rows.number]
        dim = split_dim(box.shape)
        begin, shape = list(box.begin), list(box.shape)
        if dim is not None:
            begin[dim] += rows.begin
            shape[dim] = rows.end - rows.begin
        yield _part(box, tuple(begin), tuple(shape))


def _of_dtensor(
    number: int, name: str, table: TensorTable, dtensor: Any, sharers: Sharers
) -> tuple[Sharers, list[Alike]]:
    """Return the boxes that this rank holds of a DTensor, and who holds the same."""
    whole, local = tuple(dtensor.shape), tuple(table.tensors[number].shape)
    extra = local[len(whole) :]  # complex128 is stored as pairs
    none = (0,) * len(extra)
    places = local_boxes(dtensor)
    if sum(prod(place.shape) for place in places) != prod(local[: len(whole)]):
        refuse(name, "a DTensor whose local tensor is not what its placements say")
    if not all(whole):
        # Nobody holds an element. One rank says that the tensor exists.
        nowhere = (0,) * len(local)
        first = Sharers(1, 0 if sharers.rank == 0 and is_first(dtensor) else 1, None)
        return first, [Alike(number, name, nowhere, whole + extra, whole + extra, nowhere)]
    return sharers, [
        Alike(
            number,
            name,
            place.local_offset + none,
            place.shape + extra,
            whole + extra,
            place.global_offset + none,
        )
        for place in places
    ]


def _with_names(names: Iterable[str], parts: Sequence[Part]) -> Iterator[Part]:
    """Give each entry a name of its own: its tensor's, with a number from the second box on."""
    taken: set[str] = set()
    reserved = set(names)
    for part in parts:
        name, number = part.entry, 1
        while name in taken or (number > 1 and name in reserved):
            number += 1
            name = f"{part.entry}~{number}"
        taken.add(name)
        yield part if number == 1 else part._replace(entry=name)


def row_major_offset(whole: Sequence[int], begin: Sequence[int], shape: Sequence[int]) -> int | None:
    """Return how many elements before a box lie in a contiguous tensor; None when the box is not contiguous there."""
    offset, stride = 0, 1
    partial = False
    """Whether a dimension further in is not covered; then no dimension further out may have more than one index."""
    for size, first, count in zip(reversed(whole), reversed(begin), reversed(shape), strict=True):
        if partial and count > 1:
            return None
        partial |= count != size
        offset += first * stride
        stride *= size
    return offset

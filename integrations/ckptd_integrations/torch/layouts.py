"""Where everything of a capture goes in the image, kept from one capture to the next while only contents change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, eq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ckptd.client.framework import Membership
from ckptd.storage.image import Layout, TensorSpec, plan
from ckptd_integrations.torch import values
from ckptd_integrations.torch.arrangement import Alike, Part, arrange, row_major_offset
from ckptd_integrations.torch.roles import Roles
from ckptd_integrations.torch.tensors import TensorTable

METADATA: Mapping[str, str] = {**values.METADATA, "torch": str(torch.__version__)}
"""What the header of a captured image says about its contents."""

SMALL_BYTES = 1024 * 1024
"""What could be copied beside training and is less than this in all is copied at the boundary: it takes no longer than
starting a thread."""
SMALL_TENSOR_BYTES = 64 * 1024
"""So is an entry below this: for each one the thread would need the interpreter, and Python code that is busy lets it
wait for that for 5 ms."""
_LENGTH_BYTES = 8


class Columns(NamedTuple):
    """Copies in columns: from which tensor of the table, how far into it, where to in the image, how many bytes."""

    indexes: list[int]
    skips: list[int]
    offsets: list[int]
    sizes: list[int]


class Placed(NamedTuple):
    """An entry that has to be converted while it is copied, and where its elements go."""

    part: Part
    offset: int
    size: int


class Routes(NamedTuple):
    """How each entry gets into the image."""

    now: Columns
    """By address, at the boundary."""
    later: Columns
    """By address, too, but of what only an optimizer's step changes the large part."""
    device_now: Columns
    """From a CUDA device, in the order of the work that training gives it."""
    device_later: Columns
    """From a CUDA device, beside that work."""
    converted: list[Placed]
    """What is not contiguous or lies elsewhere."""


@dataclass(frozen=True, slots=True)
class Placement:
    """An arrangement with its layout: for each part, where it begins in the image."""

    layout: Layout
    parts: list[Part]
    groups: list[list[Alike]]
    offsets: list[int]
    sizes: list[int]

    @property
    def values_capacity(self) -> int:
        """How long the values blob may become; its place begins with its length."""
        values = self.layout.values
        return values.end - values.begin - _LENGTH_BYTES


class LayoutCache:
    """Reuses the placement of the previous capture while what goes into it is the same and the values fit.

    A layout of 10,000 tensors takes 50 ms to make, and the agent has to be told of a new one.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._names: list[str] = []
        self._dtypes: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._rest: object = None
        self._placement: Placement | None = None
        self._routes_key: object = None
        self._routes: Routes | None = None

    def place(self, table: TensorTable, roles: Roles, values_bytes: int, *, whole: bool) -> Placement:
        """Return where `table` and a values blob of `values_bytes` go."""
        rest = (whole, roles.replicated, _placings(table.dtensors))
        current = self._placement
        if current is not None and self._is_same(table, rest) and values_bytes <= current.values_capacity:
            return current
        self._names, self._dtypes, self._rest = table.names, table.dtypes, rest
        self._shapes = [tuple(tensor.shape) for tensor in table.tensors]
        parts, groups = arrange(table, roles.replicated, self._membership, whole=whole)
        specs = [TensorSpec(part.entry, table.dtypes[part.number], part.shape, part.piece) for part in parts]
        # Room to grow, because lengths of numbers and lists change from step to step and a new layout costs more.
        layout = plan(specs, values_bytes + values_bytes // 4 + 1024, METADATA)
        spans = {span.name: span for span in layout.spans}
        self._placement = Placement(
            layout, parts, groups, [spans[part.entry].begin for part in parts], [spec.size_bytes for spec in specs]
        )
        return self._placement

    def routes(self, placement: Placement, table: TensorTable, roles: Roles) -> Routes:
        """Return how each entry of `placement` gets into the image."""
        stepped = roles.stepped
        key = (placement, stepped, table.odd, [_device(table.tensors[index]) for index in table.odd])
        previous = self._routes_key
        # The placement and the roles are the same objects while they are equal.
        if self._routes is None or not isinstance(previous, tuple) or not _is_same_key(previous, key):
            self._routes = _route(placement, table, stepped)
            self._routes_key = key
        return self._routes

    def _is_same(self, table: TensorTable, rest: object) -> bool:
        # Shapes are compared as they are made: 10,000 living tuples would set off the garbage collector each time.
        return (
            self._names == table.names
            and self._dtypes == table.dtypes
            and self._rest == rest
            and all(map(eq, map(attrgetter("shape"), table.tensors), self._shapes))
        )


def _placings(dtensors: Mapping[int, Any]) -> list[tuple[int, object, object, object]]:
    return [(index, item.device_mesh, item.placements, item.shape) for index, item in dtensors.items()]


def _device(tensor: Tensor) -> tuple[torch.device, bool, bool]:
    """Return what decides whether an odd tensor can be copied as it lies."""
    return tensor.device, tensor.is_contiguous(), tensor.is_conj() or tensor.is_neg()


def _is_same_key(previous: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    return previous[0] is key[0] and previous[1] is key[1] and previous[2:] == key[2:]


def _route(placement: Placement, table: TensorTable, stepped: Sequence[bool]) -> Routes:
    now, later, device_now, device_later = (Columns([], [], [], []) for _ in range(4))
    routes = Routes(now, later, device_now, device_later, [])
    odd = frozenset(table.odd)
    for part, offset, size in zip(placement.parts, placement.offsets, placement.sizes, strict=True):
        tensor = table.tensors[part.number]
        skip = row_major_offset(tuple(tensor.shape), part.begin, part.shape)
        device, contiguous, lazy = _device(tensor)
        if not size:
            continue
        if skip is None or (part.number in odd and (device.type != "cuda" or not contiguous or lazy)):
            routes.converted.append(Placed(part, offset, size))
            continue
        if part.number in odd:
            columns = routes.device_later if stepped[part.number] else routes.device_now
        else:
            columns = routes.later if stepped[part.number] and size >= SMALL_TENSOR_BYTES else routes.now
        for column, value in zip(columns, (part.number, skip * tensor.itemsize, offset, size), strict=True):
            column.append(value)
    if sum(routes.later.sizes) < SMALL_BYTES:
        return routes._replace(now=joined(routes.now, routes.later), later=Columns([], [], [], []))
    return routes


def joined(first: Columns, second: Columns) -> Columns:
    """Return both copies in one."""
    return Columns(*(left + right for left, right in zip(first, second, strict=True)))

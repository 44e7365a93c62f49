"""Which boxes of a DTensor's global tensor its local tensor holds, computed without communication.

torch tells a local tensor's shape and where it begins. A strided shard (FSDP over tensor parallelism on one dimension)
holds rows from several places, so here each dimension is cut into the runs that are kept, and the boxes are all
combinations of them.

Importing torch's own module takes 0.9 s, which only those pay who have DTensors: then it is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_MODULE = "torch.distributed.tensor"


class LocalBox(NamedTuple):
    """A box that lies at `local_offset` in the local tensor and at `global_offset` in the global one."""

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    shape: tuple[int, ...]


class _Run(NamedTuple):
    begin: int
    size: int


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether `value` is a tensor that several ranks hold together, without importing anything for it."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(value, module.DTensor)


def may_have_dtensors() -> bool:
    """Return whether anybody in this process could have made a DTensor."""
    return _MODULE in sys.modules


def local_boxes(tensor: DTensor) -> list[LocalBox]:
    """Return the boxes that this rank's local tensor is made of: one, several for a strided shard, or none.

    No box has zero elements. Nothing but `unsupported_placement` says whether the placements can be expressed so.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []
    return list(boxes_at(tuple(tensor.shape), tuple(mesh.shape), tuple(coordinate), tuple(tensor.placements)))


def unsupported_placement(tensor: DTensor) -> str | None:
    """Return in words why a DTensor's local elements are no boxes of its global tensor, or None when they are."""
    for placement in tensor.placements:
        if not (placement.is_replicate() or placement.is_shard() or _is_strided(placement)):
            return f"a DTensor of placement {placement}"
    return None


@lru_cache(maxsize=4096)
def boxes_at(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[LocalBox, ...]:
    """Return the boxes that the rank at `coordinate` of a mesh holds of a tensor of `shape`."""
    runs = [[_Run(0, size)] if size else [] for size in shape]
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if _is_strided(placement):
            pieces = _cut(runs[placement.dim], int(placement.split_factor))
            runs[placement.dim] = _join(run for piece in pieces for run in _cut(piece, ranks)[rank])
        elif placement.is_shard():
            runs[placement.dim] = _cut(runs[placement.dim], ranks)[rank]
    placed = [list(_with_local_begin(of_dim)) for of_dim in runs]
    return tuple(
        LocalBox(
            tuple(begin for begin, _ in sides),
            tuple(run.begin for _, run in sides),
            tuple(run.size for _, run in sides),
        )
        for sides in product(*placed)
    )


def _is_strided(placement: Any) -> bool:
    return isinstance(placement, sys.modules[f"{_MODULE}.placement_types"]._StridedShard)  # noqa: SLF001 - no other way


def _cut(runs: Sequence[_Run], parts: int) -> list[list[_Run]]:
    """Cut what the runs list into `parts` like `torch.chunk`: all of the same size, the last ones shorter or empty."""
    size = -(-sum(run.size for run in runs) // parts)
    return [list(_between(runs, part * size, (part + 1) * size)) for part in range(parts)]


def _between(runs: Sequence[_Run], begin: int, end: int) -> Iterator[_Run]:
    at = 0
    for run in runs:
        first, last = max(begin, at), min(end, at + run.size)
        if first < last:
            yield _Run(run.begin + first - at, last - first)
        at += run.size


def _join(runs: Iterable[_Run]) -> list[_Run]:
    joined: list[_Run] = []
    for run in runs:
        if joined and joined[-1].begin + joined[-1].size == run.begin:
            joined[-1] = _Run(joined[-1].begin, joined[-1].size + run.size)
        else:
            joined.append(run)
    return joined


def _with_local_begin(runs: Iterable[_Run]) -> Iterator[tuple[int, _Run]]:
    at = 0
    for run in runs:
        yield at, run
        at += run.size

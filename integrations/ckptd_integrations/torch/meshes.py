"""Which ranks hold the same part of a DTensor, found from meshes alone and alike by all of them.

Those that differ only in a dimension over which the tensor is replicated do. So do, as a rule, those that differ in a
dimension of the root mesh that the tensor's own mesh lacks: with FSDP on `mesh["dp"]` of a model that is tensor
parallel on `mesh["tp"]`, the layers that are not tensor parallel are the same on all ranks of "tp". But a dimension
that no DTensor of the state is spread over may as well be that of a pipeline's stages, where ranks hold other tensors,
even under the same names. Such a tensor is taken for the rank's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple


class Sharers(NamedTuple):
    """The ranks that hold something alike, and which of them this rank is."""

    ranks: int
    rank: int
    key: object
    """The same for all tensors that these ranks hold alike."""


class Spread(NamedTuple):
    """Over which dimensions of its root mesh a mesh extends, and where in the root mesh this rank is."""

    root: Any
    dims: frozenset[int]
    coordinate: tuple[int, ...]


@lru_cache(maxsize=256)
def spread_of(mesh: Any) -> Spread | None:
    """Return how `mesh` lies in its root mesh; None when this rank is not in it, or it is no box of it."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh  # noqa: SLF001 - no public way
    own = root.get_coordinate()
    if own is None or mesh.get_coordinate() is None:
        return None
    wanted = set(mesh.mesh.flatten().tolist())
    inside = [index for index, rank in enumerate(root.mesh.flatten().tolist()) if rank in wanted]
    places = [_unravel(index, tuple(root.mesh.shape)) for index in inside]
    dims = frozenset(dim for dim in range(root.ndim) if len({place[dim] for place in places}) > 1)
    size = 1
    for dim in dims:
        size *= root.mesh.shape[dim]
    return Spread(root, dims, tuple(own)) if size == mesh.size() else None


def used_dims(dtensors: Iterable[Any]) -> dict[Any, frozenset[int]]:
    """Return by root mesh over which of its dimensions any of the tensors is spread."""
    used: dict[Any, frozenset[int]] = {}
    for mesh in {dtensor.device_mesh for dtensor in dtensors}:
        spread = spread_of(mesh)
        if spread is not None:
            used[spread.root] = used.get(spread.root, frozenset()) | spread.dims
    return used


def sharers_of(dtensor: Any, world_size: int, used: dict[Any, frozenset[int]], *, alike: bool) -> Sharers | None:
    """Return who holds the same part of `dtensor` as this rank, or None when it has to be taken for the rank's own.

    `used` is what `used_dims` returned for the whole state; with `alike`, all ranks are known to hold the same tensor.
    """
    mesh = dtensor.device_mesh
    spread = spread_of(mesh)
    if spread is None or spread.root.size() != world_size:
        return None
    sizes = tuple(spread.root.mesh.shape)
    lacking = [dim for dim, size in enumerate(sizes) if dim not in spread.dims and size > 1]
    if not (alike or used[spread.root].issuperset(lacking)):
        return None
    ranks, rank = 1, 0
    for dim, placement in enumerate(dtensor.placements):
        if placement.is_replicate():
            ranks, rank = ranks * mesh.shape[dim], rank * mesh.shape[dim] + mesh.get_coordinate()[dim]
    for dim in lacking:
        ranks, rank = ranks * sizes[dim], rank * sizes[dim] + spread.coordinate[dim]
    copies = tuple(dim for dim, placement in enumerate(dtensor.placements) if placement.is_replicate())
    return Sharers(ranks, rank, (mesh, copies))


def is_first(dtensor: Any) -> bool:
    """Return whether this rank is the first of its tensor's mesh."""
    return not any(dtensor.device_mesh.get_coordinate())


def lacks_dims(dtensor: Any) -> bool:
    """Return whether the tensor's mesh is only a part of its root mesh, so that some replicas are a conclusion."""
    spread = spread_of(dtensor.device_mesh)
    return spread is not None and spread.root.size() != dtensor.device_mesh.size()


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.append(at)
    return tuple(reversed(place))

"""A restore: from the parts of a checkpoint that this rank needs, straight into the user's objects.

In a straight line: read this rank's values, check everything they say against the objects, read the tensors, let
objects load what was made for them, set the generators. World size and mesh may be others than those of the capture.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch

from ckptd.client.framework import Membership, OfferedCheckpoint
from ckptd.errors import DamagedError, StateError
from ckptd.storage import manifest as manifests
from ckptd.storage.image import VALUES_NAME, read_values
from ckptd.storage.manifest import RANK, Manifest
from ckptd.storage.reading import Want
from ckptd.storage.selection import own_chunk
from ckptd.types import TensorSpan
from ckptd_integrations.torch.copying import copy_threads
from ckptd_integrations.torch.fitting import Fitter
from ckptd_integrations.torch.nodes import MappingNode, Node, ObjectNode, SequenceNode, TensorNode, read_document
from ckptd_integrations.torch.objects import GENERATOR
from ckptd_integrations.torch.rng import RNG_NAME, restore_rng
from ckptd_integrations.torch.sources import CheckpointTensors, read_wants

_RESERVED = "__ckptd__"


def restore(state: dict[str, Any], offered: OfferedCheckpoint, membership: Membership, *, rng: bool) -> None:
    """Fill the objects in `state` in place from `offered`, and put new ones there where that can't be.

    Raises `StateError` naming what does not fit before anything was changed, and `DamagedError` naming the file and
    the tensor whose bytes are not what was sealed; then objects may be filled in part.
    """
    # What is made here is trained on, in whatever mode the script is now.
    with torch.inference_mode(mode=False), torch.no_grad():
        generators, warning = _fill(state, offered, membership, rng=rng)
    if generators is not None:
        # Last, because code that loads a state may draw random numbers.
        restore_rng(generators)
    if warning is not None:
        warnings.warn(warning, stacklevel=3)


def _fill(
    state: dict[str, Any], offered: OfferedCheckpoint, membership: Membership, *, rng: bool
) -> tuple[dict[str, Any] | None, str | None]:
    """Do all but the generators; returns their states if they are to be set, and what the user should hear."""
    manifest = manifests.read(offered.document, "of the offered checkpoint")
    existed = membership.rank < manifest.world_size
    document = read_document(_values(manifest, offered, membership.rank))
    tensors = CheckpointTensors(manifest.tensors, manifest.world_size, document, membership)
    fitter = Fitter(tensors, generators=existed)
    nodes = dict(document.entries)
    rng_node = nodes.pop(RNG_NAME, None)
    _check_names(state, nodes)
    fills = {name: fitter.fit_root(nodes[name], value, name) for name, value in state.items()}
    make_rng = fitter.build(rng_node, RNG_NAME) if rng_node is not None and rng and existed else None
    tensors.read(offered, copy_threads())
    for name, fill in fills.items():
        state[name] = fill()
    generators = None if make_rng is None else make_rng()
    warning = None
    if membership.rank == 0 and membership.world_size != manifest.world_size:
        own = {name for node in nodes.values() for name in _generators(node)}
        warning = _differences(manifest, membership.world_size, own)
    return generators, warning


def _values(manifest: Manifest, offered: OfferedCheckpoint, rank: int) -> bytes:
    """Read everything of this rank's state that is no tensor."""
    stored = manifest.tensors.get(VALUES_NAME)
    if stored is None:
        raise DamagedError("the checkpoint has no values: it was not written by ckptd, or not completely")
    chunk = own_chunk(stored, rank, manifest.world_size)
    size = chunk.end - chunk.begin
    buffer = ctypes.create_string_buffer(size)
    read_wants([Want(VALUES_NAME, chunk, 0, size, ctypes.addressof(buffer))], offered, 1)
    return read_values(memoryview(buffer).cast("B"), TensorSpan(VALUES_NAME, "U8", (size,), 0, size))


def _check_names(state: Mapping[str, Any], captured: Mapping[str, Any]) -> None:
    for name in state:
        if name not in captured:
            raise StateError(
                f"state {name!r} is bound now and was not captured",
                hint="bind what the captured run bound, or start a new job",
            )
    for name in captured:
        if name not in state:
            raise StateError(
                f"state {name!r} was captured and is not bound now",
                hint="bind what the captured run bound, or start a new job",
            )


def _differences(manifest: Manifest, world_size: int, generators: Container[str]) -> str | None:
    """Say what another number of ranks means for tensors of which each rank has its own, generators aside."""
    different = [
        stored.name
        for stored in manifest.tensors.values()
        if stored.placement == RANK
        and len({(chunk.shape, chunk.digest) for chunk in stored.chunks}) > 1
        and not stored.name.startswith(_RESERVED)
        and stored.name not in generators
    ]
    if not different:
        return None
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return (
        f"ckptd: a checkpoint of {manifest.world_size} ranks is restored by {world_size}; tensor {different[0]!r}{more}"
        f" differed between ranks, and rank r now has what rank r % {manifest.world_size} had"
    )


def _generators(node: Node) -> Iterator[str]:
    """Yield the names of tensors that are states of generators."""
    if isinstance(node, ObjectNode):
        if node.kind == GENERATOR and isinstance(node.content, TensorNode):
            yield node.content.name
    elif isinstance(node, (MappingNode, SequenceNode)):
        items = node.items if isinstance(node, SequenceNode) else [item for _, item in node.items]
        for item in items:
            yield from _generators(item)

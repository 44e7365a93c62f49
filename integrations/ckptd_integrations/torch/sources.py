"""The tensors of a checkpoint as sources of a restore: checked first, read after, straight into their targets.

What is noted here is a plan until `read` is called: it costs no byte of the checkpoint, and changes nothing. Of ten
thousand tensors nearly all are ordinary: contiguous in main memory, and one chunk as the checkpoint has them. Of those
nothing is noted but the chunk, and a glance tells that they fit; all else is looked at closely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ckptd.client.framework import Membership, OfferedCheckpoint
from ckptd.errors import DamagedError, StateError
from ckptd.storage.manifest import JOB, RANK, Chunk, StoredTensor
from ckptd.storage.reading import Want, read
from ckptd.storage.selection import own_chunk
from ckptd_integrations.torch import dtensor_restore
from ckptd_integrations.torch.local_boxes import LocalBox, is_dtensor, local_boxes, unsupported_placement
from ckptd_integrations.torch.nodes import Document
from ckptd_integrations.torch.tensors import DTYPES, PLAIN_TYPES, View, dtype_name, unsupported_kind
from ckptd_integrations.torch.transfers import transfers, whole

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_CPU = torch.device("cpu")
_ORDINARY = View(None, None, None)
_ORDINARY_DTYPES = {name: dtype for name, dtype in DTYPES.items() if not dtype.is_complex}
"""A complex tensor may be one that is to be conjugated when it is read."""


class _Source(NamedTuple):
    """A stored tensor as this rank sees it."""

    stored: StoredTensor
    own: Chunk
    """The chunk that is this rank's, or any one when the tensor is the whole job's."""
    stored_shape: tuple[int, ...]
    """The shape of its bytes: complex128 has two numbers of F64 in one more dimension."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: View


class _Target(NamedTuple):
    """A local tensor to be filled, seen with the dtype of the bytes; `boxes` is None when it is the whole tensor."""

    local: Tensor
    boxes: tuple[LocalBox, ...] | None


class CheckpointTensors:
    """Knows the tensors of one checkpoint, checks targets against them and fills them when all have been checked.

    `stored` are the tensors of a checkpoint that `world_size` ranks made; `membership` is this process's.
    """

    def __init__(
        self, stored: Mapping[str, StoredTensor], world_size: int, document: Document, membership: Membership
    ) -> None:
        self._stored, self._world_size, self._membership = stored, world_size, membership
        self._aliases = document.aliases
        self._views = document.views
        self._ordinary = _ordinary_chunks(stored, membership.rank, world_size)
        """By name, the chunks that are all of a tensor, as long as nobody has asked for it."""
        for name in (*document.aliases, *document.views):
            self._ordinary.pop(name, None)
        self._sources: dict[str, _Source] = {}
        self._whole: dict[str, tuple[Chunk, Tensor]] = {}
        """Ordinary tensors, by name: which chunk is copied to which tensor."""
        self._reads: dict[str, list[_Target]] = {}
        """All others, by the name that they are stored as."""
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._filled: list[Tensor] = []

    def check(self, name: str, target: Tensor, path: str, where: str) -> None:
        """Raise `StateError` unless the tensor `name` of the checkpoint fits `target`, which lies at `path`.

        `where` says in words what holds the target. Of a DTensor the global shape has to be the same.
        """
        source = self._find(name)
        kind = _unfillable(target)
        if kind is not None:
            raise StateError(
                f"tensor {path!r} can't be filled: {where} it is {kind}",
                hint="materialise the model before it is attached",
            )
        if not self._same_shape(source, target):
            raise StateError(
                f"tensor {path!r} is {list(source.shape)} in the checkpoint and {list(target.shape)} {where}",
                hint="build the same model as the captured run did, or start a new job",
            )
        if target.dtype != source.dtype:
            before, now = dtype_name(source.dtype), dtype_name(target.dtype)
            raise StateError(
                f"tensor {path!r} is {before} in the checkpoint and {now} {where}",
                hint="use the dtype of the captured run, or start a new job: a conversion would lose bits",
            )

    def fill(self, name: str, target: Tensor, path: str, where: str) -> None:
        """Check like `check`, and note that `target` is to be filled by `read`."""
        chunk = self._ordinary.pop(name, None)
        if chunk is not None and _is_ordinary(target, chunk):
            self._whole[name] = chunk, target
        else:
            self.check(name, target, path, where)
            self._note(self._find(name), target)
        self._filled.append(target)

    def make(self, name: str, like: Tensor | None = None, device: torch.device | None = None) -> Tensor:
        """Return a new tensor that `read` will fill, with the strides and kind of device of the captured one.

        Where `like` is a DTensor of the same shape, it is shared out as that one is; `device` overrules the captured
        one.
        """
        if (device is None or device.type == "cpu") and (like is None or not is_dtensor(like)):
            chunk = self._ordinary.pop(name, None)
            if chunk is not None:
                made = torch.empty(chunk.shape, dtype=DTYPES[chunk.dtype], device=_CPU)
                self._whole[name] = chunk, made
                return made
        source = self._find(name)
        shape, dtype = source.shape, source.dtype
        if is_dtensor(like) and self._same_shape(source, like):
            tensor: Tensor = dtensor_restore.empty_like(like, dtype)
        else:
            device = _device(source.view.device) if device is None else device
            if source.view.strides is None:
                tensor = torch.empty(shape, dtype=dtype, device=device)
            else:
                tensor = torch.empty_strided(shape, source.view.strides, dtype=dtype, device=device)
        self._note(source, tensor)
        return tensor

    def fits(self, name: str, target: Tensor) -> bool:
        """Return whether `target` is of the shape and dtype of the tensor `name` and can be filled."""
        chunk = self._ordinary.get(name)
        if chunk is not None and _is_ordinary(target, chunk):
            return True
        source = self._find(name)
        return self._same_shape(source, target) and target.dtype == source.dtype and _unfillable(target) is None

    def has_shape_of(self, name: str, tensor: Tensor) -> bool:
        """Return whether what was captured as `name` is as large as `tensor`."""
        return self._same_shape(self._find(name), tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the (global) shape of the tensor `name`."""
        return self._find(name).shape

    def is_of_job(self, name: str) -> bool:
        """Return whether the tensor `name` belongs to the whole job, and not to each rank one of its own."""
        return self._find(name).stored.placement == JOB

    def is_cut(self, name: str) -> bool:
        """Return whether several ranks have a part of the tensor `name` each."""
        source = self._find(name)
        return source.stored.placement == JOB and len(source.stored.chunks) > 1

    def read(self, offered: OfferedCheckpoint, threads: int) -> None:
        """Fill all targets; nothing is converted on the way, and only those files are opened that hold them.

        Raises `DamagedError` naming file and tensor.
        """
        chunks = [chunk for chunk, _ in self._whole.values()]
        sizes = [chunk.end - chunk.begin for chunk in chunks]
        addresses = [target.data_ptr() for _, target in self._whole.values()]
        wants = [*map(Want, self._whole, chunks, repeat(0), sizes, addresses), *self._wants()]
        read_wants(wants, offered, threads)
        for device in {target.device for target in self._targets() if target.is_cuda}:
            torch.cuda.synchronize(device)
        for target, same in self._copies:
            target.copy_(same)
        # A graph that still needs the old elements has to notice, as it does after `copy_`.
        torch.autograd.graph.increment_version(self._filled)

    def _targets(self) -> Iterator[Tensor]:
        return (target.local for targets in self._reads.values() for target in targets)

    def _find(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None:
            first = self._aliases.get(name, name)
            stored = self._stored.get(first)
            if stored is None:
                raise DamagedError(f"tensor {name!r} is missing from a checkpoint whose values name it")
            own = stored.chunks[0]
            if stored.placement != JOB:
                own = own_chunk(stored, self._membership.rank, self._world_size)
            bytes_shape = own.shape if stored.placement != JOB or stored.shape is None else stored.shape
            dtype, shape, view = DTYPES[own.dtype], bytes_shape, self._views.get(first, _ORDINARY)
            if view.dtype is not None:
                dtype, shape = torch.complex128, shape[:-1]
            source = self._sources[name] = _Source(stored, own, bytes_shape, shape, dtype, view)
        return source

    def _same_shape(self, source: _Source, tensor: Tensor) -> bool:
        return tensor.shape == source.shape or self._is_own_part(source, tensor)

    def _is_own_part(self, source: _Source, tensor: Tensor) -> bool:
        """Return whether a rank captured its local part of a DTensor as its own, and `tensor` is that DTensor.

        It does so when the mesh is not of all ranks, as in a pipeline of sharded stages. Then nothing says what the
        part is a part of, and only the same ranks can take it up again.
        """
        return (
            is_dtensor(tensor)
            and source.stored.placement == RANK
            and self._world_size == self._membership.world_size
            and tensor.device_mesh.size() != self._world_size
            and tensor.to_local().shape == source.shape
        )

    def _note(self, source: _Source, tensor: Tensor) -> None:
        target = _Target(tensor, None)
        if is_dtensor(tensor):
            boxes = None if self._is_own_part(source, tensor) else tuple(local_boxes(tensor))
            target = _Target(tensor.to_local(), boxes)
        if not target.local.numel():
            return
        lazy = target.local.is_conj() or target.local.is_neg()
        self._ordinary.pop(source.stored.name, None)
        whole = self._whole.get(source.stored.name)
        noted = self._reads.setdefault(source.stored.name, [])
        for earlier in noted if whole is None else (_Target(whole[1], None), *noted):
            if earlier.boxes == target.boxes:
                if lazy or not _is_same(earlier.local, target.local):
                    self._copies.append((target.local, earlier.local))
                return
        if lazy:
            ordinary = torch.empty_like(target.local).resolve_conj().resolve_neg()
            self._copies.append((target.local, ordinary))
            target = target._replace(local=ordinary)
        noted.append(target)

    def _wants(self) -> Iterator[Want]:
        for name, targets in self._reads.items():
            source = self._find(name)
            for local, boxes in targets:
                yield from self._wants_of(source, local, boxes)

    def _wants_of(self, source: _Source, local: Tensor, boxes: tuple[LocalBox, ...] | None) -> Iterator[Want]:
        stored, own = source.stored, source.own
        size = own.end - own.begin
        if source.view.dtype is not None:
            local = torch.view_as_real(local.detach())
            boxes = None if boxes is None else tuple(LocalBox(*map(_with_pair, box, (0, 0, 2))) for box in boxes)
        if boxes is None and own.shape == source.stored_shape and local.is_cpu and local.is_contiguous():
            yield Want(stored.name, own, 0, size, local.data_ptr())
            return
        chunks = stored.chunks if stored.placement == JOB else (own,)
        yield from transfers(stored.name, chunks, local, whole(source.stored_shape) if boxes is None else boxes)


def read_wants(wants: list[Want], offered: OfferedCheckpoint, threads: int) -> None:
    """Have the reading engine deliver `wants` from the files they lie in."""
    files = offered.open(sorted({want.chunk.file for want in wants}))
    read(wants, files, threads=threads, direct=not offered.in_memory)


def _ordinary_chunks(stored: Mapping[str, StoredTensor], rank: int, world_size: int) -> dict[str, Chunk]:
    """Return by name the chunks that are all of a tensor as this rank wants it, and have bytes."""
    found = {}
    for name, tensor in stored.items():
        chunk = tensor.chunks[0] if tensor.placement == JOB else own_chunk(tensor, rank, world_size)
        if chunk.begin < chunk.end and (tensor.placement == RANK or chunk.shape == tensor.shape):
            found[name] = chunk
    return found


def _is_ordinary(target: Tensor, chunk: Chunk) -> bool:
    """Return whether the bytes of a chunk, as they are, are what a tensor is to have at its address."""
    return (
        type(target) in PLAIN_TYPES
        and target.dtype is _ORDINARY_DTYPES.get(chunk.dtype)
        and target.layout is torch.strided
        and not target.is_nested
        and target.shape == chunk.shape
        and target.is_cpu
        and target.is_contiguous()
        and not target.is_neg()
        and target.data_ptr() != 0
    )


def _with_pair(numbers: tuple[int, ...], last: int) -> tuple[int, ...]:
    return (*numbers, last)


def _unfillable(tensor: Tensor) -> str | None:
    """Return in words why nothing can be put into a tensor, or None."""
    if is_dtensor(tensor):
        return unsupported_placement(tensor) or _unfillable_part(tensor)
    kind = unsupported_kind(tensor)
    if kind is None and tensor.is_cpu and not tensor.data_ptr() and tensor.numel():
        return "a tensor without memory"
    return kind


def _unfillable_part(tensor: DTensor) -> str | None:
    local = tensor.to_local()
    if sum(prod(box.shape) for box in local_boxes(tensor)) != local.numel():
        return "a DTensor whose local part is not what its placements say"
    return _unfillable(local)


def _is_same(left: Tensor, right: Tensor) -> bool:
    return (
        left.data_ptr() == right.data_ptr()
        and left.shape == right.shape
        and left.stride() == right.stride()
        and left.device == right.device
    )


def _device(kind: str | None) -> torch.device:
    module = None if kind is None else getattr(torch, kind, None)
    here = module is not None and module.is_available()
    return torch.device(kind if here and kind is not None else "cpu")

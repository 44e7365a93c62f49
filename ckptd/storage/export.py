"""A copy of a checkpoint that needs neither ckptd nor the store: tensors whole, in safetensors files of a usual shape.

    DIR/model.safetensors                       the tensors model.*, without that prefix
    DIR/optimizer-00001-of-00002.safetensors    what does not fit into one file of `MAX_FILE_BYTES`, with
    DIR/optimizer.safetensors.index.json        the index that the libraries for such files read
    DIR/rank-1/loader.safetensors               what rank 1 has and not all ranks have alike
    DIR/checkpoint.json                         which checkpoint it is, and the metrics reported at its step

Tensors that ranks share out are put together. Everything that is no tensor (numbers, strings, containers) is left out:
nothing but ckptd can read it. Memory is bounded: each file of the store is read once, in order, leaf by leaf, and each
leaf is checked before it is written where it belongs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from ckptd.errors import ConfigError, StoreError
from ckptd.storage.boxes import Shape, runs
from ckptd.storage.catalog import load_manifest
from ckptd.storage.hints import hint_for
from ckptd.storage.image import ITEM_BYTES, VALUES_NAME
from ckptd.storage.manifest import JOB, Chunk, Manifest, StoredTensor
from ckptd.storage.ranges import RangeReader, read_checked
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId

MAX_FILE_BYTES = 5 * 10**9
"""Of the tensors in one file, unless one is larger by itself: what hubs and their libraries use."""
_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")


class _Copy(NamedTuple):
    """A tensor as it will be in a file."""

    name: str
    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class _File:
    """A file that will be written, with where each of its tensors begins."""

    path: str
    header: bytes
    copies: tuple[tuple[int, _Copy], ...]
    size_bytes: int


class _Move(NamedTuple):
    """A chunk, and where it goes: into the tensor that begins at byte `begin` of an open file."""

    chunk: Chunk
    descriptor: int
    begin: int
    copy: _Copy


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    files: tuple[str, ...]
    """Seen from the folder."""
    size_bytes: int
    tensors: int


def export(tier: Tier, job: str, checkpoint: CheckpointId, to: Path) -> Exported:
    """Copy a checkpoint to the folder `to`, which appears when it is whole and must not have anything in it before.

    Raises `ConfigError` when the folder can't be used, `DamagedError` or `NotFoundError` when bytes are not what was
    committed, and `StoreError` when they can't be written. Then nothing is left behind.
    """
    loaded = load_manifest(tier, job, checkpoint)
    files = [file for group, copies in sorted(_groups(loaded).items()) for file in _plan(group, copies)]
    try:
        _check_target(to)
        temporary = to.with_name(f".tmp-{os.urandom(8).hex()}-{to.name}")
        temporary.mkdir(parents=True)
        try:
            written = _write(tier, job, loaded, files, temporary)
            temporary.rename(to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"can't export to {to}: {error.strerror or error}", hint=hint_for(error) or "use another folder for --to"
        ) from error
    return written


def _check_target(to: Path) -> None:
    if to.is_dir() and not any(to.iterdir()):
        return
    if to.exists() or to.is_symlink():
        raise ConfigError(f"{to} is there already", hint="--to names a folder that is empty, or does not exist yet")


def _groups(loaded: Manifest) -> dict[str, list[_Copy]]:
    """Return what goes into each file name without its ending, which a folder for a rank's own may lead."""
    groups: dict[str, list[_Copy]] = {}
    for tensor in loaded.tensors.values():
        if tensor.name == VALUES_NAME:
            continue
        group, _, rest = tensor.name.partition(".")
        for folder, dtype, shape, chunks in _wholes(tensor, loaded.world_size):
            path = folder + (re.sub(r"[^\w-]", "_", group) or "_")
            copies = groups.setdefault(path, [])
            copies.append(_Copy(rest or group, dtype, shape, chunks))
    return {path: _with_unique_names(copies) for path, copies in groups.items()}


def _wholes(tensor: StoredTensor, world_size: int) -> Iterator[tuple[str, str, Shape, tuple[Chunk, ...]]]:
    """Yield a tensor as it is copied: once, or for each rank that has it."""
    chunks = tensor.chunks
    if tensor.placement == JOB:
        yield "", chunks[0].dtype, tensor.shape or (), chunks
        return
    looks = {(chunk.dtype, chunk.shape, chunk.digest) for chunk in chunks}
    if len(looks) == 1 and len(chunks) == world_size:
        yield "", chunks[0].dtype, chunks[0].shape, chunks[:1]
        return
    for chunk in chunks:
        yield f"rank-{chunk.shard}/", chunk.dtype, chunk.shape, (chunk,)


def _with_unique_names(copies: Iterable[_Copy]) -> list[_Copy]:
    """Return copies with names that differ: a tensor `a` and one `a.a` come to the same file under the same name."""
    taken: set[str] = set()
    unique = []
    for copy in copies:
        name, number = copy.name, 1
        while name in taken:
            number += 1
            name = f"{copy.name}~{number}"
        taken.add(name)
        unique.append(copy._replace(name=name))
    return unique


def _plan(group: str, copies: Sequence[_Copy]) -> list[_File]:
    """Lay a group out in one file, or in several with an index."""
    ordered = sorted(copies, key=lambda copy: (-ITEM_BYTES[copy.dtype], copy.name))
    parts: list[list[_Copy]] = []
    room = 0
    for copy in ordered:
        if not parts or copy.size_bytes > room:
            parts.append([])
            room = MAX_FILE_BYTES
        parts[-1].append(copy)
        room -= copy.size_bytes
    if len(parts) == 1:
        return [_lay_out(f"{group}.safetensors", parts[0])]
    count = len(parts)
    files = [_lay_out(f"{group}-{number:05d}-of-{count:05d}.safetensors", part) for number, part in enumerate(parts, 1)]
    index = {
        "metadata": {"total_size": sum(copy.size_bytes for copy in copies)},
        "weight_map": {copy.name: Path(file.path).name for file in files for _, copy in file.copies},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"
    return [*files, _File(f"{group}.safetensors.index.json", text, (), len(text))]


def _lay_out(path: str, copies: Sequence[_Copy]) -> _File:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what libraries for models want to see
    begins = []
    at = 0
    for copy in copies:
        begins.append(at)
        entries[copy.name] = {
            "dtype": copy.dtype,
            "shape": copy.shape,
            "data_offsets": (at, at + copy.size_bytes),
        }
        at += copy.size_bytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body = body.ljust(-(-len(body) // _ALIGNMENT) * _ALIGNMENT)
    header = _LENGTH.pack(len(body)) + body
    placed = tuple((len(header) + begin, copy) for begin, copy in zip(begins, copies, strict=True))
    return _File(path, header, placed, len(header) + at)


def _write(tier: Tier, job: str, loaded: Manifest, files: Sequence[_File], folder: Path) -> Exported:
    described = _describe(loaded, files)
    files = [*files, _File("checkpoint.json", described, (), len(described))]
    needed: dict[str, list[_Move]] = {}
    with ExitStack() as stack:
        descriptors = []
        for file in files:
            path = folder / file.path
            path.parent.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
            os.posix_fallocate(descriptor, 0, file.size_bytes)  # a full disk shows now
            _write_at(descriptor, memoryview(file.header), 0)
            for begin, copy in file.copies:
                for chunk in copy.chunks:
                    needed.setdefault(chunk.file, []).append(_Move(chunk, descriptor, begin, copy))
        for name, moves in sorted(needed.items()):
            reader = RangeReader(tier, f"{job}/{name}")
            for move in sorted(moves, key=lambda move: move.chunk.begin):
                _copy(reader, move)
        for descriptor in descriptors:
            os.fsync(descriptor)
    return Exported(
        tuple(file.path for file in files),
        sum(file.size_bytes for file in files),
        sum(len(file.copies) for file in files),
    )


def _describe(loaded: Manifest, files: Sequence[_File]) -> bytes:
    document = {
        "job": loaded.job,
        "generation": loaded.id.generation,
        "step": loaded.id.step,
        "world_size": loaded.world_size,
        "created_at": loaded.created_at,
        "producer": loaded.document["producer"],
        "values": dict(loaded.values),
        "files": sorted(file.path for file in files),
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _copy(reader: RangeReader, move: _Move) -> None:
    """Copy a chunk's bytes to where its elements lie in the whole tensor."""
    chunk, item_bytes = move.chunk, ITEM_BYTES[move.copy.dtype]
    places = runs(move.copy.shape, chunk.offset, chunk.shape)
    at = left = 0  # of the run under way: where it goes on, and its bytes that are still to come
    for leaf in read_checked(reader, chunk, move.copy.name):
        done = 0
        while done < len(leaf):
            if not left:
                first, count = next(places)
                at, left = move.begin + first * item_bytes, count * item_bytes
            part = leaf[done : done + left]
            _write_at(move.descriptor, part, at)
            at, left, done = at + len(part), left - len(part), done + len(part)


def _write_at(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)

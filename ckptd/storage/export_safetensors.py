"""Export to safetensors files of a usual shape.

    DIR/model.safetensors                       the tensors model.*, without that prefix
    DIR/optimizer-00001-of-00002.safetensors    what does not fit into one file of `MAX_FILE_BYTES`, with
    DIR/optimizer.safetensors.index.json        the index that the libraries for such files read
    DIR/rank-1/loader.safetensors               what rank 1 has and not all ranks have alike

Everything that is no tensor (numbers, strings, containers) is left out: nothing but ckptd can read it. Tensors are put
together in the files that they are exported to, in bounded memory.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.storage.export import Source, Written
from ckptd.storage.image import ITEM_BYTES
from ckptd.storage.manifest import Manifest
from ckptd.storage.wholes import Move, Whole, moves, put_together, wholes, write_at

MAX_FILE_BYTES = 5 * 10**9
"""Of the tensors in one file, unless one is larger by itself: what hubs and their libraries use."""
_ALIGNMENT = 8
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
"""No tensor's name in such a file."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file that will be written, with where each of its tensors begins."""

    path: str
    header: bytes
    tensors: tuple[tuple[int, Whole], ...]
    size_bytes: int


def export_safetensors(source: Source, folder: Path) -> Written:
    """Write all tensors into `folder`, each state into files of its own; an `Exporter`."""
    limit = MAX_FILE_BYTES if source.max_file_bytes is None else source.max_file_bytes
    files = [
        file for group, tensors in sorted(_groups(source.manifest).items()) for file in _plan(group, tensors, limit)
    ]
    needed: list[Move] = []
    for file in files:
        _begin(folder / file.path, file)
        for begin, tensor in file.tensors:
            needed += moves(tensor, folder / file.path, begin)
    put_together(source.tier, source.job, needed)
    return Written(sum(len(file.tensors) for file in files), ("what is no tensor is not among it",))


def _begin(path: Path, file: _File) -> None:
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, file.size_bytes)  # a full disk shows now
        write_at(descriptor, memoryview(file.header), 0)
    finally:
        os.close(descriptor)


def _groups(loaded: Manifest) -> dict[str, list[Whole]]:
    """Return what goes into each file name without its ending, which a folder for a rank's own may lead."""
    groups: dict[str, list[Whole]] = {}
    for tensor in wholes(loaded):
        group, _, rest = tensor.name.partition(".")
        folder = "" if tensor.rank is None else f"rank-{tensor.rank}/"
        path = folder + (re.sub(r"[^\w-]", "_", group) or "_")
        groups.setdefault(path, []).append(tensor._replace(name=rest or group))
    return {path: _with_unique_names(tensors) for path, tensors in groups.items()}


def _with_unique_names(tensors: Iterable[Whole]) -> list[Whole]:
    """Return tensors with names that differ: a tensor `a` and one `a.a` come to the same file under the same name."""
    taken = {_METADATA}
    unique = []
    for tensor in tensors:
        name, number = tensor.name, 1
        while name in taken:
            number += 1
            name = f"{tensor.name}~{number}"
        taken.add(name)
        unique.append(tensor._replace(name=name))
    return unique


def _plan(group: str, tensors: Sequence[Whole], limit: int) -> list[_File]:
    """Lay a group out in one file, or in several with an index."""
    ordered = sorted(tensors, key=lambda tensor: (-ITEM_BYTES[tensor.dtype], tensor.name))
    parts: list[list[Whole]] = []
    room = 0
    for tensor in ordered:
        if not parts or (limit and tensor.size_bytes > room):
            parts.append([])
            room = limit
        parts[-1].append(tensor)
        room -= tensor.size_bytes
    if len(parts) == 1:
        return [_lay_out(f"{group}.safetensors", parts[0])]
    count = len(parts)
    files = [_lay_out(f"{group}-{number:05d}-of-{count:05d}.safetensors", part) for number, part in enumerate(parts, 1)]
    index = {
        "metadata": {"total_size": sum(tensor.size_bytes for tensor in tensors)},
        "weight_map": {tensor.name: Path(file.path).name for file in files for _, tensor in file.tensors},
    }
    text = json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"
    return [*files, _File(f"{group}.safetensors.index.json", text, (), len(text))]


def _lay_out(path: str, tensors: Sequence[Whole]) -> _File:
    entries: dict[str, object] = {_METADATA: {"format": "pt"}}  # what libraries for models want to see
    begins = []
    at = 0
    for tensor in tensors:
        begins.append(at)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.size_bytes),
        }
        at += tensor.size_bytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body = body.ljust(-(-len(body) // _ALIGNMENT) * _ALIGNMENT)
    header = _LENGTH.pack(len(body)) + body
    placed = tuple((len(header) + begin, tensor) for begin, tensor in zip(begins, tensors, strict=True))
    return _File(path, header, placed, len(header) + at)

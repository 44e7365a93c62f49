"""The manifest: the JSON list of a checkpoint's shards, tensors and digests. Written last; its existence is the commit.

Format version 1, readable with `json` alone:

    {"format": 1, "job", "generation", "parent": null | {"generation", "step"}, "step", "world_size", "created_at",
     "producer": {"ckptd": version}, "digest": "xxh3-128", "leaf_bytes", "complete": true,
     "shards": [{"rank", "file", "size_bytes", "digest"}],
     "tensors": {name: {"dtype", "shape", "placement",
                        "chunks": [{"shard", "offset", "shape", "byte_range", "digest"}]}},
     "values": {metric: number}, "document_digest"}

`placement` is "job" for a tensor of the whole job, whose chunks are boxes that cover its shape exactly, and "rank"
for one of which each rank keeps its own: its chunk in shard r is rank r's. When ranks differ in shape or dtype, the
tensor's `shape` or `dtype` is null and each chunk's own holds.

A chunk has further fields only when they say something:
`entry`, its name in the shard, when it is not the tensor's; `leaves`, the digests of its leaves, when it has more than
one; `dtype`, when the tensor's is null; `file`, seen from the job's folder, when its bytes lie elsewhere than in its
shard's own file: unchanged tensors are not written again, and equal ones of several ranks are written once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from ckptd.errors import DamagedError, StateError
from ckptd.storage import manifest_text
from ckptd.storage.digest import DIGEST_NAME, LEAF_BYTES, TensorDigest
from ckptd.storage.image import ITEM_BYTES, Layout, is_inside, whole_numbers
from ckptd.storage.keys import folder, is_shard_file, shard_file
from ckptd.types import CheckpointId, CheckpointRecord
from ckptd.version import __version__

FORMAT = 1
JOB, RANK = "job", "rank"
"""Placements."""
_DIGEST = re.compile("[0-9a-f]{32}")
_NO_DIGEST: tuple[None, tuple[str, ...]] = (None, ())


class Chunk(NamedTuple):
    """A box of a tensor, and where its bytes lie."""

    shard: int
    entry: str
    """Its name in the shard."""
    dtype: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    """The file that holds its bytes, seen from the job's folder."""
    begin: int
    end: int
    digest: str | None
    """None for a snapshot in memory that has not been digested."""
    leaves: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a checkpoint holds it."""

    name: str
    placement: str
    shape: tuple[int, ...] | None
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's file in a checkpoint."""

    rank: int
    file: str
    """Seen from the job's folder."""
    size_bytes: int
    digest: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest; `document` is the JSON object itself."""

    job: str
    id: CheckpointId
    parent: CheckpointId | None
    world_size: int
    created_at: float
    shards: tuple[Shard, ...]
    """By rank."""
    tensors: Mapping[str, StoredTensor]
    """By name; the values blobs of all ranks are the tensor `VALUES_NAME`."""
    values: Mapping[str, float]
    document: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """The bytes that were written for this checkpoint: those of its own files, not of what it refers to."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def state_bytes(self) -> int:
        """The bytes of the state that it restores, wherever they lie."""
        return sum(chunk.end - chunk.begin for tensor in self.tensors.values() for chunk in tensor.chunks)

    def refers(self, chunk: Chunk) -> bool:
        """Whether a chunk's bytes lie elsewhere than in its shard's own file."""
        return chunk.file != self.shards[chunk.shard].file

    @property
    def files(self) -> frozenset[str]:
        """Every file it needs, seen from the job's folder: its own, and those that it refers to."""
        named = {chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks}
        return frozenset(named.union(shard.file for shard in self.shards))

    def record(self, tier: str) -> CheckpointRecord:
        """Return what `ls` shows of this checkpoint on `tier`."""
        return CheckpointRecord(
            self.id, self.parent, tier, self.created_at, self.size_bytes, len(self.shards), self.world_size
        )


class Place(NamedTuple):
    """Where an entry's bytes lie."""

    file: str | None
    """Seen from the job's folder; None for its shard's own file."""
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ShardContent:
    """What is known of a rank's shard: its image's layout, and what became of everything in it."""

    rank: int
    layout: Layout
    size_bytes: int
    """Of its own file, which lacks what is referred to."""
    digest: str | None
    digests: Mapping[str, TensorDigest]
    """By entry, the values blob included; empty for a snapshot that was not digested."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """By entry, of those whose bytes lie elsewhere than in the image."""


def build(
    job: str,
    checkpoint: CheckpointId,
    parent: CheckpointId | None,
    shards: Sequence[ShardContent],
    *,
    created_at: float,
    values: Mapping[str, float],
) -> dict[str, Any]:
    """Return the manifest's JSON object for shards that are all there.

    Raises `StateError` naming a tensor of the job that the ranks' parts do not cover exactly.
    """
    return {
        "format": FORMAT,
        "job": job,
        "generation": checkpoint.generation,
        "parent": None if parent is None else parent._asdict(),
        "step": checkpoint.step,
        "world_size": len(shards),
        "created_at": created_at,
        "producer": {"ckptd": __version__},
        "digest": DIGEST_NAME,
        "leaf_bytes": LEAF_BYTES,
        "shards": [
            {
                "rank": shard.rank,
                "file": shard_file(shard.rank),
                "size_bytes": shard.size_bytes,
                "digest": shard.digest,
            }
            for shard in shards
        ],
        "tensors": tensors_of(shards),
        "values": dict(values),
        "complete": True,
    }


def tensors_of(shards: Sequence[ShardContent]) -> dict[str, Any]:
    """Return the `tensors` of a manifest of shards; raises `StateError` as `build` does."""
    tensors: dict[str, Any] = {}
    for shard in shards:
        digests, places = shard.digests, shard.places
        for span in shard.layout.spans:
            entry, dtype, shape, begin, end, piece = span
            name, placement, whole = (entry, RANK, shape) if piece is None else (piece.tensor, JOB, piece.shape)
            tensor = tensors.get(name)
            if tensor is None:
                tensor = tensors[name] = {"dtype": dtype, "shape": whole, "placement": placement, "chunks": []}
            elif tensor["dtype"] != dtype or tensor["shape"] != whole or tensor["placement"] != placement:
                if JOB in (placement, tensor["placement"]):
                    raise _disagreement(f"ranks disagree about the shape, dtype or placement of tensor {name!r}")
                _separate(tensor, dtype, whole)
            file, begin, end = places.get(entry, (None, begin, end))
            digest, leaves = digests.get(entry, _NO_DIGEST)
            chunk: dict[str, Any] = {
                "shard": shard.rank,
                "offset": (0,) * len(shape) if piece is None else piece.offset,
                "shape": shape,
            }
            if entry != name:
                chunk["entry"] = entry
            if file is not None:
                chunk["file"] = file
            chunk["byte_range"] = (begin, end)
            chunk["digest"] = digest
            if leaves:
                chunk["leaves"] = leaves
            if tensor["dtype"] is None:
                chunk["dtype"] = dtype
            tensor["chunks"].append(chunk)
    for name, tensor in tensors.items():
        if tensor["placement"] == JOB:
            _check_cover(name, tensor)
    return tensors


def _check_cover(name: str, tensor: Mapping[str, Any]) -> None:
    if not _covers(tensor["shape"], [(chunk["offset"], chunk["shape"]) for chunk in tensor["chunks"]]):
        raise _disagreement(f"the ranks' parts of tensor {name!r} do not make up the whole")


def _separate(tensor: dict[str, Any], dtype: str, shape: tuple[int, ...]) -> None:
    """Note in the chunks what they don't have in common any more."""
    if tensor["dtype"] not in (None, dtype):
        for chunk in tensor["chunks"]:
            chunk["dtype"] = tensor["dtype"]
        tensor["dtype"] = None
    if tensor["shape"] != shape:
        tensor["shape"] = None


def _covers(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether boxes make up a tensor: as many elements, all in it, no two at one corner.

    Boxes that overlap and leave a hole of the same size would pass; no way of sharing a tensor out makes such.
    """
    elements = 0
    corners = set()
    for offset, box in boxes:
        size = prod(box)
        if not is_inside(offset, box, shape) or (size and offset in corners):
            return False
        elements += size
        if size:
            corners.add(offset)
    return elements == prod(shape)


def _disagreement(problem: str) -> StateError:
    return StateError(
        problem, hint="every rank has to attach the same state: see `replicated` in ckptd/client/README.md"
    )


def encode(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that are put as `manifest.json`."""
    return manifest_text.encode(document)


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest; raises `DamagedError` that names the place and what is wrong."""
    return read(manifest_text.decode(data, where), where)


def read(document: Mapping[str, Any], where: str) -> Manifest:
    """Return the manifest of a JSON object; raises `DamagedError` that names the place and what is wrong."""
    try:
        if document["format"] != FORMAT:
            raise DamagedError(
                f"the manifest {where} has format {document['format']!r}, this ckptd reads {FORMAT}",
                hint="install the version of ckptd that wrote it",
            )
        if document["complete"] is not True:
            raise DamagedError(f"the manifest {where} does not say that it is complete")
        if (document["digest"], document["leaf_bytes"]) != (DIGEST_NAME, LEAF_BYTES):
            raise DamagedError(f"the manifest {where} has digests of an unknown kind")
        return _read(document)
    except KeyError as error:
        raise DamagedError(f"the manifest {where} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise DamagedError(f"the manifest {where} can't be used: {error}") from error


def _read(document: Mapping[str, Any]) -> Manifest:
    checkpoint = CheckpointId(int(document["generation"]), int(document["step"]))
    prefix = folder(checkpoint)
    shards = tuple(
        Shard(
            int(shard["rank"]),
            _checked_file(prefix + str(shard["file"])),
            int(shard["size_bytes"]),
            None if shard["digest"] is None else str(shard["digest"]),
        )
        for shard in sorted(document["shards"], key=lambda shard: int(shard["rank"]))
    )
    world_size = int(document["world_size"])
    if world_size != len(shards) or any(shard.rank != at for at, shard in enumerate(shards)):
        raise ValueError("it does not list the shards of all ranks")
    own_files = [shard.file for shard in shards]
    parent = document["parent"]
    return Manifest(
        job=str(document["job"]),
        id=checkpoint,
        parent=None if parent is None else CheckpointId(int(parent["generation"]), int(parent["step"])),
        world_size=world_size,
        created_at=float(document["created_at"]),
        shards=shards,
        tensors={str(name): _tensor(str(name), entry, own_files) for name, entry in document["tensors"].items()},
        values={str(key): float(value) for key, value in document["values"].items()},
        document=document,
    )


def _tensor(name: str, tensor: Mapping[str, Any], own_files: Sequence[str]) -> StoredTensor:
    placement, shape = tensor["placement"], tensor["shape"]
    if placement not in (JOB, RANK):
        raise ValueError(f"tensor {name!r} has the unknown placement {placement!r}")
    whole = None if shape is None else whole_numbers(shape)
    read = StoredTensor(name, placement, whole, tuple(_chunks(name, tensor, whole, own_files)))
    if not read.chunks:
        raise ValueError(f"tensor {name!r} has no chunks")
    if placement == JOB and not _covers(read.shape or (), [chunk[3:5] for chunk in read.chunks]):
        raise ValueError(f"the chunks of tensor {name!r} do not make up the whole")
    return read


def _chunks(
    name: str, tensor: Mapping[str, Any], whole: tuple[int, ...] | None, own_files: Sequence[str]
) -> Iterator[Chunk]:
    common_dtype, common_shape = tensor["dtype"], tensor["shape"]
    for chunk in tensor["chunks"]:
        get = chunk.get
        shard, digest, leaves, file = chunk["shard"], chunk["digest"], get("leaves", ()), get("file")
        dtype, shape = common_dtype or chunk["dtype"], chunk["shape"]
        shape = whole if whole is not None and shape == common_shape else whole_numbers(shape)
        begin, end = whole_numbers(chunk["byte_range"])
        size = end - begin
        if type(shard) is not int or not 0 <= shard < len(own_files):
            raise ValueError(f"it has no shard {shard!r}, which tensor {name!r} names")
        if dtype not in ITEM_BYTES or size != ITEM_BYTES[dtype] * prod(shape):
            raise ValueError(f"the byte range of tensor {name!r} is not what its dtype and shape need")
        if digest is not None and len(leaves) != (-(-size // LEAF_BYTES) if size > LEAF_BYTES else 0):
            raise ValueError(f"tensor {name!r} has not one digest for each of its leaves")
        _check_digests(name, (digest, *leaves))
        yield Chunk(
            shard,
            str(get("entry", name)),
            dtype,
            whole_numbers(chunk["offset"]),
            shape,
            own_files[shard] if file is None else _checked_file(file),
            begin,
            end,
            digest,
            tuple(leaves),
        )


def _check_digests(name: str, digests: Sequence[Any]) -> None:
    for digest in digests:
        if digest is not None and (type(digest) is not str or not _DIGEST.fullmatch(digest)):
            raise ValueError(f"{digest!r} of tensor {name!r} is no digest")


def _checked_file(file: str) -> str:
    if not is_shard_file(file):
        raise ValueError(f"it names the file {file!r}")
    return file

"""The manifest: the JSON list of a checkpoint's shards, tensors and digests. Written last; its existence is the commit.

Format version 1, readable with `json` alone:

    {"format": 1, "job", "generation", "parent": null | {"generation", "step"}, "step", "world_size", "created_at",
     "producer": {"ckptd": version}, "complete": true,
     "shards": [{"rank", "file", "size_bytes", "digest"}],
     "tensors": {name: {"dtype", "shape", "placement",
                        "chunks": [{"shard", "offset", "shape", "byte_range", "digest"}]}},
     "values": {metric: number}}

`placement` is "rank" for a tensor of which each rank keeps its own; its chunk in shard r is rank r's. When ranks
differ in shape or dtype, the tensor's `shape` or `dtype` is null and each chunk's own holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptd.errors import DamagedError
from ckptd.storage.image import Layout
from ckptd.storage.keys import shard_file
from ckptd.types import CheckpointId, CheckpointRecord
from ckptd.version import __version__

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's file in a checkpoint."""

    rank: int
    file: str
    size_bytes: int
    digest: str
    tensor_digests: Mapping[str, str]
    """By tensor name, the values blob included."""


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
    values: Mapping[str, float]
    document: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    def record(self, tier: str) -> CheckpointRecord:
        """Return what `ls` shows of this checkpoint on `tier`."""
        return CheckpointRecord(
            self.id, self.parent, tier, self.created_at, self.size_bytes, len(self.shards), self.world_size
        )


@dataclass(frozen=True, slots=True)
class ShardContent:
    """What a flush knows of a shard: its layout and the digest of everything in it."""

    rank: int
    layout: Layout
    digest: str
    tensor_digests: Mapping[str, str]


def build(
    job: str,
    checkpoint: CheckpointId,
    parent: CheckpointId | None,
    shards: Sequence[ShardContent],
    *,
    created_at: float,
    values: Mapping[str, float],
) -> dict[str, Any]:
    """Return the manifest's JSON object for shards that are all durable."""
    return {
        "format": FORMAT,
        "job": job,
        "generation": checkpoint.generation,
        "parent": None if parent is None else parent._asdict(),
        "step": checkpoint.step,
        "world_size": len(shards),
        "created_at": created_at,
        "producer": {"ckptd": __version__},
        "shards": [
            {
                "rank": shard.rank,
                "file": shard_file(shard.rank),
                "size_bytes": shard.layout.image_bytes,
                "digest": shard.digest,
            }
            for shard in shards
        ],
        "tensors": _tensors(shards),
        "values": dict(values),
        "complete": True,
    }


def _tensors(shards: Sequence[ShardContent]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for shard in shards:
        for span in shard.layout.spans:
            shape = list(span.shape)
            tensor = tensors.setdefault(
                span.name, {"dtype": span.dtype, "shape": shape, "placement": "rank", "chunks": []}
            )
            if tensor["dtype"] != span.dtype:
                tensor["dtype"] = None
            if tensor["shape"] != shape:
                tensor["shape"] = None
            tensor["chunks"].append(
                {
                    "shard": shard.rank,
                    "offset": [0] * len(shape),
                    "shape": shape,
                    "byte_range": [span.begin, span.end],
                    "digest": shard.tensor_digests[span.name],
                }
            )
    return tensors


def encode(document: Mapping[str, Any]) -> bytes:
    """Return the bytes that are put as `manifest.json`."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest; raises `DamagedError` that names the place and what is wrong."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"the manifest {where} is not JSON", hint="the checkpoint is damaged: `ckptctl verify` names all such"
        ) from error
    try:
        if document["format"] != FORMAT:
            raise DamagedError(
                f"the manifest {where} has format {document['format']!r}, this ckptd reads {FORMAT}",
                hint="install the version of ckptd that wrote it",
            )
        if document["complete"] is not True:
            raise DamagedError(f"the manifest {where} does not say that it is complete")
        return _read(document)
    except KeyError as error:
        raise DamagedError(f"the manifest {where} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedError(f"the manifest {where} can't be used: {error}") from error


def _read(document: Mapping[str, Any]) -> Manifest:
    digests: dict[int, dict[str, str]] = {int(shard["rank"]): {} for shard in document["shards"]}
    for name, tensor in document["tensors"].items():
        for chunk in tensor["chunks"]:
            digests[int(chunk["shard"])][str(name)] = str(chunk["digest"])
    shards = tuple(
        Shard(
            int(shard["rank"]),
            str(shard["file"]),
            int(shard["size_bytes"]),
            str(shard["digest"]),
            digests[int(shard["rank"])],
        )
        for shard in sorted(document["shards"], key=lambda shard: int(shard["rank"]))
    )
    world_size = int(document["world_size"])
    if world_size != len(shards) or any(shard.rank != at for at, shard in enumerate(shards)):
        raise ValueError("it does not list the shards of all ranks")
    parent = document["parent"]
    return Manifest(
        job=str(document["job"]),
        id=CheckpointId(int(document["generation"]), int(document["step"])),
        parent=None if parent is None else CheckpointId(int(parent["generation"]), int(parent["step"])),
        world_size=world_size,
        created_at=float(document["created_at"]),
        shards=shards,
        values={str(key): float(value) for key, value in document["values"].items()},
        document=document,
    )

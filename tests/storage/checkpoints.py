"""Checkpoints for the tests of copies: tensors of several leaves that begin anywhere, and files of earlier ones."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import replace

from ckptd.storage import catalog, image, keys, manifest
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.image import TensorSpec
from ckptd.storage.manifest import Place, ShardContent
from ckptd.storage.memory import MemoryTier
from ckptd.storage.packing import pack
from ckptd.storage.tier import Cost, Tier
from ckptd.types import CheckpointId

JOB = "gpt"
FIRST, LATER = CheckpointId(1, 10), CheckpointId(1, 20)
RANKS = 2
REFERRED = ("weight", "bias")
"""What rank 1 of `LATER` has from the file of `FIRST`."""
_ROWS, _HEAD = (10, LEAF_BYTES // 2 + 1000), (20, LEAF_BYTES + 333)
"""By rank: one is small, to be quick, the other has what a large file may have."""


@functools.cache
def shard(rank: int, seed: int) -> bytes:
    """A complete image; no two of its leaves are alike, nor those of different ranks and seeds."""
    specs = [
        TensorSpec("weight", "F16", (_ROWS[rank], 3)),
        TensorSpec("empty", "F32", (0,)),
        TensorSpec("bias", "F16", (7,)),
        TensorSpec("step", "I64", (1,)),
        TensorSpec("head", "U8", (_HEAD[rank],)),
    ]
    layout = image.plan(specs, 50, {})
    data = bytearray(layout.image_bytes)
    data[: len(layout.header)] = layout.header
    begin = len(layout.header)
    data[begin:] = random.Random(f"{rank} {seed}").randbytes(layout.image_bytes - begin)
    image.write_values(memoryview(data), layout.values, f"values of {rank}".encode())
    return bytes(data)


def commit(tier: Tier, checkpoint: CheckpointId = FIRST, seed: int = 0) -> None:
    """Put a checkpoint of whole images as a flush does."""
    contents = []
    for rank in range(RANKS):
        data = shard(rank, seed)
        tier.put(keys.shard_key(JOB, checkpoint, rank), data)
        contents.append(catalog.describe_shard(rank, memoryview(data)))
    _put_manifest(tier, checkpoint, None, contents)


def commit_referring(tier: Tier) -> None:
    """Put `LATER`, of which rank 1 has some tensors from the file that `FIRST` has of it."""
    whole, changed, earlier = shard(0, 1), bytearray(shard(1, 1)), shard(1, 0)
    layout = image.parse(memoryview(earlier))
    spans = {span.name: span for span in layout.spans}
    for name in REFERRED:
        changed[spans[name].begin : spans[name].end] = earlier[spans[name].begin : spans[name].end]
    packed = pack(memoryview(bytes(changed)), layout, set(REFERRED))
    file = b"".join(packed.parts)
    tier.put(keys.shard_key(JOB, LATER, 0), whole)
    tier.put(keys.shard_key(JOB, LATER, 1), file)
    own = catalog.describe_shard(1, memoryview(file))
    before = catalog.describe_shard(1, memoryview(earlier))
    lies_in = keys.folder(FIRST) + keys.shard_file(1)
    content = ShardContent(
        1,
        replace(own.layout, spans=(*(spans[name] for name in REFERRED), *own.layout.spans)),
        own.size_bytes,
        own.digest,
        {**own.digests, **{name: before.digests[name] for name in REFERRED}},
        {name: Place(lies_in, spans[name].begin, spans[name].end) for name in REFERRED},
    )
    _put_manifest(tier, LATER, FIRST, [catalog.describe_shard(0, memoryview(whole)), content])


def _put_manifest(
    tier: Tier, checkpoint: CheckpointId, parent: CheckpointId | None, contents: list[ShardContent]
) -> None:
    document = manifest.build(JOB, checkpoint, parent, contents, created_at=1.5, values={"loss": 0.25})
    tier.put(keys.manifest_key(JOB, checkpoint), manifest.encode(document), create_only=True)


@functools.cache
def good() -> dict[str, bytes]:
    """Every object of both checkpoints as it was committed, by key; not to be changed."""
    tier = MemoryTier()
    commit(tier)
    commit_referring(tier)
    return {key: data for key, (data, _) in tier.objects.items()}


def fill(tier: Tier, *, only: Callable[[str], bool] = lambda key: True) -> Tier:
    """Put every object of both checkpoints on a tier."""
    for key, data in good().items():
        if only(key):
            tier.put(key, data)
    return tier


def needed(checkpoint: CheckpointId) -> set[str]:
    """The keys of the files that a checkpoint needs."""
    document = good()[keys.manifest_key(JOB, checkpoint)]
    return {f"{JOB}/{file}" for file in catalog.parse_manifest(document, "", JOB, checkpoint).files}


def span(key: str, name: str) -> tuple[int, int]:
    """Where an entry lies in a file."""
    (found,) = [item for item in image.parse(memoryview(good()[key])).spans if item.name == name]
    return found.begin, found.end


def flip(tier: Tier, key: str, at: int) -> None:
    """Flip one bit of an object behind the tier's back."""
    data = bytearray(tier.get(key))
    data[at] ^= 0x10
    tier.put(key, bytes(data))


def is_right(tier: Tier, checkpoint: CheckpointId) -> bool:
    """Whether a tier has what was committed: the manifest, and everything that it needs of each file."""
    key = keys.manifest_key(JOB, checkpoint)
    loaded = catalog.parse_manifest(good()[key], key, JOB, checkpoint)
    own = {shard.file for shard in loaded.shards}
    if tier.get(key) != good()[key] or any(tier.get(f"{JOB}/{file}") != good()[f"{JOB}/{file}"] for file in own):
        return False
    return all(
        tier.get(f"{JOB}/{chunk.file}")[chunk.begin : chunk.end]
        == good()[f"{JOB}/{chunk.file}"][chunk.begin : chunk.end]
        for tensor in loaded.tensors.values()
        for chunk in tensor.chunks
    )


KEY = keys.shard_key(JOB, FIRST, 1)
"""The file that both checkpoints need."""
FILE = KEY.removeprefix(f"{JOB}/")
MANIFEST = keys.manifest_key(JOB, FIRST)


class Bucket(MemoryTier):
    """A tier that is far away, and notes which files are read."""

    name = "bucket"
    capabilities = replace(MemoryTier.capabilities, cost=Cost.NETWORK)

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Note it."""
        self.read.add(key)
        super().read_into(key, offset, into)


def cut(size: int) -> Callable[[Tier, str], None]:
    """Damage that makes a file another size."""

    def damage(tier: Tier, key: str) -> None:
        tier.put(key, (tier.get(key) + b"\0")[:size])

    return damage


DAMAGE: dict[str, Callable[[Tier, str], None]] = {
    "a bit in the header": lambda tier, key: flip(tier, key, 40),
    "a bit in the header's padding": lambda tier, key: flip(tier, key, span(KEY, "step")[0] - 1),
    "a bit in a large tensor": lambda tier, key: flip(tier, key, span(KEY, "weight")[0] + 5_000_000),
    "a bit in a small tensor": lambda tier, key: flip(tier, key, span(KEY, "bias")[0]),
    "a bit in the values": lambda tier, key: flip(tier, key, span(KEY, "__ckptd__.values")[0] + 9),
    "cut": cut(-2),
    "cut to half": cut(len(good()[KEY]) // 2),
    "longer": cut(len(good()[KEY]) + 1),
    "empty": cut(0),
    "missing": lambda tier, key: tier.delete(key),
    "another checkpoint's": lambda tier, key: tier.put(key, shard(1, 9)),
    "zeros": lambda tier, key: tier.put(key, bytes(len(tier.get(key)))),
}
"""Ways to damage `KEY` on a tier."""

"""Import: a checkpoint made of tensors that came from elsewhere.

It is one like any other: a generation of its own, one shard, then the manifest. Every tensor is the whole job's, so any
number of ranks restores it. Memory is bounded: the source is read piece by piece, once for its digests and once to be
put; the second time everything is held against those, so what changes meanwhile is never committed.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from ckptd.errors import ConfigError, RefusedError
from ckptd.storage import catalog, copying, image, keys, manifest
from ckptd.storage.boxes import Shape
from ckptd.storage.checks import checks_of
from ckptd.storage.digest import LEAF_BYTES, TensorDigest, digest, of_leaves, shard_digest
from ckptd.storage.file_stream import TierStream
from ckptd.storage.image import Layout, TensorSpec
from ckptd.storage.keys import check_job
from ckptd.storage.manifest import ShardContent
from ckptd.storage.stream import Buffers, Stream
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId, Piece, TensorSpan

_HOLD_DEADLINE_S = 5.0
WHOLE_STATE = ""
"""In the names of an import, for the group: all that is there is one state."""


class Incoming(NamedTuple):
    """A tensor of the job, and where its elements come from, in row-major order."""

    name: str
    dtype: str
    shape: Shape
    data: Stream


@dataclass(frozen=True, slots=True)
class Cargo:
    """What an importer found."""

    tensors: Sequence[Incoming]
    values: bytes
    """Everything that is no tensor, as the framework writes it that will restore it."""
    metadata: Mapping[str, str]
    """What the shard's header is to say."""
    states: tuple[str, ...]
    """The names that have to be attached."""
    step: int | None = None
    """The step that the source says it is of."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What people should know of it, such as what was left out; a line each."""


class Importer(Protocol):
    """Reads one format."""

    def __call__(self, place: Path, names: Mapping[str, str]) -> AbstractContextManager[Cargo]:
        """Open what lies at `place`, which is a file or a folder, as long as the context lasts.

        `names` says which groups are wanted and which states they are to become; all under their own names when it is
        empty. A single state named for `WHOLE_STATE` takes everything. Raises `StateError` for what can't be imported,
        `DamagedError` for what can't be read, and `ConfigError` for a group that is not there.
        """
        ...


class Imported(NamedTuple):
    """What was committed."""

    id: CheckpointId
    tensors: int
    size_bytes: int


def bring_in(cargo: Cargo, tier: Tier, job: str, step: int) -> Imported:
    """Commit what was found as the only checkpoint of a job.

    Raises `ConfigError` when the job has one already, `FencedError` when somebody else runs or begins that job,
    `DamagedError` when the source changes meanwhile, and what reading and putting raises.
    """
    check_job(job)
    if not tier.capabilities.create_only_put:
        raise RefusedError(
            f"{tier.url} can't tell who comes first, so nothing is imported there",
            hint="import to a folder; a job that names both as its --store uploads it from there",
        )
    if tier.capabilities.exclusive_hold:
        with contextlib.suppress(RefusedError):  # a filesystem without locks
            # Before the look: an agent that runs the job keeps us out, also one that has not committed yet.
            tier.hold(job, _HOLD_DEADLINE_S)
    known = catalog.holdings(tier, job)
    if known.committed:
        raise ConfigError(
            f"job {job} has checkpoints in {tier.url} already, the newest of step {known.committed[-1].step}",
            hint="import under another --job: what is imported begins a job",
        )
    checkpoint = CheckpointId(max(known.parents, default=0) + 1, step)
    now_at = time.time()
    specs = [TensorSpec(t.name, t.dtype, t.shape, Piece(t.name, t.shape, (0,) * len(t.shape))) for t in cargo.tensors]
    layout = image.plan(specs, len(cargo.values), cargo.metadata)
    origin = _Origin(layout, cargo, tier)
    content = _digested(layout, origin)
    document = manifest.encode(
        manifest.build(job, checkpoint, None, [content], created_at=now_at, values=cargo.metrics)
    )
    loaded = manifest.parse(document, "of the import")
    file = keys.shard_key(job, checkpoint, 0)
    checks = checks_of(loaded, headers=True)[loaded.shards[0].file]
    catalog.claim_generation(tier, job, checkpoint.generation, None, now_at)
    tier.put(file, TierStream(origin, file, layout.image_bytes, checks))
    copying.commit(tier, job, checkpoint, document)
    return Imported(checkpoint, len(specs), layout.image_bytes)


class _Origin:
    """An image that is not there yet: header and values in memory, tensors wherever they come from."""

    url = "the import's source"

    def __init__(self, layout: Layout, cargo: Cargo, target: Tier) -> None:
        self.capabilities = target.capabilities  # so units are as large as suits the one who puts them
        sources = {tensor.name: tensor.data for tensor in cargo.tensors}
        span = layout.values
        values = memoryview(bytearray(span.end - span.begin))
        image.write_values(values, TensorSpan(span.name, span.dtype, span.shape, 0, len(values)), cargo.values)
        parts = [Buffers([layout.header]), *(sources[span.name] for span in layout.spans[:-1]), Buffers([values])]
        self._parts: list[Stream] = [part for part in parts if part.size_bytes]
        self._ends = list(accumulate(part.size_bytes for part in self._parts))

    def read_into(self, _key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset` of the image."""
        number, at = bisect_right(self._ends, offset), 0
        while at < len(into):
            part = self._parts[number]
            skip = offset + at - (self._ends[number] - part.size_bytes)
            count = min(part.size_bytes - skip, len(into) - at)
            part.read_into(skip, into[at : at + count])
            number, at = number + 1, at + count


def _digested(layout: Layout, origin: _Origin) -> ShardContent:
    """Read everything once, leaf by leaf."""
    leaf = memoryview(bytearray(LEAF_BYTES))
    found: dict[str, TensorDigest] = {}
    for span in layout.spans:
        values = []
        for begin in range(span.begin, span.end, LEAF_BYTES) or (span.begin,):
            data = leaf[: min(LEAF_BYTES, span.end - begin)]
            origin.read_into("", begin, data)
            values.append(digest(data))
        found[span.name] = of_leaves(values)
    whole = shard_digest(layout.header, [item.value for item in found.values()])
    return ShardContent(0, layout, layout.image_bytes, whole, found)

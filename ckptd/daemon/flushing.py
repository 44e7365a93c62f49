"""The flush of one snapshot: digests and writes of all its shards side by side, on a pool of threads.

What is presumed changed is digested while it is written. What may lie somewhere already is digested first; then
`storage.reuse` says what need not be written, and the rank's file is put together without it.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from ckptd.daemon.digesting import Digesting, Digests
from ckptd.errors import CkptdError
from ckptd.storage import keys, reuse
from ckptd.storage.digest import TensorDigest, shard_digest, tensor_digest
from ckptd.storage.image import VALUES_NAME, Layout
from ckptd.storage.manifest import Place, ShardContent
from ckptd.storage.packing import Packed, pack
from ckptd.storage.reuse import NO_HISTORY, Content, Entry, History, Target
from ckptd.storage.shards import Shards
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.types import CheckpointId

_DIGEST_THREADS = 2
"""Two digest faster than any disk writes; what has to be known before anything is written gets more."""


class Where(NamedTuple):
    """Where a flush writes, and how fast it may."""

    tier: Tier
    job: str
    checkpoint: CheckpointId
    pace: Pace | None

    def put(self, rank: int, data: Data) -> None:
        """Write a rank's file."""
        self.tier.put(keys.shard_key(self.job, self.checkpoint, rank), data, pace=self.pace)

    def file(self, rank: int) -> str:
        """Return the name of a rank's file, seen from the job's folder."""
        return keys.folder(self.checkpoint) + keys.shard_file(rank)


class Held(NamedTuple):
    """What a checkpoint holds or refers to."""

    contents: AbstractSet[Content]
    places: Callable[[], Mapping[Content, Place]]
    """Where all of it lies. Made when it is asked for: where everything changes, nobody does."""


NOTHING_HELD = Held(frozenset(), dict)


class Known(NamedTuple):
    """What a flush may refer to, and what helps to predict what it will."""

    earlier: Held
    file_bytes: Mapping[str, int]
    """Sizes of the files in `earlier`."""
    history: History


class Described(NamedTuple):
    """A snapshot as a manifest describes it."""

    shards: tuple[ShardContent, ...]
    """By rising rank, of their entries only the values."""
    tensors: bytes
    """The text of all others."""


@dataclass(frozen=True, slots=True)
class Flushed:
    """What became of every shard."""

    stored: Described
    """As the tier has them."""
    in_memory: Described
    """As the slots have them."""
    file_bytes: Mapping[str, int]
    """The size of every file that holds any of it."""
    held: Held
    """What the next flush may refer to."""
    history: History


def flush(
    where: Where,
    images: Mapping[int, memoryview],
    shards: Shards,
    known: Known | None,
    pool: Executor,
) -> Flushed:
    """Make every shard of a snapshot durable; with `known` None every file is the slot's image.

    Raises the first error when every part has ended. Its traceback refers to slots, until `forget_frames`.
    """
    doubtful = (
        frozenset[Entry]() if known is None else reuse.doubtful(shards.spans, known.earlier.contents, known.history)
    )
    undecided = {entry.rank for entry in doubtful}
    of_doubtful, of_others = shards.split_leaves(doubtful)
    targets: Mapping[Entry, Target] = {}
    work: list[Future[None]] = []
    try:
        first = Digesting(images, of_doubtful, pool, max(_DIGEST_THREADS, len(images)))
        work += first.futures
        # Before the writes, which take longer: else they would keep digests out of a small pool until they are done.
        others = Digesting(images, of_others, pool, _DIGEST_THREADS)
        work += others.futures
        work += [pool.submit(where.put, rank, images[rank]) for rank in images if rank not in undecided]
        wait(first.futures)
        digests = first.found()
        if known is not None and doubtful:
            image_bytes = {rank: layout.image_bytes for rank, layout in shards.layouts.items()}
            contents = shards.contents(digests.values)
            targets = reuse.decide(contents, known.earlier.places(), known.file_bytes, image_bytes)
        packed = _pack(images, shards, targets)
        for rank in sorted(undecided):
            work.append(pool.submit(where.put, rank, packed[rank].parts if rank in packed else images[rank]))
        wait(others.futures)
        flushed = _describe(where, shards, digests | others.found(), known, packed=packed, targets=targets)
    finally:
        wait(work)
    for item in work:
        item.result()
    return flushed


def _pack(images: Mapping[int, memoryview], shards: Shards, targets: Mapping[Entry, Target]) -> dict[int, Packed]:
    left_out: dict[int, set[str]] = defaultdict(set)
    for rank, name in targets:
        left_out[rank].add(name)
    return {rank: pack(images[rank], shards.layouts[rank], names) for rank, names in left_out.items()}


def _describe(
    where: Where,
    shards: Shards,
    digests: Digests,
    known: Known | None,
    *,
    packed: Mapping[int, Packed],
    targets: Mapping[Entry, Target],
) -> Flushed:
    """Work out what is kept of a flush, best while the files are being written."""
    files = {rank: where.file(rank) for rank in shards.layouts}
    places = _places(shards, files, packed, targets)
    in_memory = describe(shards, digests)
    stored = in_memory
    if packed:
        as_stored = {rank: _packed(rank, file, digests) for rank, file in packed.items()}
        of_all = tuple(as_stored.get(shard.rank, shard) for shard in in_memory.shards)
        stored = Described(of_all, shards.template.text(digests.values, digests.leaves, places))
    file_bytes = {files[shard.rank]: shard.size_bytes for shard in stored.shards}
    if known is None:
        return Flushed(stored, in_memory, file_bytes, NOTHING_HELD, NO_HISTORY)
    referred = {target.file for target in targets.values() if isinstance(target, Place)}
    file_bytes |= {file: size for file, size in known.file_bytes.items() if file in referred}
    contents = shards.contents(digests.values)
    held = Held(set(contents.values()), partial(_held, shards, files, places, contents))
    return Flushed(
        stored, in_memory, file_bytes, held, reuse.history_of(shards.spans, contents, known.earlier.contents)
    )


def describe(shards: Shards, digests: Digests | None) -> Described:
    """Describe images that lie in memory; without digests it has none."""
    values, leaves = digests or (None, {})
    contents = []
    for rank, layout in shards.layouts.items():
        found: dict[str, TensorDigest] = {}
        whole = None
        if values is not None:
            own = [values[entry] for entry in shards.entries[rank]]
            whole = shard_digest(layout.header, own)
            found = {VALUES_NAME: TensorDigest(own[-1], tuple(leaves.get(shards.entries[rank][-1], ())))}
        contents.append(ShardContent(rank, _values_only(layout), layout.image_bytes, whole, found))
    return Described(tuple(contents), shards.template.text(values, leaves, {}))


def _values_only(layout: Layout) -> Layout:
    return replace(layout, spans=layout.spans[-1:])


def _packed(rank: int, file: Packed, digests: Digests) -> ShardContent:
    """Describe a file that was put together."""
    layout = file.layout
    values = tensor_digest(memoryview(file.values))
    tensors = [digests.values[Entry(rank, span.name)] for span in layout.spans[:-1]]
    whole = shard_digest(layout.header, [*tensors, values.value])
    return ShardContent(rank, _values_only(layout), layout.image_bytes, whole, {VALUES_NAME: values})


def _places(
    shards: Shards, files: Mapping[int, str], packed: Mapping[int, Packed], targets: Mapping[Entry, Target]
) -> dict[Entry, Place]:
    """Return where everything lies of the ranks whose files were put together."""
    places = {
        Entry(rank, span.name): Place(None, span.begin, span.end)
        for rank, file in packed.items()
        for span in file.layout.spans[:-1]
    }
    for entry, target in targets.items():
        if isinstance(target, Place):
            places[entry] = target
        else:
            held = places.get(target) or shards.spans[target]
            places[entry] = Place(files[target.rank], held.begin, held.end)
    return places


def _held(
    shards: Shards, files: Mapping[int, str], places: Mapping[Entry, Place], contents: Mapping[Entry, Content]
) -> dict[Content, Place]:
    """Return where everything lies that can be referred to; of what ranks have alike, where the lowest has it."""
    found: dict[Content, Place] = {}
    for entry, content in contents.items():
        if content in found:
            continue
        place = places.get(entry)
        if place is None or place.file is None:
            lies = place or shards.spans[entry]
            place = Place(files[entry.rank], lies.begin, lies.end)
        found[content] = place
    return found


def forget_frames(error: CkptdError) -> None:
    """Let go of what the frames of an error, and of those that led to it, refer to: it may outlive the slots."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__

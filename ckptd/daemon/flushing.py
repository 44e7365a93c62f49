"""The flush of one snapshot: digests and writes of all its shards side by side, on a pool of threads.

What is presumed changed is digested while it is written. What may lie somewhere already is digested first; then
`storage.reuse` says what need not be written, and the rank's file is put together without it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from typing import NamedTuple

from ckptd.daemon.digesting import Digesting
from ckptd.errors import CkptdError
from ckptd.storage import image, keys, reuse
from ckptd.storage.digest import TensorDigest, shard_digest, tensor_digest
from ckptd.storage.image import VALUES_NAME, Layout
from ckptd.storage.manifest import Place, ShardContent
from ckptd.storage.packing import Packed, pack
from ckptd.storage.reuse import Content, Entry, History, Target
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.types import CheckpointId, TensorSpan

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


class Known(NamedTuple):
    """What a flush may refer to, and what helps to predict what it will."""

    earlier: Mapping[Content, Place]
    file_bytes: Mapping[str, int]
    """Sizes of the files in `earlier`."""
    history: History


@dataclass(frozen=True, slots=True)
class Flushed:
    """What became of every shard."""

    stored: tuple[ShardContent, ...]
    """As the tier has them."""
    in_memory: tuple[ShardContent, ...]
    """As the slots have them."""
    contents: Mapping[Entry, Content]
    """All entries with bytes, the values blobs left out."""


class Shards(NamedTuple):
    """How the images of a snapshot are laid out; mostly the same as that of the snapshot before."""

    layouts: Mapping[int, Layout]
    """By rising rank."""
    entries: Mapping[Entry, TensorSpan]
    """Everything in them, in the order of ranks and images."""


def shards_of(images: Mapping[int, memoryview], before: Shards) -> Shards:
    """Return the layouts of images; what is still as it was `before` is not read again."""
    layouts = {rank: _layout(data, before.layouts.get(rank)) for rank, data in sorted(images.items())}
    if layouts.keys() == before.layouts.keys() and all(layouts[rank] is before.layouts[rank] for rank in layouts):
        return before
    entries = {Entry(rank, span.name): span for rank, layout in layouts.items() for span in layout.spans}
    return Shards(layouts, entries)


def _layout(data: memoryview, before: Layout | None) -> Layout:
    if before is None or len(data) < before.image_bytes or bytes(data[: len(before.header)]) != before.header:
        return image.parse(data)
    return before


def flush(
    where: Where,
    images: Mapping[int, memoryview],
    shards: Shards,
    known: Known | None,
    pool: Executor,
) -> Flushed:
    """Make every shard of a snapshot durable; with `known` None every file is the slot's image.

    Raises the first error when every part has ended, and keeps no view of a slot, not even in its traceback.
    """
    try:
        return _flush(where, images, shards, known, pool)
    except CkptdError as error:
        _forget_frames(error)
        raise
    finally:
        del images


def _flush(
    where: Where,
    images: Mapping[int, memoryview],
    shards: Shards,
    known: Known | None,
    pool: Executor,
) -> Flushed:
    layouts, entries = shards
    first_of_all = {} if known is None else reuse.doubtful(entries, known.earlier, known.history)
    packed: dict[int, Packed] = {}
    targets: Mapping[Entry, Target] = {}
    work: list[Future[None]] = []
    try:
        doubtful = Digesting(images, first_of_all, pool, max(_DIGEST_THREADS, len(images)))
        work += doubtful.futures
        # Before the writes, which take longer: else they would keep digests out of a small pool until they are done.
        presumed_changed = {entry: span for entry, span in entries.items() if entry not in first_of_all}
        others = Digesting(images, presumed_changed, pool, _DIGEST_THREADS)
        work += others.futures
        undecided = {entry.rank for entry in first_of_all}
        work += [pool.submit(where.put, rank, images[rank]) for rank in layouts if rank not in undecided]
        wait(doubtful.futures)
        if known is not None:
            contents = _contents(first_of_all, doubtful.found())
            image_bytes = {rank: layout.image_bytes for rank, layout in layouts.items()}
            targets = reuse.decide(contents, known.earlier, known.file_bytes, image_bytes)
        for rank in sorted(undecided):
            left_out = {entry.name for entry in targets if entry.rank == rank}
            if left_out:
                packed[rank] = pack(images[rank], layouts[rank], left_out)
            work.append(pool.submit(where.put, rank, packed[rank].parts if left_out else images[rank]))
    finally:
        wait(work)
    for item in work:
        item.result()
    digests = doubtful.found() | others.found()
    in_memory = [content_of(rank, layout, digests) for rank, layout in layouts.items()]
    return Flushed(
        tuple(_stored(where, in_memory, packed, targets)),
        tuple(in_memory),
        _contents(entries, digests),
    )


def content_of(rank: int, layout: Layout, digests: Mapping[Entry, TensorDigest]) -> ShardContent:
    """Return what is known of a shard that lies in memory as its layout says; without digests it has none."""
    by_name = {span.name: digests[Entry(rank, span.name)] for span in layout.spans} if digests else {}
    whole = shard_digest(layout.header, [found.value for found in by_name.values()]) if digests else None
    return ShardContent(rank, layout, layout.image_bytes, whole, by_name)


def _contents(entries: Mapping[Entry, TensorSpan], digests: Mapping[Entry, TensorDigest]) -> dict[Entry, Content]:
    return {
        entry: Content(span.dtype, span.end - span.begin, digests[entry].value)
        for entry, span in entries.items()
        if span.end > span.begin and entry.name != VALUES_NAME
    }


def _stored(
    where: Where, in_memory: Sequence[ShardContent], packed: Mapping[int, Packed], targets: Mapping[Entry, Target]
) -> Iterator[ShardContent]:
    """Yield the shards as their files have them, by rising rank, from how they are in memory."""
    owners = {target for target in targets.values() if isinstance(target, Entry)}
    held: dict[Entry, Place] = {}
    for content in in_memory:
        rank, file = content.rank, packed.get(content.rank)
        layout = content.layout if file is None else file.layout
        if owners:
            own_file = where.file(rank)
            lies = {Entry(rank, span.name): Place(own_file, span.begin, span.end) for span in layout.spans}
            held |= {entry: place for entry, place in lies.items() if entry in owners}
        if file is None:
            yield content
            continue
        digests = {**content.digests, VALUES_NAME: tensor_digest(memoryview(file.values))}
        places = {span.name: Place(None, span.begin, span.end) for span in layout.spans}
        for entry, target in targets.items():
            if entry.rank == rank:
                places[entry.name] = target if isinstance(target, Place) else held[target]
        whole = shard_digest(layout.header, [digests[span.name].value for span in layout.spans])
        as_stored = replace(content.layout, spans=(*content.layout.spans[:-1], layout.values))
        yield ShardContent(rank, as_stored, layout.image_bytes, whole, digests, places)


def _forget_frames(error: CkptdError) -> None:
    """Let go of what the frames of an error, and of those that led to it, refer to: it may outlive the slots."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__

"""What need not be written again: bytes that an earlier checkpoint of the tier holds, or a lower rank of this one.

Bytes are the same when digest, size and dtype are. A reference always names the file that really holds the bytes, so
no chain of references grows. Two rules keep references from costing more than they save.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import compress
from operator import itemgetter
from typing import NamedTuple

from ckptd.storage.image import VALUES_NAME
from ckptd.storage.manifest import Manifest, Place
from ckptd.types import TensorSpan

MIN_REFERRED_SHARE = 0.25
"""An earlier file is referred to only when at least this share of its bytes is: a file lives as long as anything names
it, and a few small leftovers would keep a large dead file alive. So files hold at most four times what is needed."""

MIN_SAVED_SHARE = 0.05
"""A rank refers to anything only when it saves at least this share of its image: an image is written from where it
lies, a file that lacks a part of it has to be put together."""


class Entry(NamedTuple):
    """One entry of one rank's image."""

    rank: int
    name: str


Content = str
"""What makes two tensors' bytes the same: their digest, and then their `kind`.

One string, since the collector of garbage follows tuples: 10,000 new ones would set it off at each flush."""


def kind(dtype: str, size_bytes: int) -> str:
    """Return what of a content is known before it is digested."""
    return f" {dtype} {size_bytes}"


def size_bytes(content: Content) -> int:
    """Return how many bytes there are of a content."""
    return int(content[content.rindex(" ") :])


Target = Place | Entry
"""Where an entry's bytes are found: in an earlier checkpoint's file, or with a lower rank of the same checkpoint."""


class History(NamedTuple):
    """What was found when the same job was last flushed."""

    spans: Mapping[Entry, TensorSpan]
    """All entries that there were."""
    repeated: Collection[Entry]
    """Those whose bytes were also in an earlier checkpoint, or with another rank."""


NO_HISTORY = History({}, frozenset())


def stored_contents(loaded: Manifest) -> dict[Content, Place]:
    """Return what a checkpoint holds or refers to, and where it really lies; values blobs are not among it."""
    found: dict[Content, Place] = {}
    for tensor in loaded.tensors.values():
        if tensor.name == VALUES_NAME:
            continue
        for chunk in tensor.chunks:
            size = chunk.end - chunk.begin
            if size and chunk.digest is not None:
                content = chunk.digest + kind(chunk.dtype, size)
                found.setdefault(content, Place(chunk.file, chunk.begin, chunk.end))
    return found


def doubtful(spans: Mapping[Entry, TensorSpan], earlier: Collection[Content], history: History) -> Collection[Entry]:
    """Predict which entries may turn out to be somewhere already; all others are presumed changed.

    A doubtful entry is digested before anything of its file is written, any other while it is. What was repeated the
    last time is doubtful; without a history, what an earlier checkpoint has one of the same dtype and size of, and
    what several ranks keep under one name.
    """
    if spans is history.spans:
        return history.repeated
    kinds = {content[content.index(" ") :] for content in earlier}
    names = Counter(entry.name for entry, span in spans.items() if span.piece is None)
    found = set()
    for entry, span in spans.items():
        size = span.end - span.begin
        if not size or entry.name == VALUES_NAME:
            continue
        seen = history.spans.get(entry)
        if seen is not None and seen.end - seen.begin == size and seen.dtype == span.dtype:
            is_doubtful = entry in history.repeated
        else:
            is_doubtful = kind(span.dtype, size) in kinds or names[entry.name] > 1
        if is_doubtful:
            found.add(entry)
    return found


def history_of(
    spans: Mapping[Entry, TensorSpan], contents: Mapping[Entry, Content], earlier: AbstractSet[Content]
) -> History:
    """Return what a flush teaches about the next one; `contents` are those of all `spans` that can be compared.

    That is nothing when there was no earlier checkpoint to compare with.
    """
    if not earlier:
        return NO_HISTORY
    different = set(contents.values())
    known = different & earlier
    if len(different) < len(contents):
        ranks: dict[Content, int] = {}
        known |= {content for entry, content in contents.items() if ranks.setdefault(content, entry.rank) != entry.rank}
    return History(spans, set(compress(contents, map(known.__contains__, contents.values()))) if known else set())


def decide(
    contents: Mapping[Entry, Content],
    earlier: Mapping[Content, Place],
    file_bytes: Mapping[str, int],
    image_bytes: Mapping[int, int],
) -> dict[Entry, Target]:
    """Return which entries are not written, and where their bytes are found.

    `contents` are the entries in question, `earlier` what the previous checkpoint holds or refers to, `file_bytes` the
    sizes of its files (one without a size is not used), `image_bytes` those of the images by rank.
    """
    entries = sorted(contents, key=itemgetter(0))  # by rank, which they mostly are already
    files, ranks = set(file_bytes), set(image_bytes)
    while True:
        targets = _match(entries, contents, earlier, files, ranks)
        weak_files = _weak_files(targets, file_bytes)
        weak_ranks = _weak_ranks(targets, contents, image_bytes)
        if weak_files:
            files -= weak_files
        elif weak_ranks:
            ranks -= weak_ranks
        else:
            return targets


def _match(
    entries: Sequence[Entry],
    contents: Mapping[Entry, Content],
    earlier: Mapping[Content, Place],
    files: set[str],
    ranks: set[int],
) -> dict[Entry, Target]:
    targets: dict[Entry, Target] = {}
    owners: dict[Content, Entry] = {}
    for entry in entries:
        content = contents[entry]
        if entry.rank in ranks:
            place = earlier.get(content)
            if place is not None and place.file in files:
                targets[entry] = place
                continue
            owner = owners.get(content)
            if owner is not None and owner.rank < entry.rank:
                targets[entry] = owner
                continue
        owners.setdefault(content, entry)
    return targets


def _weak_files(targets: Mapping[Entry, Target], file_bytes: Mapping[str, int]) -> set[str]:
    used: dict[str, int] = defaultdict(int)
    for file, begin, end in {target for target in targets.values() if isinstance(target, Place)}:
        if file is not None:
            used[file] += end - begin
    return {file for file, size in used.items() if size < MIN_REFERRED_SHARE * file_bytes[file]}


def _weak_ranks(
    targets: Mapping[Entry, Target], contents: Mapping[Entry, Content], image_bytes: Mapping[int, int]
) -> set[int]:
    saved: dict[int, int] = defaultdict(int)
    for entry in targets:
        saved[entry.rank] += size_bytes(contents[entry])
    return {rank for rank, size in saved.items() if size < MIN_SAVED_SHARE * image_bytes[rank]}

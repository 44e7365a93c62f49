"""What a job's agent does with a tier: plain blocking calls, made in threads.

Nothing here touches the agent's state. A flush and a prune may run side by side; what they share is the few fields of
`JobStore` that its lock guards.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ckptd.core.events import Flush
from ckptd.daemon import flushing
from ckptd.daemon.flushing import NOTHING_HELD, Described, Flushed, Held, Known, Where
from ckptd.errors import CkptdError, DamagedError, FencedError, NotFoundError
from ckptd.storage import catalog, keys, manifest, template
from ckptd.storage.manifest import Manifest
from ckptd.storage.reuse import NO_HISTORY, stored_contents
from ckptd.storage.shards import Shards, shards_of
from ckptd.storage.tier import Pace, Tier
from ckptd.types import CheckpointId


@dataclass(frozen=True, slots=True)
class FlushResult:
    """A checkpoint that was committed."""

    size_bytes: int
    """What was written: unchanged tensors that are referred to are not in it."""
    seconds: float
    document: bytes
    """The manifest of the same snapshot as the slots hold it, with its digests."""


@dataclass(frozen=True, slots=True)
class _Earlier:
    """A committed checkpoint that the next one may refer to."""

    id: CheckpointId
    file_bytes: Mapping[str, int]
    """The size of every file that it needs, its own and others."""
    held: Held


class JobStore:
    """One job on one tier. One flush at a time; every other call may be made at any time, from any thread.

    With `reuse` false every file is the slot's image and nothing is referred to. `pace` is asked before bytes are
    written.
    """

    def __init__(self, tier: Tier, job: str, pool: Executor, *, reuse: bool = True, pace: Pace | None = None) -> None:
        self.tier = tier
        self._job = job
        self._pool = pool
        self._reuse = reuse
        self._pace = pace
        self._lock = threading.Lock()
        self._generation = 0
        """The newest that we know to be ours."""
        self._files: dict[CheckpointId, frozenset[str]] = {}
        """What committed checkpoints need, of those that were read or written."""
        self._earlier: _Earlier | None = None
        self._in_flight: CheckpointId | None = None
        self._needed: frozenset[str] = frozenset()
        """What the flush in flight may refer to."""
        self._expected: dict[CheckpointId, frozenset[str]] = {}
        """What checkpoints that come from another tier need."""
        self._pruning: frozenset[CheckpointId] = frozenset()
        self._history = NO_HISTORY
        self._shards = Shards({})
        """Of the last flush's images; the next ones mostly have the same."""

    # --- the job on the tier ------------------------------------------------------------------------------------

    def claim(self, generation: int, parent: CheckpointId | None) -> bool:
        """Record a generation on the tier; return False when somebody else has that number."""
        try:
            catalog.claim_generation(self.tier, self._job, generation, parent, time.time())
        except FencedError:
            return False
        self._own(generation)
        return True

    def generations(self) -> frozenset[int]:
        """Return the generations that the tier has a record of."""
        return catalog.listing(self.tier, self._job).generations

    def record(self, generation: int) -> bytes:
        """Return what `claim` has put."""
        return self.tier.get(keys.generation_key(self._job, generation))

    def adopt(self, generation: int, record: bytes) -> None:
        """Claim a generation that is ours on another tier, with the record from there; an equal one is ours as well.

        Raises `FencedError` when somebody else has that number here.
        """
        key = keys.generation_key(self._job, generation)
        create_only = self.tier.capabilities.create_only_put
        is_there = not create_only and self._holds(key)
        if not is_there:
            try:
                self.tier.put(key, record, create_only=create_only)
            except FencedError:
                is_there = True
        if is_there and self.tier.get(key) != record:
            raise FencedError(
                f"generation {generation} of job {self._job} is somebody else's on {self.tier.url}",
                hint="two agents run the job, each with a disk of its own: stop one of them",
            )
        self._own(generation)

    def _own(self, generation: int) -> None:
        with self._lock:
            self._generation = max(self._generation, generation)

    def _holds(self, key: str) -> bool:
        try:
            self.tier.size_bytes(key)
        except NotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def expecting(self, checkpoint: CheckpointId, files: Collection[str]) -> Iterator[None]:
        """Keep every prune away from files of a checkpoint that is on its way here from another tier."""
        with self._lock:
            self._expected[checkpoint] = frozenset(files)
        try:
            yield
        finally:
            with self._lock:
                del self._expected[checkpoint]

    # --- restore ------------------------------------------------------------------------------------------------

    def check_offer(self, checkpoint: CheckpointId) -> bytes:
        """Return the manifest of a checkpoint, ready to be offered, when every file that it needs is there.

        Sizes are compared, nothing is read: whoever reads the bytes checks them. Raises `NotFoundError` or
        `DamagedError` that names the file.
        """
        loaded = self._load(checkpoint)
        needed = {shard.file: shard.size_bytes for shard in loaded.shards}
        own = set(needed)
        for tensor in loaded.tensors.values():
            for chunk in tensor.chunks:
                if chunk.end > needed.get(chunk.file, -1):
                    needed[chunk.file] = chunk.end
        for file, size in needed.items():
            found = self.tier.size_bytes(f"{self._job}/{file}")
            if found < size or (file in own and found != size):
                raise DamagedError(
                    f"{self.tier.url}/{self._job}/{file} has {found} bytes, the manifest of {checkpoint} needs {size}",
                    hint=f"`ckptctl verify {self._job} {checkpoint.step}` names everything that is damaged",
                )
        return manifest.encode(loaded.document)

    def open(self, file: str) -> int:
        """Return a descriptor of a file that is named as seen from the job's folder; the caller closes it.

        Raises `NotFoundError` for what is not there, and for what is no file of a checkpoint of this job.
        """
        if not keys.is_shard_file(file):
            raise NotFoundError(f"job {self._job} has no file {file!r}")
        return self.tier.open(f"{self._job}/{file}")

    def _load(self, checkpoint: CheckpointId) -> Manifest:
        loaded = catalog.load_manifest(self.tier, self._job, checkpoint)
        with self._lock:
            self._files[checkpoint] = loaded.files
        return loaded

    # --- flush --------------------------------------------------------------------------------------------------

    def flush(self, order: Flush, images: Mapping[int, memoryview]) -> FlushResult:
        """Make every shard of a snapshot durable, then commit it with its manifest.

        Raises the first error when every part has ended. Neither it nor anything else refers to a slot then.
        """
        begin_s = time.monotonic()
        key = keys.manifest_key(self._job, order.id)
        try:
            known = self._begin(order)
            self._refuse_committed(key)
            where = Where(self.tier, self._job, order.id, self._pace)
            self._shards = shards_of(images, self._shards)
            flushed = flushing.flush(where, images, self._shards, known, self._pool)
            document = self._document(order, flushed.stored)
            self.tier.put(key, document, create_only=True)
            self._remember(order.id, flushed)
        except CkptdError as error:
            flushing.forget_frames(error)
            raise
        finally:
            del images  # an error's traceback must not keep them
            with self._lock:
                self._in_flight, self._needed = None, frozenset()
        written_bytes = sum(shard.size_bytes for shard in flushed.stored.shards)
        seconds = time.monotonic() - begin_s
        if flushed.stored is not flushed.in_memory:
            document = self._document(order, flushed.in_memory)
        return FlushResult(written_bytes, seconds, document)

    def snapshot_document(self, order: Flush, images: Mapping[int, memoryview]) -> bytes:
        """Return the manifest of a snapshot that lies in slots and was not digested; its files are the slots.

        Raises `DamagedError` when a slot holds no image, `StateError` when the ranks' images don't fit together.
        """
        try:
            return self._document(order, flushing.describe(shards_of(images, self._shards), None))
        except CkptdError as error:
            flushing.forget_frames(error)
            raise
        finally:
            del images

    def _document(self, order: Flush, described: Described) -> bytes:
        document = manifest.build(
            self._job, order.id, order.parent, described.shards, created_at=time.time(), values=order.values
        )
        return template.encode(document, described.tensors)

    def _begin(self, order: Flush) -> Known | None:
        """Fix what a flush may refer to, so that no prune removes it meanwhile."""
        with self._lock:
            self._generation = max(self._generation, order.id.generation)
            self._in_flight = order.id
            if not self._reuse:
                return None
            earlier = self._earlier
            if earlier is None or (earlier.id.generation != order.id.generation and earlier.id != order.parent):
                self._earlier, self._history = self._read_earlier(order.parent), NO_HISTORY
                earlier = self._earlier
            if earlier is None:
                return Known(NOTHING_HELD, {}, self._history)
            self._needed = frozenset(earlier.file_bytes)
            return Known(earlier.held, earlier.file_bytes, self._history)

    def _read_earlier(self, parent: CheckpointId | None) -> _Earlier | None:
        """Read what a generation began with; what can't be read is not referred to, and no more harm than that."""
        if parent is None or parent in self._pruning:
            return None
        try:
            loaded = catalog.load_manifest(self.tier, self._job, parent)
            sizes = {file: self.tier.size_bytes(f"{self._job}/{file}") for file in loaded.files}
        except CkptdError:
            return None
        self._files[parent] = loaded.files
        found = stored_contents(loaded)
        return _Earlier(parent, sizes, Held(found.keys(), lambda: found))

    def _refuse_committed(self, key: str) -> None:
        """Raise `FencedError` when a checkpoint stands: a second attempt might write its files in another way."""
        if self._holds(key):
            raise FencedError(f"{self.tier.url}/{key} exists already")

    def _remember(self, checkpoint: CheckpointId, flushed: Flushed) -> None:
        """Keep what the next flush may refer to, and what a prune must not remove."""
        with self._lock:
            self._files[checkpoint] = frozenset(flushed.file_bytes)
            self._earlier = _Earlier(checkpoint, flushed.file_bytes, flushed.held)
            self._history = flushed.history

    # --- prune --------------------------------------------------------------------------------------------------

    def prune(self, ids: Sequence[CheckpointId], kept: Collection[CheckpointId]) -> CkptdError | None:
        """Remove checkpoints, and every file that no remaining one needs; return what went wrong, if anything.

        What remains is what is committed on the tier and not in `ids`, and `kept`. When the manifest of any of it
        can't be read, nothing is removed, since it may name any file. Neither is anything removed when somebody has
        claimed a newer generation, whose checkpoints may refer to anything: that is a `FencedError`. A checkpoint
        that can't be removed does not keep the others.

        Files of checkpoints that were never committed, older than the newest that is, go too.
        """
        removed = frozenset(ids)
        if not removed:
            return None
        with self._lock:
            self._pruning |= removed
            if self._earlier is not None and self._earlier.id in removed:
                self._earlier = None
            self._generation = max([self._generation, *(checkpoint.generation for checkpoint in (*ids, *kept))])
        try:
            return self._prune(removed, kept)
        except CkptdError as error:
            return error
        finally:
            with self._lock:
                self._pruning -= removed

    def _prune(self, removed: frozenset[CheckpointId], kept: Collection[CheckpointId]) -> CkptdError | None:
        with self._lock:
            known_before = set(self._files)
        listed = catalog.listing(self.tier, self._job)
        newest = max(listed.generations, default=0)
        if newest > self._generation:
            raise FencedError(
                f"generation {newest} of job {self._job} is claimed on {self.tier.url}, this is {self._generation}",
                hint="another agent runs the job: what it needs is not known here, so nothing is pruned",
            )
        remaining = (listed.committed | frozenset(kept)) - removed
        with self._lock:
            for gone in known_before - listed.committed:
                self._files.pop(gone, None)
        for checkpoint in sorted(remaining):
            self._note_files(checkpoint)
        failures: list[CkptdError] = []
        for checkpoint in sorted(removed):
            try:
                self.tier.delete(keys.manifest_key(self._job, checkpoint))
            except CkptdError as error:
                failures.append(error)
                self._note_files(checkpoint)
            else:
                with self._lock:
                    self._files.pop(checkpoint, None)
        newest_committed = max(remaining | removed)
        for file, checkpoint in listed.files.items():
            is_left_over = checkpoint < newest_committed and checkpoint not in listed.committed
            if checkpoint in removed or is_left_over:
                failures += self._delete_unless_needed(file, checkpoint)
        return failures[-1] if failures else None

    def _note_files(self, checkpoint: CheckpointId) -> None:
        """Read what a checkpoint needs, unless it is known; one that is not there needs nothing."""
        with self._lock:
            if checkpoint in self._files:
                return
        with contextlib.suppress(NotFoundError):
            self._load(checkpoint)

    def _delete_unless_needed(self, file: str, checkpoint: CheckpointId) -> list[CkptdError]:
        with self._lock:  # held for the delete, so that no flush begins to need the file meanwhile
            if (
                checkpoint == self._in_flight
                or file in self._needed
                or any(file in needed for needed in (*self._files.values(), *self._expected.values()))
            ):
                return []
            try:
                self.tier.delete(f"{self._job}/{file}")
            except CkptdError as error:
                return [error]
            return []

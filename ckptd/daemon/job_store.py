"""What a job's agent does with a tier: plain blocking calls, made in threads.

Nothing here touches the agent's state. A flush and a prune may run side by side; what they share is in `Needs`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from ckptd.core.events import Flush
from ckptd.daemon import flushing
from ckptd.daemon.flushing import NOTHING_HELD, Described, Flushed, Held, Known, Where
from ckptd.errors import CkptdError, DamagedError, FencedError, NotFoundError
from ckptd.pruning.needs import Needs
from ckptd.pruning.prune import GARBAGE_AFTER_S, Pruning
from ckptd.storage import catalog, keys, manifest, template
from ckptd.storage.removing import holds
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

    def __init__(
        self,
        tier: Tier,
        job: str,
        pool: Executor,
        *,
        reuse: bool = True,
        pace: Pace | None = None,
        grace_s: float = 0.0,
        garbage_after_s: float = GARBAGE_AFTER_S,
    ) -> None:
        self.tier = tier
        self._job = job
        self._pool = pool
        self._reuse = reuse
        self._pace = pace
        self.needs = Needs(tier, job)
        self.pruning = Pruning(tier, job, self.needs, grace_s=grace_s, garbage_after_s=garbage_after_s)
        self._earlier: _Earlier | None = None
        self._history = NO_HISTORY
        self._shards = Shards({})
        """Of the last flush's images; the next ones mostly have the same."""

    # --- the job on the tier ------------------------------------------------------------------------------------

    def claim(self, generation: int, parent: CheckpointId | None) -> bool:
        """Record a generation on the tier; return False when somebody else has that number."""
        with self.needs.claiming(generation):
            try:
                catalog.claim_generation(self.tier, self._job, generation, parent, time.time())
            except FencedError:
                return False
            self.needs.own(generation)
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
        with self.needs.claiming(generation):
            if not self._put_record(generation, record):
                raise FencedError(
                    f"generation {generation} of job {self._job} is somebody else's on {self.tier.url}",
                    hint="two agents run the job, each with a disk of its own: stop one of them",
                )
            self.needs.own(generation)

    def _put_record(self, generation: int, record: bytes) -> bool:
        """Put the record of a generation; return False when another one stands."""
        key = keys.generation_key(self._job, generation)
        create_only = self.tier.capabilities.create_only_put
        if create_only or not holds(self.tier, key):
            try:
                self.tier.put(key, record, create_only=create_only)
            except FencedError:
                pass
            else:
                return True
        return self.tier.get(key) == record

    # --- restore ------------------------------------------------------------------------------------------------

    def check_offer(self, checkpoint: CheckpointId) -> bytes:
        """Return the manifest of a checkpoint, ready to be offered, when every file that it needs is there.

        Sizes are compared, nothing is read: whoever reads the bytes checks them. Raises `NotFoundError` or
        `DamagedError` that names the file.
        """
        loaded = self.needs.load(checkpoint)
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

    # --- flush --------------------------------------------------------------------------------------------------

    def flush(self, order: Flush, images: Mapping[int, memoryview]) -> FlushResult:
        """Make every shard of a snapshot durable, then commit it with its manifest.

        Raises the first error when every part has ended. Neither it nor anything else refers to a slot then. It is a
        `FencedError` when somebody else has claimed a newer generation here.
        """
        begin_s = time.monotonic()
        key = keys.manifest_key(self._job, order.id)
        try:
            known = self._begin(order)
            self._refuse_committed(key)
            self.needs.refuse_newer()  # before everything is written, and again before it counts
            where = Where(self.tier, self._job, order.id, self._pace)
            self._shards = shards_of(images, self._shards)
            flushed = flushing.flush(where, images, self._shards, known, self._pool)
            document = self._document(order, flushed.stored)
            self.needs.refuse_newer()
            self.tier.put(key, document, create_only=True)
            self._remember(order.id, flushed)
        except CkptdError as error:
            flushing.forget_frames(error)
            raise
        finally:
            del images  # an error's traceback must not keep them
            self.needs.end_flush()
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
        self.needs.begin_flush(order.id)
        if not self._reuse:
            return None
        with self.needs.lock:
            earlier = self._earlier
            if (
                earlier is None
                or not self.needs.knows(earlier.id)  # a prune has removed it
                or (earlier.id.generation != order.id.generation and earlier.id != order.parent)
                or not self._stands(earlier)
            ):
                earlier, self._history = self._read_earlier(order.parent), NO_HISTORY
            self._earlier = earlier
            if earlier is None:
                return Known(NOTHING_HELD, {}, self._history)
            self.needs.refer(earlier.file_bytes)
            return Known(earlier.held, earlier.file_bytes, self._history)

    def _stands(self, earlier: _Earlier) -> bool:
        """Whether every file is as it was written: somebody may have wiped the disk under the job."""
        try:
            return all(self.tier.size_bytes(f"{self._job}/{file}") == size for file, size in earlier.file_bytes.items())
        except CkptdError:
            return False

    def _read_earlier(self, parent: CheckpointId | None) -> _Earlier | None:
        """Read what a generation began with; what can't be read is not referred to, and no more harm than that."""
        if parent is None:
            return None
        try:
            loaded = self.needs.load(parent)
            sizes = {file: self.tier.size_bytes(f"{self._job}/{file}") for file in loaded.files}
        except CkptdError:
            return None
        found = stored_contents(loaded)
        return _Earlier(parent, sizes, Held(found.keys(), lambda: found))

    def _refuse_committed(self, key: str) -> None:
        """Raise `FencedError` when a checkpoint stands: a second attempt might write its files in another way."""
        if holds(self.tier, key):
            raise FencedError(f"{self.tier.url}/{key} exists already")

    def _remember(self, checkpoint: CheckpointId, flushed: Flushed) -> None:
        """Keep what the next flush may refer to, and what a prune must not remove."""
        self.needs.note(checkpoint, flushed.file_bytes)
        self._earlier = _Earlier(checkpoint, flushed.file_bytes, flushed.held)
        self._history = flushed.history

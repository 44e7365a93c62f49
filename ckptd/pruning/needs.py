"""What this process needs of a job's files on one tier: what flushes, fetches and uploads tell prunes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping

from ckptd.errors import FencedError, NotFoundError
from ckptd.storage import catalog, keys
from ckptd.storage.manifest import Manifest
from ckptd.storage.removing import holds
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId


class Needs:
    """The needs of one process. Any thread may call.

    A file is deleted under the lock, so that nobody begins to need it meanwhile.
    """

    def __init__(self, tier: Tier, job: str) -> None:
        self.lock = threading.RLock()
        """Held while what is needed changes, or something is deleted; whoever has it may call every method."""
        self._tier = tier
        self._job = job
        self._generation = 0
        """The newest that we know to be ours."""
        self._claiming: set[int] = set()
        self._files: dict[CheckpointId, frozenset[str]] = {}
        """What checkpoints need that are committed, or whose removal can be undone, of those that were seen."""
        self._in_flight: CheckpointId | None = None
        self._referred: frozenset[str] = frozenset()
        """What the flush in flight may refer to."""
        self._expected: dict[CheckpointId, frozenset[str]] = {}
        """What checkpoints that come from another tier need."""

    # --- generations ------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The newest generation that is ours."""
        return self._generation

    def own(self, generation: int) -> None:
        """Note that a generation is ours."""
        with self.lock:
            self._generation = max(self._generation, generation)

    @contextlib.contextmanager
    def claiming(self, generation: int) -> Iterator[None]:
        """Note that a record of this generation may be ours before we know it to be."""
        with self.lock:
            self._claiming.add(generation)
        try:
            yield
        finally:
            with self.lock:
                self._claiming.discard(generation)

    def newest(self) -> int:
        """Return the newest generation that is ours, or may be: a record that is looked at first is no stranger's."""
        with self.lock:
            return max(self._generation, *self._claiming, 0)

    def refuse_newer(self) -> None:
        """Raise `FencedError` when somebody else has claimed the generation after ours: then nothing is committed.

        Numbers are claimed one after another, so one is looked for. Its record is gone only when all checkpoints of
        that generation and ours are; whoever comes that late commits what no lineage leads to.
        """
        newer = self._generation + 1
        if holds(self._tier, keys.generation_key(self._job, newer)) and newer > self.newest():
            raise self.fenced(newer, "nothing is committed")

    def fenced(self, newer: int, consequence: str) -> FencedError:
        """Return the error of who finds a newer generation than its own."""
        return FencedError(
            f"generation {newer} of job {self._job} is claimed on {self._tier.url}, this is {self._generation}",
            hint=f"another agent runs the job: {consequence} here",
        )

    # --- files ------------------------------------------------------------------------------------------------

    def load(self, checkpoint: CheckpointId) -> Manifest:
        """Read the manifest of a checkpoint, and note what it needs."""
        loaded = catalog.load_manifest(self._tier, self._job, checkpoint)
        self.note(checkpoint, loaded.files)
        return loaded

    def note(self, checkpoint: CheckpointId, files: Collection[str]) -> None:
        """Note what a checkpoint needs."""
        with self.lock:
            self._files[checkpoint] = frozenset(files)

    def learn(self, checkpoint: CheckpointId) -> None:
        """Read what a checkpoint needs, unless it is known; one that is not there needs nothing."""
        if not self.knows(checkpoint):
            with contextlib.suppress(NotFoundError):
                self.load(checkpoint)

    def forget(self, checkpoints: Collection[CheckpointId]) -> None:
        """Note that checkpoints are gone for good."""
        with self.lock:
            for checkpoint in checkpoints:
                self._files.pop(checkpoint, None)

    def knows(self, checkpoint: CheckpointId) -> bool:
        """Whether the needs of a checkpoint are known."""
        with self.lock:
            return checkpoint in self._files

    @property
    def known(self) -> frozenset[CheckpointId]:
        """The checkpoints whose needs are known."""
        with self.lock:
            return frozenset(self._files)

    @contextlib.contextmanager
    def expecting(self, checkpoint: CheckpointId, files: Collection[str]) -> Iterator[None]:
        """Keep every prune away from files of a checkpoint that is on its way here from another tier."""
        with self.lock:
            self._expected[checkpoint] = frozenset(files)
        try:
            yield
        finally:
            with self.lock:
                del self._expected[checkpoint]

    def begin_flush(self, checkpoint: CheckpointId) -> None:
        """Note that a flush is under way, which may refer to nothing yet."""
        with self.lock:
            self._generation = max(self._generation, checkpoint.generation)
            self._in_flight = checkpoint

    def refer(self, file_bytes: Mapping[str, int]) -> None:
        """Fix what the flush in flight may refer to, so that no prune removes it meanwhile."""
        with self.lock:
            self._referred = frozenset(file_bytes)

    def end_flush(self) -> None:
        """Note that no flush is under way."""
        with self.lock:
            self._in_flight, self._referred = None, frozenset()

    @property
    def coming(self) -> frozenset[CheckpointId]:
        """The checkpoints that this process is writing."""
        with self.lock:
            return frozenset((*self._expected, *(() if self._in_flight is None else (self._in_flight,))))

    @contextlib.contextmanager
    def removing(self, checkpoint: CheckpointId) -> Iterator[None]:
        """Keep everybody from beginning to bring a checkpoint here; raises `FencedError` when that has begun."""
        with self.lock:
            if checkpoint in self.coming:
                raise FencedError(f"{checkpoint} of job {self._job} is on its way to {self._tier.url} again")
            yield

    def files_without(self, gone: Collection[CheckpointId]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the files that are needed without some checkpoints, and those that these need, as far as is known."""
        with self.lock:
            staying = [files for checkpoint, files in self._files.items() if checkpoint not in gone]
            released = [files for checkpoint, files in self._files.items() if checkpoint in gone]
            return self._referred.union(*staying, *self._expected.values()), frozenset[str]().union(*released)

    def delete_unless_needed(self, file: str, checkpoint: CheckpointId) -> bool:
        """Delete a file in a checkpoint's folder, if it is still of no use; return whether that was done."""
        with self.lock:
            needed = any(file in files for files in (*self._files.values(), *self._expected.values()))
            if needed or file in self._referred or checkpoint in self.coming:
                return False
            self._tier.delete(f"{self._job}/{file}")
        return True

"""What a job's agent does with its tiers but the first: claim, upload, fetch. Plain blocking calls, made in threads.

A generation is claimed on every tier when the job starts. The claims of restarts are made up for by the next upload:
a tier that does not answer must not delay them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ckptd.daemon.job_store import JobStore
from ckptd.errors import CkptdError, FencedError, NotFoundError
from ckptd.storage import catalog, copying, fetching
from ckptd.storage.pacing import StoppablePace
from ckptd.storage.tier import Report
from ckptd.types import CheckpointId

_PROGRESS_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A checkpoint that was committed on a further tier."""

    size_bytes: int
    """What was sent; files that were there already are not in it."""
    seconds: float


class FurtherTiers:
    """The tiers of one job that checkpoints are uploaded to and fetched from. Any thread may call."""

    def __init__(
        self,
        job: str,
        first: JobStore,
        others: Mapping[str, JobStore],
        max_bytes_per_s: Mapping[str, int],
        report: Report,
    ) -> None:
        """Serve `others`, by name; of those in `max_bytes_per_s`, uploads keep to it."""
        self._job = job
        self._first = first
        self._others = others
        self._report = report
        self._stopped = threading.Event()
        self._fetch_pace = StoppablePace(0, self._stopped)
        self._paces = {name: StoppablePace(max_bytes_per_s.get(name, 0), self._stopped) for name in others}
        self._lock = threading.Lock()
        self._claimed: set[tuple[str, int]] = set()

    def stop(self) -> None:
        """End what is on its way before its next piece: nobody waits for it any more."""
        self._stopped.set()

    def claim_all(self, generation: int) -> bool:
        """Claim a generation wherever that can be done now; return False when somebody else has it anywhere."""
        for name in self._others:
            try:
                self._claim(name, generation)
            except FencedError:
                return False
            except CkptdError as error:
                self._report("claim postponed", {"tier": name, "generation": generation, "error": str(error)})
        return True

    def upload(self, checkpoint: CheckpointId, name: str) -> Uploaded:
        """Commit a checkpoint of the first tier on a further one.

        Raises `FencedError` when another agent has that generation there, and what reading or sending raises.
        """
        begin_s = time.monotonic()
        self._claim(name, checkpoint.generation)
        target = self._others[name]
        files = catalog.load_manifest(self._first.tier, self._job, checkpoint).files
        with target.needs.expecting(checkpoint, files):
            copied = copying.upload(
                self._first.tier,
                target.tier,
                self._job,
                checkpoint,
                pace=self._paces[name],
                ours=target.needs.newest,
            )
            target.needs.note(checkpoint, files)
        return Uploaded(copied.size_bytes, time.monotonic() - begin_s)

    def fetch(self, checkpoint: CheckpointId, name: str) -> None:
        """Bring a checkpoint to the first tier, from the tier of that name or any other that has a good copy.

        What is intact on the first tier stays. Raises `DamagedError` when no tier has a good copy of some file.
        """
        sources = [self._others[name].tier, *(store.tier for other, store in self._others.items() if other != name)]
        progress = Progress(checkpoint, name, self._report)
        files = self._files(checkpoint, name)
        with self._first.needs.expecting(checkpoint, files):
            fetching.fetch(
                sources,
                self._first.tier,
                self._job,
                checkpoint,
                pace=self._fetch_pace,
                progress=progress.moved,
                report=self._report,
            )
            self._first.needs.load(checkpoint)

    def _files(self, checkpoint: CheckpointId, name: str) -> Collection[str]:
        """Return what a checkpoint needs, as a tier's manifest says; a fetch looks elsewhere if that can't be read."""
        try:
            return catalog.load_manifest(self._others[name].tier, self._job, checkpoint).files
        except CkptdError:
            return ()

    def _claim(self, name: str, generation: int) -> None:
        with self._lock:
            if (name, generation) in self._claimed:
                return
        for number in sorted(self._first.generations()):
            if number < generation and (name, number) not in self._claimed:
                # Of those that were never uploaded from, too: the lineage there would break off at the gap. One that
                # is somebody else's there was lost to them by an earlier claim.
                with contextlib.suppress(FencedError, NotFoundError):  # or a prune has removed the record
                    self._others[name].adopt(number, self._first.record(number))
                self._claimed.add((name, number))
        self._others[name].adopt(generation, self._first.record(generation))
        with self._lock:
            self._claimed.add((name, generation))


class Progress:
    """Says every few seconds how much has come."""

    def __init__(self, checkpoint: CheckpointId, tier: str, report: Report) -> None:
        self._checkpoint, self._tier, self._report = checkpoint, tier, report
        self._lock = threading.Lock()
        self._bytes = 0
        self._said_at_s = time.monotonic()

    def moved(self, size_bytes: int) -> None:
        """Take note of bytes that have come."""
        with self._lock:
            self._bytes += size_bytes
            now_s = time.monotonic()
            if now_s - self._said_at_s < _PROGRESS_EVERY_S:
                return
            self._said_at_s = now_s
        self._report("fetching", {"step": self._checkpoint.step, "tier": self._tier, "size_bytes": self._bytes})

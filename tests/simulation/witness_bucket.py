"""The part of the witness that looks after the bucket: what is there, what the machine knows of it, and what may go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.job_states import JobState
from ckptd.core.uploads import FINAL_UPLOAD_TRIES
from ckptd.errors import CkptdError
from ckptd.types import CheckpointId
from tests.simulation.memory import shard_of
from tests.simulation.storage import BUCKET, TIER

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node
    from tests.simulation.witness import Witness


class BucketWitness:
    """What has been uploaded, told and fetched in one run."""

    def __init__(self, witness: Witness, node: Node) -> None:
        self._witness = witness
        self._node = node
        self.fetched: CheckpointId | None = None
        """What was brought to the disk for the generation that is about to begin."""
        self.lines: dict[int, list[CheckpointId]] = {}
        """The lineage up to where each generation began."""
        self._known: set[CheckpointId] = set()
        """What the machine has been told to be there."""
        self._told_late: set[CheckpointId] = set()
        """What it was told while it had already made its plan."""
        self._skipped: set[CheckpointId] = set()
        """What could not be fetched for the generation that is about to begin."""
        self._leaving: set[CheckpointId] = set()
        self._on_disk: set[CheckpointId] = set()
        self._failures: dict[CheckpointId, int] = {}
        self._lost: set[CheckpointId] = set()
        self._impatient = False
        self.unread = False
        self._open = False
        self._changes = -1

    def agent_begins(self) -> None:
        """Forget what was in the memory of the agent before."""
        for known in (self._known, self._told_late, self._skipped, self._leaving, self._on_disk, self._lost):
            known.clear()
        self._failures.clear()
        self.fetched = None
        self.unread = self._open = self._impatient = False

    # --- what a restart may use -------------------------------------------------------------------------------

    @property
    def offered(self) -> list[CheckpointId]:
        """What the machine may restore from there, as far as it knows."""
        return self._witness.usable(self._known - self._skipped, BUCKET)

    @property
    def staying(self) -> list[CheckpointId]:
        """What is committed there and is not about to go."""
        there = self._node.bucket.manifests.keys() - self._leaving
        return [item for item in self._witness.chain if item in there]

    @property
    def lineage(self) -> list[CheckpointId]:
        """What somebody finds there who knows nothing else."""
        there = self._node.bucket.manifests
        for number in sorted(self._node.bucket.parents, reverse=True):
            line = [*self.lines.get(number, ()), *sorted(item for item in there if item.generation == number)]
            if found := [item for item in line if item in there]:
                return found
        return []

    def outdated(self, checkpoint: CheckpointId) -> bool:
        """Whether who finds the bucket alone would begin with something newer, though a step back has left both."""
        return checkpoint not in self._witness.chain and any(item > checkpoint for item in self.lineage)

    # --- inputs and effects of the machine --------------------------------------------------------------------

    def before(self, event: e.Input, agent: ModelAgent) -> None:
        """Note what the machine is about to hear."""
        match event:
            case e.StoreRead():
                self.unread = bool(event.unread)
                self._on_disk = {source.id for source in event.sources if source.tier == TIER}
                if not self.unread:
                    self._known = {source.id for source in event.sources if source.tier == BUCKET}
            case e.Committed() if event.tier == TIER:
                self._on_disk.add(event.id)
            case e.Committed():
                late = agent.machine.state is JobState.PREPARING
                (self._told_late if late else self._known).add(event.id)
            case e.StopWanted() if not event.checkpoint and agent.machine.state is JobState.DRAINING:
                self._impatient = True
            case e.UploadFailed():
                self._failures[event.id] = self._failures.get(event.id, 0) + 1
                if not event.error.retryable:
                    self._lost.add(event.id)
            case e.FetchFailed() if event.source.tier == BUCKET:
                if event.error.retryable:
                    self._skipped.add(event.source.id)
            case e.Fetched() if event.copied:
                self.fetched = event.source.id
                self._on_disk.add(event.source.id)
            case e.Claimed():
                self._known |= self._told_late
                self._told_late.clear()
                self._skipped.clear()
                self.fetched = None
            case _:
                return

    def fresh_start(self) -> None:
        """Check that there is nothing to begin with, and that all places were looked at."""
        places = self._node.disk.manifests.keys() | set(self.offered)
        self._witness.require(places.isdisjoint(self._witness.chain), "a fresh start though there are checkpoints")
        self._witness.require(not self.unread, "a fresh start though the bucket could not be read")

    def leave(self, checkpoints: Iterable[CheckpointId]) -> None:
        """Note what is to go."""
        self._leaving.update(checkpoints)
        self._known.difference_update(checkpoints)

    def agent_killed(self) -> None:
        """Note in the middle of what the agent dies."""
        self._witness.seen["agent killed during an upload"] += self._open

    def upload_begins(self, order: e.Upload) -> None:
        """Check that no other upload is under way."""
        self._witness.require(not self._open, f"a second upload begins, of {order.id}")
        self._leaving.discard(order.id)
        self._open = True

    def upload_ends(self) -> None:
        """Note the end of an upload."""
        self._open = False

    # --- the bucket -------------------------------------------------------------------------------------------

    def after_event(self) -> None:
        """Check that what is committed there is whole and right, if anything has changed."""
        bucket, witness = self._node.bucket, self._witness
        if bucket.changes == self._changes:
            return
        self._changes = bucket.changes
        for manifest in bucket.manifests.values():
            if manifest.id not in witness.chain:
                continue
            lacks = manifest.files - bucket.files.keys()
            witness.require(not lacks, f"{manifest.id} in the bucket lacks files: {lacks}")
            for rank in range(self._node.options.world_size):
                content = bucket.content(manifest, rank)
                right = content == shard_of(rank, manifest.id.step)
                witness.require(right, f"rank {rank}'s shard of {manifest.id} is wrong in the bucket: {content}")

    # --- ends -------------------------------------------------------------------------------------------------

    @property
    def hopeless(self) -> bool:
        """Whether the newest checkpoint on the disk will not come here, or failed so often that nobody waits."""
        # Of a generation that was claimed while the job was stopped, the machine does not know that it cut the lineage.
        in_lineage = [item for item in self._on_disk if item in self._witness.chain]
        newest = {max(known) for known in (self._on_disk, in_lineage) if known}
        return any(item in self._lost or self._failures.get(item, 0) >= FINAL_UPLOAD_TRIES for item in newest)

    def excuses(self, error: CkptdError) -> bool:
        """Whether a job may end with an error because nobody could read the bucket, and the disk had nothing."""
        return error.retryable and (self.unread or bool(self._skipped)) and not self._witness.intact

    def job_finished(self, final: list[CheckpointId]) -> None:
        """Check that the final checkpoint is there."""
        arrived = any(item in self._node.bucket.manifests for item in final)
        needed = self._node.options.bucket and bool(final) and not self._impatient
        self._witness.require(arrived or not needed, "the final checkpoint is not in the bucket")

"""Pruning one job on one tier: checkpoints that were let go, files that nobody needs, and room on a full disk.

What goes is decided by `core.policy`; here is what has to be looked at for that, and the order in which it is done. A
plan changes nothing, so it can be shown first. Carrying it out deletes no file that has come to be needed meanwhile:
flushes, fetches and uploads go on beside it, and say in `Needs` what they need.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from ckptd.core.policy.garbage import (
    LEAST_GRACE_S,
    SKEW_S,
    Caution,
    FileVerdict,
    MarkerVerdict,
    Uses,
    judge_files,
    judge_markers,
    judge_records,
)
from ckptd.errors import CkptdError, DamagedError
from ckptd.pruning.needs import Needs
from ckptd.storage import catalog, keys, removing
from ckptd.storage.catalog import Listing
from ckptd.storage.tier import Cost, Tier
from ckptd.types import CheckpointId, Marker

GARBAGE_AFTER_S = 86400.0
_LOOK_EVERY_S = 10.0
"""Where others may be writing, how old what is known of them may be when a file goes."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a prune is to do beside removing checkpoints and their files."""

    at_once: bool = False
    """Nothing can be undone any more, neither this removal nor those that wait."""
    garbage: bool = False
    """Left-overs in folders go too."""
    sweep: bool = False
    """What killed puts have left goes too."""
    needed_from: int | None = None
    """Records of older generations go too, where the tier needs none of them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a prune is about to do."""

    going: frozenset[CheckpointId]
    undoable: bool
    """Whether they can be brought back for a while."""
    markers: tuple[MarkerVerdict, ...]
    """Of earlier removals."""
    files: tuple[FileVerdict, ...]
    """All files of checkpoints, whether they go or not."""
    records: tuple[int, ...]
    """The generations whose records go."""
    sweep_age_s: float | None
    """How old what killed puts have left must be to go; None when nobody looks for it."""


@dataclass(slots=True)
class Removed:
    """What a prune has done."""

    freed_bytes: int = 0
    files: int = 0
    records: int = 0
    swept: tuple[str, ...] = ()
    """What killed puts had left, in words."""
    checkpoints: set[CheckpointId] = field(default_factory=set)
    """Of those that were to go the ones that are no checkpoints any more."""
    errors: list[CkptdError] = field(default_factory=list)
    """What could not be done; a checkpoint that can't be removed does not keep the others."""


class Pruning:
    """Prunes one job on one tier. Any thread may call."""

    def __init__(
        self,
        tier: Tier,
        job: str,
        needs: Needs,
        *,
        exclusive: bool | None = None,
        grace_s: float = 0.0,
        garbage_after_s: float = GARBAGE_AFTER_S,
    ) -> None:
        """Prune with so much time to undo it.

        `exclusive` says whether the job is held here, so that nobody else can be writing; None means that it is if it
        can be. Where it isn't, what was left over goes after `garbage_after_s`.
        """
        self._tier = tier
        self._job = job
        self._needs = needs
        self._exclusive = tier.capabilities.exclusive_hold if exclusive is None else exclusive
        self._grace_s = grace_s
        self._garbage_after_s = garbage_after_s
        self._one_at_a_time = threading.Lock()
        self._stopping = threading.Event()
        self._began = time.monotonic(), time.time()

    def prune(self, ids: Collection[CheckpointId], kept: Collection[CheckpointId]) -> Removed:
        """Remove checkpoints, and every file that no remaining one needs.

        What remains is what is committed on the tier and not in `ids`, what can still be undone, and `kept`. When the
        manifest of any of it can't be read, nothing is removed, since it may name any file. Neither is anything
        removed when somebody has claimed a newer generation, whose checkpoints may refer to anything.
        """
        near = self._tier.capabilities.cost is not Cost.NETWORK
        return self._run(ids, kept, Task(garbage=near))

    def collect(self, kept: Collection[CheckpointId], needed_from: int | None) -> Removed:
        """Remove everything that nobody needs; `needed_from` is the oldest generation that any tier needs."""
        return self._run((), kept, Task(garbage=True, sweep=True, needed_from=needed_from))

    def make_room(self, ids: Collection[CheckpointId], kept: Collection[CheckpointId]) -> Removed:
        """Remove checkpoints, all garbage, and what waits for its grace to end: nothing of it can be undone."""
        return self._run(ids, kept, Task(at_once=True, garbage=True, sweep=True))

    def close(self, patience_s: float) -> None:
        """Return when nothing is pruned any more. What takes longer ends before its next file, which is garbage then.

        Whoever lets go of the job comes here first: the next one who holds it must not be pruned by us.
        """
        in_time = self._one_at_a_time.acquire(timeout=patience_s)
        self._stopping.set()
        if not in_time:
            self._one_at_a_time.acquire()
        self._one_at_a_time.release()

    def _run(self, ids: Collection[CheckpointId], kept: Collection[CheckpointId], task: Task) -> Removed:
        with self._one_at_a_time:
            if self._stopping.is_set():
                return Removed()
            try:
                return self.carry_out(self.plan(ids, kept, task))
            except CkptdError as error:
                return Removed(errors=[error])

    # --- the plan ---------------------------------------------------------------------------------------------

    def plan(self, ids: Collection[CheckpointId], kept: Collection[CheckpointId], task: Task) -> Plan:
        """Find out what a prune has to do; raises what makes it impossible to know."""
        known_before = self._needs.known
        listed = catalog.listing(self._tier, self._job)
        self._needs.own(max((item.generation for item in (*ids, *kept)), default=0))
        self._refuse_newer(listed)
        caution = Caution(self._exclusive, time.time(), self._garbage_after_s)
        grace_s = 0.0 if task.at_once else self._grace_s or LEAST_GRACE_S
        markers = judge_markers(listed.markers, listed.committed, grace_s, caution)
        waiting = {found.marker.checkpoint for found in markers} - listed.committed
        self._needs.forget(known_before - listed.committed - waiting)
        going = frozenset(ids) - waiting
        undoable = bool(self._grace_s) and not task.at_once
        markers = [  # stale ones become part of this removal, or go with it
            replace(found, ends=not undoable) if found.marker.checkpoint in going else found for found in markers
        ]
        remaining = (listed.committed | frozenset(kept)) - going
        catalog.in_parallel(self._needs.learn, sorted(remaining))
        catalog.in_parallel(self._learn_marked, [found.marker for found in markers if not found.ends])
        final = {found.marker.checkpoint: found.marker for found in markers if found.final}
        gone = frozenset(final) if undoable else going.union(final)
        if undoable or not caution.exclusive:  # elsewhere what lies there unneeded counts as garbage anyway
            self._learn_going(going, final.values())
        needed, released = self._needs.files_without(gone)
        ours = self._needs.coming | (frozenset(kept) - listed.committed)
        staying = (remaining | waiting | going) - gone
        verdicts = judge_files(listed.files.values(), Uses(needed, staying, ours, gone, released), caution)
        if not task.garbage:
            verdicts = [item for item in verdicts if item.file.checkpoint in gone or item.file.name in released]
        records = judge_records(listed.generations, staying | ours, task.needed_from)
        age_s = self._sweep_age_s() if task.sweep else None
        return Plan(going, undoable, tuple(markers), tuple(verdicts), records, age_s)

    def _refuse_newer(self, listed: Listing) -> None:
        newest = max(listed.generations, default=0)
        if newest > self._needs.generation:
            raise self._needs.fenced(newest, "what it needs is not known, so nothing is pruned")

    def _learn_marked(self, marker: Marker) -> None:
        """Read what a checkpoint needs that was removed."""
        if not self._needs.knows(marker.checkpoint):
            key = keys.marker_key(self._job, marker.checkpoint, marker.deleted_at)
            where = f"{self._tier.url}/{key}"
            loaded = catalog.parse_manifest(self._tier.get(key), where, self._job, marker.checkpoint)
            self._needs.note(marker.checkpoint, loaded.files)

    def _learn_going(self, going: Collection[CheckpointId], final: Collection[Marker]) -> None:
        """Read what checkpoints need that go; of one that can't be read only what lies in its own folder is known."""
        for checkpoint in sorted(going):
            with contextlib.suppress(DamagedError):
                self._needs.learn(checkpoint)
        for marker in final:
            with contextlib.suppress(DamagedError):
                self._learn_marked(marker)

    def _sweep_age_s(self) -> float:
        """Return how old what a killed put has left must be: where nobody else writes, older than this process."""
        if not self._exclusive:
            return self._garbage_after_s + SKEW_S
        began_s, began_at = self._began
        return max(time.monotonic() - began_s, time.time() - began_at) + 1.0

    # --- and what becomes of it -------------------------------------------------------------------------------

    def carry_out(self, plan: Plan) -> Removed:
        """Do what was planned: manifests, then markers whose time is over, then files. What goes wrong is returned."""
        done = Removed()
        for act in (self._remove, self._sweep, self._remove_records):
            try:
                act(plan, done)
            except CkptdError as error:
                done.errors.append(error)
        return done

    def _remove(self, plan: Plan, done: Removed) -> None:
        gone = self._uncommit(plan, done) | self._finish(plan.markers, done)
        self._needs.forget(gone)
        failed = (plan.going - gone) | {found.marker.checkpoint for found in plan.markers if found.final} - gone
        looked_s = -math.inf
        for verdict in plan.files:
            if self._stopping.is_set():
                break
            if verdict.remove and (verdict.file.checkpoint not in failed or plan.undoable):
                if not self._exclusive and time.monotonic() - looked_s >= _LOOK_EVERY_S:
                    self._look_again()
                    looked_s = time.monotonic()
                try:
                    if self._needs.delete_unless_needed(verdict.file.name, verdict.file.checkpoint):
                        done.files += 1
                        done.freed_bytes += verdict.file.size_bytes
                except CkptdError as error:
                    done.errors.append(error)

    def _look_again(self) -> None:
        """Note what others have committed or brought back meanwhile; raises what makes its needs impossible to know."""
        listed = catalog.listing(self._tier, self._job)
        self._refuse_newer(listed)
        catalog.in_parallel(self._needs.learn, sorted(listed.committed))

    def _sweep(self, plan: Plan, done: Removed) -> None:
        if plan.sweep_age_s is not None and not self._stopping.is_set():
            done.swept = tuple(self._tier.sweep(f"{self._job}/", plan.sweep_age_s))

    def _remove_records(self, plan: Plan, done: Removed) -> None:
        for generation in plan.records:
            self._tier.delete(keys.generation_key(self._job, generation))
            done.records += 1

    def _uncommit(self, plan: Plan, done: Removed) -> set[CheckpointId]:
        """Remove manifests; return which checkpoints are gone for good, the others go on needing their files."""
        gone: set[CheckpointId] = set()
        deleted_at = time.time() if plan.undoable else None
        for checkpoint in sorted(plan.going):
            try:
                with self._needs.removing(checkpoint):
                    marked = removing.uncommit(self._tier, self._job, checkpoint, deleted_at)
            except CkptdError as error:
                done.errors.append(error)
                self._needs.learn(checkpoint)
            else:
                done.checkpoints.add(checkpoint)
                if not marked:
                    gone.add(checkpoint)
        return gone

    def _finish(self, verdicts: Collection[MarkerVerdict], done: Removed) -> set[CheckpointId]:
        """Remove the markers whose time is over; return which checkpoints are gone for good."""
        gone: set[CheckpointId] = set()
        for checkpoint, found in sorted(_by_checkpoint(verdicts).items()):
            try:
                may_go = removing.finish(self._tier, self._job, checkpoint, [item.marker for item in found])
            except CkptdError as error:
                done.errors.append(error)
                continue
            if found[0].final and may_go:
                gone.add(checkpoint)
        return gone


def _by_checkpoint(verdicts: Collection[MarkerVerdict]) -> Mapping[CheckpointId, list[MarkerVerdict]]:
    ending: dict[CheckpointId, list[MarkerVerdict]] = defaultdict(list)
    for found in verdicts:
        if found.ends:
            ending[found.marker.checkpoint].append(found)
    return ending

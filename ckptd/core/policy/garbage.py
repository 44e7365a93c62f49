"""What is garbage on a tier: what a listing shows in, a verdict with its reason for each out.

Nothing is garbage that anybody may still need or finish. Who holds a job alone knows that of every file; elsewhere a
left-over may be what another process is about to commit, and only its age tells.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ckptd.types import CheckpointId, Marker, StoredFile

SKEW_S = 900.0
"""So much our clock may be ahead of that which dates the files; object stores refuse who is further off."""
LEAST_GRACE_S = 3600.0
"""For so long a removal that somebody else wanted to be undoable can be undone, whatever our own grace is."""


@dataclass(frozen=True, slots=True)
class Caution:
    """How sure one can be that nobody else is at work on the job on a tier, and what time it is."""

    exclusive: bool
    """Whether the job is held alone: whatever is there is ours."""
    now: float
    """Our reading of the wall clock."""
    after_s: float
    """Elsewhere, how old a left-over must be."""

    def is_old(self, modified_at: float) -> bool:
        """Whether something was written so long ago that nobody is still at it, even if our clock is ahead."""
        return self.now - SKEW_S - modified_at >= self.after_s


@dataclass(frozen=True, slots=True)
class Uses:
    """What is still to be had on a tier, and what is not."""

    needed: Collection[str]
    """Files that a checkpoint needs which is committed, can be brought back, or is on its way."""
    staying: Collection[CheckpointId]
    """Checkpoints of whose folders nothing goes: committed ones, and those whose removal can be undone."""
    ours: Collection[CheckpointId]
    """Those that this process is about to commit."""
    gone: Collection[CheckpointId]
    """Those that were committed once, and were removed for good."""
    released: Collection[str] = ()
    """Files that those needed, wherever they lie."""


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """Whether a file goes, and why."""

    file: StoredFile
    remove: bool
    reason: str


def judge_files(files: Iterable[StoredFile], uses: Uses, caution: Caution) -> list[FileVerdict]:
    """Judge every file in the folders of a job's checkpoints, but for their manifests."""
    return [FileVerdict(file, *_judge(file, uses, caution)) for file in files]


def _judge(file: StoredFile, uses: Uses, caution: Caution) -> tuple[bool, str]:
    if file.name in uses.needed:
        return False, "a checkpoint needs it"
    if file.checkpoint in uses.ours:
        return False, "its checkpoint is on its way"
    if file.checkpoint in uses.gone:
        return True, "its checkpoint was removed"
    if file.checkpoint in uses.staying:
        return False, "it lies with a checkpoint that stays"
    if file.name in uses.released:
        return True, "the last checkpoint that needed it was removed"
    if caution.exclusive:
        return True, "its checkpoint was never committed"
    if caution.is_old(file.modified_at):
        return True, f"its checkpoint was not committed within {caution.after_s:g} s"
    return False, "somebody may be about to commit its checkpoint"


@dataclass(frozen=True, slots=True)
class MarkerVerdict:
    """What becomes of the marker of a removal, and why."""

    marker: Marker
    ends: bool
    """Whether the marker goes."""
    final: bool
    """Whether the checkpoint goes with it: its removal can't be undone any more."""
    reason: str


def judge_markers(
    markers: Iterable[Marker], committed: Collection[CheckpointId], grace_s: float, caution: Caution
) -> list[MarkerVerdict]:
    """Judge every marker of a job.

    One whose checkpoint is committed is of a removal that was interrupted or undone. Of several of one checkpoint the
    newest counts.
    """
    found = list(markers)
    newest: dict[CheckpointId, float] = {}
    for marker in found:
        newest[marker.checkpoint] = max(marker.deleted_at, newest.get(marker.checkpoint, marker.deleted_at))
    verdicts: list[MarkerVerdict] = []
    for marker in found:
        age_s = max(0.0, caution.now - newest[marker.checkpoint])  # whose clock was ahead has removed it just now
        if marker.checkpoint in committed:
            stale = caution.exclusive or caution.is_old(newest[marker.checkpoint])  # or a removal is under way
            verdicts.append(MarkerVerdict(marker, stale, False, "its checkpoint is committed"))
        elif age_s >= grace_s:
            verdicts.append(MarkerVerdict(marker, True, True, f"it was removed more than {grace_s:g} s ago"))
        else:
            reason = f"its removal can be undone for another {grace_s - age_s:.0f} s"
            verdicts.append(MarkerVerdict(marker, False, False, reason))
    return verdicts


def judge_records(
    generations: Collection[int], remaining: Iterable[CheckpointId], needed_from: int | None
) -> tuple[int, ...]:
    """Return the generations whose records nothing needs any more.

    A lineage goes back to the generation of the oldest checkpoint that is left anywhere: `remaining` are those on
    this tier, and `needed_from` is the oldest generation of them all, None where that is not known. The newest record
    stays whatever else goes, since its number must never be given again.
    """
    if needed_from is None or not generations:
        return ()
    oldest = min([needed_from, max(generations), *(item.generation for item in remaining)])
    return tuple(sorted(generation for generation in generations if generation < oldest))

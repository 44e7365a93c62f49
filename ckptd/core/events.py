"""What happens to a job (inputs) and what it wants done (effects), as values.

The machine in `core.job` takes inputs and returns effects; the daemon carries them out, and so does the simulation.
Neither reads a clock: every input comes with the time at which it happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.core.adopt_events import RankReturned, Recall, StoreUnread
from ckptd.core.gate_events import CheckNode, NodeChecked
from ckptd.core.halt_events import HaltWanted, Leave
from ckptd.core.number_events import Marked, Reported
from ckptd.core.prune_events import Collect, MakeRoom, Prune, Pruned, RoomMade
from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mend, Mended, Scrub, Scrubbed
from ckptd.core.watch_events import EndRanks, Gather, Gathered, Watched
from ckptd.errors import CkptdError
from ckptd.types import CheckpointId, Evidence, Held, Incident, RaisedException

# --- inputs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoreRead:
    """What the tiers hold: the lineage's checkpoints, best first, and the highest generation number in use.

    Every copy is named: newest first, and of one checkpoint the one on the cheaper tier.
    """

    sources: tuple[Source, ...]
    last_generation: int
    held: Mapping[str, tuple[Held, ...]] = field(default_factory=dict)
    """What is committed on each tier, in the lineage or not, for retention."""
    unread: Mapping[str, CkptdError] = field(default_factory=dict)
    """The tiers that could not be read, and why; what they hold is not in the rest."""


@dataclass(frozen=True, slots=True)
class SetupFailed:
    """The job can't start: the store can't be read, a generation can't be claimed, there is no memory for slots."""

    error: CkptdError
    passing: bool = False
    """Whether the same may succeed later without anything going from a tier: the state folder can't be written now."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint on a tier can be offered: its manifest was read, and the files that it names are there."""

    source: Source
    world_size: int
    """By how many ranks it was captured."""
    copied: bool = False
    """Whether it was brought to the first tier for that, and is now committed there too."""


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A checkpoint on a tier is damaged or can't be read."""

    source: Source
    error: CkptdError


@dataclass(frozen=True, slots=True)
class Claimed:
    """The generation is ours, on every tier."""

    generation: int


@dataclass(frozen=True, slots=True)
class RankSpawned:
    """A rank's process exists."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class RankJoined:
    """A rank asks for its place."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class SlotsLent:
    """A rank has slots to capture into, by number."""

    rank: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankRestored:
    """A rank has put the offered snapshot into its objects."""

    rank: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """A rank could not use the offered snapshot."""

    rank: int
    id: CheckpointId
    error: CkptdError


@dataclass(frozen=True, slots=True)
class RankStepped:
    """A rank has finished its first step in this generation, at monotonic `at_s`."""

    rank: int
    step: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Progress:
    """The last finished step of every rank that has joined, as its control page says."""

    steps: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class RankSealed:
    """A rank has sealed its shard of `step`."""

    rank: int
    step: int
    slot: int
    image_bytes: int
    capture_s: float
    values: Mapping[str, float]
    final: bool
    witness: Mapping[str, str] = field(default_factory=dict)
    """Digests of a few tensors of which each rank has captured but a share, by name."""


@dataclass(frozen=True, slots=True)
class CaptureMissed:
    """A rank did not capture the announced step: it was past it already, or `error` says why."""

    rank: int
    step: int
    error: CkptdError | None


@dataclass(frozen=True, slots=True)
class CheckpointWanted:
    """Somebody asks for a checkpoint at the next boundary that all ranks can meet."""


@dataclass(frozen=True, slots=True)
class RankLeft:
    """A rank has left its training block after `step`."""

    rank: int
    step: int


@dataclass(frozen=True, slots=True)
class RankExited:
    """A rank's process has ended; `evidence` is what the detectors make of it, None for a clean end."""

    rank: int
    pid: int
    evidence: Evidence | None
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LauncherExited:
    """The launcher has ended though nobody told it to; every rank dies with it."""

    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint's manifest stands on a tier: on the first one by a flush, on a further one by an upload."""

    id: CheckpointId
    tier: str
    size_bytes: int
    flush_s: float
    """How long it took to get there."""


@dataclass(frozen=True, slots=True)
class FlushFailed:
    """A snapshot could not be made durable."""

    id: CheckpointId
    error: CkptdError


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """A checkpoint could not be copied to a further tier. After a `FencedError` that tier gets nothing any more."""

    id: CheckpointId
    tier: str
    error: CkptdError


@dataclass(frozen=True, slots=True)
class StopWanted:
    """Stop the job on purpose, and be done within `grace_s`; with `checkpoint`, after a last capture.

    Wanted again without `checkpoint`, ranks are ended and no upload is waited for; the third time nothing is.
    """

    grace_s: float
    checkpoint: bool = True
    reason: str = "somebody asked for it"


@dataclass(frozen=True, slots=True)
class RestartWanted:
    """Restart the whole job on purpose, from at most `step` when given."""

    step: int | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Input = (
    StoreRead | SetupFailed | Fetched | FetchFailed | Claimed | RankSpawned | RankJoined | SlotsLent
    | RankRestored | RestoreFailed | RankStepped | Progress | RankSealed | CaptureMissed | CheckpointWanted
    | RankLeft | RankExited | LauncherExited | Committed | FlushFailed | UploadFailed | RoomMade | StopWanted
    | HaltWanted | RestartWanted | Pruned | Scrubbed | Mended | NodeChecked | Tick
    | Watched | Gathered | Reported | RankReturned | StoreUnread
)  # fmt: skip

# --- effects --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadStore:
    """Look into the tiers; answered by `StoreRead` or `SetupFailed`."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """See whether a checkpoint on a tier can be offered; answered by `Fetched` or `FetchFailed`."""

    source: Source


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim a generation number of at least `at_least`; answered by `Claimed` or `SetupFailed`."""

    at_least: int
    parent: CheckpointId | None


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start all ranks of a generation."""

    generation: int
    restarts: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Let a rank in; `offer` is what it may restore, from memory or from a tier.

    `whole` tells it from the beginning what `Whole` has told the ranks before it.
    """

    rank: int
    generation: int
    offer: Source | None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Whole:
    """Have every rank capture all of its replicated tensors as its own from now on: they proved to differ."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Write the step to capture next into every rank's control page; None withdraws it.

    The ranks wait at the boundary of the `last` one, to be told to `Leave`.
    """

    step: int | None
    last: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """A rank may write a slot again."""

    rank: int
    slot: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Make a snapshot durable on the first tier; answered by `Committed` or `FlushFailed`."""

    id: CheckpointId
    parent: CheckpointId | None
    slots: Mapping[int, int]
    image_bytes: Mapping[int, int]
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Upload:
    """Copy a checkpoint from the first tier to a further one; answered by `Committed` or `UploadFailed`."""

    id: CheckpointId
    tier: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Send a signal to every rank's process group."""

    signal: int


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Tell a rank that left that nothing of it waits to be committed any more."""

    rank: int


@dataclass(frozen=True, slots=True)
class Record:
    """Keep the newest form of an incident."""

    incident: Incident


@dataclass(frozen=True, slots=True)
class Log:
    """One event for the log: a name from `log.EVENTS` and its fields."""

    event: str
    fields: Mapping[str, object] = field(default_factory=dict)
    level: str = "info"


@dataclass(frozen=True, slots=True)
class End:
    """The job is over; `error` is what the command should end with, None for success."""

    outcome: str
    error: CkptdError | None = None
    exception: RaisedException | None = None


Effect = (
    ReadStore | Fetch | Claim | Spawn | Admit | Whole | Announce | Release | Flush | Upload | Prune
    | Collect | MakeRoom | Kill | Dismiss
    | Leave | Record | Log | End | Scrub | Mend | CheckNode
    | Gather | EndRanks | Marked | Recall
)  # fmt: skip

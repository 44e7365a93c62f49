"""A script for the job machine: short verbs go in, effects come out as short lines.

    job = Script()
    assert job.begin() == ["read store"]

Time is a number that only `wait` moves. Debug lines of the log are left out, incidents are shown by what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptd.core import events as e
from ckptd.core.adopt_events import Recall
from ckptd.core.gate_events import CheckNode, NodeChecked
from ckptd.core.halt_events import Leave
from ckptd.core.job import JobMachine, JobSpec, Now
from ckptd.core.job_spec import TierSpec
from ckptd.core.number_events import Marked
from ckptd.core.policy.gate import Unfit
from ckptd.core.policy.hang import HangPolicy
from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.policy.retention import RetentionPolicy
from ckptd.core.prune_events import Collect, MakeRoom, Prune, Pruned, RoomMade
from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mend, Scrub
from ckptd.core.watch_events import EndRanks, Gather
from ckptd.errors import CkptdError, DamagedError, StoreError
from ckptd.types import CheckpointId, Evidence, RaisedException

TIER = "local"
BUCKET = "bucket"


def cid(text: str) -> CheckpointId:
    """Read a checkpoint as it is printed: g1/s20."""
    generation, step = text.split("/")
    return CheckpointId(int(generation[1:]), int(step[1:]))


def killed(rank: int | None, at_s: float = 0.0, signal: int = 9) -> Evidence:
    """Return the evidence of a rank that a signal has killed."""
    summary = f"rank {rank} was killed by signal {signal}"
    return Evidence("exit", "signal", rank, 1.0, summary, at_s, signal=signal, returncode=-signal)


def raised(rank: int, message: str, at_s: float = 0.0, error: dict[str, Any] | None = None) -> Evidence:
    """Return the evidence of a rank whose script raised an exception."""
    exception = RaisedException("ValueError", message, f"Traceback of {message}", error)
    return Evidence("exit", "exception", rank, 1.0, f"rank {rank} raised ValueError", at_s, exception=exception)


class Script:
    """A job machine on a leash. Every verb returns what the machine wants done."""

    def __init__(
        self,
        *,
        ranks: int = 2,
        every_s: float = 10.0,
        supervised: bool = True,
        keep: int = 3,
        slots: int = 2,
        scrub_s: float = 0.0,
        further: Sequence[TierSpec] = (),
        numbers: NumbersPolicy | None = None,
        hang: HangPolicy | None = None,
        **policy: Any,
    ):
        spec = JobSpec(
            "job",
            ranks,
            every_s,
            supervised=supervised,
            slots=slots,
            tiers=(TierSpec(TIER, RetentionPolicy(keep), scrub_s=scrub_s), *further),
            restart=RestartPolicy(**policy),
            numbers=numbers or NumbersPolicy(),
            hang=hang,
        )
        self.machine = JobMachine(spec)
        self.now_s = 0.0
        self.ranks = range(ranks)
        self.pids: dict[int, int] = {}
        self.effects: list[e.Effect] = []
        self.incidents: dict[int, Any] = {}
        self.node: str | None = ""
        """What the check "disk" of the node says at once: nothing when it is fit, None when it does not answer."""
        self._next_pid = 100

    @property
    def state(self) -> str:
        """The machine's state, as `ckptctl status` shows it."""
        return self.machine.state.value

    def feed(self, event: e.Input) -> list[str]:
        """Feed any input."""
        return self._show(self.machine.handle(event, Now(self.now_s, 1e9 + self.now_s)))

    def _show(self, effects: Sequence[e.Effect]) -> list[str]:
        if CheckNode() in effects and self.node is not None:
            unfit = (Unfit("disk", self.node),) if self.node else ()
            effects = [*effects, *self.machine.handle(NodeChecked(unfit), Now(self.now_s, 1e9 + self.now_s))]
        self.effects = list(effects)
        for effect in effects:
            if isinstance(effect, e.Record):
                self.incidents[effect.incident.number] = effect.incident
        return [line for line in map(show, effects) if line]

    # --- beginning --------------------------------------------------------------------------------------------

    def begin(self) -> list[str]:
        """Start the job."""
        return self._show(self.machine.begin())

    def store(
        self,
        *checkpoints: str,
        last_generation: int = 0,
        bucket: Sequence[str] = (),
        unread: Mapping[str, CkptdError] | None = None,
    ) -> list[str]:
        """Answer what the disk and the bucket hold, the best first of each."""
        sources = [*(Source(cid(item), TIER) for item in checkpoints), *(Source(cid(item), BUCKET) for item in bucket)]
        sources.sort(key=lambda source: source.id, reverse=True)
        return self.feed(e.StoreRead(tuple(sources), last_generation, unread=unread or {}))

    def fetched(self, checkpoint: str, world_size: int | None = None, *, tier: str = TIER) -> list[str]:
        """Answer that a checkpoint can be offered; from the bucket it was brought to the disk."""
        source = Source(cid(checkpoint), tier)
        return self.feed(e.Fetched(source, world_size or len(self.ranks), copied=tier != TIER))

    def fetch_failed(self, checkpoint: str, error: CkptdError | None = None, *, tier: str = TIER) -> list[str]:
        """Answer that a checkpoint is damaged, or why else it can't be offered."""
        problem = DamagedError(f"{checkpoint} is damaged") if error is None else error
        return self.feed(e.FetchFailed(Source(cid(checkpoint), tier), problem))

    def claimed(self, generation: int) -> list[str]:
        """Answer that a generation is ours."""
        return self.feed(e.Claimed(generation))

    def spawned(self) -> list[str]:
        """Start the process of every rank."""
        return [line for rank in self.ranks for line in self.spawned_one(rank)]

    def spawned_one(self, rank: int) -> list[str]:
        """Start the process of one rank."""
        self.pids[rank] = self._pid()
        return self.feed(e.RankSpawned(rank, self.pids[rank]))

    def _pid(self) -> int:
        self._next_pid += 1
        return self._next_pid

    def joined(self, rank: int, pid: int | None = None) -> list[str]:
        """Let a rank ask for its place, and have slots 0 and 1, or all that it may have."""
        if pid is None and rank not in self.pids:
            pid = self._pid()
        self.pids[rank] = self.pids[rank] if pid is None else pid
        lines = self.feed(e.RankJoined(rank, self.pids[rank]))
        self.lend(rank)
        return lines

    def lend(self, rank: int, *slots: int) -> list[str]:
        """Lend a rank slots."""
        return self.feed(e.SlotsLent(rank, slots or tuple(range(min(2, self.machine.spec.slots)))))

    def restored(self) -> list[str]:
        """Let every rank report that it has its state back."""
        return [line for rank in self.ranks for line in self.feed(e.RankRestored(rank, 0.1))]

    def restore_fails(self, rank: int, checkpoint: str, error: CkptdError) -> list[str]:
        """Let a rank report that it could not use what it was offered."""
        return self.feed(e.RestoreFailed(rank, cid(checkpoint), error))

    def stepped(self, step: int) -> list[str]:
        """Let every rank report its first step."""
        return [line for rank in self.ranks for line in self.feed(e.RankStepped(rank, step, self.now_s))]

    def begin_training(self) -> None:
        """Begin on an empty store, and go on to where every rank has finished a step."""
        self.begin()
        self.store()
        self.up_to_training()

    def up_to_spawned(self, generation: int) -> None:
        """Let a generation be ours, and go on to where every rank has a process."""
        self.claimed(generation)
        self.spawned()

    def up_to_joined(self, generation: int) -> None:
        """Let a generation be ours, and go on to where every rank has its place."""
        self.up_to_spawned(generation)
        for rank in self.ranks:
            self.joined(rank)

    def up_to_training(self, generation: int = 1, *, first_step: int = 1, restores: bool = False) -> None:
        """Let a generation be ours, and go on to where every rank has finished a step."""
        self.up_to_joined(generation)
        if restores:
            self.restored()
        self.stepped(first_step)
        self.progress(first_step)

    # --- training ---------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> list[str]:
        """Let time pass, and the clock tick."""
        self.now_s += seconds
        return self.feed(e.Tick())

    def progress(self, step: int) -> list[str]:
        """Let every rank be at a step."""
        return self.feed(e.Progress(dict.fromkeys(self.ranks, step)))

    def sealed(self, rank: int, step: int, slot: int, *, final: bool = False, **witness: str) -> list[str]:
        """Let a rank seal a step in a slot, with the digests of a few replicated tensors."""
        return self.feed(e.RankSealed(rank, step, slot, 4096, 0.1, {"loss": 0.5}, final, witness))

    def all_sealed(self, step: int, slot: int, *, final: bool = False) -> list[str]:
        """Let every rank seal a step in the same slot."""
        return [line for rank in self.ranks for line in self.sealed(rank, step, slot, final=final)]

    def missed(self, rank: int, step: int, error: CkptdError | None = None) -> list[str]:
        """Let a rank say that it did not capture a step."""
        return self.feed(e.CaptureMissed(rank, step, error))

    def committed(self, checkpoint: str) -> list[str]:
        """Let a flush succeed."""
        return self.feed(e.Committed(cid(checkpoint), TIER, 8192, 0.2))

    def uploaded(self, checkpoint: str, tier: str = BUCKET) -> list[str]:
        """Let an upload succeed."""
        return self.feed(e.Committed(cid(checkpoint), tier, 8192, 0.2))

    def upload_failed(self, checkpoint: str, error: CkptdError | None = None, tier: str = BUCKET) -> list[str]:
        """Let an upload fail, for a reason that may pass unless another is given."""
        return self.feed(e.UploadFailed(cid(checkpoint), tier, error or StoreError("503 slow down")))

    def flush_failed(self, checkpoint: str, error: CkptdError | None = None) -> list[str]:
        """Let a flush fail, for a reason that may pass unless another is given."""
        return self.feed(e.FlushFailed(cid(checkpoint), error or StoreError("input/output error")))

    def room_made(self, freed_bytes: int, *ids: str, left: Mapping[str, tuple[str, ...]] | None = None) -> list[str]:
        """Answer that so much has gone from the disk, and which checkpoints with it, but for those that are left."""
        names = {cid(item): names for item, names in (left or {}).items()}
        return self.feed(RoomMade(TIER, tuple(map(cid, ids)), freed_bytes, names))

    def pruned(self, *ids: str, left: Mapping[str, tuple[str, ...]] | None = None) -> list[str]:
        """Answer that checkpoints have gone from the disk, but for those that are left."""
        names = {cid(item): names for item, names in (left or {}).items()}
        return self.feed(Pruned(TIER, tuple(map(cid, ids)), names))

    def capture(self, step: int, slot: int) -> list[str]:
        """Let an interval pass, a capture be announced for `step` at the next boundary, and every rank seal it."""
        self.now_s += self.machine.spec.every_s
        assert f"announce {step}" in self.progress(step - 1)
        return self.all_sealed(step, slot)

    # --- ends -------------------------------------------------------------------------------------------------

    def left(self, rank: int, step: int) -> list[str]:
        """Let a rank leave its training block."""
        return self.feed(e.RankLeft(rank, step))

    def exited(self, rank: int, evidence: Evidence | None = None, pid: int | None = None) -> list[str]:
        """Let a rank's process end, cleanly unless there is evidence."""
        return self.feed(e.RankExited(rank, self.pids[rank] if pid is None else pid, evidence))

    def die(self, rank: int) -> list[str]:
        """Let a rank be killed."""
        return self.exited(rank, killed(rank, self.now_s))

    def all_die(self, first: int = 0) -> list[str]:
        """Let one rank be killed, and then the others by us."""
        lines = self.die(first)
        for rank in self.ranks:
            if rank != first:
                lines += self.die(rank)
        return lines

    def stop(self, grace_s: float = 60.0, *, checkpoint: bool = True) -> list[str]:
        """Stop the job on purpose."""
        return self.feed(e.StopWanted(grace_s, checkpoint))


def show(effect: e.Effect) -> str:
    """Return an effect as a short line, an empty one for what no scenario is about."""
    match effect:
        case e.ReadStore():
            return "read store"
        case Recall():
            return "recall"
        case e.Fetch():
            return f"fetch {effect.source.id}{'' if effect.source.tier == TIER else f' from {effect.source.tier}'}"
        case e.Claim():
            return f"claim {effect.at_least} after {effect.parent}"
        case e.Spawn():
            return f"spawn generation {effect.generation}, restart {effect.restarts}"
        case e.Admit():
            offer = "nothing" if effect.offer is None else f"{effect.offer.id} from {effect.offer.tier}"
            return f"admit {effect.rank} to {effect.generation} with {offer}{', whole' if effect.whole else ''}"
        case e.Whole():
            return "whole"
        case e.Announce():
            return f"announce {effect.step}{', the last' if effect.last else ''}"
        case e.Release():
            return f"release {effect.rank}:{effect.slot}"
        case e.Flush():
            return f"flush {effect.id}"
        case Prune():
            where = "" if effect.tier == TIER else f" on {effect.tier}"
            return f"prune {' '.join(map(str, effect.ids))}{where}, keep {' '.join(map(str, effect.kept))}"
        case Collect():
            return ""
        case MakeRoom():
            return " ".join(["make room:", *map(str, effect.ids), "keep", *map(str, effect.kept)])
        case e.Upload():
            return f"upload {effect.id} to {effect.tier}"
        case Scrub():
            return f"scrub {effect.source}"
        case Mend():
            return f"mend {effect.source}"
        case Leave():
            return "leave"
        case Gather() if effect.evidence.kind != "hang":
            return ""  # nobody waits for it: see `test_job_straggling`
        case Gather():
            return f"gather {effect.incident}: {effect.evidence.kind} of rank {effect.evidence.rank}"
        case EndRanks():
            return f"end ranks {' '.join(map(str, effect.ranks))}"
        case e.Kill():
            return f"kill {int(effect.signal)}"
        case e.Dismiss():
            return f"dismiss {effect.rank}"
        case e.Record():
            return _incident(effect)
        case e.Log():
            return "" if effect.level == "debug" else f"log {effect.event}"
        case Marked() | CheckNode():
            return ""
        case e.End():
            error = "" if effect.error is None else f": {type(effect.error).__name__}: {effect.error.message}"
            return f"end {effect.outcome}{error}"
    raise AssertionError(effect)


def _incident(record: e.Record) -> str:
    incident = record.incident
    lost = "" if incident.lost_steps is None else f", lost {incident.lost_steps}"
    return f"incident {incident.number} {'closed' if incident.closed else 'open'}: {incident.cause}{lost}"

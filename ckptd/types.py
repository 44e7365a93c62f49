"""The nouns of ckptd as frozen values: what every layer may hold, compare and print.

Nothing here does anything. Times named `_at` are seconds of the wall clock (for people and files), times named
`_s` are durations or readings of the monotonic clock (for decisions).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")
_EXIT_CODE = re.compile("[1-9][0-9]{0,2}")


class CheckpointId(NamedTuple):
    """Names a snapshot or checkpoint of a job: which incarnation made it, at which finished step."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"g{self.generation}/s{self.step}"


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """One committed checkpoint as a tier lists it."""

    id: CheckpointId
    parent: CheckpointId | None
    tier: str
    committed_at: float
    size_bytes: int
    shards: int
    world_size: int
    health: str | None = None
    """"healthy" or "suspect", as far as reports tell; None where they don't."""

    def to_json(self) -> dict[str, Any]:
        """Return the stable shape of `ckptctl ls --json`."""
        return {
            "generation": self.id.generation,
            "step": self.id.step,
            "tier": self.tier,
            "committed_at": self.committed_at,
            "size_bytes": self.size_bytes,
            "shards": self.shards,
            "world_size": self.world_size,
            "health": self.health,
        }


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint committed on a tier, and what retention asks about it."""

    id: CheckpointId
    committed_at: float = 0.0
    size_bytes: int = 0
    """What was written for it; files that it refers to are counted with the checkpoint that wrote them."""
    values: Mapping[str, float] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the folder of a checkpoint on a tier, committed or not, as a listing shows it."""

    name: str
    """Seen from the job's folder."""
    checkpoint: CheckpointId
    """In whose folder it lies."""
    size_bytes: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class Marker:
    """What a checkpoint that was removed has left on a tier for as long as that can be undone."""

    checkpoint: CheckpointId
    deleted_at: float
    """Whole seconds of the wall clock of whoever removed it."""
    size_bytes: int


class Piece(NamedTuple):
    """Which part of which tensor an entry of a shard is, when the tensor belongs to the job and not to one rank.

    The tensor has the global `shape`; the entry holds the box that begins at `offset` and has the entry's own shape.
    """

    tensor: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class TensorSpan(NamedTuple):
    """Where one entry lies in a shard image: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    piece: Piece | None = None
    """None for a tensor of this rank alone, which then bears the entry's name."""


@dataclass(frozen=True, slots=True)
class RaisedException:
    """An uncaught exception of a rank, as text: objects of a dead process are of no use to anybody."""

    type: str
    message: str
    traceback: str
    error: dict[str, Any] | None = None
    """The `CkptdError.to_json()` form when the exception was ours: a refusal, not a crash."""
    told_s: float | None = field(default=None, compare=False)
    """Monotonic time at which the agent was told, long before the end of a rank that has much to clear up."""

    def told_after(self, before: RaisedException | None) -> RaisedException:
        """Return this with the time at which `before` was told, if that is the same exception."""
        same = before is not None and (before.type, before.message) == (self.type, self.message)
        return replace(self, told_s=before.told_s) if before is not None and same else self

    @property
    def exit_code(self) -> int | None:
        """The exit code that the rank was about to end with, when it was `SystemExit`."""
        told = self.type == "SystemExit" and _EXIT_CODE.fullmatch(self.message)
        return int(self.message) if told else None

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and is kept with an incident."""
        return {"type": self.type, "message": self.message, "traceback": self.traceback, "error": self.error}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RaisedException:
        """Rebuild what `to_json` wrote."""
        error = data.get("error")
        said = error if isinstance(error, dict) else None
        return cls(str(data["type"]), str(data["message"]), str(data["traceback"]), said)


@dataclass(frozen=True, slots=True)
class OomKill:
    """That the kernel killed a process because memory had run out, and how that is known."""

    said: str
    """One line: what the kernel's log says of it, or which counter has moved."""
    certain: bool
    """Whether the kernel named the process; else a kill was counted in its cgroup, which may have been another's."""
    cgroup: str | None = None
    limit_bytes: int | None = None
    """The tightest limit of that cgroup and those above it; None when there is none."""


@dataclass(frozen=True, slots=True)
class RankExit:
    """How one rank's process ended, as its parent saw it."""

    rank: int
    pid: int
    returncode: int
    """The exit code, or minus the signal's number, as `subprocess` has it."""
    at_s: float
    """Monotonic time at which the parent learned of the end."""
    exception: RaisedException | None = None
    last_lines: tuple[str, ...] = ()
    """The end of what the rank wrote to stderr."""
    core_dumped: bool = False
    """Whether the kernel wrote a core file, or gave it to the program that collects them."""
    oom: OomKill | None = None
    """Set when the kernel killed it for want of memory."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A detector's typed claim: what happened to which rank, how sure, and in words."""

    detector: str
    kind: str
    rank: int | None
    certainty: float
    summary: str
    at_s: float
    signal: int | None = None
    returncode: int | None = None
    exception: RaisedException | None = None
    fatal: bool = True
    facts: tuple[str, ...] = ()
    """What else is known, a line each, for whoever looks closer."""
    step: int | None = None
    """The step that failed, where that is known: a rank may have finished more when it is noticed."""
    told_s: float | None = None
    """Monotonic time at which the rank itself told of it, before its end at `at_s`; None when it did not."""

    @property
    def signature(self) -> str:
        """What makes two failures the same failure, for the policy that counts repetitions.

        Numbers in a message (addresses, pids, sizes) differ from time to time and say nothing of that.
        """
        if self.exception is not None:
            return f"{self.exception.type}: {_NUMBER.sub('#', self.exception.message)}"
        number = self.signal if self.signal is not None else self.returncode
        return self.kind if number is None else f"{self.kind} {number}"


@dataclass(frozen=True, slots=True)
class Incident:
    """One failure: its evidence, the decision with its reasons, what was lost and how long each phase took."""

    number: int
    job: str
    generation: int
    cause: str
    rank: int | None
    signal: int | None
    returncode: int | None
    failed_at: float
    failed_step: int
    lost_steps: int | None = None
    restored: dict[str, Any] | None = None
    """{step, tier, generation} of what the next generation began with; None for a fresh start or no restart."""
    seconds: dict[str, float] = field(default_factory=dict)
    decision: str = ""
    reasons: tuple[str, ...] = ()
    consequences: tuple[str, ...] = ()
    exception: RaisedException | None = None
    last_lines: tuple[str, ...] = ()
    kind: str = ""
    """The evidence's kind: what sort of failure it was, in one word."""
    evidence_path: str | None = None
    """The folder with what was gathered of it, on the node where it happened."""
    closed: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Incident:
        """Rebuild what `to_json` wrote, also by another version: what is not known here is left out."""
        known = cls.__dataclass_fields__
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key in known
        }
        if values.get("exception") is not None:
            values["exception"] = RaisedException.from_json(values["exception"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the stable shape of `ckptctl incidents --json`."""
        return {
            "number": self.number,
            "job": self.job,
            "generation": self.generation,
            "cause": self.cause,
            "rank": self.rank,
            "signal": self.signal,
            "returncode": self.returncode,
            "failed_at": self.failed_at,
            "failed_step": self.failed_step,
            "lost_steps": self.lost_steps,
            "restored": self.restored,
            "seconds": dict(self.seconds),
            "decision": self.decision,
            "reasons": list(self.reasons),
            "consequences": list(self.consequences),
            "exception": None if self.exception is None else self.exception.to_json(),
            "last_lines": list(self.last_lines),
            "kind": self.kind,
            "evidence_path": self.evidence_path,
            "closed": self.closed,
        }

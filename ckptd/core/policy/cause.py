"""Which of several failures of one generation is the cause, and what the others are then. Pure: words and times in.

Ranks in lock-step take each other down: one is killed, and those that wait for it lose their connection and raise.
Their exceptions may be known before the death that they come from, since a large process takes its time to end.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ckptd.types import Evidence


class Blame(IntEnum):
    """How much a failure can explain; a higher one is the cause of a lower one, whenever each was seen."""

    OURS = 0
    """A kill of ours, which follows from what was seen before."""
    SYMPTOM = 1
    """What a rank raises, or dies of, when another one is gone or stands still."""
    CAUSE = 2
    """Everything else."""


_ABRUPTNESS = ("oom", "signal", "exit", "vanished", "exception")
"""What is the cause of two ends that became known at the same moment: who dies at once can't have died of the other."""
_PEER_ERRORS = frozenset({
    "BrokenPipeError",
    "ConnectionAbortedError",
    "ConnectionError",
    "ConnectionResetError",
    "torch.distributed.DistNetworkError",
    "torch.distributed.DistStoreError",
    "torch.distributed.distributed_c10d.DistNetworkError",
    "torch.distributed.distributed_c10d.DistStoreError",
})  # fmt: skip
_PEER_WORDS = re.compile(
    r"connection (?:was )?(?:closed|reset|aborted) by (?:remote )?peer"
    r"|broken pipe"
    r"|ncclremoteerror|remote process exit|nccl communicator (?:was|is) aborted"
    r"|timed out waiting \d+ ?ms for (?:recv|send)"
    r"|application timeout caused pair closure"
    r"|watchdog caught collective operation timeout"
    r"|failed to recv, got 0 bytes"
    r"|socket timeout",
    re.IGNORECASE,
)
"""How gloo, NCCL and torch's store say that a peer is gone or does not answer."""


@dataclass(frozen=True, slots=True)
class Failed:
    """One failure as this policy weighs it."""

    evidence: Evidence
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the later of two failures is the cause, and why."""

    newer_is_cause: bool
    reason: str


def blame(failed: Failed, killed_s: float | None) -> Blame:
    """Weigh a failure; `killed_s` is when ckptd ordered its own kill of all ranks, None when it did not."""
    evidence = failed.evidence
    if evidence.kind == "signal" and evidence.signal == signal.SIGKILL:
        return Blame.OURS if killed_s is not None and evidence.at_s >= killed_s else Blame.CAUSE
    return Blame.SYMPTOM if symptom(failed) is not None else Blame.CAUSE


def symptom(failed: Failed) -> str | None:
    """Return the words by which a failure says that a peer was gone, None when it says something else.

    Its own exception tells; without one, what it wrote last, if it ended by an exit code or aborted.
    """
    evidence, exception = failed.evidence, failed.evidence.exception
    if exception is not None:
        first = next(iter(exception.message.strip().splitlines()), "")
        if exception.type in _PEER_ERRORS:
            return f"{exception.type}: {first}" if first else exception.type
        return _matching(exception.message.splitlines())
    if evidence.kind == "exit" or (evidence.kind == "signal" and evidence.signal == signal.SIGABRT):
        return _matching(failed.last_lines)
    return None


def _matching(lines: Sequence[str]) -> str | None:
    return next((found[0] for line in lines if (found := _PEER_WORDS.search(line)) is not None), None)


def compare(cause: Failed, newer: Failed, killed_s: float | None) -> Verdict:
    """Say whether `newer`, which became known after `cause`, is the cause of both.

    Two ranks that told of their failures are compared by when they did: each may take its time to end, and other ranks
    can't have failed of it before it told.
    What began the incident was before every kill of ckptd's, which only follows from it.
    """
    before, after = blame(cause, None), blame(newer, killed_s)
    if before is not after:
        higher, lower = (newer, cause) if after > before else (cause, newer)
        said = symptom(lower)
        why = "ckptd ended it" if said is None else f"{said!r} is what a rank says that has lost another one"
        return Verdict(after > before, f"{_who(higher)} failed by itself; {_who(lower)} did not: {why}")
    first, second = cause.evidence, newer.evidence
    did, first_s, second_s = "ended", first.at_s, second.at_s
    if first.told_s is not None and second.told_s is not None:
        did, first_s, second_s = "told of its failure", first.told_s, second.told_s
    if first_s != second_s:
        earlier, later = (newer, cause) if second_s < first_s else (cause, newer)
        ms = abs(first_s - second_s) * 1e3
        return Verdict(earlier is newer, f"{_who(earlier)} {did} {ms:.3g} ms before {_who(later)}")
    more = _abruptness(second) < _abruptness(first)
    one, other = (newer, cause) if more else (cause, newer)
    why = "ended more abruptly" if _abruptness(first) != _abruptness(second) else "was heard of first"
    return Verdict(more, f"{_who(one)} and {_who(other)} ended at the same moment, and {_who(one)} {why}")


def consequence(failed: Failed, cause: Evidence, killed_s: float | None) -> str:
    """Say in words what a failure is beside its cause."""
    evidence = failed.evidence
    match blame(failed, killed_s):
        case Blame.OURS:
            return f"ckptd ended {_who(failed)}"
        case Blame.SYMPTOM if cause.rank is not None and cause.rank != evidence.rank:
            return f"{_who(failed)} lost its connection to rank {cause.rank}"
    return evidence.summary


def _abruptness(evidence: Evidence) -> int:
    return _ABRUPTNESS.index(evidence.kind) if evidence.kind in _ABRUPTNESS else -1


def _who(failed: Failed) -> str:
    rank = failed.evidence.rank
    return f"rank {rank}" if rank is not None else "the job"

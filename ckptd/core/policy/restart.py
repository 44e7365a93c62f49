"""Whether to restart after a failure, from what and when, or to give up. Pure: failures in, decision out.

The rules, in the order in which they are asked:

1. What was refused (state that doesn't fit the model) no restart can cure.
2. The same failure at the same step, N times in a row: what the job begins with may be to blame, so it steps back to
   an older checkpoint; if that ends the same way, or there is none, it is given up.
3. More failures within `window_s` than the budget allows: given up.
4. Generations that die quickly, one after the other, without getting further than those before them: the next one
   waits, twice as long each time. Every other failure is restarted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptd.types import CheckpointId

_REMEMBERED = 16
"""However long ago: more than are needed in a row to give up, or for the longest delay."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Limits of what a job may cost before it is given up."""

    max_restarts: int = 100
    """Restarts within `window_s`."""
    window_s: float = 86400.0
    """What is longer ago is not held against the job: failures come with hours of training, not with bugs alone."""
    same_exception_limit: int = 3
    """The same exception, or bad number, at the same step this often in a row is no chance."""
    same_death_limit: int = 5
    """The same exit code or signal at the same step this often in a row, which chance can do too."""
    quick_s: float = 60.0
    """A generation that lived no longer died quickly."""
    backoff_base_s: float = 1.0
    backoff_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What the policy knows of one failure."""

    signature: str
    step: int
    """The last step that any rank had finished."""
    progressed: bool
    """Whether its generation had finished a step beyond where the one before it had failed."""
    by_script: bool = False
    """Whether the script itself brought it about, by an exception or a bad number: that is hardly ever chance."""
    refused: str | None = None
    """The message of a refusal that no restart can cure, such as state that doesn't fit the model."""
    at_s: float = 0.0
    """When, on the monotonic clock."""
    lived_s: float = 0.0
    """How long its generation had lived."""
    summary: str = ""
    """What it was, for people; the signature leaves out what differs from time to time."""


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """Restart after `delay_s`, or not; `reasons` in words. `verdict` is why the job was given up, if it was.

    With `at_most_step` the next generation begins no later than there, though there is something newer.
    """

    restart: bool
    delay_s: float
    reasons: tuple[str, ...]
    verdict: str | None = None
    at_most_step: int | None = None


def decide(failures: Sequence[Failure], policy: RestartPolicy, older: CheckpointId | None = None) -> RestartDecision:
    """Decide on the last of `failures`, which lists all of this job that are known, oldest first.

    `older` is the newest checkpoint before the one that the failed generation began with, None when there is none.
    """
    last = failures[-1]
    what = last.summary or last.signature
    if last.refused is not None:
        return _give_up(last.refused, "a restart can't change what was refused")
    spent = sum(1 for failure in failures if failure.at_s > last.at_s - policy.window_s)
    within = f"within {_span(policy.window_s)}"
    repeated = _repetitions(failures)
    limit = policy.same_exception_limit if last.by_script else policy.same_death_limit
    if repeated > limit or (repeated == limit and older is None):
        kind = "what a script does itself" if last.by_script else "a death"
        then = "an older checkpoint ended the same way" if repeated > limit else "there is no older checkpoint to try"
        return _give_up(
            f"the same failure {repeated} times in a row at step {last.step}: {what}",
            f"{limit} times is the limit for {kind} without progress, and {then}",
        )
    if spent > policy.max_restarts:
        return _give_up(
            f"failure number {spent} {within}, and max_restarts is {policy.max_restarts}: {what}",
            "the restart budget is used up",
        )
    reasons = [f"restart {spent} of at most {policy.max_restarts} {within}"]
    if repeated == limit and older is not None:
        reasons.append(
            f"from step {older.step}, since the same failure came {repeated} times in a row at step {last.step}"
        )
    quick = _quick_and_fruitless(failures, policy.quick_s)
    delay_s = 0.0 if quick < 2 else min(policy.backoff_max_s, policy.backoff_base_s * 2 ** min(quick - 2, 60))
    if delay_s:
        reasons.append(f"after {delay_s:g} s, since {quick} generations in a row died early and made no progress")
    at_most_step = older.step if older is not None and repeated == limit else None
    return RestartDecision(restart=True, delay_s=delay_s, reasons=tuple(reasons), at_most_step=at_most_step)


def remembered(failures: Sequence[Failure], policy: RestartPolicy) -> list[Failure]:
    """Return those of `failures` that can still change a decision: the journal has them with every word of a job."""
    oldest_s = failures[-1].at_s - policy.window_s if failures else 0.0
    recent = sum(1 for failure in failures if failure.at_s > oldest_s)
    return list(failures[-max(recent, _REMEMBERED) :])


def _give_up(verdict: str, reason: str) -> RestartDecision:
    return RestartDecision(restart=False, delay_s=0.0, reasons=(reason,), verdict=verdict)


def _span(seconds: float) -> str:
    for size_s, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size_s and not seconds % size_s:
            return f"{seconds / size_s:g} {unit}"
    return f"{seconds:g} s"


def _repetitions(failures: Sequence[Failure]) -> int:
    """Count how often the last failure happened in a row, at the same step and with the same signature."""
    last = failures[-1]
    count = 0
    for failure in reversed(failures):
        if (failure.signature, failure.step) != (last.signature, last.step):
            break
        count += 1
    return count


def _quick_and_fruitless(failures: Sequence[Failure], quick_s: float) -> int:
    """Count the failures in a row, up to the last, whose generation died early and no further than the one before."""
    count = 0
    for failure in reversed(failures):
        if failure.progressed or failure.lived_s > quick_s:
            break
        count += 1
    return count

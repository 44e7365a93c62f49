"""Whether to restart after a failure, after what delay, and when to give up. Pure: failures in, decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Limits of what a job may cost before it is given up."""

    max_restarts: int = 100
    """All restarts of one run together."""
    same_exception_limit: int = 3
    """The same exception at the same step this often in a row is a bug of the script: no restart will cure it."""
    same_death_limit: int = 5
    """The same exit code or signal at the same step this often in a row, which chance can do too."""
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
    is_exception: bool = False
    refused: str | None = None
    """The message of a refusal that no restart can cure, such as state that doesn't fit the model."""


@dataclass(frozen=True, slots=True)
class RestartDecision:
    """Restart after `delay_s`, or not; `reasons` in words. `verdict` is why the job was given up, if it was."""

    restart: bool
    delay_s: float
    reasons: tuple[str, ...]
    verdict: str | None = None


def decide(failures: Sequence[Failure], policy: RestartPolicy) -> RestartDecision:
    """Decide on the last of `failures`, which lists all of this run, oldest first."""
    last = failures[-1]
    if last.refused is not None:
        return _give_up(last.refused, "a restart can't change what was refused")
    repeated = _repetitions(failures)
    limit = policy.same_exception_limit if last.is_exception else policy.same_death_limit
    if repeated >= limit:
        return _give_up(
            f"the same failure {repeated} times in a row at step {last.step}: {last.signature}",
            f"{repeated} times is the limit for {'an exception' if last.is_exception else 'a death'} without progress",
        )
    if len(failures) > policy.max_restarts:
        return _give_up(
            f"failure number {len(failures)}, and max_restarts is {policy.max_restarts}: {last.signature}",
            "the restart budget is used up",
        )
    fruitless = _fruitless(failures)
    delay_s = 0.0 if fruitless < 2 else min(policy.backoff_max_s, policy.backoff_base_s * 2 ** (fruitless - 2))
    reasons = [f"restart {len(failures)} of at most {policy.max_restarts}"]
    if delay_s:
        reasons.append(f"after {delay_s:g} s, since {fruitless} generations in a row made no progress")
    return RestartDecision(restart=True, delay_s=delay_s, reasons=tuple(reasons))


def _give_up(verdict: str, reason: str) -> RestartDecision:
    return RestartDecision(restart=False, delay_s=0.0, reasons=(reason,), verdict=verdict)


def _repetitions(failures: Sequence[Failure]) -> int:
    """Count how often the last failure happened in a row, at the same step and with the same signature."""
    last = failures[-1]
    count = 0
    for failure in reversed(failures):
        if (failure.signature, failure.step) != (last.signature, last.step):
            break
        count += 1
    return count


def _fruitless(failures: Sequence[Failure]) -> int:
    """Count the failures in a row, up to the last, whose generation got no further than the one before."""
    count = 0
    for failure in reversed(failures):
        if failure.progressed:
            break
        count += 1
    return count

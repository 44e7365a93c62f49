"""When a job stops by itself: before its time is over, after a step, or at a moment that somebody chose.

Pure. Two clocks come in: the monotonic one for the time limit, which counts from the start of this run, and the wall
clock for moments that people and batch systems name. Those are compared anew each time, so that a clock which is set
right meanwhile counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DEFAULT_GRACE_S = 60.0
DEFAULT_MARGIN_S = 10.0
_INTERVAL_MAX_S = 60.0
"""Of a long interval between checkpoints so much is enough to be on the safe side."""
_SHARE_MAX = 0.5
"""However slow everything is, the first half of the time is for training."""
_MEASURE_BY = 0.25
"""When so much of the time is over, something must have been measured."""
_END_S = 5.0
"""How long before its time is over a job should be gone: for ranks that have to be killed."""
_GRACE_MIN_S = 1.0
_LEADS = 4


@dataclass(frozen=True, slots=True)
class Conditions:
    """What somebody may set, show and clear while the job runs. `at` is wall-clock time, in seconds."""

    after_step: int | None = None
    at: float | None = None
    at_next_checkpoint: bool = False

    @property
    def any(self) -> bool:
        """Whether any is set."""
        return self != Conditions()


@dataclass(frozen=True, slots=True)
class HaltPolicy:
    """How much time a job has.

    `limit_at_s` is monotonic and `ends_at` wall-clock time, by which a job must be gone; `began_s` and `began_at` are
    when this run of it began on either clock. `margin_s` is added to the margin that is measured.
    """

    grace_s: float = DEFAULT_GRACE_S
    margin_s: float = DEFAULT_MARGIN_S
    began_s: float = 0.0
    began_at: float = 0.0
    limit_at_s: float | None = None
    ends_at: float | None = None
    conditions: Conditions = field(default_factory=Conditions)


@dataclass(frozen=True, slots=True)
class Pace:
    """What this run has measured, in seconds; None where nothing was yet. `upload_s` is 0 without a further tier."""

    every_s: float
    step_s: float | None = None
    capture_s: float | None = None
    flush_s: float | None = None
    upload_s: float | None = None

    @property
    def known(self) -> bool:
        """Whether a whole checkpoint was measured, up to the last tier."""
        return self.flush_s is not None and self.upload_s is not None


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """How much time there is, how much of it the stop needs, and why."""

    left_s: float
    whole_s: float
    margin_s: float
    limit: str
    """Which limit it is."""
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Halt:
    """The job is to stop now, and be done within `grace_s`; `reason` is for people."""

    reason: str
    grace_s: float
    checkpoint: bool = True


def margin(pace: Pace, extra_s: float, whole_s: float) -> tuple[float, tuple[str, ...]]:
    """Return how long before its time is over a job has to begin to stop, and what that is made of.

    One interval between checkpoints (of a long one a minute), two steps until all ranks meet, one capture, one flush,
    two uploads (one may be under way when the last begins), each the longest of the last ones, and `extra_s`. Never
    more than half of the time that there was.
    """
    parts = (
        ("interval", min(pace.every_s, _INTERVAL_MAX_S)),
        ("two steps", 2 * (pace.step_s or 0.0)),
        ("capture", pace.capture_s or 0.0),
        ("flush", pace.flush_s or 0.0),
        ("two uploads", 2 * (pace.upload_s or 0.0)),
        ("extra", extra_s),
    )
    reasons = [f"{name} {seconds:.3g} s" for name, seconds in parts if seconds]
    needed_s = sum(seconds for _, seconds in parts)
    if needed_s > whole_s * _SHARE_MAX:
        needed_s = whole_s * _SHARE_MAX
        reasons.append(f"but no more than half of {whole_s:.3g} s")
    return needed_s, tuple(reasons)


def time_left(policy: HaltPolicy, pace: Pace, now_s: float, wall: float) -> TimeLeft | None:
    """Return the time until the nearer of the two limits, None when there is none."""
    limits: list[tuple[float, float, str]] = []
    if policy.limit_at_s is not None:
        limits.append((policy.limit_at_s - now_s, policy.limit_at_s - policy.began_s, "the time limit"))
    if policy.ends_at is not None:
        limits.append((policy.ends_at - wall, policy.ends_at - policy.began_at, "the end of the batch job"))
    if not limits:
        return None
    left_s, whole_s, limit = min(limits)
    margin_s, reasons = margin(pace, policy.margin_s, max(0.0, whole_s))
    return TimeLeft(left_s, whole_s, margin_s, limit, reasons)


def grace_within(left: TimeLeft) -> float:
    """Return how long a stop may take that has to be over before the time is: ranks may have to be killed then."""
    return round(max(_GRACE_MIN_S, left.left_s - min(_END_S, left.left_s / 4)), 3)


def wants_measure(left: TimeLeft, pace: Pace) -> bool:
    """Whether a checkpoint is due only to learn how long one takes."""
    return not pace.known and left.left_s <= left.whole_s * (1 - _MEASURE_BY)


def decide(
    policy: HaltPolicy, conditions: Conditions, left: TimeLeft | None, *, wall: float, newest_step: int
) -> Halt | None:
    """Return why and how the job has to stop now, None when it need not.

    That the step of `after_step` is done is the last thing seen to: the ranks are to stop there, not to run past it,
    which `last_step` prepares.
    """
    if left is not None and left.left_s <= left.margin_s:
        grace_s = grace_within(left)
        what = f"{left.limit} is in {max(0.0, left.left_s):.3g} s, and stopping may take {left.margin_s:.3g} s"
        return Halt(what, grace_s)
    if conditions.at is not None and wall >= conditions.at:
        return Halt("the moment has come at which it was to stop", policy.grace_s)
    if conditions.after_step is not None and newest_step >= conditions.after_step:
        return Halt(f"step {conditions.after_step} is done", policy.grace_s)
    return None


def last_step(after_step: int | None, newest_step: int, lead: int) -> int | None:
    """Return the step to announce as the last one, once the ranks are near it; None while it is far, or behind them.

    `lead` is how far ahead of the first rank a step has to be announced. It is announced earlier than that, so that
    nothing which is announced just before it can be in its way.
    """
    if after_step is None or not newest_step + lead <= after_step <= newest_step + _LEADS * lead:
        return None
    return after_step


def may_begin_upload(usual_s: float | None, left_s: float) -> bool:
    """Whether an older checkpoint's upload may begin while the last one is still to come.

    It holds the last one up, so both have to fit into the time that is left; what was never measured does not.
    """
    return usual_s is not None and 2 * usual_s <= left_s

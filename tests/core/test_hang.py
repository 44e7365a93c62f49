"""The rule by which a rank counts as hung: the limit, and whose time counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.policy import hang
from ckptd.core.policy.hang import NO_DEADLINE_NS, HangPolicy, Limit
from tests.core.looks import POLICY, TICK_S, Job

step_times = st.lists(st.floats(0.0005, 400.0), min_size=hang.ENOUGH, max_size=hang.WINDOW)


# --- the limit ----------------------------------------------------------------------------------------------------


@given(step_times)
def test_the_limit_is_bounded(times_s: list[float]) -> None:
    """It is never below the floor or twice the longest step, nor above the ceiling unless those steps are."""
    limit = hang.learned(times_s, POLICY).seconds
    assert limit >= POLICY.floor_s
    assert limit >= 2 * max(times_s)
    assert limit <= max(POLICY.ceiling_s, 2 * max(times_s))


@given(step_times, st.floats(1.0, 3.0))
def test_a_hiccup_is_no_hang(times_s: list[float], factor: float) -> None:
    """A step of up to three times the longest is within the limit, as long as the ceiling allows any such."""
    longest_s = max(times_s)
    if 3 * longest_s < POLICY.ceiling_s:
        assert factor * longest_s <= hang.learned(times_s, POLICY).seconds


@given(step_times, st.floats(1.0, 50.0))
def test_longer_steps_never_shorten_the_limit(times_s: list[float], factor: float) -> None:
    """A job that slows down is given more time."""
    slower = [seconds * factor for seconds in times_s]
    assert hang.learned(slower, POLICY).seconds >= hang.learned(times_s, POLICY).seconds


@pytest.mark.parametrize(
    ("times_s", "seconds", "rule"),
    [
        ([0.1] * 2, 600.0, "fewer than 3 steps are known"),
        ([0.1] * 20, 5.0, "the floor"),
        ([1.0] * 20, 10.0, "10 x the usual step of 1 s"),
        ([0.1] * 20 + [4.0], 12.0, "3 x the longest step of 4 s"),
        ([120.0] * 3, 600.0, "the ceiling"),
        ([500.0] * 3, 1000.0, "2 x the longest step of 500 s"),
    ],
)
def test_the_rule(times_s: list[float], seconds: float, rule: str) -> None:
    """Each part of the rule, with the words that status shows for it."""
    assert hang.learned(times_s, POLICY) == Limit(pytest.approx(seconds), rule)


def test_the_limit_of_a_capture() -> None:
    """A capture has ten times what the longest took, and never less than a step; the first one has the ceiling."""
    step = Limit(5.0, "the floor")
    assert hang.of_capture([], step, POLICY).seconds == POLICY.ceiling_s
    assert hang.of_capture([0.2, 0.1], step, POLICY) == step
    assert hang.of_capture([0.2, 2.0], step, POLICY).seconds == 20.0
    assert hang.of_capture([200.0], step, POLICY).seconds == POLICY.ceiling_s


@given(st.floats(-5, 1e6))
def test_unseen_time_does_not_count(gap_s: float) -> None:
    """However long nobody has looked, a look counts a quarter of a second at most, and never less than nothing."""
    assert 0 <= hang.counted_s(gap_s) <= hang.LOOK_S


# --- who is hung --------------------------------------------------------------------------------------------------


def test_a_job_that_stops_is_found_soon() -> None:
    """With steps of 0.1 s a hang is found after the floor, well within ten seconds."""
    job = Job()
    job.steps([0.1] * 50)
    assert POLICY.floor_s <= job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 2.0), min_size=4, max_size=12))
def test_a_hang_is_found_within_twice_the_limit(times_s: list[float]) -> None:
    """Whatever the steps were that nobody called a hang, the next one that never ends is found within the limit."""
    job = Job()
    usual_s = times_s[0]
    job.steps([usual_s * (1 + index / 4) for index in range(len(times_s))])
    limit_s = job.patience.limit.seconds
    assert limit_s <= job.until_hung(2 * limit_s) <= limit_s + 3 * TICK_S


def test_sparse_steps_learn_a_limit_of_their_own() -> None:
    """Steps of two minutes are no hang; nor is one of five."""
    job = Job()
    job.steps([120.0] * 5)
    job.steps([300.0])


def test_the_limit_follows_a_job_that_slows_down() -> None:
    """Steps that become longer and longer, beyond the ceiling, are never a hang."""
    job = Job()
    seconds, steps = 0.1, []
    while seconds < 900:
        steps.append(seconds)
        seconds *= 1.5
    job.steps(steps)


def test_the_limit_follows_a_job_that_speeds_up() -> None:
    """After a window of short steps the long ones from before are forgotten."""
    job = Job()
    job.steps([10.0] * 5)
    assert job.patience.limit.seconds == pytest.approx(100, rel=0.02)
    job.steps([0.1] * hang.WINDOW)
    assert job.patience.limit.seconds == POLICY.floor_s


def test_the_first_step_may_take_long() -> None:
    """A first step of minutes is no hang, and teaches nothing about the next ones."""
    job = Job()
    job.steps([300.0])
    assert not job.patience.knows
    job.steps([0.1] * 5)
    assert job.patience.limit.seconds == POLICY.floor_s


def test_a_first_step_that_never_ends() -> None:
    """It is found after `first`, and the rank alone is named where there is but one."""
    job = Job(HangPolicy(first_s=60), ranks=1)
    assert 60 <= job.until_hung(70) <= 60.2
    assert job.hung is not None
    assert job.hung.rank == 0


def test_the_rank_behind_is_named() -> None:
    """Who has finished fewer steps than all others holds them up."""
    job = Job(ranks=3)
    job.steps([0.1] * 20)
    job.wait(0.1)
    for rank in (0, 2):
        job.step[rank] += 1
        job.beat_s[rank] = job.now_s
    job.until_hung(10)
    assert job.hung is not None
    assert (job.hung.rank, job.hung.step) == (1, 20)


def test_nobody_is_named_where_all_stand_at_the_same_step() -> None:
    """A page can't tell who holds up whom in a collective."""
    job = Job(ranks=3)
    job.steps([0.1] * 20)
    job.until_hung(10)
    assert job.hung is not None
    assert job.hung.rank is None


# --- what counts --------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1.1, 5000.0), min_size=1, max_size=6))
def test_nobody_is_blamed_for_an_agent_that_was_away(gaps_s: list[float]) -> None:
    """An agent that was stopped, or a machine that slept, calls nobody hung for it, however long and often."""
    job = Job()
    job.steps([0.1] * 20)
    for gap_s in gaps_s:
        job.wait(POLICY.floor_s / (2 * len(gaps_s)))
        job.now_s += gap_s
        assert job.look() is None
        assert job.wait(0.3) is None
    job.until_hung(2 * POLICY.floor_s)


def test_after_an_absence_everybody_has_a_moment() -> None:
    """A rank that was about to be called hung when the machine slept gets a second to go on."""
    job = Job()
    job.steps([0.1] * 20)
    assert job.wait(POLICY.floor_s - 0.1) is None
    job.now_s += 3600
    assert job.wait(0.9) is None
    job.steps([0.05])
    assert job.wait(POLICY.floor_s - 0.1) is None


@settings(deadline=None)
@given(st.lists(st.floats(0.05, 0.9), min_size=5, max_size=60))
def test_a_starved_agent_blames_later_not_sooner(gaps_s: list[float]) -> None:
    """Late looks make the verdict later at most: no look counts for more than the time that has passed."""
    job = Job()
    job.steps([0.1] * 20)
    begin_s = job.now_s
    for gap_s in gaps_s:
        job.now_s += gap_s
        if job.look() is not None:
            break
    assert job.hung is None or job.now_s - begin_s > POLICY.floor_s


def test_time_asleep_is_not_learned() -> None:
    """A step during which the machine slept for an hour says nothing about the next one."""
    job = Job()
    job.steps([0.1] * 20)
    job.now_s += 3600
    job.look()
    job.steps([0.1])
    assert job.patience.limit.seconds == POLICY.floor_s


# --- sections and phases ------------------------------------------------------------------------------------------


def enter(job: Job, rank: int, deadline_s: float | None) -> None:
    """Let a rank enter a section."""
    job.until_ns[rank] = NO_DEADLINE_NS + 1 if deadline_s is None else round((job.now_s + deadline_s) * 1e9)


def test_a_section_has_its_deadline() -> None:
    """A rank in a section is called hung at its deadline and not before, nor are those that wait for it."""
    job = Job()
    job.steps([0.1] * 20)
    enter(job, 0, 1200)
    assert 1199.9 <= job.until_hung(1300) <= 1200.5
    assert job.hung is not None
    assert job.hung.rank == 0
    assert job.hung.limit.rule == "the deadline of section 'eval'"


def test_a_section_without_deadline_has_the_ceiling() -> None:
    """Who names no deadline gets the ceiling."""
    job = Job()
    job.steps([0.1] * 20)
    enter(job, 1, None)
    assert POLICY.ceiling_s <= job.until_hung(700) <= POLICY.ceiling_s + 0.5


def test_after_a_section_the_usual_limit_holds() -> None:
    """What comes after a section counts from its end, and the long step teaches nothing."""
    job = Job()
    job.steps([0.1] * 20)
    enter(job, 0, 1200)
    assert job.wait(1000) is None
    job.until_ns[0] = 0
    assert job.wait(POLICY.floor_s - 0.1) is None
    job.steps([0.05] * 10)
    assert job.patience.limit.seconds == POLICY.floor_s
    assert job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S


def test_time_asleep_extends_a_section() -> None:
    """A machine that slept through a deadline gives the section what it had left."""
    job = Job()
    job.steps([0.1] * 20)
    enter(job, 0, 60)
    job.wait(30)
    job.now_s += 3600
    assert job.wait(29) is None
    job.until_hung(3)


@pytest.mark.parametrize("phase", ["restoring", "joining", "leaving"])
def test_a_phase_that_cannot_be_learned_has_the_ceiling(phase: str) -> None:
    """A restore, the way in and the way out may take the ceiling, and others wait for it."""
    job = Job()
    job.steps([0.1] * 20)
    job.phase[1] = phase
    assert POLICY.ceiling_s <= job.until_hung(700) <= POLICY.ceiling_s + 0.5
    assert job.hung is not None
    assert job.hung.rank == 1


def test_a_rank_that_raised_and_does_not_end() -> None:
    """It has the ceiling for its way out; who waits for it waits no longer than for anybody else."""
    job = Job()
    job.steps([0.1] * 20)
    job.phase[1] = "raised"
    assert job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S
    job = Job(ranks=1)
    job.steps([0.1] * 20)
    job.phase[0] = "raised"
    assert POLICY.ceiling_s <= job.until_hung(700) <= POLICY.ceiling_s + 0.5


def test_a_capture_that_never_ends() -> None:
    """A rank that stands still in a capture is found as soon as captures of that length are known."""
    job = Job()
    job.steps([0.1] * 20)
    job.patience.captured(0.8)
    job.phase[1] = "capturing"
    assert 8 <= job.until_hung(20) <= 8.2
    assert job.hung is not None
    assert job.hung.rank == 1


def test_a_rank_that_never_attaches() -> None:
    """One that is absent holds up those that wait in their first step, and is named."""
    job = Job(HangPolicy(first_s=30))
    job.phase[1] = "absent"
    assert 30 <= job.until_hung(40) <= 30.2


def test_restored_steps_are_not_learned() -> None:
    """The jump from nothing to the restored step is no step of training."""
    job = Job()
    job.phase = dict.fromkeys(job.ranks, "restoring")
    job.wait(3)
    job.step = dict.fromkeys(job.ranks, 500)
    job.look()
    job.phase = dict.fromkeys(job.ranks, "training")
    job.look()
    assert job.patience.stepped_s is None
    job.steps([2.0, 0.1, 0.1, 0.1])
    assert job.patience.limit.seconds == POLICY.floor_s

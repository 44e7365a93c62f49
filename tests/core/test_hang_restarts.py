"""What is known of hangs over generations: what was learned, first steps, and what was called a hang before."""

from __future__ import annotations

from ckptd.core.policy import hang
from tests.core.looks import POLICY, TICK_S, Job


def test_what_was_learned_outlives_a_generation() -> None:
    """After a restart the first step may take long again, and once a few are done the next no longer than before."""
    job = Job()
    job.steps([0.1] * 20)
    job.restart(10)
    job.steps([100.0, 0.1, 0.1])
    assert job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S


def test_after_a_long_first_step_the_next_ones_may_take_long() -> None:
    """What is compiled in the first step of a generation may be in the second, by all ranks at once or one by one."""
    job = Job()
    job.steps([0.1] * 20)
    job.restart(10)
    job.steps([100.0, 60.0])
    job.steps([0.1], ranks=[0])
    assert job.wait(199) is None, "rank 0 waits for rank 1, which may take twice the first step"
    assert job.until_hung(3) <= 2
    assert job.hung is not None
    assert job.hung.limit.rule == "2 x the first step of 100 s"


def test_after_a_quick_first_step_a_hang_is_found_soon() -> None:
    """Also where restore and first step fell between two looks: it is not taken for the first step that never ends."""
    job = Job()
    job.steps([0.1] * 20)
    job.restart(10)
    for rank in job.ranks:
        job.step[rank], job.beat_s[rank] = 11, job.now_s
    job.look()
    assert job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S


def test_a_first_look_at_a_rank_that_trains() -> None:
    """Steps that nobody has looked at are steps: the second one is no first one, and its length is not known."""
    job = Job()
    job.steps([0.1] * 20)
    job.patience.begin()
    job.wait(3)
    job.steps([0.1])
    assert job.patience.limit.seconds == POLICY.floor_s
    assert job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S


def test_the_same_step_again_is_given_more_time() -> None:
    """A long evaluation that nobody declared is called a hang a few times at most, and never again when it comes back.

    Until it has come to its end once nobody knows that it has one.
    """
    restarts = 0
    job = Job()
    job.steps([0.1] * 20)
    for _ in range(4):
        while job.wait(60) is not None:
            assert job.hung is not None
            job.patience.convicted(job.hung.step)
            restarts += 1
            job.restart(15)
            job.steps([0.1] * 5)
        job.steps([0.1] * (hang.WINDOW + 1))
    assert restarts == 2
    assert 120 <= job.until_hung(130) <= 121
    assert job.hung is not None
    assert job.hung.limit.rule == "2 x 60.1 s, which was no hang"


def test_a_hang_that_does_not_come_back_is_forgotten() -> None:
    """Where the job was called hung with reason, the step takes no time in the next life, and nothing is learned."""
    job = Job()
    job.steps([0.1] * 20)
    job.until_hung(10)
    job.patience.convicted(20)
    job.restart(15)
    job.steps([0.1] * 5)
    job.steps([4.0], ranks=[])
    job.steps([0.1] * 10)
    assert job.until_hung(20) <= 13, "three times the longest step"
    job.restart(15)
    job.steps([0.1] * (hang.WINDOW + 2))
    assert job.until_hung(10) <= POLICY.floor_s + 3 * TICK_S


def test_who_waited_for_one_that_goes_on_begins_anew() -> None:
    """A rank that was late and goes on after all takes the suspicion from those that have waited for it as long."""
    job = Job()
    job.steps([0.1] * 20)
    job.steps([0.1], ranks=[0])  # it waits for rank 1 from here on
    assert job.wait(7.0) is not None
    job.hung = None
    job.step[1], job.beat_s[1] = job.step[0], job.now_s
    assert job.look() is None, "rank 0 has stood still for as long, and rank 1 is there only now"

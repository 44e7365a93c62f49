"""Reports on their way to the control page, and the steps that are to be skipped."""

from __future__ import annotations

import math

import pytest

import ckptd
from ckptd.client.run import Run
from ckptd.protocol import messages as m
from ckptd.protocol.page import RING_ENTRIES, Phase, Word
from tests.client.fake_agent import FakeAgent, offer
from tests.client.fake_framework import FakeNumber

NUMBERS = {"metric": "loss", "skipped": []}


def attach(agent: FakeAgent, *, generation: int = 1, **more: object) -> Run:
    """Attach with an agent that watches the loss, unless it says something else."""
    numbers = {**NUMBERS, **more.pop("numbers", {})}
    agent.answers[m.Join] = lambda: m.Admitted(generation, agent.offer, numbers=numbers)
    return ckptd.attach(epoch=1, **more)


def written(agent: FakeAgent) -> list[tuple[int, float]]:
    """Return what the ring holds."""
    return agent.page.reports(None)[1]


def test_each_report_is_written_with_its_step(agent: FakeAgent) -> None:
    """What is reported while step N is under way is a report of step N; only the watched metric goes to the ring."""
    run = attach(agent)
    for step in run.steps(3):
        run.report(loss=1.0 / step, accuracy=0.5)
    run.report(accuracy=0.5)
    assert written(agent) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_nan_and_infinity_arrive_as_they_are(agent: FakeAgent) -> None:
    """What the manifest can't hold is what the ring is for."""
    run = attach(agent)
    run.report(loss=math.nan)
    run.report(loss=-math.inf)
    run.report(loss=2)
    (_, nan), *others = written(agent)
    assert math.isnan(nan)
    assert others == [(1, -math.inf), (1, 2.0)]


def test_what_is_no_number_is_no_report(agent: FakeAgent) -> None:
    """Text that says nothing, lists and None are left out, and cost no fault."""
    run = attach(agent)
    for value in ("low", [1.0, 2.0], None):
        run.report(loss=value)
    assert written(agent) == []
    assert run.protected


def test_a_job_that_watches_nothing_gets_no_reports(agent: FakeAgent) -> None:
    """Without a metric nothing is written, and the values still go to the manifest."""
    run = attach(agent, numbers={"metric": None})
    run.report(loss=1.0)
    assert written(agent) == []
    assert run._values == {"loss": 1.0}


def test_a_number_on_a_device_is_not_waited_for(agent: FakeAgent) -> None:
    """It is written at the first boundary at which it is there, with the step that it is of, in order."""
    run = attach(agent)
    first, second = FakeNumber(1.0), FakeNumber(2.0)
    run.report(loss=first)
    run.step()
    run.report(loss=second)
    second.done = True
    run.step()
    assert written(agent) == []
    first.done = True
    run.step()
    assert written(agent) == [(1, 1.0), (2, 2.0)]
    run.step()
    assert run._due_ns > 0  # nothing is looked at any more


def test_the_end_of_a_run_waits_for_its_numbers(agent: FakeAgent) -> None:
    """What is still on a device when the block ends is written before the last capture says that all is over."""
    with attach(agent) as run:
        run.step()
        run.report(loss=FakeNumber(math.nan))
    assert [step for step, _ in written(agent)] == [2]
    assert agent.page.phase is Phase.LEFT


def test_a_device_that_is_far_behind_costs_the_oldest_reports(agent: FakeAgent) -> None:
    """No more wait for a device than the ring holds, and of a full ring all but the oldest can be read."""
    run = attach(agent)
    pending = [FakeNumber(float(number)) for number in range(RING_ENTRIES + 10)]
    for number in pending:
        run.report(loss=number)
        run.step()
    for number in pending:
        number.done = True
    run.step()
    assert [value for _, value in written(agent)] == [float(n) for n in range(11, RING_ENTRIES + 10)]


def test_reports_without_an_agent_are_harmless(agent: FakeAgent) -> None:
    """After the agent is lost a report does nothing."""
    run = attach(agent)
    run._unprotect()
    run.report(loss=1.0)
    run.report(loss=FakeNumber(1.0))
    run.step()


# --- what is to be skipped ----------------------------------------------------------------------------------------


def test_the_hook_is_told_after_the_restore_and_before_the_first_step(agent: FakeAgent) -> None:
    """Each range is told once, in order, when the state is back; `run.skipped` has the same steps."""
    offer(agent, {"epoch": 7}, step=10)
    told = []

    def skip(first: int, last: int) -> None:
        told.append((first, last, agent.page.phase, int(agent.page.words[Word.STEP])))

    run = attach(agent, generation=2, numbers={"skipped": [[12, 13], [20, 20]]}, skip_data=skip)
    assert [item[:2] for item in told] == [(12, 13), (20, 20)]
    assert all(phase is not Phase.TRAINING and step == 10 for _, _, phase, step in told)
    assert run.skipped == {12, 13, 20}
    assert [step for step in run.steps(14) if step not in run.skipped] == [11, 14]


def test_what_the_hook_raises_is_raised(agent: FakeAgent) -> None:
    """A script that can't skip must not train on."""

    def skip(first: int, last: int) -> None:
        raise RuntimeError(f"no way back to {first}")

    with pytest.raises(RuntimeError, match="no way back to 3"):
        attach(agent, numbers={"skipped": [[3, 4]]}, skip_data=skip)


def test_nothing_is_skipped_in_most_runs(agent: FakeAgent) -> None:
    """Without ranges the hook is not called."""
    run = attach(agent, skip_data=lambda *_: pytest.fail("there is nothing to skip"))
    assert run.skipped == frozenset()


@pytest.mark.parametrize("wish", ["step_back", {"policy": "step_back", "metric": "nll"}])
def test_the_wish_for_a_policy_reaches_the_agent(agent: FakeAgent, wish: object) -> None:
    """Training that nobody supervises says itself what follows from a bad number."""
    ckptd.attach(epoch=1, numbers=wish)
    assert agent.heard(m.Join)[-1].options["numbers"] == wish

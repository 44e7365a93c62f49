"""A rank whose job is told to stop: it captures its last step, waits for the others, and leaves its block in order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import ckptd
from ckptd.client import leaving
from ckptd.client.run import Run
from ckptd.errors import RESUMABLE
from ckptd.protocol import messages as m
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import FAULTS
from tests.client.harness import Begin


@pytest.fixture
def run(agent: FakeAgent) -> Run:
    """A run whose first step is done."""
    run = ckptd.attach(data=bytearray(b"data"))
    run.step()
    agent.wait_for(m.Stepped)
    return run


def beside(act: Callable[[], None]) -> threading.Thread:
    """Act once the rank has sealed; returns the thread that does."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_a_rank_leaves_at_the_last_step_when_it_may(agent: FakeAgent, run: Run) -> None:
    """The last step is sealed first, then the block is left by SystemExit with an exit code of its own."""
    cleaned: list[str] = []

    def tell() -> None:
        agent.wait_for(m.Seal)
        agent.page.announce(None)
        agent.page.leave()

    agent.page.announce(3, last=True)
    assert run.stopping
    thread = beside(tell)
    with pytest.raises(SystemExit) as end, run:
        try:
            for _ in run.steps(100):
                pass
        finally:
            cleaned.append("cleaned up")
        cleaned.append("taken for finished")
    thread.join()
    assert end.value.code == RESUMABLE
    assert cleaned == ["cleaned up"]
    assert [seal.step for seal in agent.heard(m.Seal)] == [3]
    assert not agent.heard(m.Leave)
    assert not agent.heard(m.Raised)


def test_a_loop_of_ones_own_leaves_too(agent: FakeAgent, run: Run) -> None:
    """A script that only calls `step()` is ended at the same boundary."""
    agent.page.announce(2, last=True)
    agent.page.leave()
    agent.page.announce(2, last=True)  # the agent may leave while others still wait
    with pytest.raises(SystemExit):
        run.step()


def test_training_goes_on_when_the_step_was_not_the_last(agent: FakeAgent, run: Run) -> None:
    """A rank that waits goes on at once when another step is announced instead, and captures that."""

    def tell() -> None:
        agent.wait_for(m.Seal)
        agent.page.announce(None)
        agent.page.announce(4)

    agent.page.announce(2, last=True)
    thread = beside(tell)
    run.step()
    thread.join()
    assert not run.stopping
    run.step()
    run.step()
    assert agent.wait_for(m.Seal, 2).step == 4


def test_a_wait_that_is_in_vain_is_bounded(agent: FakeAgent, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another rank was past the step nobody is told to leave: training goes on after a while, until it is told."""
    monkeypatch.setattr(leaving, "_PATIENCE_MIN_S", 0.05)
    monkeypatch.setattr(leaving, "_PATIENCE_FACTOR", 0.0)
    agent.page.announce(2, last=True)
    run.step()
    run.step()
    assert run._step == 3
    agent.page.leave()
    with pytest.raises(SystemExit):
        run.step()
    assert not agent.heard(m.Missed)


def test_a_rank_that_is_past_the_last_step_says_so(agent: FakeAgent, run: Run) -> None:
    """A rank that comes too late for the last step neither waits nor leaves."""
    run.step()
    agent.page.announce(2, last=True)
    run.step()
    assert agent.wait_for(m.Missed).step == 2


def test_an_agent_that_is_gone_keeps_nobody_waiting(
    agent: FakeAgent, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that waits at its last step trains on, unprotected, when the agent dies meanwhile."""
    monkeypatch.setattr(leaving, "_LOOK_EVERY_S", 0.01)

    def tell() -> None:
        agent.wait_for(m.Seal)
        agent.hang_up()

    agent.page.announce(2, last=True)
    thread = beside(tell)
    run.step()
    thread.join()
    run.step()
    assert not run.protected
    assert "UNPROTECTED" in capsys.readouterr().err


def test_a_last_capture_that_fails_is_told(agent: FakeAgent, run: Run) -> None:
    """The agent does not wait for a rank whose state can't be captured, and the rank does not wait at all."""

    def fail() -> None:
        raise ValueError("no good")

    FAULTS["write"] = fail
    agent.page.announce(2, last=True)
    run.step()
    missed = agent.wait_for(m.Missed)
    assert missed.error is not None
    assert "no good" in missed.error["message"]


def test_a_copy_that_is_under_way_is_sealed_before_the_last_one(agent: FakeAgent, begin: Begin) -> None:
    """An image that is copied beside training is complete before the last step is captured."""
    run, binding = begin()
    binding.held = False
    for copy in binding.copies:
        copy.gate.set()
    agent.page.announce(3, last=True)

    def tell() -> None:
        agent.wait_for(m.Seal, 2)
        agent.page.leave()

    thread = beside(tell)
    with pytest.raises(SystemExit):
        run.step()
    thread.join()
    assert [seal.step for seal in agent.heard(m.Seal)] == [2, 3]

"""What happens while a copy is under way: nothing under its feet, and no harm to training."""

from __future__ import annotations

import os

import pytest

import ckptd
from ckptd.client.run import current_run
from ckptd.protocol import messages as m
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import BOUND, FAULTS, read
from tests.client.harness import AGENTS_REGIONS, Begin, announce, fail, let_go
from tests.daemon.harness import mapped_regions


def test_another_capture_meanwhile(agent: FakeAgent, begin: Begin) -> None:
    """A step announced right behind another waits for the first one's copy; both are sealed."""
    run, binding = begin()
    let_go(binding.copies[0])
    announce(agent, run)
    assert agent.wait_for(m.Seal).step == 2
    let_go(binding.copies[1])
    binding.optimizer_step()
    assert agent.wait_for(m.Seal, 2).step == 3


def test_new_slots_meanwhile(agent: FakeAgent, begin: Begin) -> None:
    """Slots are exchanged for larger ones after the copy into them is complete and sealed."""
    run, binding = begin()
    let_go(binding.copies[0])
    run.state["more"] = bytearray(3_000_000)
    announce(agent, run)
    let_go(binding.copies[1])
    binding.optimizer_step()
    assert agent.wait_for(m.Seal, 2).step == 3
    kinds = [type(message) for message in agent.said if isinstance(message, (m.Seal, m.Reserve))]
    assert kinds == [m.Reserve, m.Seal, m.Reserve, m.Seal]
    assert read(agent.slots[agent.heard(m.Seal)[0].slot].contents)["data"] == b"step"


def test_the_end_meanwhile(agent: FakeAgent, begin: Begin) -> None:
    """A run that ends with its last step still being copied seals it, says that it is final, and unhooks."""
    run, binding = begin()
    let_go(binding.copies[0])
    run.close()
    first, last = agent.wait_for(m.Seal, 2), agent.heard(m.Seal)[0]
    assert {(seal.step, seal.slot) for seal in (first, last)} == {(2, first.slot)}
    assert [seal.final for seal in agent.heard(m.Seal)] == [False, True]
    assert agent.wait_for(m.Leave) == m.Leave(2)
    assert (binding.copies[0].finished, binding.closed, binding.hooks) == (1, 1, [])
    assert mapped_regions() == AGENTS_REGIONS


def test_the_end_after_a_change_underneath(agent: FakeAgent, begin: Begin) -> None:
    """When the copy of the last step turns out void at the end, the last step is captured anew."""
    run, binding = begin()
    let_go(binding.copies[0])
    binding.state["data"][:] = b"late"
    run.close()
    seal = agent.wait_for(m.Seal)
    assert (seal.step, seal.final) == (2, True)
    assert read(agent.slots[seal.slot].contents)["data"] == b"late"


def test_the_last_capture_is_made_at_once(agent: FakeAgent, begin: Begin) -> None:
    """Behind the last step no training is left to copy beside: that capture is a plain one, also when overlap is on."""
    run, binding = begin()
    let_go(binding.copies[0])
    binding.optimizer_step(b"last")
    run.step()
    run.close()
    seal = agent.wait_for(m.Seal, 2)
    assert (seal.step, seal.final) == (3, True)
    assert read(agent.slots[seal.slot].contents)["data"] == b"last"
    assert len(binding.copies) == 1


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exception_meanwhile(agent: FakeAgent, kind: type[BaseException], strict: bool) -> None:
    """What was being copied when an exception leaves the block is sealed: it is a good snapshot of its step."""
    with pytest.raises(kind, match="mine"), ckptd.attach(data=bytearray(4), overlap="on", strict=strict) as run:
        (binding,) = BOUND
        announce(agent, run)
        raise kind("mine")
    assert agent.wait_for(m.Seal).step == 1
    agent.drain()
    raised = [type(message) for message in agent.said if isinstance(message, (m.Seal, m.Raised))]
    assert raised == ([m.Seal, m.Raised] if kind is ValueError else [m.Seal])
    assert (binding.closed, mapped_regions()) == (1, AGENTS_REGIONS)


@pytest.mark.parametrize("strict", [False, True])
def test_a_copy_that_fails_does_not_hide_the_exception(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str], strict: bool
) -> None:
    """The user's exception is what leaves the block, though the copy fails on the way out; it is reported too."""
    with pytest.raises(ValueError, match="mine"), ckptd.attach(data=bytearray(4), overlap="on", strict=strict) as run:
        announce(agent, run)
        FAULTS["finish"] = fail(RuntimeError("device lost"))
        FAULTS["close"] = fail(RuntimeError("not hooked"))
        raise ValueError("mine")
    assert agent.wait_for(m.Raised).exception["message"] == "mine"
    said = capsys.readouterr().err
    assert "device lost" in said
    assert "letting go of the framework failed: RuntimeError: not hooked" in said
    assert current_run() is None


def test_an_agent_that_is_gone_meanwhile(agent: FakeAgent, begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    """When the agent is gone before the copy is complete, training goes on, says so once, and lets go of the slots."""
    run, binding = begin()
    agent.hang_up()
    let_go(binding.copies[0])
    binding.optimizer_step(b"next")
    assert not run.protected
    assert binding.copies[0].finished == 1
    assert mapped_regions() == AGENTS_REGIONS
    assert binding.closed == 0, "nothing is unhooked inside of a hook"
    run.step()
    assert (binding.closed, binding.hooks) == (1, [])
    run.step()
    run.close()
    assert binding.closed == 1
    assert capsys.readouterr().err.count("UNPROTECTED") == 1


def test_the_breaker_opens_meanwhile(agent: FakeAgent, begin: Begin) -> None:
    """A breaker that opens waits for the copy before the slots go, whatever comes of it, and leaves hooks harmless."""
    run, binding = begin()
    let_go(binding.copies[0])
    binding.state["data"][:] = b"oops"
    run._guard.trip("enough")
    assert binding.copies[0].finished == 1
    assert mapped_regions() == AGENTS_REGIONS
    binding.optimizer_step(b"next")
    assert list(run.steps(20))[-1] == 20
    agent.drain()
    assert not agent.heard(m.Seal)


def test_a_fork_meanwhile(agent: FakeAgent, begin: Begin) -> None:
    """A forked child forgets the copy, which nobody makes there, and has no slot; the rank's own copy is sealed."""
    run, binding = begin()
    pid = os.fork()
    if pid == 0:
        wrong = 1
        try:
            assert not run.protected
            binding.copies.clear()  # the last that refers to it, but for what has to have forgotten it
            assert mapped_regions() == AGENTS_REGIONS
            binding.optimizer_step(b"none")
            run.step()
            run.close()
            assert binding.closed == 0
            wrong = 0
        finally:
            os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    let_go(binding.copies[0])
    binding.optimizer_step()
    assert read(agent.slots[agent.wait_for(m.Seal).slot].contents)["data"] == b"step"


def test_garbage_of_a_run_without_an_end(agent: FakeAgent, begin: Begin) -> None:
    """A copy under way when nobody ends the run is waited for when the process lets go of it."""
    run, binding = begin()
    let_go(binding.copies[0])
    run._unprotect()
    assert binding.copies[0].done

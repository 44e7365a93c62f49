"""What `overlap` says, and what the agent's word about replicated state changes."""

from __future__ import annotations

import time

import pytest

import ckptd
from ckptd.protocol import messages as m
from ckptd.protocol.page import Word
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import BOUND, FAULTS, FakeBinding
from tests.client.harness import Begin, announce, let_go


def test_off_hooks_nothing(agent: FakeAgent, begin: Begin) -> None:
    """With overlap off no optimizer is hooked, and every capture is complete at its boundary."""
    _, binding = begin(overlap="off")
    assert not binding.hooks
    assert not binding.copies
    assert agent.wait_for(m.Seal).step == 2


def test_a_device_overlaps_from_the_start(agent: FakeAgent, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device's own engine copies, "auto" overlaps every capture, and steps between them are not looked at."""
    monkeypatch.setattr(FakeBinding, "overlaps_by_default", True)
    run, binding = begin(overlap="auto")
    for _ in range(4):
        binding.copies[-1].gate.set()
        binding.optimizer_step()
        for slot in agent.held:
            agent.page.release(slot)
        run.step()
        assert run._due_ns == run._look_ns
        announce(agent, run)
    assert len(binding.copies) == 5


@pytest.mark.parametrize("dear", ["begin", "write"])
def test_auto_takes_the_cheaper_way(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, dear: str) -> None:
    """On a CPU both ways are tried in turn, and then captures go the way that costs this job less."""
    monkeypatch.setenv("CKPTD_OVERLAP", "auto")
    run = ckptd.attach(data=bytearray(b"step"))
    (binding,) = BOUND
    FAULTS[dear] = lambda: time.sleep(0.05)
    ways: list[bool] = []
    for _ in range(12):
        for _ in range(4):
            binding.optimizer_step()
            run.step()
        before = len(binding.copies)
        binding.optimizer_step()
        announce(agent, run)
        ways.append(len(binding.copies) > before)
        binding.optimizer_step()
        until_sealed = len(ways)
        agent.wait_for(m.Seal, until_sealed)
        for slot in agent.held:
            agent.page.release(slot)
    assert ways[:6] == [False, True] * 3
    assert ways[6:] == [dear == "write"] * 6


def test_a_whole_image_when_ranks_differ(agent: FakeAgent, begin: Begin) -> None:
    """When the agent finds that ranks differ, a rank captures all of its state as its own, in slots that hold it."""
    run, binding = begin()
    let_go(binding.copies[0])
    binding.optimizer_step()
    assert not binding.images[-1].whole
    agent.page.words[Word.WHOLE] = 1
    binding.whole_bytes = 2_000_000
    announce(agent, run)
    assert (binding.images[-1].whole, binding.images[-1].step) == (True, 3)
    binding.copies[-1].gate.set()
    binding.optimizer_step()
    seal = agent.wait_for(m.Seal, 2)
    assert seal.image_bytes > 2_000_000
    assert seal.witness == {}
    assert len(agent.heard(m.Reserve)) == 2

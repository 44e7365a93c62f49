"""Copies beside training: when they are sealed, what makes them void, and what is said of both."""

from __future__ import annotations

import threading
import time

import pytest

import ckptd
from ckptd.client.overlap import OverlapChooser
from ckptd.protocol import messages as m
from ckptd.protocol.page import Phase, Word
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import BOUND, FAULTS, read
from tests.client.harness import AGENTS_REGIONS, Begin, announce, fail, let_go
from tests.daemon.harness import mapped_regions

# --- the straight line --------------------------------------------------------------------------------------------


def test_training_goes_on_beside_the_copy(agent: FakeAgent, begin: Begin) -> None:
    """An announced step returns while its copy has not even begun, and nothing is sealed or said to be captured."""
    run, binding = begin()
    (copy,) = binding.copies
    assert not copy.done
    assert agent.page.phase is Phase.TRAINING
    assert not agent.held
    assert not agent.heard(m.Seal)
    assert run.protected


def test_sealed_before_the_optimizer_steps(agent: FakeAgent, begin: Begin) -> None:
    """The optimizer's step waits for the copy, which is sealed before anything changes; once, with several of them."""
    run, binding = begin()
    (copy,) = binding.copies
    seen: list[object] = []

    def look() -> None:
        seen.append((agent.page.phase, threading.current_thread(), bytes(binding.state["data"])))
        copy.gate.set()

    FAULTS["finish"] = look
    binding.optimizer_step(b"next")
    assert seen == [(Phase.CAPTURING, threading.main_thread(), b"step")]
    seal = agent.wait_for(m.Seal)
    assert (seal.step, seal.final) == (2, False)
    assert read(agent.slots[seal.slot].contents) == {"data": b"step", "epoch": 1}
    assert agent.held == {seal.slot}
    assert agent.page.phase is Phase.TRAINING
    binding.optimizer_step(b"more")
    run.step()
    run.step()
    assert len(seen) == 1
    assert copy.finished == 1
    assert len(agent.heard(m.Seal)) == 1


def test_sealed_at_the_next_boundary(agent: FakeAgent, begin: Begin) -> None:
    """Where no optimizer steps, as between two parts of an accumulated gradient, a boundary seals what is complete."""
    run, binding = begin()
    run.step()
    assert not agent.heard(m.Seal), "nobody waits for it at a boundary"
    binding.copies[0].gate.set()
    binding.copies[0].thread.join()
    run.step()
    assert agent.wait_for(m.Seal).step == 2
    assert agent.page.words[Word.STEP] == 4


def test_a_copy_may_take_several_steps(agent: FakeAgent, begin: Begin) -> None:
    """A copy that is not complete at a boundary goes on beside the next step, and is sealed before an optimizer's."""
    run, binding = begin()
    for _ in range(3):
        run.step()
    let_go(binding.copies[0])
    binding.optimizer_step(b"next")
    seal = agent.wait_for(m.Seal)
    assert (seal.step, read(agent.slots[seal.slot].contents)["data"]) == (2, b"step")


def test_optimizers_that_step_in_threads(agent: FakeAgent, begin: Begin) -> None:
    """Optimizers that step at once, in threads of a backward pass, all wait, and the image is sealed once."""
    _, binding = begin()
    threads = [threading.Thread(target=binding.hooks[0]) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert all(thread.is_alive() for thread in threads)
    binding.copies[0].gate.set()
    for thread in threads:
        thread.join(30)
    assert agent.wait_for(m.Seal).step == 2
    assert agent.held == {0}
    agent.page.release(0)
    assert not agent.held


def test_locked_pages(agent: FakeAgent, begin: Begin) -> None:
    """A binding may keep a slot's pages locked: captures go on, and the slot is unmapped when it is unlocked."""
    run, binding = begin()
    binding.locks = True
    for number in range(4):
        binding.copies[number].gate.set()
        binding.optimizer_step()
        for slot in agent.held:
            agent.page.release(slot)
        announce(agent, run)
    let_go(binding.copies[-1])
    run.close()
    assert len(binding.locked) == 1
    assert not agent.heard(m.Missed)
    binding.locked.clear()
    assert mapped_regions() == AGENTS_REGIONS


def test_plain_values_are_those_of_the_boundary(agent: FakeAgent, begin: Begin) -> None:
    """What training may change at any time is copied at the boundary, reported numbers and tensors included."""

    class Loss:
        def __init__(self, value: float) -> None:
            self.value = value

        def detach(self) -> Loss:
            return self

        def clone(self) -> Loss:
            return Loss(self.value)

        def __float__(self) -> float:
            return self.value

    run = ckptd.attach(data=bytearray(b"step"), epoch=1, overlap="on")
    (binding,) = BOUND
    binding.held = True
    loss = Loss(0.5)
    run.report(loss=loss, lr=1.0)
    announce(agent, run)
    run.state["epoch"] = 2
    loss.value = 99.0
    run.report(lr=2.0)
    let_go(binding.copies[0])
    binding.optimizer_step()
    seal = agent.wait_for(m.Seal)
    assert read(agent.slots[seal.slot].contents)["epoch"] == 1
    assert seal.values == {"loss": 0.5, "lr": 1.0}


def test_nothing_that_can_wait(agent: FakeAgent, begin: Begin) -> None:
    """State that could change at any time is complete at the boundary and sealed right there."""
    run, binding = begin(epoch=1)
    assert not binding.copies
    assert agent.wait_for(m.Seal).step == 2
    run.step()
    assert len(agent.heard(m.Seal)) == 1


def test_what_training_has_paid(agent: FakeAgent, begin: Begin) -> None:
    """A seal says for how long training stood still: at the boundary and in the hook, and not between them."""
    _, binding = begin()
    FAULTS["finish"] = lambda: (time.sleep(0.05), binding.copies[0].gate.set())
    begin_s = time.monotonic()
    time.sleep(0.2)
    binding.optimizer_step()
    seconds = agent.wait_for(m.Seal).seconds
    assert 0.05 <= seconds <= time.monotonic() - begin_s - 0.2 + 0.1


def test_slots_can_be_used_in_turn(agent: FakeAgent, begin: Begin) -> None:
    """Copy after copy finds a slot when the agent releases what it has flushed, and none refers to a slot it left."""
    run, binding = begin()
    binding.held = False
    binding.copies[0].gate.set()
    for step in range(3, 20):
        binding.optimizer_step(b"%04d" % step)
        for slot in agent.held:
            agent.page.release(slot)
        announce(agent, run)
    binding.optimizer_step()
    assert len(agent.heard(m.Seal)) == 18 or agent.wait_for(m.Seal, 18)
    assert read(agent.slots[agent.heard(m.Seal)[-1].slot].contents)["data"] == b"0019"
    assert not agent.heard(m.Missed)
    assert run._session is not None
    for lent in run._session.slots.values():
        lent._map.close()  # nothing holds a view of it


def test_the_witness_is_of_what_was_captured(agent: FakeAgent, begin: Begin) -> None:
    """The digests that a seal carries are taken before an optimizer changes the tensors."""
    run, binding = begin()
    let_go(binding.copies[0])
    binding.optimizer_step(b"next")
    assert agent.wait_for(m.Seal).witness == {"data": b"step".hex()}
    run.close()
    assert agent.heard(m.Seal)[-1].witness == {"data": b"step".hex()}


# --- changes under the copy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_change_underneath(agent: FakeAgent, begin: Begin, capsys: pytest.CaptureFixture[str], strict: bool) -> None:
    """A tensor that changes under its copy makes the snapshot void: told, said once by name, and no fault.

    From then on captures are copied at the boundary.
    """
    run, binding = begin(strict=strict)
    let_go(binding.copies[0])
    binding.state["data"][:] = b"oops"
    binding.optimizer_step(b"next")
    missed = agent.wait_for(m.Missed)
    assert (missed.step, missed.at_step) == (2, 2)
    assert missed.error is not None
    assert missed.error["code"] == "state"
    assert "'data' was changed" in missed.error["message"]
    assert not agent.held
    for _ in range(2):
        announce(agent, run)
    assert [seal.step for seal in (agent.wait_for(m.Seal, 2), agent.heard(m.Seal)[0])] == [4, 3]
    assert len(binding.copies) == 1
    said = capsys.readouterr().err
    assert said.count("'data' was changed") == 1
    assert said.startswith("ckptd: the checkpoint of step 2 is void")
    assert run.protected


def test_changes_underneath_never_end_the_trying(agent: FakeAgent, begin: Begin) -> None:
    """However often jobs of this kind begin, a void snapshot counts for nothing with the breaker."""
    run, binding = begin()
    for _ in range(3):
        run._guard.run("a copy beside training", lambda: None)
    let_go(binding.copies[0])
    binding.state["data"][:] = b"oops"
    binding.optimizer_step()
    assert not run._guard._faults
    assert run.protected


def test_a_copy_that_fails(agent: FakeAgent, begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy that fails in any other way is one fault: the agent does not wait, later captures need no such copy."""
    run, binding = begin()
    FAULTS["finish"] = fail(RuntimeError("device lost"))
    binding.optimizer_step(b"next")
    missed = agent.wait_for(m.Missed)
    assert missed.error is not None
    assert (missed.step, missed.error["message"]) == (2, "RuntimeError: device lost")
    announce(agent, run)
    assert agent.wait_for(m.Seal).step == 3
    assert capsys.readouterr().err == "ckptd: a copy beside training failed: RuntimeError: device lost\n"


def test_a_copy_that_fails_when_strict(agent: FakeAgent, begin: Begin) -> None:
    """With strict the optimizer's step raises what the copy failed with."""
    _, binding = begin(strict=True)
    FAULTS["finish"] = fail(RuntimeError("device lost"))
    with pytest.raises(RuntimeError, match="device lost"):
        binding.optimizer_step()


@pytest.mark.parametrize("where", ["begin", "witness"])
def test_other_faults_are_told(agent: FakeAgent, begin: Begin, where: str) -> None:
    """What fails when a copy begins, or after it is complete, is told as for any capture, and leaves its slot free."""
    run, binding = begin()
    let_go(binding.copies[0])
    binding.optimizer_step()
    agent.wait_for(m.Seal)
    FAULTS[where] = fail(ZeroDivisionError("no good"))
    announce(agent, run)
    if where == "witness":
        binding.copies[1].gate.set()
        binding.optimizer_step()
    assert agent.wait_for(m.Missed).step == 3
    assert len(agent.held) == 1
    FAULTS.clear()
    binding.held = False
    announce(agent, run)
    binding.optimizer_step()
    assert agent.wait_for(m.Seal, 2).step == 4


@pytest.mark.parametrize("overlap", ["on", "auto"])
def test_faults_of_seals_end_the_trying(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    """Images that can't be sealed, one after the other, open the breaker, though steps between them find nothing wrong.

    Copies that only begin prove nothing.
    """
    monkeypatch.setattr(OverlapChooser, "choose", lambda self: True)
    run = ckptd.attach(data=bytearray(4), overlap=overlap)
    (binding,) = BOUND
    FAULTS["witness"] = fail(ZeroDivisionError("no good"))
    for _ in range(5):
        for _ in range(5):
            binding.optimizer_step()
            run.step()
        announce(agent, run)
        binding.optimizer_step()
    assert not run.protected
    said = capsys.readouterr().err
    assert said.count("a copy beside training failed: ZeroDivisionError") == 3
    assert said.count("UNPROTECTED") == 1


def test_a_reported_value_that_can_not_be_copied(agent: FakeAgent) -> None:
    """A value whose copying fails costs that capture before any copy beside training has begun."""

    class Odd:
        def clone(self) -> Odd:
            raise LookupError("odd")

    run = ckptd.attach(data=bytearray(4), overlap="on")
    run.report(odd=Odd())
    announce(agent, run)
    assert agent.wait_for(m.Missed).step == 1
    assert not BOUND[0].copies
    assert run.protected


def test_ctrl_c_while_waiting(agent: FakeAgent, begin: Begin) -> None:
    """Ctrl-C passes through the wait in a hook; who goes on training all the same gets the copy sealed later."""
    _, binding = begin()
    FAULTS["finish"] = fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        binding.optimizer_step()
    assert not agent.heard(m.Missed)
    assert agent.page.phase is Phase.TRAINING
    let_go(binding.copies[0])
    binding.optimizer_step()
    assert agent.wait_for(m.Seal).step == 2

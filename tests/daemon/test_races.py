"""What happens between two moments of which the second relies on the first: ranks that hang up, jobs that end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ckptd.daemon import region
from ckptd.daemon.arena import Arena, Budget
from ckptd.errors import AgentError, CkptdError, FencedError
from ckptd.protocol import messages as m
from tests.daemon.harness import PATIENCE_S, AgentThread, Node, until
from tests.daemon.speaker import Speaker


class Door:
    """Has reservations of memory wait, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = threading.Event()
        self._opened = threading.Event()
        self._make = region.make
        monkeypatch.setattr(region, "make", self._wait)

    def _wait(self, name: str, *arguments: Any) -> Any:
        if not name.endswith("-page"):
            self.waiting.set()
            assert self._opened.wait(PATIENCE_S)
        return self._make(name, *arguments)

    def open(self) -> None:
        """Let all go on."""
        self._opened.set()


@pytest.fixture
def other(node: Node, agent: AgentThread) -> Speaker:
    """Another connection of a rank."""
    return Speaker(node)


def end_while(agent: AgentThread, also: Callable[[], object]) -> None:
    """End the job, and do something else before the agent does anything for its end but to decide it."""

    def both() -> None:
        agent.job().stop(0.0, checkpoint=False)
        assert agent.job().ending
        also()

    agent.call(both)


def rejoin(agent: AgentThread, speaker: Speaker, page: int, rank: int = 0) -> None:
    """Come back to generation 1 of the job, with a control page and no slots."""
    said = m.Rejoin("job", rank, 1, agent.job().incarnation, 1, True, True, [])
    speaker.channel.send_with(said, [page], PATIENCE_S)


def copy_of_page(agent: AgentThread) -> int:
    """Return a memory file like the control page of rank 0."""
    page = agent.job().attendance.admitted[0].page
    assert page is not None
    descriptor = os.memfd_create("page", os.MFD_CLOEXEC)
    os.write(descriptor, page.words.tobytes())
    return descriptor


# --- coming -------------------------------------------------------------------------------------------------------


def test_who_hangs_up_while_a_job_ends_begins_no_other(agent: AgentThread, speaker: Speaker, other: Speaker) -> None:
    """A rank that comes while the job of its name ends has to wait; if it does not, nothing is begun for it."""
    speaker.join()
    before = agent.job()

    def come_and_go() -> None:
        other.channel.send(m.Join("job", 0, 1, 0, {"store": before.config.stores[0].url}), PATIENCE_S)
        other.close()

    end_while(agent, come_and_go)
    until(before.ended.done, "the end of the job")
    agent.call(lambda: None)
    assert agent.job() is before


def test_an_agent_that_is_stopped_begins_no_job(agent: AgentThread, speaker: Speaker, other: Speaker) -> None:
    """Who comes while the agent waits for the end of its jobs is refused: nobody would wait for another one."""
    speaker.join()
    store = agent.job().config.stores[0].url

    def stop_and_come() -> None:
        agent._stop.set()
        other.channel.send(m.Join("job", 0, 1, 0, {"store": store}), PATIENCE_S)

    end_while(agent, stop_and_come)
    answer = other.channel.receive(PATIENCE_S)
    assert isinstance(answer, m.Refused)
    assert answer.error["message"] == "this agent is being stopped"
    other.close()


def test_who_begins_anew_leaves_nothing_behind(
    node: Node, agent: AgentThread, speaker: Speaker, other: Speaker
) -> None:
    """A process that has lost its connection and attaches again gets its own place, and does not wait for its end."""
    speaker.join()
    first = agent.job().attendance.admitted[0]
    speaker.channel.close()
    other.channel.send(m.Join("job", 0, 1, 0, {"store": str(node.store)}), PATIENCE_S)
    assert isinstance(other.channel.receive(PATIENCE_S), m.Admitted)
    assert (first.page, first._pidfd) == (None, None)
    other.close()


def test_who_is_not_let_in_has_no_say(node: Node, agent: AgentThread, other: Speaker) -> None:
    """What a rank says that waits for its place is not taken for that of the rank that has it."""
    holder = node.puppet()
    holder.attach()
    holder.train(3)
    other.channel.send(m.Join("job", 0, 1, 0, {"store": str(node.store)}), PATIENCE_S)
    with pytest.raises(AgentError, match="rank 0 of job job is not let in yet"):
        other.ask(m.Reserve(2**24))
    with pytest.raises(AgentError, match="rank 0 of job job is not let in yet"):
        other.ask(m.Leave(1))
    other.close()
    assert holder.train(3) == 6
    assert {slot.size_bytes for slot in agent.job()._arena.slots(0).values()} == {region.HUGE_BYTES}


# --- coming back --------------------------------------------------------------------------------------------------


def test_nobody_comes_back_to_a_job_that_ends(agent: AgentThread, speaker: Speaker, other: Speaker) -> None:
    """Who does while what the job has is being let go of is turned away: nothing would let go of it again."""
    speaker.join()
    page = copy_of_page(agent)
    end_while(agent, lambda: rejoin(agent, other, page))
    answer = other.channel.receive(PATIENCE_S)
    assert isinstance(answer, m.Refused)
    assert answer.error["code"] == FencedError.code
    os.close(page)
    other.close()


def test_who_hangs_up_as_it_comes_back_is_gone(agent: AgentThread, speaker: Speaker, other: Speaker) -> None:
    """A connection that turns out to be closed when it is answered is forgotten like any that closes."""
    speaker.join()
    page = copy_of_page(agent)

    def come_and_go() -> None:
        rejoin(agent, other, page)
        other.channel.close()

    agent.call(come_and_go)
    until(lambda: agent.events("rank returned"), "the return")
    until(lambda: not agent.call(lambda: agent.agent._ranks), "its being forgotten")
    os.close(page)


@pytest.mark.parametrize("rank", [-1, 1, 2**64 - 1])
def test_a_rank_that_there_is_not_does_not_come_back(
    agent: AgentThread, speaker: Speaker, other: Speaker, rank: int
) -> None:
    """A number outside of the job is turned away, and is no rank of the generation."""
    speaker.join()
    page = copy_of_page(agent)
    rejoin(agent, other, page, rank)
    answer = other.channel.receive(PATIENCE_S)
    assert isinstance(answer, m.Refused)
    assert answer.error["code"] == FencedError.code
    assert agent.job().machine.generation.joined == {0}
    os.close(page)
    other.close()


# --- slots --------------------------------------------------------------------------------------------------------


def test_slots_that_are_being_replaced_can_not_be_sealed(
    agent: AgentThread, speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its wish for larger slots on, a rank has none of the old ones: they may be gone at any moment."""
    speaker.join()
    assert isinstance(speaker.ask(m.Reserve(4096)), m.Lent)
    door = Door(monkeypatch)
    speaker.channel.send(m.Reserve(2**24), PATIENCE_S)
    assert door.waiting.wait(PATIENCE_S)
    speaker.channel.send(m.Seal(1, 0, 4096, 0.0, final=True), PATIENCE_S)
    (refusal,) = until(lambda: agent.events("message refused"), "the refusal")
    assert "sealed slot 0, which it was not lent" in refusal["error"]
    door.open()
    assert isinstance(speaker.channel.receive(PATIENCE_S), m.Lent)


def test_what_is_reserved_ahead_takes_no_slots_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that asks while slots are about to be reserved for it keeps those that it asked for."""
    arena, door = Arena("job", Budget(), 2), Door(monkeypatch)
    failures: list[CkptdError] = []

    def ahead() -> None:
        try:
            arena.reserve_ahead(0, 8 * region.HUGE_BYTES)
        except CkptdError as error:
            failures.append(error)

    threads = [threading.Thread(target=arena.reserve, args=(0, 4096, ())), threading.Thread(target=ahead)]
    threads[0].start()
    assert door.waiting.wait(PATIENCE_S)
    threads[1].start()
    door.open()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert [slot.size_bytes for slot in arena.slots(0).values()] == [region.HUGE_BYTES] * 2
    arena.close()

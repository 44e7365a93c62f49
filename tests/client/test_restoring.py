"""What a rank begins with when it is offered a checkpoint: its files, its faults, and the order of things."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest

import ckptd
from ckptd.client.framework import OfferedCheckpoint
from ckptd.client.run import current_run
from ckptd.errors import (
    AgentError,
    DamagedError,
    ProtocolError,
    StateError,
    StoreError,
)
from ckptd.protocol import messages as m
from tests.client.fake_agent import FakeAgent, offer
from tests.client.fake_framework import BOUND, FAULTS, FakeBinding
from tests.client.harness import unprotected
from tests.daemon.harness import until


def nothing_is_open() -> bool:
    """Wait until neither side has a file of the offer open any more."""

    def closed() -> bool:
        links = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the one that lists
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return not any("memfd:test" in link for link in links)

    return bool(until(closed, "the end of files"))


def test_a_restore(agent: FakeAgent) -> None:
    """An offer fills the rank's objects in place, and steps go on after its step; the agent learns of it."""
    offer(agent, {"data": bytearray(b"before"), "epoch": 7})
    data = bytearray(6)
    run = ckptd.attach(data=data, epoch=0)
    assert (data, run.state["epoch"], run.generation) == (b"before", 7, 2)
    assert run.restored is not None
    assert run.restored[:3] == (1, 40, "memory")
    assert run.restored.seconds >= 0
    assert list(run.steps(42)) == [41, 42]
    restored = agent.wait_for(m.Restored)
    assert (restored.generation, restored.step) == (1, 40)


def test_a_finished_run_has_nothing_to_do(agent: FakeAgent) -> None:
    """A run restored at its last step does no step, captures nothing, and ends."""
    offer(agent, {"data": bytearray(6)}, step=50)
    with ckptd.attach(data=bytearray(6)) as run:
        assert list(run.steps(50)) == []
    assert not agent.heard(m.Seal)
    assert agent.wait_for(m.Leave) == m.Leave(50)


def test_a_state_of_another_shape_is_raised(agent: FakeAgent) -> None:
    """A checkpoint that does not fit is a `state` error that names the tensor; nothing was changed, the agent knows."""
    offer(agent, {"data": bytearray(b"before")})
    data = bytearray(b"smaller"[:3])
    with pytest.raises(StateError, match="data: 3 bytes now, 6 before"):
        ckptd.attach(data=data)
    assert data == b"sma"
    assert agent.wait_for(m.RestoreFailed).error["code"] == "state"
    assert current_run() is None


def test_a_damaged_offer_is_raised(agent: FakeAgent) -> None:
    """A snapshot whose digest differs is a `damaged` error, so that the agent never offers it again."""
    offer(agent, {"data": bytearray(b"before")}, damaged=["g000001/rank-00000"])
    with pytest.raises(DamagedError, match="'g000001/rank-00000' is not what was captured"):
        ckptd.attach(data=bytearray(6))
    assert nothing_is_open()
    failed = agent.wait_for(m.RestoreFailed)
    assert (failed.generation, failed.step, failed.error["code"]) == (1, 40, "damaged")


def test_a_fault_of_an_adapter_shows_itself(agent: FakeAgent) -> None:
    """Whatever an adapter raises while it restores is raised as it is, though its frames still look into the slot."""

    def fail() -> None:
        raise ZeroDivisionError("in the adapter")

    offer(agent, {"data": bytearray(b"before")})
    FAULTS["restore"] = fail
    with pytest.raises(ZeroDivisionError, match="in the adapter"):
        ckptd.attach(data=bytearray(6))
    assert current_run() is None


def test_slots_are_asked_for_after_the_restore(agent: FakeAgent) -> None:
    """A restore comes first, since objects may grow by it; slots are asked for once, in the size needed then."""
    offer(agent, {"data": bytearray(b"before"), "text": "x" * 700})
    ckptd.attach(data=bytearray(6), text="")
    kinds = [type(message) for message in agent.said]
    assert kinds == [m.Hello, m.Join, m.Open, m.Restored, m.Reserve]


def test_many_files_are_opened_in_batches(agent: FakeAgent) -> None:
    """However many files a restore reads, an answer carries no more descriptors than it may; all are closed."""
    offer(agent, {"data": bytearray(b"before")})
    image = agent.files.popitem()[1]
    agent.files = {f"g000001/rank-{number:05}": image for number in range(150)}
    agent.document = json.dumps({"files": [*agent.files, *agent.files]}).encode()
    data = bytearray(6)
    ckptd.attach(data=data)
    assert data == b"before"
    assert [len(message.files) for message in agent.heard(m.Open)] == [64, 64, 22]
    assert nothing_is_open()


def test_files_are_opened_once(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A binding may ask for a file again, or for none; it gets the same descriptor without a question."""
    offer(agent, {"data": bytearray(b"before")})
    seen: list[Any] = []

    def restore(self: FakeBinding, offered: OfferedCheckpoint) -> None:
        files = list(offered.document["files"])
        seen.extend([offered.open(files), offered.open(files), offered.open([]), offered.in_memory])

    monkeypatch.setattr(FakeBinding, "restore", restore)
    ckptd.attach(data=bytearray(6))
    assert seen[0] == seen[1]
    assert seen[2:] == [{}, True]
    assert len(agent.heard(m.Open)) == 1
    assert nothing_is_open()


def test_a_file_that_is_gone(agent: FakeAgent) -> None:
    """A file that the agent refuses is raised with the agent's words, and told as a restore that failed."""
    offer(agent, {"data": bytearray(b"before")})
    agent.files.clear()
    with pytest.raises(StoreError, match="g000001/rank-00000 is gone"):
        ckptd.attach(data=bytearray(6))
    assert agent.wait_for(m.RestoreFailed).error["code"] == "store"


@pytest.mark.parametrize("files", [[], ["other"]])
def test_other_files_than_those_asked_for(agent: FakeAgent, files: list[str]) -> None:
    """An agent that opens something else is not believed, and the rank does not begin."""
    offer(agent, {"data": bytearray(b"before")})
    agent.files["other"] = b""
    agent.answers[m.Open] = lambda: m.Opened(files)
    with pytest.raises(ProtocolError, match="other files than those that were asked for"):
        ckptd.attach(data=bytearray(6))
    assert current_run() is None


@pytest.mark.parametrize("document", [b"{", b"[]", b"\xff"])
def test_a_manifest_that_can_not_be_read(agent: FakeAgent, document: bytes) -> None:
    """A rank that is offered a checkpoint it can't make out ends; it does not begin anew beside it."""
    offer(agent, {"data": bytearray(b"before")})
    agent.document = document
    with pytest.raises(ProtocolError, match="the manifest of the offered checkpoint"):
        ckptd.attach(data=bytearray(6))
    assert current_run() is None


def test_an_agent_that_goes_away_in_a_restore(agent: FakeAgent) -> None:
    """A rank whose agent is gone before its state is back ends, strict or not: training anew would be worse."""
    offer(agent, {"data": bytearray(b"before")})
    agent.answers[m.Open] = agent.hang_up  # type: ignore[assignment]
    with pytest.raises(AgentError, match="closed the connection"):
        ckptd.attach(data=bytearray(6))
    assert current_run() is None


def test_an_agent_that_goes_away_after_a_restore(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank whose agent is gone when its state is back goes on from there, unprotected."""
    offer(agent, {"data": bytearray(b"before"), "epoch": 7})
    agent.answers[m.Reserve] = agent.hang_up  # type: ignore[assignment]
    data = bytearray(6)
    run = ckptd.attach(data=data, epoch=0)
    unprotected(capsys, "closed the connection")
    assert (data, run.state["epoch"], list(run.steps(42))) == (b"before", 7, [41, 42])
    assert BOUND[0].closed == 1

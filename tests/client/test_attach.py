"""Joining a job: what is refused before the first step, and what only costs protection."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import ckptd
from ckptd.client.embedded import pick_framework
from ckptd.client.run import current_run
from ckptd.errors import (
    AgentError,
    CkptdError,
    ConfigError,
    DamagedError,
    FencedError,
    MemoryBudgetError,
    ProtocolError,
    StateError,
)
from ckptd.protocol import messages as m
from ckptd.storage.image import parse
from tests.client.fake_agent import FakeAgent
from tests.daemon.bytes_framework import FAULTS, BytesFramework
from tests.daemon.harness import open_descriptors


def unprotected(capsys: pytest.CaptureFixture[str], because: str) -> None:
    """Check that exactly one line says so, after one with the reason, and that nothing is left of a session."""
    reason, verdict = capsys.readouterr().err.splitlines()
    assert because in reason
    assert verdict == "ckptd: training goes on UNPROTECTED: nothing will be checkpointed"
    assert current_run() is None


def test_a_fresh_start(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank says who it is, gets page and slots before its first step, and has restored nothing."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    data = bytearray(100)
    with ckptd.attach(data=data, epoch=1, every="1m30s", store="/x") as run:
        assert (run.generation, run.restored, run.protected) == (1, None, True)
        assert run.state == {"data": data, "epoch": 1}
        assert run.state["data"] is data
        assert agent.heard(m.Join) == [m.Join("job", 0, 1, 0, {"store": "/x", "every_s": 90.0})]
        assert len(agent.heard(m.Reserve)) == 1
        assert current_run() is run
    assert current_run() is None


def test_attach_twice_is_refused(agent: FakeAgent) -> None:
    """A process has one run at a time; the second attach is a `config` error and harms the first in no way."""
    with ckptd.attach(data=bytearray(10)) as run:
        with pytest.raises(ConfigError, match="has a run already"):
            ckptd.attach(data=bytearray(10))
        run.step()
        assert run.protected
        assert len(agent.heard(m.Join)) == 1
    with ckptd.attach(data=bytearray(10)) as run:
        assert run.protected


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "CKPTD_GENERATION"])
@pytest.mark.parametrize("value", ["one", "-1", "1.5", "", " 1", "²"])
def test_a_bad_place_is_refused(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A launcher's variable that is no whole number is a `config` error that names it, before anything is asked."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
        ckptd.attach(data=bytearray(10))
    assert not agent.said


def test_a_bad_interval_is_refused(agent: FakeAgent) -> None:
    """An interval that is no duration is a `config` error of the rank itself."""
    with pytest.raises(ConfigError, match="'soon' is no duration"):
        ckptd.attach(data=bytearray(10), every="soon")
    assert not agent.heard(m.Join)
    assert current_run() is None


def test_state_that_can_not_be_captured_is_refused(agent: FakeAgent) -> None:
    """State that could never be captured is refused by its key before the rank joins, and the agent learns why."""
    with pytest.raises(StateError, match="'lock' is a lock, which can't be captured"):
        ckptd.attach(data=bytearray(10), lock=threading.Lock())
    raised = agent.wait_for(m.Raised)
    assert "'lock' is a lock" in raised.exception["message"]
    assert raised.exception["error"]["code"] == "state"
    assert not agent.heard(m.Join)
    assert current_run() is None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "error", [ConfigError("rank 3 of 2"), FencedError("generation 1 is over"), DamagedError("nothing left")]
)
def test_a_refused_place_is_raised(agent: FakeAgent, error: CkptdError, strict: bool) -> None:
    """A place that the agent refuses is the same error in the rank, strict or not: it must not train by accident."""
    agent.answers[m.Join] = lambda: m.Refused(error.to_json())
    with pytest.raises(type(error), match=error.message):
        ckptd.attach(data=bytearray(10), strict=strict)
    assert current_run() is None


def test_refused_slots_are_raised(agent: FakeAgent) -> None:
    """A lack of memory is refused at attach with the agent's own words, which the agent is told came from us."""
    agent.answers[m.Reserve] = lambda: m.Refused(MemoryBudgetError("they need 5 bytes", hint="buy more").to_json())
    with pytest.raises(MemoryBudgetError, match="they need 5 bytes") as refused:
        ckptd.attach(data=bytearray(10))
    assert refused.value.hint == "buy more"
    assert agent.wait_for(m.Raised).exception["error"]["code"] == "memory"
    assert current_run() is None


# --- without an agent ---------------------------------------------------------------------------------------------


def test_no_agent_where_one_must_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A supervised rank that finds no agent starts none: it says so and trains on unprotected, with its state."""
    monkeypatch.setenv("CKPTD_GENERATION", "3")
    with ckptd.attach(data=bytearray(10), epoch=4) as run:
        unprotected(capsys, "no agent listens at")
        assert not run.protected
        assert list(run.steps(3)) == [1, 2, 3]
        assert run.state["epoch"] == 4
    assert capsys.readouterr().err == ""


def test_no_agent_is_an_error_when_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """With strict, a rank that finds no agent does not begin."""
    monkeypatch.setenv("CKPTD_GENERATION", "3")
    with pytest.raises(AgentError, match="no agent listens at"):
        ckptd.attach(data=bytearray(10), strict=True)
    assert current_run() is None


@pytest.mark.parametrize("moment", [m.Join, m.Reserve])
def test_an_agent_that_goes_away_meanwhile(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str], moment: type[m.Message]
) -> None:
    """An agent that dies while a rank attaches costs protection, not the training."""
    agent.answers[moment] = agent.hang_up  # type: ignore[assignment]
    before = open_descriptors()
    run = ckptd.attach(data=bytearray(10))
    unprotected(capsys, "closed the connection")
    assert list(run.steps(2)) == [1, 2]
    assert open_descriptors() <= before + 1  # the fake's own end of the connection


@pytest.mark.parametrize("moment", ["join", "reserve"])
def test_an_agent_that_does_not_answer(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Every question of attach has a deadline, after which the training begins without protection."""
    monkeypatch.setattr("ckptd.client.session.ADMIT_DEADLINE_S", 0.2)
    monkeypatch.setattr("ckptd.client.session.CALL_DEADLINE_S", 0.2)
    agent.answers[m.Join if moment == "join" else m.Reserve] = lambda: None
    run = ckptd.attach(data=bytearray(10))
    unprotected(capsys, "did not answer within 0.2 s")
    assert not run.protected


def test_an_agent_of_another_version(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent that speaks another version is no agent for this rank; the line says which side is older."""
    agent.welcome = m.Welcome(1, agent.welcome.frameworks, 99)
    assert not ckptd.attach(data=bytearray(10)).protected
    unprotected(capsys, "speaks protocol version 99")


def test_a_page_of_another_layout(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """A control page that this client does not know is never written."""
    agent.page.words[1] += 1
    before = bytes(agent.page._map)
    assert not ckptd.attach(data=bytearray(10)).protected
    unprotected(capsys, "another layout")
    assert bytes(agent.page._map) == before


def test_a_dead_socket_is_no_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a killed agent left behind at its place reads as no agent."""
    monkeypatch.setenv("CKPTD_GENERATION", "1")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s"))
    stale.close()
    assert not ckptd.attach(data=bytearray(10)).protected
    unprotected(capsys, "no agent listens at")


# --- frameworks ---------------------------------------------------------------------------------------------------


def test_the_framework_of_the_script_is_used() -> None:
    """The adapter is that of the first framework which the script has imported, else the first one offered."""
    offered = [{"name": str(at), "trigger": trigger, "target": str(at)} for at, trigger in enumerate(["no_such", "os"])]
    assert pick_framework(offered) == "1"
    assert pick_framework(offered[:1]) == "0"
    with pytest.raises(ProtocolError, match="no framework adapter"):
        pick_framework([])


def test_an_adapter_that_is_not_installed_here(agent: FakeAgent) -> None:
    """An adapter that this environment lacks is a `state` error with what to install, not a traceback from within."""
    agent.welcome = m.Welcome(1, [{"name": "x", "trigger": "os", "target": "no.such.module:Thing"}])
    with pytest.raises(StateError, match=r"no\.such\.module:Thing can't be imported") as refused:
        ckptd.attach(data=bytearray(10))
    assert "ckptd[torch]" in str(refused.value.hint)


# --- restore ------------------------------------------------------------------------------------------------------


def offer(agent: FakeAgent, state: dict[str, Any], step: int = 40, **changes: Any) -> None:
    """Put an image of a state into a slot of the agent and offer it."""
    from ckptd.storage.catalog import describe_shard

    image = BytesFramework().bind(state, rng=False).prepare()
    agent.arena.reserve(0, image.image_bytes, ())
    view = agent.arena.slots(0)[1].view
    image.write(view)
    content = describe_shard(0, view[: image.image_bytes])
    assert parse(view).image_bytes == image.image_bytes
    agent.page.seal(1)
    offered = {
        "generation": 1,
        "step": step,
        "tier": "memory",
        "slot": 1,
        "image_bytes": image.image_bytes,
        "digests": dict(content.tensor_digests),
    }
    agent.offer = {**offered, **changes}


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
    offer(agent, {"data": bytearray(b"before")}, digests={"data": "00", "__ckptd__.values": "00"})
    with pytest.raises(DamagedError, match="'data' is not what was captured"):
        ckptd.attach(data=bytearray(6))
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

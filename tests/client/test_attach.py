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
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import BOUND
from tests.client.harness import unprotected
from tests.daemon.harness import open_descriptors


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


@pytest.mark.parametrize(
    ("arguments", "variable", "told"),
    [
        ({"resume_from": "s3://bucket/runs/gpt"}, "/ignored/gpt", {"resume_from": "s3://bucket/runs/gpt"}),
        ({"resume_from": "/old/gpt", "resume_step": 7}, "", {"resume_from": "/old/gpt", "resume_step": 7}),
        ({}, "/old/gpt", {"resume_from": "/old/gpt"}),
        ({}, "", {}),
    ],
)
def test_what_to_resume_from(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], variable: str, told: dict[str, Any]
) -> None:
    """The argument, else the variable, tells the agent with which job's checkpoint this one is to begin."""
    monkeypatch.setenv("CKPTD_RESUME_FROM", variable)
    with ckptd.attach(data=bytearray(4), every=1, store="/x", **arguments):
        assert agent.heard(m.Join)[0].options == {"store": "/x", "every_s": 1.0, "hang": False, **told}


@pytest.mark.parametrize(
    ("arguments", "rank", "told"),
    [
        ({}, None, {"hang": False}),
        ({}, "0", {}),
        ({"hang": {"floor": "2s"}}, None, {"hang": {"floor": "2s"}}),
        ({"hang": "floor=2s"}, "0", {"hang": "floor=2s"}),
        ({"hang": False}, "0", {"hang": False}),
    ],
)
def test_who_may_hang(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], rank: str | None, told: dict[str, Any]
) -> None:
    """A process that no launcher has started is not to be killed for standing still, unless it says so."""
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with ckptd.attach(data=bytearray(4), **arguments):
        options = agent.heard(m.Join)[0].options
        assert {key: value for key, value in options.items() if key == "hang"} == told


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


@pytest.mark.parametrize("wanted", ["maybe", "ON", "1"])
def test_a_bad_overlap_is_refused(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """An overlap that is none of three words is a `config` error that lists them, as argument and as variable."""
    for arguments, place in (({"overlap": wanted}, "overlap is"), ({}, "CKPTD_OVERLAP is")):
        monkeypatch.setenv("CKPTD_OVERLAP", wanted)
        with pytest.raises(ConfigError, match=f"{place} '{wanted}'") as refused:
            ckptd.attach(data=bytearray(10), **arguments)
        assert refused.value.hint == "it is one of auto, on, off"
    with pytest.raises(ConfigError, match="CKPTD_OVERLAP is"):
        ckptd.resumable()(lambda run: None)()
    assert not agent.said


def test_an_argument_outweighs_the_environment(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code says about overlap holds against what the environment says, which holds against the default."""
    monkeypatch.setenv("CKPTD_OVERLAP", "nonsense")
    for number, (overlap, variable, hooks) in enumerate(
        [("off", "on", 0), ("on", "off", 1), (None, "on", 1), (None, "off", 0), (None, "", 1)]
    ):
        monkeypatch.setenv("CKPTD_OVERLAP", variable)
        ckptd.attach(data=bytearray(10), overlap=overlap)
        assert len(BOUND[number].hooks) == hooks
        current_run()._end()  # type: ignore[union-attr]


def test_the_framework_learns_the_membership(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A binding is told which rank of how many it is in, and which names the user calls replicated."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for replicated in (None, (), ("model",), ["model", "optimizer"]):
        run = ckptd.attach(model=bytearray(10), optimizer=bytearray(10), rng=False, replicated=replicated)
        expected = None if replicated is None else tuple(replicated)
        assert (BOUND[-1].rng, BOUND[-1].membership) == (False, (1, 3, expected))
        run._end()


def test_replicated_names_must_be_attached(agent: FakeAgent) -> None:
    """A replicated name that names nothing, or a text for names, is a `config` error before anything is asked."""
    with pytest.raises(ConfigError, match="replicated names 'modle', and nothing of that name is attached") as refused:
        ckptd.attach(model=bytearray(10), data=bytearray(10), replicated=("model", "modle"))
    assert refused.value.hint == "attached are 'model', 'data'"
    with pytest.raises(ConfigError, match="replicated is the text 'model'") as refused:
        ckptd.attach(model=bytearray(10), replicated="model")
    assert refused.value.hint == "it is a sequence of names: ('model',)"
    assert not agent.said


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
    assert BOUND[0].closed == 1


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

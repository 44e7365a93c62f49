"""What `ckptctl` may ask of a running job, through a real agent's socket."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.core.policy.halt import Conditions
from ckptd.errors import AgentError, CkptdError, ConfigError, FencedError, NotFoundError, PluginError, StoreError
from ckptd.journal import JobEntry, Life
from ckptd.protocol import messages as m
from ckptd.protocol.channel import open_channel
from ckptd.storage.local import LocalTier
from ckptd.store_config import StoreConfig
from tests.daemon.harness import PATIENCE_S, AgentThread, Node, Puppet, until

HOUR_S = 3600


@pytest.fixture
def ask(node: Node, agent: AgentThread) -> Iterator[Callable[..., Future[Any]]]:
    """Ask the agent something, each time on a connection of its own; the answer is a future."""
    with ThreadPoolExecutor(4) as pool:

        def call(message: m.Message) -> Any:
            channel, _ = open_channel(str(node.socket), "ctl", PATIENCE_S)
            try:
                answer = channel.call(message, PATIENCE_S)
            finally:
                channel.close()
            assert isinstance(answer, m.Done)
            return answer.result

        yield lambda message: pool.submit(call, message)


@pytest.fixture
def training(node: Node, agent: AgentThread) -> Iterator[Puppet]:
    """A rank that trains on in a thread, in a job whose next checkpoint by itself is an hour away."""
    puppet = node.puppet(CKPTD_EVERY="1h")
    puppet.attach()
    puppet.train(3, 0.01)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            puppet.train(1, 0.005)

    thread = threading.Thread(target=train)
    thread.start()
    yield puppet
    stop.set()
    thread.join()


def test_a_checkpoint_on_demand(agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]]) -> None:
    """`checkpoint` answers with the step once it is committed, and later on with a newer one."""
    first = ask(m.Control("job", "checkpoint")).result()
    assert first["job"] == "job"
    assert first["step"] == agent.committed() > 0
    until(lambda: agent.status()["step"] > first["step"], "further steps")
    assert ask(m.Control("job", "checkpoint")).result()["step"] > first["step"]


def test_an_older_flush_is_no_answer(
    agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint asked for while an older one is still being written is answered with one that was made after it."""
    put, go_on = LocalTier.put, threading.Event()

    def slow(self: LocalTier, key: str, data: Any, **options: Any) -> None:
        go_on.wait(PATIENCE_S)
        put(self, key, data, **options)

    monkeypatch.setattr(LocalTier, "put", slow)
    old = ask(m.Control("job", "checkpoint"))
    until(lambda: agent.job().machine.keeper.book.flushing, "the first flush")
    then = agent.status()["step"]
    until(lambda: agent.status()["step"] > then, "further steps")
    new = ask(m.Control("job", "checkpoint"))
    until(lambda: agent.job().machine.keeper.wished or len(agent.job().machine.keeper.book.snapshots) > 1, "the wish")
    go_on.set()
    assert new.result()["step"] > then
    assert old.result()["step"] <= new.result()["step"]


def test_a_checkpoint_without_waiting(agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]]) -> None:
    """`checkpoint --no-wait` answers at once, and the checkpoint comes."""
    assert ask(m.Control("job", "checkpoint", wait=False)).result() == {"job": "job", "step": None}
    until(agent.committed, "the checkpoint")


def test_a_checkpoint_that_never_comes(agent: AgentThread, node: Node, ask: Callable[..., Future[Any]]) -> None:
    """Who waits for a checkpoint of a job that ends without one is told so."""
    puppet = node.puppet(CKPTD_EVERY="1h")
    puppet.attach()
    puppet.train(1)
    until(lambda: agent.status()["state"] == "running", "training")
    answer = ask(m.Control("job", "checkpoint"))
    until(lambda: agent.job().machine.keeper.wished, "the wish")
    agent.call(lambda: agent.job().stop(0.0, checkpoint=False))
    with pytest.raises(AgentError, match="ended before the checkpoint was committed"):
        answer.result()


def test_only_a_running_job_can_be_checkpointed(
    node: Node, agent: AgentThread, ask: Callable[..., Future[Any]]
) -> None:
    """A job whose ranks are gone refuses `checkpoint` and `restart` with its state."""
    puppet = node.puppet()
    puppet.attach()
    puppet.kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for new ranks")
    with pytest.raises(AgentError, match="job job is pending: only a running job can be checkpointed"):
        ask(m.Control("job", "checkpoint")).result()
    with pytest.raises(AgentError, match="job job is pending: there is nothing to restart"):
        ask(m.Control("job", "restart")).result()


def test_stop_waits_for_the_end(agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]]) -> None:
    """`stop` captures once more, waits for its commit and answers with the outcome; a second one gets the same."""
    both = [ask(m.Control("job", "stop")) for _ in range(2)]
    assert [answer.result() for answer in both] == [{"job": "job", "outcome": "stopped"}] * 2
    assert agent.committed() > 0
    assert agent.status()["state"] == "stopped"
    assert ask(m.Control("job", "stop")).result() == {"job": "job", "outcome": "stopped"}


def test_stop_without_waiting(agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]]) -> None:
    """`stop --no-wait` answers at once, and the job stops."""
    assert ask(m.Control("job", "stop", wait=False)).result() == {"job": "job", "outcome": "stopping"}
    until(lambda: agent.status()["state"] == "stopped", "the stop")


def test_a_restart_of_a_supervised_job(node: Node, agent: AgentThread, ask: Callable[..., Future[Any]]) -> None:
    """`restart` begins a new generation and an incident says who asked; from a step that isn't there it is refused."""
    config = supervised(node)
    assert ask(m.Submit(config.to_json())).result() == {"job": "job"}
    before = until(lambda: agent.status()["ranks"][0]["pid"], "the first rank")
    with pytest.raises(NotFoundError, match="job job has no checkpoint at step 9 or before it"):
        ask(m.Control("job", "restart", step=9)).result()
    assert ask(m.Control("job", "restart")).result() == {"job": "job", "step": None}
    until(lambda: agent.status()["ranks"][0]["pid"] not in (None, before), "the second rank")
    assert agent.status()["generation"] == 2
    assert [incident["cause"] for incident in node.incidents()] == ["a restart was asked for"]
    assert ask(m.Control("job", "stop")).result()["outcome"] == "stopped"


def test_a_restart_from_a_step_comes_too_late_for_what_begins(
    node: Node, agent: AgentThread, ask: Callable[..., Future[Any]]
) -> None:
    """`restart --from` of a generation without ranks, which begins with something else, is refused and not ignored."""
    slow, go_on = node.folder / "slow", node.folder / "go_on"
    slow.write_text(f'#!/bin/sh\nwhile [ ! -e {go_on} ]; do sleep 0.05; done\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    ask(m.Submit(supervised(node, python=str(slow)).to_json())).result()
    until(lambda: agent.status()["state"] == "starting", "the first generation")
    with pytest.raises(AgentError, match="generation 1 of job job is about to begin, with step 0"):
        ask(m.Control("job", "restart", step=9)).result()
    assert ask(m.Control("job", "restart")).result() == {"job": "job", "step": None}
    go_on.touch()
    until(lambda: agent.status()["ranks"][0]["pid"], "the rank")


def test_conditions_outlive_a_reboot(node: Node, agent: AgentThread, ask: Callable[..., Future[Any]]) -> None:
    """A job that comes back after its node has started anew stops upon the conditions that somebody has set before."""
    ask(m.Submit(supervised(node).to_json())).result()
    ask(m.Control("job", "halt", options={"after_step": 500})).result()
    entry = agent.call(lambda: agent.agent.journal.read_job("job"))
    assert entry is not None
    ask(m.Control("job", "stop", options={"no_checkpoint": True})).result()
    before = replace(entry, life=replace(entry.life, boot_id="an older one"))
    agent.call(lambda: agent.agent.adopt(before))
    assert agent.job().machine.conditions == Conditions(after_step=500)
    assert ask(m.Control("job", "halt")).result()["after_step"] == 500


def test_a_store_that_is_not_mounted_is_no_fresh_start(
    node: Node, agent: AgentThread, ask: Callable[..., Future[Any]]
) -> None:
    """A job that comes back after its node has started anew does not begin from nothing where it had a checkpoint."""
    status = {"state": "running", "last_committed": {"step": 20, "tier": "local", "generation": 1}}
    entry = JobEntry("job", supervised(node).to_json(), status, 1, "", 0.0, Life(comes_back=True))
    job = agent.call(lambda: agent.agent.adopt(entry))
    end = until(lambda: agent.call(lambda: job.ended.done() and job.ended.result()), "the end")
    assert isinstance(end.error, StoreError), "which may pass, so that it is tried again"
    assert end.error.message == "no checkpoint of this job is there, and the last one was step 20"
    assert not list(node.store.glob("job/*"))


def supervised(node: Node, **changes: Any) -> JobConfig:
    """Return a job of one rank that does nothing for a long time."""
    fields = {
        "preload": (),
        "cwd": str(node.folder),
        "stores": (StoreConfig(str(node.store)),),
        "command": ("/bin/sleep", "1000"),
    }
    return JobConfig("job", **{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"command": ("no_such.py",)}, ConfigError, "no_such.py"),
        ({"cwd": "/no/such/folder"}, ConfigError, "/no/such/folder"),
        ({"python": "/no/such/python"}, ConfigError, "/no/such/python"),
        ({"stores": (StoreConfig("nfs4://x"),)}, PluginError, "nfs4"),
        ({"stores": (StoreConfig("/proc/nowhere"),)}, StoreError, "/proc/nowhere"),
    ],
)
def test_an_impossible_job_is_refused(
    node: Node,
    agent: AgentThread,
    ask: Callable[..., Future[Any]],
    changes: dict[str, Any],
    kind: type[CkptdError],
    says: str,
) -> None:
    """What can be known before a job runs is refused when it is submitted, and leaves the name free."""
    with pytest.raises(kind, match=says):
        ask(m.Submit(supervised(node, **changes).to_json())).result()
    assert not agent.call(lambda: agent.agent.jobs)
    assert ask(m.Submit(supervised(node).to_json())).result() == {"job": "job"}
    with pytest.raises(FencedError, match="job job runs already"):
        ask(m.Submit(supervised(node).to_json())).result()


def test_what_is_not_known(agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]]) -> None:
    """Unknown jobs, verbs and settings are refused by name."""
    with pytest.raises(NotFoundError, match="no job other") as missing:
        ask(m.Control("other", "stop")).result()
    assert missing.value.hint == "its jobs: job"
    with pytest.raises(NotFoundError):
        ask(m.Status("other")).result()
    with pytest.raises(AgentError, match="unknown request 'explode'"):
        ask(m.Control("job", "explode")).result()
    with pytest.raises(ConfigError, match="nosuch"):
        ask(m.Submit({"name": "x", "nosuch": 1})).result()


def test_status_is_that_of_the_moment(
    node: Node, agent: AgentThread, training: Puppet, ask: Callable[..., Future[Any]]
) -> None:
    """`status` has each rank's process, phase and step as they are now."""
    before = ask(m.Status("job")).result()["jobs"]
    assert [job["job"] for job in before] == ["job"]
    (rank,) = before[0]["ranks"]
    assert (rank["rank"], rank["pid"], rank["state"]) == (0, training.pid, "training")
    time.sleep(0.1)
    after = ask(m.Status()).result()["jobs"][0]
    assert after["ranks"][0]["step"] > rank["step"] > 0
    assert (after["state"], after["generation"], after["restarts"]) == ("running", 1, 0)

"""The agent is killed, replaced and upgraded under ranks that train: no step is lost, and the end is the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import ckptd
from ckptd.daemon.living import started
from ckptd.errors import FencedError
from ckptd.protocol.messages import PROTOCOL_VERSION
from tests.crash import state as crash_state
from tests.end_to_end.harness import LIGHT, SCRIPTS, World
from tests.waiting import PATIENCE_S, until

JOB = "job"


class Service:
    """The service of a world, whose agents come and go while one job trains."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.agent = self.start()

    def start(self, **env: str) -> subprocess.Popen[str]:
        """Start an agent, and wait until it listens."""
        world = self.world
        self.agent = agent = world.popen([sys.executable, "-m", "ckptd.daemon"], CKPTD_LOG_FORMAT="json", **env)
        until(lambda: '"agent started"' in world.output(agent), "an agent")
        return agent

    def kill(self) -> None:
        """Kill the agent, and nobody else."""
        self.agent.kill()
        self.agent.wait()

    def submit(self, command: list[str], *, every: str = "100ms", more: str = "") -> None:
        """Hand the job over."""
        file = self.world.folder / f"{JOB}.toml"
        file.write_text(
            f'command = {json.dumps(command)}\nnproc = 2\nevery = "{every}"\nstore = "{self.world.store}"\n'
            f'python = "{sys.executable}"\n{more}'
        )
        done = self.world.ctl("submit", str(file))
        assert done.returncode == 0, done.stderr

    def train(self, steps: int, pause_s: float = 0.01, *, every: str = "100ms", more: str = "") -> None:
        """Hand over a light job, and wait until it trains, and has a checkpoint if it makes any by itself."""
        self.submit([LIGHT, str(steps), str(pause_s)], every=every, more=f'preload = ["ckptd"]\n{more}')
        self.world.until_training(JOB, 5, committed=every != "1h")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's lines of one event, of all agents."""
        lines = "".join(path.read_text() for path in self.world.folder.glob("output-*.txt")).splitlines()
        parsed = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in parsed if line["event"] == name]

    def adopted(self, times: int) -> None:
        """Wait until a job was taken over so often."""
        until(lambda: len(self.events("job adopted")) >= times, "the job's being taken over")

    def pids(self) -> list[int]:
        """Return the processes of the ranks."""
        status = self.world.status(JOB)
        assert status is not None
        return [rank["pid"] for rank in status["ranks"]]

    def ended(self, outcome: str = "finished") -> dict[str, Any]:
        """Wait for the end of the job, stop the agent, and return the job's last status."""

        def end() -> dict[str, Any] | None:
            status = self.world.status(JOB)
            return status if status and status["state"] in ("finished", "failed", "stopped") else None

        status: dict[str, Any] = until(end, "the end of the job")
        self.agent.send_signal(signal.SIGTERM)
        self.agent.wait(PATIENCE_S)
        assert status["state"] == outcome
        return status


@pytest.fixture
def service(light: World) -> Service:
    """The service, with light jobs."""
    return Service(light)


def check_state(world: World, steps: int) -> None:
    """Check that the light job has ended with the state of one that was never interrupted."""
    for rank in range(2):
        wanted = crash_state.fresh(rank)
        for step in range(1, steps + 1):
            crash_state.advance(wanted, step)
        assert json.loads((world.folder / f"end-{rank}.json").read_text()) == crash_state.digests(wanted)


def check_end(world: World, steps: int) -> None:
    """Check that the light job ended as one does that was never interrupted, and that its checkpoints are good."""
    check_state(world, steps)
    assert all(item["intact"] for item in world.json("verify", JOB))
    assert world.json("ls", JOB)[0]["step"] == steps


def test_three_agents_one_after_the_other(light: World, service: Service) -> None:
    """Agents are killed and replaced under the job: the same processes train to the right end, without an incident.

    A second copy of the job is refused meanwhile, with what is so: its agent runs it, or has gone.
    """
    service.train(700)
    pids = service.pids()
    twice = light.ctl("submit", str(light.folder / f"{JOB}.toml"))
    assert (twice.returncode, f"job {JOB} runs already" in twice.stderr) == (FencedError.exit_code, True)
    beside = light.ctl("run", "--name", JOB, "--nproc", "2", "--store", str(light.store), "--", LIGHT, "700")
    assert f"{JOB} is held by agent {service.agent.pid}" in beside.stderr
    for number in (1, 2, 3):
        service.kill()
        second = light.ctl("run", "--name", JOB, "--nproc", "2", "--store", str(light.store), "--", LIGHT, "700")
        assert second.returncode == FencedError.exit_code, second.stderr
        assert f"job {JOB} trains already, and the ckptd that ran it is gone" in second.stderr
        service.start()
        service.adopted(number)
        assert service.pids() == pids
        now = light.status(JOB)
        assert now is not None
        committed = now["last_committed"]["step"]
        until(lambda step=committed: (light.status(JOB) or {})["last_committed"]["step"] > step, "a commit")
    assert service.ended()["generation"] == 1
    assert light.incidents_now(JOB) == []
    check_end(light, 700)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_ten_kills_of_the_agent_under_torch(world: World) -> None:
    """The agent of two ranks that train with gloo is killed ten times: no step is lost, the end is bit-identical."""
    world.env["CKPTD_JOB"] = JOB
    world.finish(world.run("train.py", 600, options=("--name", "quiet")))
    service = Service(world)
    service.submit([str(SCRIPTS / "train.py"), "600", "--pause=0.02"])
    world.until_training(JOB, 5, committed=True)
    pids = service.pids()
    for number in range(1, 11):
        service.kill()
        service.start()
        service.adopted(number)
    assert service.pids() == pids
    assert service.ended()["generation"] == 1
    assert world.incidents_now(JOB) == []
    assert world.tensors(JOB) == world.tensors("quiet")


def test_a_kill_during_a_flush(light: World, service: Service) -> None:
    """What was being written when the agent died is written by the next one out of the same slots."""
    service.train(100_000, every="1h", more='flush_max = "400KB/s"\n')
    assert light.ctl("checkpoint", JOB).returncode == 0
    before = {item["step"] for item in light.json("ls", JOB)}
    ask = light.ctl_popen("checkpoint", JOB)
    until(lambda: any((light.store / JOB).glob("g*/s*/.tmp-*")), "a flush")
    time.sleep(0.5)
    service.kill()
    ask.wait(PATIENCE_S)
    service.start()
    service.adopted(1)
    (adopted,) = service.events("job adopted")
    until(lambda: {item["step"] for item in light.json("ls", JOB)} - before, "its commit")
    new = {item["step"] for item in light.json("ls", JOB)} - before
    assert new & set(adopted["snapshots"])
    assert light.ctl("stop", JOB).returncode == 0
    service.ended("stopped")
    assert all(item["intact"] for item in light.json("verify", JOB, "--all"))


def test_agent_and_rank_die_together(light: World, service: Service) -> None:
    """The next agent learns from the launcher how the rank ended, and the job begins again with its last checkpoint."""
    service.train(300)
    _, second = service.pids()
    service.agent.send_signal(signal.SIGSTOP)
    light.kill_pid(second)
    service.kill()
    service.start()
    light.until_training(JOB, 1, generation=2)
    service.ended()
    (incident,) = light.incidents_now(JOB)
    assert (incident["rank"], incident["signal"]) == (1, signal.SIGKILL)
    check_end(light, 300)


def test_a_rank_dies_while_no_agent_is_there(light: World, service: Service) -> None:
    """The launcher tells the next agent what it has seen meanwhile."""
    service.train(300)
    first, _ = service.pids()
    service.kill()
    light.kill_pid(first)
    time.sleep(0.3)
    service.start()
    light.until_training(JOB, 1, generation=2)
    service.ended()
    (incident,) = light.incidents_now(JOB)
    assert (incident["rank"], incident["signal"]) == (0, signal.SIGKILL)
    check_end(light, 300)


def test_no_agent_for_too_long(light: World, service: Service) -> None:
    """Launcher and ranks that wait in vain are ended; the next agent goes on with the last checkpoint."""
    service.train(100_000, more='agent_wait = "1s"\n')
    service.kill()
    light.until_empty()
    service.start()
    status = light.until_training(JOB, 6, generation=2)
    assert status["restarts"] == 1
    assert light.ctl("stop", JOB).returncode == 0
    service.ended("stopped")
    (incident,) = light.incidents_now(JOB)
    assert incident["cause"] == "the launcher is gone"


def test_a_job_that_is_to_end_with_its_agent(light: World, service: Service) -> None:
    """With `on_agent_loss = "end"` nothing outlives the agent."""
    service.train(100_000, more='on_agent_loss = "end"\n')
    service.kill()
    light.until_empty(patience_s=30)


def test_a_launcher_is_killed(light: World, service: Service) -> None:
    """Ranks whose launcher dies are captured once more, and begin again with that; none of them stays."""
    service.train(500, every="1h")
    before = service.pids()
    for process in light.launchers():
        if process.pid not in before:
            process.kill()
    light.until_training(JOB, 1, generation=2)
    assert not any(map(started, before))
    service.ended()
    (incident,) = light.incidents_now(JOB)
    assert incident["cause"] == "the launcher ended with SIGKILL"
    # Far from the interval of an hour: no more than the steps between the capture and the end of the ranks.
    assert incident["restored"]["tier"] == "memory"
    assert incident["lost_steps"] <= 10
    check_end(light, 500)


def test_agent_and_launcher_die_together(light: World, service: Service) -> None:
    """Ranks that are left alone come back to the next agent, are captured once more, and begin again."""
    service.train(500)
    before = service.pids()
    service.kill()
    for process in light.launchers():
        if process.pid not in before:
            process.kill()
    service.start()
    light.until_training(JOB, 1, generation=2)
    assert not any(map(started, before))
    service.ended()
    (incident,) = light.incidents_now(JOB)
    assert incident["cause"] == "the launcher is gone"
    assert incident["lost_steps"] <= 10, "what was captured once more is not what they began with"
    check_end(light, 500)


def test_an_upgrade(light: World, service: Service, tmp_path: Path) -> None:
    """An agent of another version with the same protocol takes over ranks and launcher of the one before."""
    service.train(400)
    pids = service.pids()
    newer = tmp_path / "newer"
    shutil.copytree(Path(ckptd.__file__).parent, newer / "ckptd", ignore=shutil.ignore_patterns("__pycache__"))
    (newer / "ckptd" / "version.py").write_text('"""Newer."""\n\n__version__ = "99.0"\n')
    service.kill()
    service.start(PYTHONPATH=f"{newer}:{light.env.get('PYTHONPATH', '')}")
    service.adopted(1)
    assert service.pids() == pids
    service.ended()
    assert json.loads(max(light.store.glob("*/g*/s*/manifest.json")).read_text())["producer"]["ckptd"] == "99.0"
    check_end(light, 400)


def test_upgrades_that_speak_another_protocol(light: World, service: Service, tmp_path: Path) -> None:
    """What an agent can't talk to is ended, whether it can read the journal or not, and the job begins again at once.

    Nothing of the old generation trains on beside the new one.
    """
    service.train(300)
    before = service.pids()
    for version, renamed in ((98, "refused"), (99, "declined")):
        newer = tmp_path / str(version)
        shutil.copytree(Path(ckptd.__file__).parent, newer / "ckptd")
        protocol, handover = newer / "ckptd" / "protocol" / "message.py", newer / "ckptd" / "core" / "handover.py"
        text = re.sub(r"(?m)^PROTOCOL_VERSION = \d+$", f"PROTOCOL_VERSION = {version}", protocol.read_text())
        protocol.write_text(text)
        handover.write_text(handover.read_text().replace('"refused"', f'"{renamed}"'))
        service.kill()
        light.env["PYTHONPATH"] = f"{newer}:{light.env.get('PYTHONPATH', '')}"
        service.start()
        until(lambda: service.events("launcher ready")[version - 97 :], "the next launcher")  # noqa: B023 - called here
        assert not any(map(started, before))
    until(lambda: service.events("job ended"), "the end of the job")
    service.agent.send_signal(signal.SIGTERM)
    service.agent.wait(PATIENCE_S)
    check_state(light, 300)
    versions = f"this client speaks protocol version {PROTOCOL_VERSION}, this side 98"
    assert [item["cause"] for item in light.incidents_now(JOB)] == [f"the launcher could not be taken over: {versions}"]


def test_a_stop_that_was_cut_short(light: World, service: Service) -> None:
    """A job that somebody was stopping when its agent died is stopped by the next one, with its last checkpoint."""
    service.train(100_000, every="1h")
    first, _ = service.pids()
    os.kill(first, signal.SIGSTOP)
    assert light.ctl("stop", JOB, "--no-wait").returncode == 0
    service.kill()
    os.kill(first, signal.SIGCONT)
    service.start()
    status = service.ended("stopped")
    assert status["last_committed"]["step"] == status["step"]


def test_an_agent_dies_while_ranks_wait_for_their_last_commit(light: World, service: Service) -> None:
    """Ranks that have left and wait until all is durable wait for the next agent, which writes what is left."""
    service.train(60, every="1h", more='flush_max = "300KB/s"\n')
    until(lambda: all(rank["state"] == "left" for rank in (light.status(JOB) or {})["ranks"]), "the ranks' leaving")
    service.kill()
    service.start()
    service.adopted(1)
    assert service.ended()["generation"] == 1
    check_end(light, 60)


def test_a_second_agent_at_the_same_place(light: World, service: Service) -> None:
    """An agent whose place is taken says so in a line, also when the first one is stopped and does not answer."""
    service.agent.send_signal(signal.SIGSTOP)
    try:
        second = light.popen([sys.executable, "-m", "ckptd.daemon"])
        said = light.finish(second, 8)
    finally:
        service.agent.send_signal(signal.SIGCONT)
    assert f"ckptd: error: another agent listens at {light.home / 'ckptd.sock'}" in said
    service.agent.send_signal(signal.SIGTERM)
    light.finish(service.agent)


def test_an_agent_that_hangs(light: World, service: Service) -> None:
    """Ranks train on beside an agent that does nothing, say so once, and go on as before when it is back."""
    service.train(100_000)
    service.agent.send_signal(signal.SIGSTOP)
    log = light.home / "jobs" / JOB / "logs" / "g000001" / "rank-00000.err"
    until(lambda: "the agent has done nothing for 10 s" in log.read_text(), "its being noticed")
    service.agent.send_signal(signal.SIGCONT)
    now = light.status(JOB)
    assert now is not None
    committed = now["last_committed"]["step"]
    until(lambda: (light.status(JOB) or {})["last_committed"]["step"] > committed, "a commit")
    assert log.read_text().count("has done nothing") == 1
    assert light.ctl("stop", JOB).returncode == 0
    service.ended("stopped")
    assert light.incidents_now(JOB) == []

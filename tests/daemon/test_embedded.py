"""The agent as a process: the service, and the embedded one that begins and ends with its ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from ckptd.protocol.channel import open_channel
from tests.daemon.bytes_framework import contents
from tests.daemon.harness import PATIENCE_S, Node, until


def test_an_embedded_agent_ends_after_its_last_rank(node: Node) -> None:
    """The first rank starts an agent, others use it, and after the last one's last commit nothing is left of it."""
    puppets = [node.puppet(rank, 2) for rank in range(2)]
    for puppet in puppets:
        puppet.start_attach()
    assert [puppet.finish()[0] for puppet in puppets] == [1, 1]
    assert len(node.agents()) == 1
    assert node.socket.exists()
    for puppet in puppets:
        puppet.train(5)
    for puppet in puppets:
        puppet.start("run.close()")
    for puppet in puppets:
        puppet.finish()
        puppet.end()
    until(lambda: not node.agents(), "the end of the agent")
    assert not node.socket.exists()
    assert json.loads(node.manifests()[-1].read_text())["step"] == 5


def test_an_embedded_agent_outlives_its_ranks_until_the_last_flush(node: Node) -> None:
    """When every rank is killed, what they have sealed is still committed before the agent ends, and restored later."""
    puppet = node.puppet(CKPTD_EVERY="20ms")
    puppet.attach(2_000_000)
    puppet.train_until(node.manifests, "a commit")
    puppet.train(50, 0.002)
    puppet.kill()
    until(lambda: not node.agents(), "the end of the agent")
    newest = json.loads(node.manifests()[-1].read_text())["step"]
    assert not node.socket.exists()
    again = node.puppet()
    assert again.attach(2_000_000) == [2, newest, "local"]
    assert again.data() == contents(newest, 2_000_000)
    assert not list(node.store.rglob(".tmp-*"))


def test_an_embedded_agent_that_nobody_comes_to_ends(node: Node) -> None:
    """An embedded agent whose starter died before it came waits a while for a rank, and ends."""
    code = "import sys, ckptd.daemon.__main__ as agent; agent._FIRST_PEER_S = 0.3; sys.exit(agent.main(['--embedded']))"
    result = subprocess.run(
        [sys.executable, "-c", code], env=node.env, capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == 0
    assert b"agent stopping" in result.stderr
    assert not node.socket.exists()


def test_an_agent_that_is_stopped_while_a_rank_trains_on(node: Node) -> None:
    """A stopped agent commits once more and ends; the rank trains on, and says once that it is unprotected now."""
    puppet = node.puppet(CKPTD_EVERY="1h")
    puppet.attach()
    puppet.train(3, 0.01)
    (agent,) = node.agents()
    agent.send_signal(signal.SIGTERM)
    until(lambda: puppet.train(1, 0.002) and not node.agents(), "the end of the agent")
    assert len(node.manifests()) == 1
    until(lambda: puppet.train(1, 0.002) and not puppet.do("result = run.protected"), "its being noticed")
    puppet.train(100)
    assert puppet.said.count("UNPROTECTED") == 1
    assert puppet.do("result = run.protected") is False


def test_a_killed_agent_is_noticed(node: Node) -> None:
    """A rank whose agent was killed says once that it trains on unprotected, soon and without being asked."""
    puppet = node.puppet()
    puppet.attach()
    puppet.train_until(node.manifests, "a commit")
    (agent,) = node.agents()
    agent.kill()
    puppet.do("import ckptd.client.run\nckptd.client.run._LOOK_EVERY_NS = 10**6\nrun._look_ns = run._due_ns = 1")
    until(lambda: puppet.train(1, 0.001) and not puppet.do("result = run.protected"), "its being noticed")
    assert puppet.train(10) > 0
    assert puppet.said.count("UNPROTECTED") == 1
    puppet.do("run.close()")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_tells_systemd(node: Node, number: int) -> None:
    """The service says when it is ready and when it stops, ends with 0 on a signal, and removes its socket."""
    place = str(node.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(place)
        manager.settimeout(PATIENCE_S)
        service = node.agent_process(NOTIFY_SOCKET=place)
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
        channel, welcome = open_channel(str(node.socket), "ctl", PATIENCE_S)
        assert welcome.agent_pid == service.pid
        channel.close()
        service.send_signal(number)
        assert manager.recv(1000) == b"STOPPING=1"
    assert service.wait(PATIENCE_S) == 0
    assert not node.socket.exists()


@pytest.mark.parametrize(
    ("env", "code", "says"),
    [
        ({"CKPTD_LOG_FORMAT": "xml"}, 2, "CKPTD_LOG_FORMAT 'xml' is unknown"),
        ({"CKPTD_MEMORY_MAX": "lots"}, 2, "CKPTD_MEMORY_MAX 'lots' is no size"),
        ({"CKPTD_HOME": "/proc/nowhere"}, 4, "can't use"),
        ({"CKPTD_SOCKET": "/proc/nowhere/s"}, 8, "can't listen at /proc/nowhere/s"),
    ],
)
def test_a_service_that_can_not_start(node: Node, env: dict[str, str], code: int, says: str) -> None:
    """What keeps the service from starting is one line, a hint and an exit code."""
    command = [sys.executable, "-m", "ckptd.daemon"]
    result = subprocess.run(
        command, env={**node.env, **env}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == code, result.stderr
    first, second = result.stderr.splitlines()
    assert first.startswith("ckptd: error: ")
    assert says in first
    assert second.startswith("  hint: ")


def test_a_bug_crashes_the_agent(node: Node) -> None:
    """An unexpected exception ends the agent with a code of its own and its traceback, rather than half a job."""
    (node.folder / "site" / "sitecustomize.py").write_text(
        "import sys\nif 'ckptd.daemon' in sys.orig_argv:\n    from ckptd.core import job\n"
        "    def bug(*_): raise ZeroDivisionError('a bug')\n    job.JobMachine._sealed = bug\n"
    )
    agent = node.agent_process()
    puppet = node.puppet()
    puppet.attach()
    until(lambda: agent.poll() is not None or not puppet.train(1, 0.002), "the crash")
    assert agent.wait(PATIENCE_S) == 70
    assert "ZeroDivisionError: a bug" in node.agent_said
    assert os.path.exists(f"/proc/{puppet.pid}")

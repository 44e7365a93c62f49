"""How ranks, their children and the launcher end, and that nothing stays."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.protocol import messages

FAMILY = """
import os, signal, subprocess, sys, time

# A grandchild that has left group and session, another whose parent has ended already, and one in the group.
far = subprocess.Popen(["sleep", "600"], start_new_session=True)
orphan = int(subprocess.check_output(["sh", "-c", "setsid sleep 600 >/dev/null & echo $!"]))
near = subprocess.Popen(["sleep", "600"])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print(far.pid, orphan, near.pid, flush=True)
while os.environ.get("STAY") and not os.path.exists(os.environ.get("GO", "")):
    time.sleep(0.01)
os._exit(5)
"""


def family_of(agent, until, rank=0) -> list[int]:
    """Return the processes that a rank of FAMILY has started."""
    until(lambda: agent.output(rank, "out").endswith("\n"), "the rank has started its children")
    pids = [int(word) for word in agent.output(rank, "out").split()[-3:]]
    agent.strangers += pids
    return pids


@pytest.mark.parametrize("preload", [["json"], []])
def test_agent_loss_ends_everything(start, script, until, lives, preload):
    """When the agent is gone its ranks, their children and the launcher end, wherever those have moved."""
    agent = start([str(script(FAMILY))], preload=preload)
    ranks = [agent.spawn(rank, {"STAY": "1"}) for rank in (0, 1)]
    pids = [*ranks, *family_of(agent, until, 0), *family_of(agent, until, 1)]
    assert all(lives(pid) for pid in pids)
    agent.channel.close()
    assert agent.process.wait(60) == 0
    assert [pid for pid in pids if lives(pid)] == []


def test_sigterm_to_the_launcher_ends_everything_and_tells(start, script, until, lives):
    """A stopped launcher leaves nothing, and the agent still learns how its ranks ended."""
    agent = start([str(script(FAMILY))])
    pids = [agent.spawn(0, {"STAY": "1"}), *family_of(agent, until)]
    agent.process.send_signal(signal.SIGTERM)
    assert agent.expect(messages.Exited).returncode == -signal.SIGKILL
    assert agent.process.wait(60) == 0
    assert [pid for pid in pids if lives(pid)] == []


def test_killing_the_launcher_takes_its_ranks_with_it(start, script, until, lives):
    """A launcher that is killed can do nothing any more, so the kernel ends its ranks."""
    agent = start([str(script(FAMILY))])
    ranks = [agent.spawn(rank, {"STAY": "1"}) for rank in (0, 1)]
    family_of(agent, until, 0)
    family_of(agent, until, 1)
    agent.process.kill()
    until(lambda: not any(lives(pid) for pid in ranks), "the ranks have ended")


def test_kill_ends_ranks_that_ignore_everything_else(start, script, until, lives):
    """SIGTERM may be ignored; SIGKILL ends all ranks and whatever descends from them, and the launcher serves on."""
    agent = start([str(script(FAMILY))])
    pids = [agent.spawn(rank, {"STAY": "1"}) for rank in (0, 1)]
    pids += family_of(agent, until, 0) + family_of(agent, until, 1)
    agent.kill(signal.SIGTERM)
    agent.kill(signal.SIGKILL)
    ended = agent.wait(2)
    assert {result.returncode for result in ended.values()} == {-signal.SIGKILL}
    # The answer to the next order comes after the sweep.
    agent.spawn(2, {})
    assert [pid for pid in pids if lives(pid)] == []
    assert agent.wait()[2].returncode == 5


def test_leftovers_of_a_generation_are_gone_before_the_next(start, script, until, lives):
    """What ranks have left behind when they ended by themselves does not meet the next generation."""
    agent = start([str(script(FAMILY))])
    agent.spawn(0, {"STAY": ""})
    children = family_of(agent, until)
    assert agent.wait()[0].returncode == 5
    agent.spawn(1, {})
    assert [pid for pid in children if lives(pid)] == []


def test_leftovers_of_one_rank_live_while_another_does(start, script, tmp_path, until, lives):
    """As long as a rank lives nothing but that rank's own group is touched: a leftover might be its helper."""
    agent = start([str(script(FAMILY))])
    go = tmp_path / "go"
    agent.spawn(0, {"STAY": "1", "GO": str(go)})
    agent.spawn(1, {})
    first, second = family_of(agent, until, 0), family_of(agent, until, 1)
    assert set(agent.wait()) == {1}
    assert all(lives(pid) for pid in [*first, *second])
    go.touch()
    assert set(agent.wait()) == {0}
    until(lambda: not any(lives(pid) for pid in [*first, *second]), "the leftovers are gone")


def test_orphans_that_end_are_reaped_while_ranks_live(start, script, until):
    """The launcher adopts orphans, so it must not collect their zombies over a long run."""
    text = """
        import subprocess, time
        for _ in range(5):
            subprocess.run(["sh", "-c", "sleep 0.2 & exit"])
        print("begun", flush=True)
        time.sleep(600)
        """
    agent = start([str(script(text))])
    pid = agent.spawn(0)
    until(lambda: agent.output(0, "out"), "the rank runs")

    def children() -> list[str]:
        return Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()

    until(lambda: children() == [str(pid)], "only the rank is left")


def test_each_end_is_told_with_its_time(start, script):
    """`Exited` says which rank, how, and when by the clock that all processes of a node share."""
    agent = start([str(script("import sys\nsys.exit(int(sys.argv[1]))")), "6"])
    agent.order(3)
    spawned = agent.expect(messages.Spawned)
    ended = agent.expect(messages.Exited)
    assert (ended.rank, ended.pid, ended.returncode) == (3, spawned.pid, 6)
    assert spawned.at_s < ended.at_s


def test_any_program_may_be_a_rank(start):
    """A command that is not Python is executed as it is, with the rank's environment and files."""
    agent = start(["sh", "-c", 'echo "$RANK $*"; echo oops >&2; ls /proc/self/fd | wc -l; exit 4', "sh", "a b"])
    assert agent.expect(messages.Ready).preloaded == []
    first, second = agent.run({"RANK": "0"}, {"RANK": "1"})
    assert (first.returncode, first.stdout, first.stderr) == (4, "0 a b\n4\n", "oops\n")
    assert second.stdout == "1 a b\n4\n"


def test_a_program_starts_with_default_signals(start):
    """Python ignores SIGPIPE; a program that it executes must not inherit that."""
    command = ["grep", "SigIgn", "/proc/self/status"]
    # Whatever this test's own parent ignores is inherited by anybody's children.
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    agent = start(command)
    assert agent.run({})[0].stdout == fresh


def test_a_program_that_cannot_be_executed_is_refused(start, script, tmp_path):
    """A failed exec is an answer with the reason, not a rank that ends at once."""
    program = tmp_path / "program"
    program.write_text("#!/nowhere/interpreter\n")
    program.chmod(0o755)
    agent = start([str(program)])
    agent.order(0)
    failed = agent.expect(messages.SpawnFailed)
    assert failed.rank == 0
    assert failed.error["code"] == "config"
    assert failed.error["message"] == f"{program} can't be executed: No such file or directory"
    program.write_text("no first line\n")
    agent.order(1)
    assert "Exec format error" in agent.expect(messages.SpawnFailed).error["message"]
    program.chmod(0o600)
    agent.order(2, {"NULL": "a\0b"})
    assert agent.expect(messages.SpawnFailed).rank == 2
    program.write_text("#!/bin/sh\necho good\n")
    program.chmod(0o755)
    assert agent.run({})[0].stdout == "good\n"


def test_output_that_cannot_be_opened_is_refused(start, script, tmp_path):
    """A rank whose output has no place is not started, and others still are."""
    agent = start([str(script("print('ran')"))])
    agent.channel.send(messages.Spawn(0, {}, str(tmp_path / "no" / "out"), str(tmp_path / "err")), 10)
    failed = agent.expect(messages.SpawnFailed)
    assert failed.error["code"] == "store"
    assert str(tmp_path / "no" / "out") in failed.error["message"]
    assert agent.run({})[0].stdout == "ran\n"


def test_output_is_appended(start, script):
    """A new generation may write to the same files, and what the last one said stays."""
    agent = start([str(script("print('line')"))])
    assert agent.run({})[0].stdout == "line\n"
    assert agent.run({})[0].stdout == "line\nline\n"


@pytest.mark.parametrize("command", [["missing.py"], ["no-such-program"], ["-m"], []])
def test_a_command_that_cannot_work_is_one_line(start, command):
    """The agent asks `plan_command` first; a launcher that is started all the same says it in one line."""
    agent = start(command)
    assert agent.process.wait(60) == 2
    lines = agent.complaints().splitlines()
    assert [line.split(":")[0] for line in lines] == ["ckptd", "hint"]


def test_a_peer_that_speaks_nonsense_is_a_lost_agent(start, script, until, lives):
    """Bytes that are no message end the job as a lost agent does, with one line and no traceback."""
    agent = start([str(script("import time\ntime.sleep(600)"))])
    pid = agent.spawn(0)
    agent.channel.stream.sendall(b"\0\0\0\4nope")
    assert agent.process.wait(60) == 0
    assert not lives(pid)
    assert agent.complaints() == "ckptd: launcher: lost the agent: a peer sent a message that is not JSON\n"


def test_an_idle_launcher_ends_with_its_agent(start, script):
    """A launcher that nobody goes on with ends with its agent, also when it has no ranks."""
    agent = start([str(script(""))])
    agent.expect(messages.Ready)
    agent.channel.close()
    assert agent.process.wait(60) == 0


def test_python_is_this_one(start, script):
    """Ranks run in the interpreter that the launcher runs in, preloaded or not."""
    path = script("import sys\nprint(sys.executable)")
    for preload in (["json"], []):
        assert start([str(path)], preload=preload).run({})[0].stdout == f"{sys.executable}\n"

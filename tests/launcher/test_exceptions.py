"""How a rank's uncaught exception reaches the agent and the user."""

from __future__ import annotations

from ckptd.protocol import messages
from ckptd.types import RaisedException

SCRIPT = """
import os
from ckptd import CkptdError
from ckptd.errors import StateError

class Mine(Exception):
    pass

class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def train():
    case = os.environ["CASE"]
    if case == "own":
        raise Mine("loss is NaN")
    if case == "builtin":
        raise ValueError("x" * 100_000)
    if case == "deep":
        error = None
        for i in range(3000):
            try:
                raise ValueError(i) from error
            except ValueError as caught:
                error = caught
        raise error
    if case == "broken":
        raise Broken
    if case == "refused":
        raise StateError("key 'a' holds a lock", hint="leave it out")
    if case == "interrupt":
        raise KeyboardInterrupt
    if case.isdecimal():
        raise SystemExit(int(case))

train()
"""


def run(start, agent_socket, envs_of, script, case, **more):
    path = script(SCRIPT)
    agent = start([str(path)], preload=["json", "ckptd.errors"])
    (env,) = envs_of(1, socket_path=agent_socket.path, generation=4)
    (result,) = agent.run({**env, "CASE": case, **more})
    raised = [message for message in agent_socket.heard if isinstance(message, messages.Raised)]
    return result, raised


def test_an_uncaught_exception_is_reported_and_printed(start, agent_socket, envs_of, script, until):
    """The agent gets type, message and traceback; the user sees the traceback that Python prints."""
    result, _ = run(start, agent_socket, envs_of, script, "own")
    until(lambda: len(agent_socket.heard) == 2, "the report arrived")
    hello, raised = agent_socket.heard
    assert isinstance(hello, messages.Hello)
    assert (hello.role, hello.pid) == ("rank", result.pid)
    assert isinstance(raised, messages.Raised)
    assert (raised.job, raised.rank, raised.generation) == ("gpt", 0, 4)
    told = RaisedException.from_json(raised.exception)
    assert (told.type, told.message, told.error) == ("Mine", "loss is NaN", None)
    assert told.traceback == result.stderr
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n  File ")
    assert "train.py" in result.stderr.splitlines()[1]
    assert "launcher" not in result.stderr


def test_a_report_is_bounded_and_keeps_the_end(start, agent_socket, envs_of, script, until):
    """However long a traceback and a message are, the report is small and holds the cause."""
    result, _ = run(start, agent_socket, envs_of, script, "deep")
    until(lambda: len(agent_socket.heard) == 2, "the report arrived")
    told = RaisedException.from_json(agent_socket.heard[1].exception)
    assert len(told.traceback) == 64 * 1024
    assert told.traceback.endswith("ValueError: 2999\n")
    result, _ = run(start, agent_socket, envs_of, script, "builtin")
    until(lambda: len(agent_socket.heard) == 4, "the report arrived")
    told = RaisedException.from_json(agent_socket.heard[3].exception)
    assert (told.type, len(told.message)) == ("ValueError", 8 * 1024)
    assert result.returncode == 1


def test_an_exception_without_text_is_reported(start, agent_socket, envs_of, script, until):
    """An exception whose own text fails does not take the report with it."""
    run(start, agent_socket, envs_of, script, "broken")
    until(lambda: len(agent_socket.heard) == 2, "the report arrived")
    assert RaisedException.from_json(agent_socket.heard[1].exception).type == "Broken"


def test_an_error_of_ours_is_one_line(start, agent_socket, envs_of, script, until):
    """A `CkptdError` is a refusal: message, hint and its exit code, and its JSON form for the agent."""
    result, _ = run(start, agent_socket, envs_of, script, "refused")
    assert (result.returncode, result.stderr) == (7, "ckptd: error: key 'a' holds a lock\nhint: leave it out\n")
    until(lambda: len(agent_socket.heard) == 2, "the report arrived")
    told = RaisedException.from_json(agent_socket.heard[1].exception)
    assert (told.type, told.message) == ("ckptd.errors.StateError", "key 'a' holds a lock")
    assert told.error == {
        "code": "state",
        "message": "key 'a' holds a lock",
        "hint": "leave it out",
        "retryable": False,
    }
    assert "Traceback" in told.traceback


def test_debug_shows_the_traceback_of_an_error_of_ours(start, agent_socket, envs_of, script):
    """Whoever asks by CKPTD_DEBUG gets the traceback, and the exit code of a traceback."""
    result, _ = run(start, agent_socket, envs_of, script, "refused", CKPTD_DEBUG="1")
    assert result.stderr.startswith("Traceback")
    assert result.returncode == 1


def test_endings_that_are_no_faults_are_not_reported(start, agent_socket, envs_of, script):
    """An interrupt and the exit codes of success and of a job to be resumed are somebody's wish: nothing is told."""
    for case in ("0", "75", "interrupt", "end"):
        _, raised = run(start, agent_socket, envs_of, script, case)
        assert raised == []


def test_an_exit_code_is_told_before_the_end(start, agent_socket, envs_of, script, until):
    """A rank that exits as failed says so before it clears up, which takes its connections to others down."""
    result, _ = run(start, agent_socket, envs_of, script, "3")
    assert result.returncode == 3
    until(lambda: len(agent_socket.heard) == 2, "the report arrived")
    told = RaisedException.from_json(agent_socket.heard[1].exception)
    assert (told.type, told.message) == ("SystemExit", "3")


def test_an_unreachable_agent_changes_nothing(start, tmp_path, envs_of, script):
    """With nobody to tell, output and exit code are the same."""
    path = script(SCRIPT)
    agent = start([str(path)])
    reachless = envs_of(1, socket_path=tmp_path / "nobody.sock")[0]
    results = agent.run({**reachless, "CASE": "own"}, {**reachless, "CASE": "refused"}, {"CASE": "own"})
    assert [result.returncode for result in results] == [1, 7, 1]
    assert results[0].stderr == results[2].stderr
    assert results[0].stderr.endswith("Mine: loss is NaN\n")

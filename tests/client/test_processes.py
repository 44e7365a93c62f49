"""Runs in processes of their own: forks, races to start an agent, and agents that are stopped, with the real agent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import Node, until
from tests.end_to_end.harness import World

LOADER = Path(__file__).parent / "scripts" / "loader.py"
CHILD = """
def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world for `ckptctl run`; nothing may be left running in it."""
    world = World(tmp_path)
    try:
        yield world
        world.until_empty(patience_s=30)
    finally:
        world.close()


# --- forks --------------------------------------------------------------------------------------------------------


def test_a_forked_child_has_nothing_of_the_session(node: Node) -> None:
    """A forked child has no run, no slot, no page and no connection, and its steps and calls do nothing."""
    puppet = node.puppet()
    puppet.attach()
    code = puppet.do(f"""{CHILD}
def work():
    from ckptd.client.run import current_run
    assert current_run() is None and not run.protected
    assert 'memfd:ckptd' not in open('/proc/self/maps').read(), 'memory'
    links = [os.readlink(f'/proc/self/fd/{{fd}}') for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{{fd}}')]
    assert not [link for link in links if link.startswith('socket:')], links
    before = run._step
    for _ in range(100):
        run.step()
    run.checkpoint()
    run.report(loss=1.0)
    run.close()
    assert run._step == before + 100
result = child(work)
""")
    assert code == 0, puppet.said
    puppet.train_until(node.manifests, "a commit after the fork")
    assert puppet.do("result = run.protected")
    puppet.do("run.close()")


def test_a_fork_in_which_something_else_takes_the_place_of_a_slot(node: Node) -> None:
    """What other hooks allocate in a forked child, before ours lets go of the slots, stays intact."""
    puppet = node.puppet()
    puppet.do("""
def allocate():
    global kept
    kept = bytearray(b'x' * (8 << 20))
os.register_at_fork(after_in_child=allocate)
""")
    puppet.attach(8 << 20)
    assert puppet.do(f"{CHILD}\nresult = child(lambda: sum(kept))") == 0, puppet.said


def test_a_child_may_end_like_any_program(node: Node) -> None:
    """A forked child that ends through the interpreter, with its clean-ups, does not end the rank's session."""
    puppet = node.puppet()
    puppet.attach()
    puppet.start("""
pid = os.fork()
if pid == 0:
    sys.exit(0)
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
""")
    assert puppet.finish() == 0
    puppet.train_until(node.manifests, "a commit after the fork")


def test_a_child_that_lives_on_does_not_hide_the_end_of_its_rank(node: Node) -> None:
    """The agent sees the end of a rank though a forked child of it lives on, and keeps no place for it."""
    node.agent_process()
    puppet = node.puppet()
    puppet.attach()
    puppet.train_until(node.manifests, "a commit")
    child = puppet.do("pid = os.fork()\nif pid == 0:\n    import time\n    time.sleep(1000)\nresult = pid")
    try:
        puppet.kill()
        (incident,) = until(node.incidents, "the incident")
        assert incident["cause"] in ("rank 0 was killed by SIGKILL", "rank 0 ended while it was training")  # by kernel
        assert node.puppet().attach()[0] == 2
    finally:
        os.kill(child, signal.SIGKILL)


def test_loader_workers_and_a_kill(world: World) -> None:
    """DataLoader workers forked while attached disturb nothing, and neither hide nor survive the kill of their rank."""
    output = world.finish(world.run(str(LOADER), 8))
    total = sum(index * index for index in range(8)) * 8
    assert f"[0] total {total} generation 2" in output
    assert f"[1] total {total} generation 2" in output
    (incident,) = world.incidents_now("loader")
    assert (incident["rank"], incident["signal"]) == (1, signal.SIGKILL)
    assert incident["seconds"]["kill"] < 10


# --- starting an agent --------------------------------------------------------------------------------------------


def test_ranks_that_race_start_one_agent(node: Node) -> None:
    """Ranks that find no agent at the same moment start exactly one, and all of them join it."""
    puppets = [node.puppet(rank, 4) for rank in range(4)]
    for puppet in puppets:
        puppet.do("result = 1")  # every interpreter is up
    for puppet in puppets:
        puppet.start_attach()
    assert [puppet.finish()[0] for puppet in puppets] == [1] * 4
    assert sum(puppet.said.count("started an embedded agent") for puppet in puppets) == 1
    assert len(node.agents()) == 1
    assert len({puppet.do("result = os.path.exists(os.environ['CKPTD_SOCKET'])") for puppet in puppets}) == 1


def test_an_agent_that_can_not_start(node: Node) -> None:
    """When the embedded agent ends at once, the rank says where its log is and trains on unprotected."""
    puppet = node.puppet(CKPTD_MEMORY_MAX="lots")
    assert puppet.attach() == [1, None, None]
    assert puppet.train(3) == 3
    assert "the embedded agent ended at once with 2" in puppet.said
    assert "agent.log" in puppet.said
    assert puppet.said.count("UNPROTECTED") == 1
    assert "CKPTD_MEMORY_MAX 'lots' is no size" in node.agent_said


def test_an_agent_started_by_a_rank_is_not_its_burden(node: Node) -> None:
    """The embedded agent has a process group of its own: Ctrl-C in the rank's terminal does not reach it."""
    puppet = node.puppet()
    puppet.attach()
    (agent,) = node.agents()
    assert os.getpgid(agent.pid) == agent.pid != os.getpgid(puppet.pid)
    assert puppet.do("import warnings, gc; warnings.simplefilter('error'); gc.collect(); result = run.protected")


# --- an agent that is stopped -------------------------------------------------------------------------------------


def test_a_stopped_agent_does_not_stop_training(node: Node) -> None:
    """With the agent stopped, the step that has to ask it returns at its deadline, and training goes on without it.

    When the agent goes on it takes note, and ends with the rank.
    """
    puppet = node.puppet()
    puppet.do("import ckptd.client.session\nckptd.client.session.CALL_DEADLINE_S = 0.5")
    puppet.attach()
    puppet.train_until(node.manifests, "a commit")
    (agent,) = node.agents()
    announced = "run._words[ckptd.client.run._CAPTURE]"
    until(lambda: puppet.do(f"result = {announced} > run._step and {announced} < 2**63"), "an announcement")
    agent.suspend()
    try:
        begin_s = time.monotonic()
        steps = puppet.do(f"data.extend(bytes(4 << 20))\ntrain({announced} - run._step)\nresult = run._step")
        assert 0.5 <= time.monotonic() - begin_s < 15
        assert puppet.do("result = run.protected") is False
        assert puppet.do("for _ in range(1000): run.step()\nresult = run._step") == steps + 1000
    finally:
        agent.resume()
    assert "did not answer within 0.5 s" in puppet.said
    assert puppet.said.count("UNPROTECTED") == 1
    puppet.do("run.close()")
    puppet.end()
    until(lambda: not node.agents(), "the end of the agent")


def test_an_agent_that_was_stopped_for_a_while(node: Node) -> None:
    """An agent that is stopped while nothing has to be asked of it goes on afterwards as if nothing had been."""
    puppet = node.puppet()
    puppet.attach()
    puppet.train_until(node.manifests, "a commit")
    (agent,) = node.agents()
    agent.suspend()
    try:
        puppet.train(200, 0.001)
    finally:
        agent.resume()
    before = len(node.manifests())
    newest = node.manifests()[-1]
    puppet.train_until(lambda: len(node.manifests()) > before or node.manifests()[-1] > newest, "a further commit")
    assert puppet.do("result = run.protected")


# --- asking and missing -------------------------------------------------------------------------------------------


def test_a_checkpoint_on_request_is_committed_soon(node: Node) -> None:
    """`run.checkpoint()` brings a commit though the next one by itself is an hour away."""
    puppet = node.puppet(CKPTD_EVERY="1h")
    puppet.attach()
    puppet.train(5, 0.01)
    assert not node.manifests()
    puppet.do("run.checkpoint()")
    puppet.train_until(node.manifests, "the commit")


def test_a_missed_step_is_followed_by_another(node: Node) -> None:
    """A rank that is past an announced step says so, and a later step is captured and committed instead."""
    puppet = node.puppet(CKPTD_EVERY="50ms")
    puppet.attach()
    announced = "run._words[ckptd.client.run._CAPTURE]"
    puppet.train(3, 0.01)
    for _ in range(3):
        before = len(node.manifests())
        until(lambda: puppet.do(f"run.step()\nresult = {announced} < 2**63"), "an announcement")
        puppet.do(f"run._step = max(run._step, {announced} + 3)\nrun.step()")
        newest = max(node.manifests(), default=Path())
        puppet.train_until(
            lambda before=before, newest=newest: len(node.manifests()) > before or node.manifests()[-1:] > [newest],
            "a commit after the miss",
        )

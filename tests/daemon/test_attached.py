"""Jobs whose ranks somebody else starts: a real agent, real processes, real sockets and real memory, without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from tests.daemon.bytes_framework import contents
from tests.daemon.harness import AgentThread, Node, PuppetError, train_until, until

SIZE = 50_000


def test_what_every_rank_has_sealed_is_committed(node: Node, agent: AgentThread) -> None:
    """Two ranks capture the same announced step, and the commit holds each one's bytes of exactly that step."""
    puppets = node.attach(2, SIZE)
    for rank, puppet in enumerate(puppets):
        puppet.do(f"run.report(loss={rank}.5, note='text')")
    train_until(puppets, lambda: agent.committed() > 1, "a commit")
    assert agent.status()["state"] == "running"
    newest = node.manifests()[-1]
    manifest = json.loads(newest.read_text())
    assert (manifest["world_size"], manifest["generation"], manifest["parent"]) == (2, 1, None)
    assert manifest["values"] in ({"loss": 0.5}, {"loss": 1.5})
    for rank in range(2):
        assert node.stored(newest, rank) == contents(manifest["step"], SIZE)


def test_ranks_that_leave_wait_for_their_last_commit(node: Node, agent: AgentThread) -> None:
    """Leaving the block captures the last step, and returns only when it is committed; then the job is finished."""
    puppets = node.attach(2, SIZE)
    for puppet in puppets:
        puppet.train(7)
    for puppet in puppets:
        puppet.start("run.close()")
    for puppet in puppets:
        puppet.finish()
    assert json.loads(node.manifests()[-1].read_text())["step"] == 7
    assert [puppet.end() for puppet in puppets] == [0, 0]
    until(lambda: agent.status()["state"] == "finished", "the end of the job")
    assert node.incidents() == []


def test_a_killed_rank_is_evidence(node: Node, agent: AgentThread) -> None:
    """The end of a rank's process is an incident with its rank and cause, though nobody here is its parent."""
    puppets = node.attach(2, SIZE)
    train_until(puppets, lambda: agent.committed(), "a commit")
    puppets[1].kill()
    until(lambda: node.incidents(), "the incident")
    (incident,) = node.incidents()
    assert incident["cause"] in ("rank 1 was killed by SIGKILL", "rank 1 ended while it was training")  # by kernel
    assert (incident["rank"], incident["generation"], incident["closed"]) == (1, 1, False)


def test_the_next_incarnation_restores_from_memory(node: Node, agent: AgentThread) -> None:
    """While the agent lives, new ranks restore the newest snapshot from memory, whole and with digests checked."""
    puppets = node.attach(2, SIZE)
    train_until(puppets, lambda: agent.committed(), "a commit")
    puppets[1].kill()
    puppets[0].kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for new ranks")
    sealed = max(snapshot.id.step for snapshot in agent.job().machine.keeper.book.complete)
    again = [node.puppet(rank, 2) for rank in range(2)]
    for puppet in again:
        puppet.start_attach(SIZE)
    assert [puppet.finish() for puppet in again] == [[2, sealed, "memory"]] * 2
    assert [puppet.data() for puppet in again] == [contents(sealed, SIZE)] * 2
    assert [puppet.train(1) for puppet in again] == [sealed + 1] * 2
    train_until(again, lambda: agent.committed() > sealed, "a commit of the new generation")
    (incident,) = node.incidents()
    assert incident["restored"] == {"generation": 1, "step": sealed, "tier": "memory"}
    assert incident["closed"]


def test_ranks_may_be_back_before_their_end_was_seen(node: Node, agent: AgentThread) -> None:
    """A rank of the next incarnation that comes while an old one still ends waits for it, and disturbs it in no way."""
    old = node.attach(2, SIZE)
    train_until(old, lambda: agent.committed(), "a commit")
    old[1].kill()
    new = [node.puppet(rank, 2) for rank in range(2)]
    for puppet in new:
        puppet.start_attach(SIZE)
    until(lambda: len(agent.job().machine._waiting) == 2, "both of them waiting")
    assert agent.status()["generation"] == 1
    old[0].kill()
    assert [puppet.finish()[0] for puppet in new] == [2, 2]


def test_a_second_start_of_the_same_script_harms_nothing(node: Node, agent: AgentThread) -> None:
    """Starting a training twice by mistake neither stops the checkpoints of the first nor keeps it from ending."""
    first = node.puppet()
    first.attach(SIZE)
    first.train_until(lambda: agent.committed(), "a commit")
    second = node.puppet()
    second.start_attach(SIZE)
    until(lambda: agent.job().machine._waiting, "the second one's arrival")
    before = agent.committed()
    first.train_until(lambda: agent.committed() > before, "a commit beside the second one")
    assert agent.status()["ranks"][0]["pid"] == first.pid
    assert agent.status()["ranks"][0]["state"] == "training"
    first.do("run.close()")
    first.end()
    assert second.finish()[:2] == [2, agent.committed()]


def test_the_slot_of_an_abandoned_snapshot_is_used_again(node: Node, agent: AgentThread) -> None:
    """When one rank can't capture a step, the other's slot is released, and later steps find slots for their commit."""
    puppets = node.attach(2, SIZE)
    train_until(puppets, lambda: agent.committed(), "a commit")

    def abandoned() -> int:
        return agent.call(lambda: agent.job().machine.keeper.counters.abandoned)

    def more(count: Callable[[], int]) -> Callable[[], bool]:
        before = count()
        return lambda: count() > before

    for _ in range(3):  # more often than there are slots
        puppets[1].do("def fail(): raise ckptd.CkptdError('no')\nFAULTS['write'] = fail")
        train_until(puppets, more(abandoned), "an abandoned snapshot")
        puppets[1].do("FAULTS.clear()")
        train_until(puppets, more(agent.committed), "a commit after it")
    assert any("rank 1: no" in event["reason"] for event in agent.events("snapshot abandoned"))
    assert puppets[1].do("result = run.protected")


def test_any_fault_of_a_capture_reaches_the_agent(node: Node, agent: AgentThread) -> None:
    """A state_dict that raises something of its own costs that checkpoint, and not all that come after it."""
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(lambda: agent.committed(), "a commit")
    for where in ("prepare", "write"):
        puppet.do(f"def fail(): raise ZeroDivisionError('by the user')\nFAULTS[{where!r}] = fail")
        faults = puppet.said.count("a capture failed")
        puppet.train_until(lambda faults=faults: puppet.said.count("a capture failed") > faults, "the fault")
        puppet.do("FAULTS.clear()")
        before = agent.committed()
        puppet.train_until(lambda before=before: agent.committed() > before, "a commit after it")
    reasons = [event["reason"] for event in agent.events("snapshot abandoned")]
    assert any("ZeroDivisionError: by the user" in reason for reason in reasons)


def test_a_state_that_grows_gets_larger_slots(node: Node, agent: AgentThread) -> None:
    """When the state outgrows its slots, larger ones replace them while training goes on, and the commit is whole."""
    puppet = node.puppet()
    puppet.attach(1000)
    puppet.train_until(lambda: agent.committed(), "a commit")
    size = 1_500_000
    puppet.do(f"data.extend(bytes({size} - len(data)))")
    before = puppet.train(0)  # a snapshot of the small state may still be on its way
    puppet.train_until(lambda: agent.committed() > before, "a commit of the grown state")
    newest = node.manifests()[-1]
    step = json.loads(newest.read_text())["step"]
    assert node.stored(newest) == contents(step, size)
    until(lambda: len(agent.job()._arena.slots(0)) <= 3, "the end of the small slots")
    puppet.kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for a new rank")
    again = node.puppet()
    generation, restored, tier = again.attach(size)
    assert (generation, tier) == (2, "memory")
    assert again.data() == contents(restored, size)


def test_slots_that_do_not_fit_are_refused_at_attach(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """A state too large for memory_max is refused in the rank with the bytes, and ends the job as failed."""
    agent = start_agent(memory_max_bytes=8 * 2**20)
    puppet = node.puppet()
    with pytest.raises(PuppetError, match=r"\(20971520 bytes\)") as refused:
        puppet.attach(10_000_000)
    assert refused.value.code == "memory"
    until(lambda: agent.status()["state"] == "failed", "the end of the job")
    assert not agent.job()._arena.slots(0)


@pytest.mark.parametrize(
    ("end", "kind", "cause", "traceback"),
    [
        ("raise ValueError('no good')", "exception", "rank 0 raised ValueError: no good", "ValueError: no good"),
        ("raise SystemExit(3)", "exit", "rank 0 ended with exit code 3", None),
    ],
)
def test_what_a_rank_ends_with_is_the_incident(
    node: Node, agent: AgentThread, end: str, kind: str, cause: str, traceback: str | None
) -> None:
    """An exception or a failing exit code that leaves the block is the cause, for ranks of any launcher, whatever
    ends the process then."""
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(lambda: agent.committed(), "a commit")
    puppet.start(f"try:\n    with run:\n        {end}\nfinally:\n    os.kill(os.getpid(), 9)")
    until(lambda: node.incidents(), "the incident")
    (incident,) = node.incidents()
    assert (incident["kind"], incident["cause"]) == (kind, cause)
    told = incident["exception"]
    assert (told and told["traceback"].splitlines()[-1]) == traceback


def test_a_fresh_agent_restores_from_disk(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """When the agent has gone too, the next one restores the newest commit from disk, and numbers generations on."""
    agent = start_agent()
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(lambda: agent.committed(), "a commit")
    step = agent.committed()
    puppet.kill()
    agent.close()
    newest = json.loads(node.manifests()[-1].read_text())["step"]
    assert newest >= step
    start_agent()
    again = node.puppet()
    assert again.attach(SIZE) == [2, newest, "local"]
    assert again.data() == contents(newest, SIZE)


def test_a_stopping_agent_lets_attached_ranks_go(node: Node, agent: AgentThread) -> None:
    """An agent that is told to stop ends though ranks of another launcher train on, which it must not kill."""
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(lambda: agent.committed(), "a commit")
    agent.close()
    assert puppet.process.poll() is None
    assert puppet.train(10) > 0
    assert not node.socket.exists()


def test_a_rank_that_dies_before_its_admission_leaves_nothing_behind(
    node: Node, start_agent: Callable[..., AgentThread]
) -> None:
    """A rank killed while the store is still read for it leaves an idle agent, which an embedded one can end as."""
    agent = start_agent()
    read = agent.agent.plugins.open_tier

    def slow(url: str, options: object) -> object:
        tier = read(url)
        listing = tier.list

        def wait(prefix: str) -> object:
            time.sleep(1.0)
            return listing(prefix)

        tier.list = wait  # type: ignore[method-assign]
        return tier

    agent.agent.plugins.open_tier = slow  # type: ignore[method-assign,assignment]
    puppet = node.puppet()
    puppet.start_attach(SIZE)
    until(lambda: agent.status()["state"] == "preparing", "its arrival")
    puppet.kill()
    until(lambda: agent.call(lambda: agent.agent.idle), "an idle agent")

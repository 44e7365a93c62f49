"""A job whose store is slow or broken, or whose rank goes silent: nothing is lost, nothing hangs, nothing leaks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ckptd.errors import StoreError
from ckptd.storage.local import LocalTier
from tests.daemon.bytes_framework import contents
from tests.daemon.harness import PATIENCE_S, AgentThread, Node, PuppetError, until

SIZE = 50_000


def test_a_store_that_fails_for_a_while(node: Node, agent: AgentThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store fails, training goes on and the newest snapshot stays in memory; it is committed afterwards."""
    put, broken = LocalTier.put, threading.Event()

    def fail(self: LocalTier, key: str, data: Any, **options: Any) -> None:
        if broken.is_set() and key.endswith(".safetensors"):
            raise StoreError("the disk is full")
        put(self, key, data, **options)

    monkeypatch.setattr(LocalTier, "put", fail)
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(agent.committed, "a commit")
    broken.set()
    puppet.train_until(lambda: len(agent.events("flush failed")) >= 2, "failed flushes")
    before = agent.committed()
    assert agent.call(lambda: agent.job().machine.keeper.pending)
    assert puppet.do("result = run.protected")
    broken.clear()
    until(lambda: agent.committed() > before, "the commit of what was in memory, though no step is done any more")
    step = json.loads(node.manifests()[-1].read_text())["step"]
    puppet.kill()
    again = node.puppet()
    _, restored, tier = again.attach(SIZE)
    assert (restored, tier) == (max(step, restored), "memory")
    assert again.data() == contents(restored, SIZE)


def test_a_stop_while_a_checkpoint_is_looked_at(
    node: Node, start_agent: Callable[..., AgentThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is stopped while a checkpoint is looked at for it ends at once, and its agent once that is done."""
    first = start_agent()
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(first.committed, "a commit")
    puppet.kill()
    first.close()
    size, begun, go_on = LocalTier.size_bytes, threading.Event(), threading.Event()

    def slow(self: LocalTier, key: str) -> int:
        begun.set()
        go_on.wait(PATIENCE_S)
        return size(self, key)

    monkeypatch.setattr(LocalTier, "size_bytes", slow)
    second = start_agent()
    waiting = node.puppet()
    waiting.start_attach(SIZE)
    assert begun.wait(PATIENCE_S)
    second.call(lambda: second.job().stop(0.0, checkpoint=False))
    until(lambda: second.job().ended.done(), "the end of the job")
    assert waiting.finish() == [1, None, None]
    assert "UNPROTECTED" in waiting.said
    go_on.set()
    second.close()


def test_a_damaged_checkpoint_is_passed_over(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """A checkpoint of which a file is cut short is not offered, and the one before it is."""
    first = start_agent()
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(lambda: len(node.manifests()) >= 2, "two commits")
    puppet.kill()
    first.close()
    older, newest = node.manifests()[-2:]
    shard = newest.parent / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4096])
    second = start_agent()
    again = node.puppet()
    step = json.loads(older.read_text())["step"]
    assert again.attach(SIZE) == [2, step, "local"]
    assert again.data() == contents(step, SIZE)
    assert [event["step"] for event in second.events("checkpoint damaged")] == [int(newest.parent.name[1:])]


def test_checkpoints_of_which_none_is_whole(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """When every checkpoint is damaged the rank is not started afresh behind the user's back: the job fails."""
    first = start_agent()
    puppet = node.puppet()
    puppet.attach(SIZE)
    puppet.train_until(first.committed, "a commit")
    puppet.kill()
    first.close()
    for shard in node.store.rglob("*.safetensors"):
        shard.write_bytes(b"")
    second = start_agent()
    again = node.puppet()
    with pytest.raises(PuppetError) as refused:
        again.attach(SIZE)
    assert refused.value.code == "damaged"
    until(lambda: second.status()["state"] == "failed", "the end of the job")


def test_a_rank_that_goes_silent_is_noticed(node: Node, agent: AgentThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that trains on without the agent is logged by number, and keeps the others from nothing but captures."""
    monkeypatch.setattr("ckptd.daemon.attendance._DISCONNECT_GRACE_S", 0.1)
    puppets = [node.puppet(rank, 2) for rank in range(2)]
    for puppet in puppets:
        puppet.start_attach(SIZE)
    for puppet in puppets:
        puppet.finish()
        puppet.train(2)
    puppets[1].do("run._guard.trip('a test says so')")
    until(lambda: agent.events("rank disconnected"), "the line in the log")
    assert agent.events("rank disconnected")[0]["rank"] == 1
    assert [puppet.train(5) for puppet in puppets] == [7, 7]
    puppets[0].do("run.close()")
    assert "failed" not in puppets[0].said

"""What ranks are offered to begin with, and how they get at it: slots of all ranks, files, of any world size."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.core.events import Flush
from ckptd.daemon.job_store import JobStore
from ckptd.errors import AgentError, CkptdError, NotFoundError, ProtocolError
from ckptd.protocol import messages as m
from ckptd.storage import manifest
from ckptd.storage.local import LocalTier
from ckptd.store_config import StoreConfig
from ckptd.types import CheckpointId
from tests.daemon.bytes_framework import contents
from tests.daemon.harness import (
    PATIENCE_S,
    AgentThread,
    Node,
    Puppet,
    PuppetError,
    mapped_regions,
    open_descriptors,
    train_until,
    until,
)
from tests.daemon.speaker import Speaker

SIZE = 50_000
DIFFER = "data[0] ^= 255"


def end(agent: AgentThread, puppets: list[Puppet]) -> None:
    """Kill all ranks, and wait until the job would take in others."""
    for puppet in puppets:
        puppet.kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for new ranks")


def newest_in_memory(agent: AgentThread) -> int:
    """Return the step of the newest snapshot in memory."""
    return agent.call(lambda: agent.job().machine.keeper.book.newest.id.step)


@pytest.fixture
def offered(node: Node, agent: AgentThread, speaker: Speaker) -> Speaker:
    """A rank that was let in with an offer from memory, and has asked for nothing yet."""
    (puppet,) = node.attach(1, SIZE)
    train_until([puppet], agent.committed, "a commit")
    end(agent, [puppet])
    answer = speaker.join()
    assert isinstance(answer, m.Admitted)
    assert answer.offer == {"generation": 1, "step": newest_in_memory(agent), "tier": "memory", "in_memory": True}
    return speaker


def files(speaker: Speaker) -> list[str]:
    """Return the files that the offered manifest names."""
    return sorted(manifest.read(speaker.document, "that is offered").files)


# --- opening ------------------------------------------------------------------------------------------------------


def test_a_slot_is_lent_to_read_only(offered: Speaker) -> None:
    """The files of a snapshot are slots that whoever restores can't write, each with a position of its own."""
    (file,) = files(offered)
    assert offered.ask(m.Open([file, file])) == m.Opened([file, file])
    first, second = offered.channel.take_descriptors(2)
    assert os.read(first, 8) == os.read(second, 8)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        os.write(first, b"x")
    assert caught.value.errno == errno.EBADF
    os.close(first)
    os.close(second)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["generation.json"], NotFoundError),
        (["../job/g000001/generation.json"], NotFoundError),
        (["/etc/passwd"], NotFoundError),
        (["g000001/s000000000001/rank-00007.safetensors"], NotFoundError),
        (["x"] * 65, ProtocolError),
    ],
)
def test_what_is_not_offered_can_not_be_opened(offered: Speaker, names: list[str], error: type[CkptdError]) -> None:
    """Only files that the offered manifest names are lent, at most 64 at once; the rank goes on asking after that."""
    with pytest.raises(error):
        offered.ask(m.Open(names))
    assert isinstance(offered.ask(m.Open(files(offered))), m.Opened)
    for descriptor in offered.channel.take_descriptors(1):
        os.close(descriptor)


def test_an_offer_ends_with_the_last_restore(offered: Speaker, agent: AgentThread) -> None:
    """When every rank has restored, the agent holds nothing of the offer any more, and lends no more files."""
    (file,) = files(offered)
    before = agent.call(open_descriptors)
    checkpoint = agent.call(lambda: agent.job().machine.generation.offer.id)
    offered.channel.send(m.Restored(*checkpoint, 0.1), 10.0)
    with pytest.raises(AgentError, match="not offered anything any more"):
        offered.ask(m.Open([file]))
    until(lambda: open_descriptors() < before, "the closing of manifest and slots")


def test_who_is_not_offered_anything_opens_nothing(speaker: Speaker) -> None:
    """A rank that began afresh is refused with the reason."""
    admitted = speaker.join()
    assert (admitted.generation, admitted.offer) == (1, None)
    with pytest.raises(AgentError, match="not offered anything"):
        speaker.ask(m.Open(["g000001/s000000000001/rank-00000.safetensors"]))


def test_every_rank_reads_the_slots_of_all(node: Node, agent: AgentThread) -> None:
    """A snapshot of two ranks is offered with the slots of both, and no slot is copied for it."""
    puppets = node.attach(2, SIZE)
    train_until(puppets, agent.committed, "a commit")
    end(agent, puppets)
    regions = mapped_regions()
    again = [Speaker(node), node.puppet(1, 2)]
    speaker, puppet = again[0], again[1]
    puppet.start_attach(SIZE)
    answer = speaker.ask(m.Join("job", 0, 2, 0, {}))
    assert isinstance(answer, m.Admitted)
    page, document = speaker.channel.take_descriptors(2)
    read = manifest.parse(os.pread(document, 2**20, 0), "that is offered")
    assert speaker.ask(m.Open([shard.file for shard in read.shards]))
    slots = speaker.channel.take_descriptors(2)
    step = read.id.step
    for chunk in read.tensors["data"].chunks:
        assert os.pread(slots[chunk.shard], chunk.end - chunk.begin, chunk.begin) == contents(step, SIZE)
    assert puppet.finish() == [2, step, "memory"]
    assert mapped_regions() <= regions + 2  # the pages
    for descriptor in (page, document, *slots):
        os.close(descriptor)
    speaker.close()


def test_a_snapshot_that_was_not_flushed_is_offered(
    node: Node, agent: AgentThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot whose flush has not ended has a manifest without digests, made once for all ranks."""
    put, flushes, go_on = LocalTier.put, threading.Event(), threading.Event()

    def slow(tier: LocalTier, key: str, data: Any, **options: Any) -> None:
        if key.endswith(".safetensors"):
            flushes.set()
            go_on.wait(PATIENCE_S)
        put(tier, key, data, **options)

    monkeypatch.setattr(LocalTier, "put", slow)
    puppets = node.attach(2, SIZE)
    train_until(puppets, flushes.is_set, "a flush")
    step = newest_in_memory(agent)
    end(agent, puppets)
    described: list[CheckpointId] = []
    describe = JobStore.snapshot_document

    def counted(store: JobStore, order: Flush, images: Mapping[int, memoryview]) -> bytes:
        described.append(order.id)
        return describe(store, order, images)

    monkeypatch.setattr(JobStore, "snapshot_document", counted)
    again = node.attach(2, SIZE)
    assert [puppet.do("result = [run.restored.step, run.restored.tier]") for puppet in again] == [[step, "memory"]] * 2
    assert [puppet.data() for puppet in again] == [contents(step, SIZE)] * 2
    assert described == [CheckpointId(1, step)]
    go_on.set()
    train_until(again, lambda: agent.committed() > step, "a commit of the new generation")


# --- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Flip one byte of a tensor in a shard's file."""
    data = bytearray(path.read_bytes())
    data[4096 + 20_000] ^= 1
    path.write_bytes(data)


def test_damage_in_memory_costs_the_copy_and_no_step(node: Node, agent: AgentThread) -> None:
    """A rank that finds a slot damaged is refused by digest, and the next one gets the same step from the disk."""
    (puppet,) = node.attach(1, SIZE)
    train_until([puppet], agent.committed, "a commit")
    end(agent, [puppet])
    until(lambda: not agent.call(lambda: agent.job().machine.keeper.pending), "the last commit")
    newest = agent.call(lambda: agent.job().machine.keeper.book.newest)
    slot = agent.job()._arena.slots(0)[newest.slots[0]]
    slot.view[4096 + 20_000] ^= 1
    with pytest.raises(PuppetError, match="is not what was captured") as caught:
        node.puppet().attach(SIZE)
    assert caught.value.code == "damaged"
    node.puppets[-1].kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for another try")
    again = node.puppet()
    assert again.attach(SIZE) == [3, newest.id.step, "local"]
    assert again.data() == contents(newest.id.step, SIZE)
    (failed,) = agent.events("restore failed")
    assert (failed["tier"], failed["step"], failed["rank"]) == ("memory", newest.id.step, 0)
    assert "tensor 'data'" in failed["error"]


def test_damage_on_the_disk_is_found_by_who_reads_it(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """A flipped byte passes the look at sizes, is refused by the rank, and the next try begins with the one before."""
    first = start_agent()
    puppets = node.attach(1, SIZE)
    train_until(puppets, lambda: len(node.manifests()) >= 2, "two commits")
    puppets[0].kill()
    first.close()
    older, newest = node.manifests()[-2:]
    flip(newest.parent / "rank-00000.safetensors")
    second = start_agent()
    with pytest.raises(PuppetError, match="is not what was captured"):
        node.puppet().attach(SIZE)
    node.puppets[-1].kill()
    until(lambda: second.status()["state"] == "pending", "readiness for another try")
    step = json.loads(older.read_text())["step"]
    again = node.puppet()
    assert again.attach(SIZE) == [3, step, "local"]
    assert again.data() == contents(step, SIZE)


def test_a_file_that_vanishes_after_the_look_is_damage(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """A file that is gone when the rank opens it costs that copy, as any other damage does."""
    first = start_agent()
    puppets = node.attach(1, SIZE)
    train_until(puppets, lambda: len(node.manifests()) >= 2, "two commits")
    puppets[0].kill()
    first.close()
    newest = node.manifests()[-1]
    start_agent()
    speaker = Speaker(node)
    answer = speaker.join()
    assert isinstance(answer, m.Admitted)
    (newest.parent / "rank-00000.safetensors").unlink()
    with pytest.raises(CkptdError, match="is gone") as caught:
        speaker.ask(m.Open(files(speaker)))
    assert caught.value.code == "damaged"
    speaker.close()


def test_slots_that_hold_no_image_are_damage(node: Node, agent: AgentThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of which no manifest can be made is refused before a rank reads it, and the disk's copy is next."""
    (puppet,) = node.attach(1, SIZE)
    train_until([puppet], agent.committed, "a commit")
    end(agent, [puppet])
    until(lambda: not agent.call(lambda: agent.job().machine.keeper.pending), "the last commit")
    newest: CheckpointId = agent.call(lambda: agent.job().machine.keeper.book.newest.id)
    monkeypatch.setattr(agent.job()._checkpoints, "_documents", {})
    snapshot = agent.call(lambda: agent.job().machine.keeper.book.newest)
    agent.job()._arena.slots(0)[snapshot.slots[0]].view[8:100] = bytes(92)
    with pytest.raises(PuppetError, match="can't be offered"):
        node.puppet().attach(SIZE)
    node.puppets[-1].kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for another try")
    assert node.puppet().attach(SIZE) == [3, newest.step, "local"]


def test_slots_are_there_before_ranks_ask(node: Node, start_agent: Callable[..., AgentThread]) -> None:
    """Of a checkpoint on the disk the agent knows how large slots will have to be, and clears them ahead, once."""
    first = start_agent()
    puppets = node.attach(1, SIZE)
    train_until(puppets, first.committed, "a commit")
    puppets[0].kill()
    first.close()
    second = start_agent()
    speaker = Speaker(node)
    assert isinstance(speaker.join(), m.Admitted)
    until(lambda: len(second.job()._arena.slots(0)) == 2, "slots for who has not asked")
    lent = speaker.ask(m.Reserve(SIZE))
    assert isinstance(lent, m.Lent)
    assert len(lent.slots) == len(second.job()._arena.slots(0)) == 2
    speaker.close()


# --- world sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_another_world_size(node: Node, start_agent: Callable[..., AgentThread], before: int, after: int) -> None:
    """A checkpoint of more or fewer ranks is restored by those there are now, and the log says of how many it is."""
    first = start_agent()
    puppets = node.attach(before, SIZE)
    train_until(puppets, first.committed, "a commit")
    for puppet in puppets:
        puppet.kill()
    first.close()
    step = json.loads(node.manifests()[-1].read_text())["step"]
    second = start_agent()
    again = node.attach(after, SIZE)
    assert [puppet.do("result = run.restored.step") for puppet in again] == [step] * after
    assert [puppet.data() for puppet in again] == [contents(step, SIZE)] * after
    (started,) = second.events("generation started")
    assert started["restore_world_size"] == before
    train_until(again, lambda: second.committed() > step, "a commit of the new world size")
    assert json.loads(node.manifests()[-1].read_text())["world_size"] == after


# --- replicas -----------------------------------------------------------------------------------------------------


def test_replicas_that_differ_are_captured_whole(node: Node, agent: AgentThread) -> None:
    """Differing replicas are named in the log, none of their snapshots is kept, and the next are captured whole."""
    puppets = node.attach(2, SIZE, replicated=("data",))
    train_until(puppets, agent.committed, "a commit")
    before = agent.committed()
    puppets[1].do(f"def train(steps, pause=0.0):\n    {DIFFER}\n    run.step()")
    train_until(puppets, lambda: agent.events("replicas differ"), "the comparison")
    (differ,) = agent.events("replicas differ")
    assert (differ["tensor"], differ["ranks"], differ["level"]) == ("data", [1], "error")
    train_until(puppets, lambda: agent.committed() > differ["step"], "a commit of whole captures")
    assert before < differ["step"]
    steps = [json.loads(path.read_text())["step"] for path in node.manifests()]
    assert differ["step"] not in steps
    end(agent, puppets)
    again = node.attach(2, SIZE, replicated=("data",))
    assert [puppet.do("result = int(run._session.page.words[3])") for puppet in again] == [1, 1]
    assert again[0].data() != again[1].data()


# --- one slot per rank --------------------------------------------------------------------------------------------


@pytest.fixture
def single(node: Node, agent: AgentThread) -> JobConfig:
    """A job whose rank gets one slot."""
    config = JobConfig("job", (), (StoreConfig(str(node.store)),), every_s=0.1, slots=1)
    agent.call(agent.agent.submit, config)
    return config


def test_a_single_slot_is_used_again_and_again(node: Node, agent: AgentThread, single: JobConfig) -> None:
    """With one slot per rank the log warns of it, captures follow one another, and memory or disk has the last one."""
    (warned,) = agent.events("one slot per rank")
    assert warned["level"] == "warning"
    (puppet,) = node.attach(1, SIZE)
    train_until([puppet], lambda: len(agent.events("checkpoint committed")) >= 4, "four commits")
    assert len(agent.job()._arena.slots(0)) == 1
    puppet.kill()
    until(lambda: agent.status()["state"] == "pending", "readiness for a new rank")
    until(lambda: not agent.call(lambda: agent.job().machine.keeper.pending), "the last commit")
    again = node.puppet()
    _, restored, tier = again.attach(SIZE)
    assert restored == agent.committed()
    assert tier in ("memory", "local")
    assert again.data() == contents(restored, SIZE)


def test_the_last_step_gets_the_single_slot(node: Node, agent: AgentThread, single: JobConfig) -> None:
    """A rank that ends with its only slot taken gets it for its last step, which is committed before it is let go."""
    (puppet,) = node.attach(1, SIZE)
    train_until([puppet], agent.committed, "a commit")
    last = puppet.train(1)
    puppet.do("run.close()")
    assert json.loads(node.manifests()[-1].read_text())["step"] == last

"""The storage threads of a model agent: each a task that touches the disk step by step, and dies with the agent.

They keep the promises of `ckptd.daemon.storage_work`: shards first and the manifest last, a prune takes the manifest
first, and an answer is given only when nothing reads or writes a slot any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core import lineage
from ckptd.core.restore import Source
from ckptd.errors import DamagedError, StoreError
from tests.simulation.clock import Steps
from tests.simulation.disk import Manifest
from tests.simulation.memory import PARTS, Cell, Content, Slot

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent

TIER = "local"


def read_store(agent: ModelAgent) -> Steps:
    """Look what the disk holds, as `storage_work.read_store` does."""
    yield agent.node.options.write_s * agent.node.rng.random()
    disk = agent.node.disk
    line = lineage.candidates(disk.parents, disk.manifests)
    sources = tuple(Source(checkpoint, TIER) for checkpoint in line)
    agent.feed(e.StoreRead(sources, lineage.latest_generation(disk.parents, disk.manifests)))


def claim(agent: ModelAgent, order: e.Claim) -> Steps:
    """Take the next generation number and record it on the disk."""
    disk = agent.node.disk
    yield agent.node.rng.uniform(0, 0.05)
    number = max(order.at_least, disk.generation_counter + 1)
    disk.generation_counter = number
    yield agent.node.rng.uniform(0, 0.05)
    agent.node.witness.generation_claimed(number, order.parent)
    disk.parents[number] = order.parent
    yield agent.node.rng.uniform(0, 0.05)
    agent.feed(e.Claimed(number))


def flush(agent: ModelAgent, order: e.Flush) -> Steps:
    """Write every shard, each at its own pace, then the manifest."""
    node = agent.node
    reading = [agent.arena.slots[rank][number] for rank, number in order.slots.items()]
    node.witness.flush_begins(order, reading)
    tasks = [node.clock.start(agent, "flush", _flush_shard(agent, order, slot)) for slot in reading]
    digests: dict[int, Content] = {}
    failed = False
    for slot, task in zip(reading, tasks, strict=True):
        digest = yield task.done
        failed = failed or digest is None
        digests[slot.rank] = digest
    if not failed:
        yield node.options.write_s * node.rng.random()
        failed = node.write_fails() or not node.disk.put_manifest(Manifest(order.id, digests))
    node.witness.flush_ends(order, committed=not failed)
    yield node.rng.uniform(0, 0.02)
    if failed:
        agent.feed(e.FlushFailed(order.id, StoreError("the disk is full")))
    else:
        agent.feed(e.Committed(order.id, TIER, 1, 0.0))


def _flush_shard(agent: ModelAgent, order: e.Flush, slot: Slot) -> Steps:
    """Digest a shard, then write it; both read the slot part by part. Returns the digest, None when it failed."""
    node, rank = agent.node, slot.rank
    digest: list[Cell | None] = []
    for part in range(PARTS):
        yield node.options.write_s * node.rng.uniform(0, 0.2)
        digest.append(slot.cells[part])
    written: list[Cell | None] = [None] * PARTS
    for part in range(PARTS):
        yield node.options.write_s * node.rng.choice((0.1, 0.3, 0.3, 1.0)) * node.rng.random()
        if node.write_fails():
            return None
        written[part] = slot.cells[part]
        node.disk.put_shard(order.id, rank, tuple(written))  # torn, if the agent dies now
    return tuple(digest)


def fetch(agent: ModelAgent, source: Source) -> Steps:
    """Bring a checkpoint into slots that hold nothing, and compare it with its manifest."""
    node = agent.node
    yield node.rng.uniform(0, 0.05)
    manifest = node.disk.manifests.get(source.id)
    if manifest is None:
        agent.feed(e.FetchFailed(source, DamagedError(f"{source.id} has no manifest")))
        return
    slots: dict[int, Slot] = {}
    for rank in manifest.digests:
        slots[rank] = agent.free_slot(rank, 2 if node.options.state_grows else 1)
        yield node.rng.uniform(0, 0.02)
    damaged = False
    for rank, slot in slots.items():
        for part in range(PARTS):
            yield node.options.restore_part_s
            cell = node.disk.shards.get((source.id, rank), (None,) * PARTS)[part]
            node.witness.slot_written(slot, f"a fetch of {source.id}")
            slot.write(part, cell)
            damaged = damaged or cell is None or cell != manifest.digests[rank][part]
    if damaged:
        agent.feed(e.FetchFailed(source, DamagedError(f"{source.id} is not what was committed")))
        return
    sizes = dict.fromkeys(slots, 1)
    agent.feed(e.Fetched(source, {rank: slot.number for rank, slot in slots.items()}, sizes))


def prune(agent: ModelAgent, order: e.Prune) -> Steps:
    """Remove checkpoints, the manifest of each before its shards."""
    node = agent.node
    for checkpoint in order.ids:
        yield node.rng.uniform(0, 0.05)
        node.witness.checkpoint_leaves(checkpoint)
        node.disk.delete_manifest(checkpoint)
        for rank in range(node.options.world_size):
            yield node.rng.uniform(0, 0.01)
            node.disk.delete_shard(checkpoint, rank)

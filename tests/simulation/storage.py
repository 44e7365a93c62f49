"""The storage threads of a model agent: each a task that touches the disk step by step, and dies with the agent.

They keep the promises of `ckptd.daemon.job_store`: shards first and the manifest last, a prune takes the manifest
first and leaves what others refer to, and an answer is given only when nothing reads or writes a slot any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core import lineage
from ckptd.core.restore import Source
from ckptd.errors import DamagedError, StoreError
from tests.simulation.clock import Steps
from tests.simulation.disk import Manifest
from tests.simulation.memory import PARTS, Cell, Slot

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent

TIER = "local"


def read_store(agent: ModelAgent) -> Steps:
    """Look what the disk holds, as `JobStore.read` does."""
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
    tasks = [node.clock.start(agent, "flush", _flush_shard(agent, order, slot, agent.earlier)) for slot in reading]
    manifest = Manifest(order.id, {}, {})
    failed = False
    for slot, task in zip(reading, tasks, strict=True):
        written = yield task.done
        failed = failed or written is None
        if written is not None:
            manifest.digests[slot.rank], manifest.places[slot.rank] = written
    if not failed:
        yield node.options.write_s * node.rng.random()
        failed = node.write_fails() or not node.disk.put_manifest(manifest)
    if not failed:
        agent.earlier = manifest
        agent.known_files[order.id] = manifest.files
    node.witness.flush_ends(order, committed=not failed)
    yield node.rng.uniform(0, 0.02)
    if failed:
        agent.feed(e.FlushFailed(order.id, StoreError("the disk is full")))
    else:
        agent.feed(e.Committed(order.id, TIER, 1, 0.0))


def _flush_shard(agent: ModelAgent, order: e.Flush, slot: Slot, earlier: Manifest | None) -> Steps:
    """Digest a shard, then write what has changed; both read the slot part by part.

    Returns the digest and where each part lies, None when a write has failed.
    """
    node, rank = agent.node, slot.rank
    digest: list[Cell | None] = []
    for part in range(PARTS):
        yield node.options.write_s * node.rng.uniform(0, 0.2)
        digest.append(slot.cells[part])
    places = [order.id] * PARTS
    if node.options.reuse and earlier is not None and rank in earlier.digests:
        pairs = zip(digest, earlier.digests[rank], earlier.places[rank], strict=True)
        places = [place if new == old else order.id for new, old, place in pairs]
    written: list[Cell | None] = [None] * PARTS
    node.disk.put_file((order.id, rank), tuple(written))
    for part in range(PARTS):
        if places[part] != order.id:
            node.witness.seen["referred to"] += 1
            continue
        yield node.options.write_s * node.rng.choice((0.1, 0.3, 0.3, 1.0)) * node.rng.random()
        if node.write_fails():
            return None
        written[part] = slot.cells[part]
        node.disk.put_file((order.id, rank), tuple(written))  # torn, if the agent dies now
    return tuple(digest), tuple(places)


def check(agent: ModelAgent, source: Source) -> Steps:
    """See whether a checkpoint can be offered: its manifest is there, and so are its files, by their sizes."""
    node = agent.node
    yield node.rng.uniform(0, 0.05)
    manifest = node.disk.manifests.get(source.id)
    yield node.rng.uniform(0, 0.02)
    if manifest is None:
        agent.feed(e.FetchFailed(source, DamagedError(f"{source.id} has no manifest")))
    elif source.id in node.disk.cut or not manifest.files <= node.disk.files.keys():
        agent.feed(e.FetchFailed(source, DamagedError(f"{source.id} lacks bytes")))
    else:
        agent.earlier = manifest
        agent.known_files[source.id] = manifest.files
        agent.feed(e.Fetched(source, len(manifest.digests)))


def prune(agent: ModelAgent, order: e.Prune) -> Steps:
    """Remove checkpoints, the manifest of each before its files, but for files that a remaining one needs.

    Those are of `order.kept`, and of whatever this agent has committed or looked at: another prune may be under way.
    """
    node = agent.node
    for checkpoint in order.ids:
        yield node.rng.uniform(0, 0.05)
        node.witness.checkpoint_leaves(checkpoint)
        node.disk.delete_manifest(checkpoint)
        agent.left_over.add(checkpoint)
        agent.known_files.pop(checkpoint, None)
    kept = {kept: node.disk.manifests[kept].files for kept in order.kept if kept in node.disk.manifests}
    for file in sorted(node.disk.files):
        yield node.rng.uniform(0, 0.01) if file[0] in agent.left_over else 0.0
        if file[0] in agent.left_over and not any(file in files for files in (kept | agent.known_files).values()):
            node.disk.delete_file(file)

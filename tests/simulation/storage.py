"""The storage threads of a model agent: each a task that touches the disk step by step, and dies with the agent.

They keep the promises of `ckptd.daemon.job_store`: shards first and the manifest last, a prune takes the manifest
first and leaves what others refer to, and an answer is given only when nothing reads or writes a slot any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core import lineage
from ckptd.core.restore import Source
from ckptd.errors import CkptdError, DamagedError, StoreError
from ckptd.types import CheckpointId, Held
from tests.simulation.clock import Steps
from tests.simulation.disk import Disk, File, Manifest
from tests.simulation.memory import PARTS, Cell, Slot

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent

TIER = "local"
BUCKET = "bucket"


@dataclass(slots=True)
class Shelf:
    """What an agent knows of the files on one tier."""

    known_files: dict[CheckpointId, set[File]] = field(default_factory=dict)
    """What checkpoints need that this agent has committed or looked at, or that are on their way."""
    left_over: set[CheckpointId] = field(default_factory=set)
    """Checkpoints that were pruned; others may still need files of theirs."""
    prunes: int = 0
    """How many are under way."""


def read_store(agent: ModelAgent) -> Steps:
    """Look what the disk holds, as `JobStore.read` does."""
    node = agent.node
    yield node.options.write_s * node.rng.random()
    places: dict[str, Disk] = {TIER: node.disk}
    unread: dict[str, CkptdError] = {}
    if node.options.bucket:
        if node.options.bucket_read_s:
            yield node.options.bucket_read_s * node.bucket.rng.random()
        if node.bucket.down:
            unread[BUCKET] = StoreError("connection refused")
        else:
            places[BUCKET] = node.bucket
    parents = {number: parent for place in places.values() for number, parent in place.parents.items()}
    committed = {checkpoint for place in places.values() for checkpoint in place.manifests}
    line = lineage.candidates(parents, committed)
    sources = [Source(item, tier) for item in line for tier, place in places.items() if item in place.manifests]
    held = {tier: tuple(Held(item) for item in place.manifests) for tier, place in places.items()}
    agent.feed(e.StoreRead(tuple(sources), lineage.latest_generation(parents, committed), held, unread))


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
        agent.shelves[TIER].known_files[order.id] = manifest.files
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
        agent.shelves[TIER].known_files[source.id] = manifest.files
        agent.feed(e.Fetched(source, len(manifest.digests)))


def prune(agent: ModelAgent, order: e.Prune) -> Steps:
    """Remove checkpoints, the manifest of each before its files, but for files that a remaining one needs.

    Those are of `order.kept`, and of whatever this agent has committed or looked at: another prune may be under way.
    """
    node, place, shelf = agent.node, agent.node.place(order.tier), agent.shelves[order.tier]
    rng = node.bucket.rng if order.tier == BUCKET else node.rng
    shelf.prunes += 1
    for checkpoint in order.ids:
        yield rng.uniform(0, 0.05)
        if order.tier == BUCKET and node.bucket.down and checkpoint in place.manifests:
            shelf.known_files[checkpoint] = place.manifests[checkpoint].files  # it stays, whole
            continue
        node.witness.checkpoint_leaves(checkpoint, order.tier)
        place.delete_manifest(checkpoint)
        shelf.left_over.add(checkpoint)
        shelf.known_files.pop(checkpoint, None)
    kept = {kept: place.manifests[kept].files for kept in order.kept if kept in place.manifests}
    for file in sorted(place.files):
        yield rng.uniform(0, 0.01) if file[0] in shelf.left_over else 0.0
        if file[0] in shelf.left_over and not any(file in files for files in (kept | shelf.known_files).values()):
            place.delete_file(file)
    shelf.prunes -= 1

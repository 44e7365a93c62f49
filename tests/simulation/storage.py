"""The storage threads of a model agent: each a task that touches the disk step by step, and dies with the agent.

They keep the promises of `ckptd.daemon.job_store`: shards first and the manifest last, a prune takes the manifest
first and leaves what others refer to, and an answer is given only when nothing reads or writes a slot any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core import lineage
from ckptd.core.policy.garbage import judge_records
from ckptd.core.prune_events import Collect, MakeRoom, Prune, Pruned, RoomMade
from ckptd.core.restore import Source
from ckptd.errors import CkptdError, DamagedError, FullError, StoreError
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
    in_flight: set[File] = field(default_factory=set)
    """What a flush writes, and what it may refer to."""
    prunes: int = 0
    """How many are under way."""
    turns: int = 0
    """How many removals have asked for their turn; the agent does one at a time (`ckptd.pruning`)."""
    over: int = 0
    """How many of those are over."""


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
    shelf, earlier = agent.shelves[TIER], agent.earlier
    if earlier is not None and earlier.id not in shelf.known_files:
        earlier = None
    shelf.in_flight = {(order.id, slot.rank) for slot in reading} | (set() if earlier is None else earlier.files)
    tasks = [node.clock.start(agent, "flush", _flush_shard(agent, order, slot, earlier)) for slot in reading]
    manifest = Manifest(order.id, {}, {})
    error: CkptdError | None = None
    for slot, task in zip(reading, tasks, strict=True):
        written = yield task.done
        if isinstance(written, CkptdError):
            error = error or written
        else:
            manifest.digests[slot.rank], manifest.places[slot.rank] = written
    if error is None:
        yield node.options.write_s * node.rng.random()
        if node.write_fails() or not node.disk.put_manifest(manifest):
            error = StoreError("input/output error")
    if error is None:
        agent.earlier = manifest
        shelf.known_files[order.id] = manifest.files
    shelf.in_flight = set()
    node.witness.flush_ends(order, committed=error is None)
    yield node.rng.uniform(0, 0.02)
    if error is not None:
        agent.feed(e.FlushFailed(order.id, error))
    else:
        agent.feed(e.Committed(order.id, TIER, 1, 0.0))


def _flush_shard(agent: ModelAgent, order: e.Flush, slot: Slot, earlier: Manifest | None) -> Steps:
    """Digest a shard, then write what has changed; both read the slot part by part.

    Returns the digest and where each part lies, or the error of a write that has failed.
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
    if node.is_full((order.id, rank)):
        return FullError("no space left on device")
    written: list[Cell | None] = [None] * PARTS
    node.disk.put_file((order.id, rank), tuple(written))
    for part in range(PARTS):
        if places[part] != order.id:
            node.witness.seen["referred to"] += 1
            continue
        yield node.options.write_s * node.rng.choice((0.1, 0.3, 0.3, 1.0)) * node.rng.random()
        if node.write_fails():
            return StoreError("input/output error")
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


def prune(agent: ModelAgent, order: Prune) -> Steps:
    """Remove checkpoints, the manifest of each before its files, and on the disk all garbage."""
    yield from _remove(agent, order, undoable_s=agent.node.options.grace_s if order.tier == TIER else 0.0)
    agent.feed(Pruned(order.tier, order.ids))


def make_room(agent: ModelAgent, order: MakeRoom) -> Steps:
    """Remove checkpoints, garbage, and whatever could be brought back."""
    freed = yield from _remove(agent, order, undoable_s=0.0)
    agent.node.witness.seen["room made"] += bool(freed)
    agent.feed(RoomMade(order.tier, order.ids, freed))


def collect(agent: ModelAgent, order: Collect) -> Steps:
    """Remove garbage and generation records; what lies in the bucket is never old enough here."""
    place, shelf = agent.node.place(order.tier), agent.shelves[order.tier]
    if order.tier == TIER:
        yield from _wait_for_turn(shelf)
        shelf.prunes += 1
        yield from _delete_files(agent, order)
        shelf.prunes -= 1
        shelf.over += 1
    for number in judge_records(place.parents.keys(), (item.id for item in place.whole), order.needed_from):
        yield 0.0
        del place.parents[number]
        agent.node.witness.seen["record removed"] += 1


def _wait_for_turn(shelf: Shelf) -> Steps:
    """Let all removals that were ordered before end first."""
    mine, shelf.turns = shelf.turns, shelf.turns + 1
    while shelf.over < mine:
        yield 0.005


def _remove(agent: ModelAgent, order: Prune | MakeRoom, undoable_s: float) -> Steps:
    node, place, shelf = agent.node, agent.node.place(order.tier), agent.shelves[order.tier]
    rng = node.bucket.rng if order.tier == BUCKET else node.rng
    yield from _wait_for_turn(shelf)
    shelf.prunes += 1
    for checkpoint in order.ids:
        yield rng.uniform(0, 0.05)
        if order.tier == BUCKET and node.bucket.down and checkpoint in place.manifests:
            shelf.known_files[checkpoint] = place.manifests[checkpoint].files  # it stays, whole
            continue
        if not node.numbers.steps_back_beyond(checkpoint):
            node.witness.checkpoint_leaves(checkpoint, order.tier)
        node.numbers.checkpoint_leaves(checkpoint, order.tier)
        place.delete_manifest(checkpoint, node.clock.now_s if undoable_s else None)
        shelf.left_over.add(checkpoint)
        shelf.known_files.pop(checkpoint, None)
    for checkpoint, (removed_s, _) in list(place.removed.items()):
        if node.clock.now_s - removed_s >= undoable_s:
            del place.removed[checkpoint]
            shelf.left_over.add(checkpoint)
    freed: int = yield from _delete_files(agent, order)
    shelf.prunes -= 1
    shelf.over += 1
    return freed


def _delete_files(agent: ModelAgent, order: Prune | MakeRoom | Collect) -> Steps:
    """Delete what nobody needs, on the disk everything of that kind; return how many files that were.

    Needed is what stays, what can be brought back, what this agent has committed or looked at, and what it is writing.
    """
    node, place, shelf = agent.node, agent.node.place(order.tier), agent.shelves[order.tier]
    rng = node.bucket.rng if order.tier == BUCKET else node.rng
    freed = 0
    for file in sorted(place.files):
        if order.tier == BUCKET and file[0] not in shelf.left_over:
            continue
        yield rng.uniform(0, 0.01)
        kept = place.whole  # what another prune is about to remove is whole until then
        if isinstance(order, Prune):
            kept = [manifest for manifest in kept if manifest.id in order.kept or manifest.id in place.removed]
        needed = [*(manifest.files for manifest in kept), *shelf.known_files.values(), shelf.in_flight]
        if file in place.files and not any(file in files for files in needed):
            place.delete_file(file)
            freed += 1
    return freed

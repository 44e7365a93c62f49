"""Uploads and fetches of a model agent: checkpoints copied file by file, checked on their way, manifest last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.restore import Source
from ckptd.errors import DamagedError, StoreError
from tests.simulation.clock import Steps
from tests.simulation.disk import File, Manifest
from tests.simulation.memory import Content
from tests.simulation.storage import BUCKET, TIER

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent


def upload(agent: ModelAgent, order: e.Upload) -> Steps:
    """Copy a checkpoint from the disk to the bucket, and say what became of it."""
    node = agent.node
    node.witness.bucket.upload_begins(order)
    error = yield from _upload(agent, order)
    node.witness.bucket.upload_ends()
    yield node.bucket.rng.uniform(0, 0.02)
    if error is None:
        agent.feed(e.Committed(order.id, BUCKET, 1, 0.0))
    else:
        agent.shelves[BUCKET].known_files.pop(order.id, None)
        agent.feed(e.UploadFailed(order.id, BUCKET, error))


def _upload(agent: ModelAgent, order: e.Upload) -> Steps:
    """Claim what generations are not claimed there yet, then put what is missing, and the manifest last."""
    node, bucket, chance = agent.node, agent.node.bucket, _error_chance(agent)
    manifest = node.disk.manifests.get(order.id)
    node.witness.require(manifest is not None, f"an upload of {order.id}, which is not on the disk")
    assert manifest is not None
    agent.shelves[BUCKET].known_files[order.id] = manifest.files  # before any is found there, or a prune takes it
    for number in sorted(node.disk.parents.keys() - bucket.parents.keys()):
        if (error := (yield from bucket.call(0.02, chance))) is not None:
            return error
        if number in node.disk.parents:  # or nobody needs it any more
            bucket.parents[number] = node.disk.parents[number]
    for file in sorted(manifest.files):
        content = node.disk.files.get(file)
        node.witness.require(content is not None, f"an upload of {order.id} needs {file}, which was pruned")
        assert content is not None
        if not is_right(manifest, file, content):
            return DamagedError(f"{file} is not what the manifest of {order.id} says")
        if file in bucket.files:
            continue
        if (error := (yield from bucket.call(node.options.bucket_put_s, chance))) is not None:
            return error
        node.witness.require(file in node.disk.files, f"an upload of {order.id} reads {file}, which was pruned")
        bucket.put_file(file, content)
    if (error := (yield from bucket.call(0.02, chance))) is not None:
        return error
    bucket.put_manifest(manifest)  # there already, it is the same one: an earlier attempt has put it
    return None


def fetch(agent: ModelAgent, source: Source) -> Steps:
    """Bring a checkpoint from the bucket to the disk: what is missing or damaged there."""
    error = yield from _fetch(agent, source)
    if error is None:
        world_size = len(agent.node.disk.manifests[source.id].digests)
        agent.feed(e.Fetched(source, world_size, copied=True))
    else:
        agent.feed(e.FetchFailed(source, error))


def _fetch(agent: ModelAgent, source: Source) -> Steps:
    node, disk, bucket, shelf = agent.node, agent.node.disk, agent.node.bucket, agent.shelves[TIER]
    if (error := (yield from bucket.call(0.02, _error_chance(agent)))) is not None:
        return error
    manifest = bucket.manifests.get(source.id)
    if manifest is None:
        return DamagedError(f"{source.id} has no manifest")
    while shelf.prunes:
        yield 0.02  # one may be about to remove the same checkpoint
    shelf.known_files[source.id] = manifest.files  # before the first is there, or a prune takes it for a left-over
    shelf.left_over.discard(source.id)
    for file in sorted(manifest.files):
        if file in disk.files and is_right(manifest, file, disk.files[file]):
            continue
        if (error := (yield from bucket.call(node.options.bucket_put_s, _error_chance(agent)))) is not None:
            return error
        content = bucket.files.get(file)
        if content is None or not is_right(manifest, file, content):
            return DamagedError(f"{file} is not what the manifest of {source.id} says")
        if node.write_fails():
            return StoreError("the disk is full")
        disk.put_file(file, content)
    disk.mended(source.id)
    disk.put_manifest(manifest)
    agent.earlier = manifest
    return None


def is_right(manifest: Manifest, file: File, content: Content) -> bool:
    """Whether a file has what a manifest says of it."""
    owner, rank = file
    parts = [part for part, place in enumerate(manifest.places[rank]) if place == owner]
    return all(content[part] == manifest.digests[rank][part] for part in parts)


def _error_chance(agent: ModelAgent) -> float:
    return agent.node.options.bucket_error_chance if agent.node.faults.writes_may_fail else 0.0

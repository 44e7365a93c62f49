"""The scrubs of a model agent: a stored copy read again, and mended on the disk from what the bucket has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mended, Scrubbed
from ckptd.errors import NotFoundError, StoreError
from tests.simulation.clock import Steps
from tests.simulation.copying import is_right
from tests.simulation.disk import Disk, File, Manifest
from tests.simulation.storage import BUCKET, TIER

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent


def scrub(agent: ModelAgent, source: Source) -> Steps:
    """Read a copy file by file, and say what is wrong with it."""
    node, place = agent.node, agent.node.place(source.tier)
    rng = node.bucket.rng if source.tier == BUCKET else node.rng
    problems: list[str] = []
    error: NotFoundError | StoreError | None = None
    manifest = place.manifests.get(source.id)
    for file in () if manifest is None else sorted(manifest.files):
        yield node.options.write_s * rng.random()
        if source.tier == BUCKET and node.bucket.down:
            error = StoreError("connection refused")
        elif manifest is not None and not _is_there(place, manifest, file):
            problems.append(f"{file} is damaged")
    if source.id not in place.manifests:
        error = NotFoundError(f"there is no {source.id}")
    yield rng.uniform(0, 0.02)
    agent.feed(Scrubbed(source, () if error is not None else tuple(problems), error))


def _is_there(place: Disk, manifest: Manifest, file: File) -> bool:
    return file in place.files and is_right(manifest, file, place.files[file])


def mend(agent: ModelAgent, source: Source) -> Steps:
    """Replace what is damaged on the disk by what the bucket has, where it has it; nothing else is damaged here."""
    node = agent.node
    node.witness.require(source.tier == TIER, f"{source} is to be mended, and is damaged by nobody")
    problems = yield from _mend(agent, node.disk, node.disk.manifests.get(source.id))
    yield node.rng.uniform(0, 0.02)
    agent.feed(Mended(source, {}, tuple(problems)))


def _mend(agent: ModelAgent, disk: Disk, manifest: Manifest | None) -> Steps:
    node = agent.node
    if manifest is None:
        return ["there is no manifest"]
    for file in sorted(manifest.files):
        yield node.options.write_s * node.rng.random()
        if _is_there(disk, manifest, file):
            continue
        content = node.bucket.files.get(file)
        if node.bucket.down or content is None or not is_right(manifest, file, content):
            return [f"{file} has no good copy"]
        if node.write_fails():
            return ["input/output error"]
        disk.put_file(file, content)
    if not all(_is_there(disk, manifest, file) for file in manifest.files):
        return ["it was damaged again"]
    if manifest.id in disk.damaged:
        node.witness.scrubs.disk_mended(manifest.id)
        disk.mended(manifest.id)
    return []

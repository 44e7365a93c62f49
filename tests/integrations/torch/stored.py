"""Live objects committed to a tier, and restored from it: for tests of exports and imports."""

import json
import os
import warnings

from torch.distributed import checkpoint as dcp

from ckptd.client.framework import Membership
from ckptd.storage import catalog, keys
from ckptd.storage.export import export
from ckptd.storage.importing import bring_in
from ckptd.storage.manifest import build, encode
from ckptd.storage.memory import MemoryTier
from ckptd.types import CheckpointId
from ckptd_integrations.torch.dcp_format import export_dcp, import_dcp
from ckptd_integrations.torch.framework import TorchFramework
from ckptd_integrations.torch.torch_format import export_torch, import_torch

AT = CheckpointId(1, 7)
EXPORTERS = {"torch": export_torch, "dcp": export_dcp}
IMPORTERS = {"torch": import_torch, "dcp": import_dcp}


def image_of(state, rank=0, world_size=1, rng=False):
    """Capture one rank's state."""
    binding = TorchFramework().bind(state, rng=rng, membership=Membership(rank, world_size))
    try:
        prepared = binding.prepare(AT.step)
        slot = memoryview(bytearray(b"\xa5" * prepared.image_bytes))
        prepared.write(slot)
        return slot
    finally:
        binding.close()


def commit(images):
    """Return a tier with a checkpoint of these images, one per rank."""
    tier = MemoryTier()
    catalog.claim_generation(tier, "job", AT.generation, None, 0.0)
    contents = []
    for rank, image in enumerate(images):
        tier.put(keys.shard_key("job", AT, rank), image)
        contents.append(catalog.describe_shard(rank, memoryview(image)))
    document = build("job", AT, None, contents, created_at=1.0, values={"loss": 0.5})
    tier.put(keys.manifest_key("job", AT), encode(document))
    return tier


def committed(state, rng=False):
    """Return a tier with a checkpoint of a job of one rank."""
    return commit([image_of(state, rng=rng)])


def exported(name, tier, to, job="job", at=AT):
    """Export in the format of that name; return the folder."""
    export(EXPORTERS[name], tier, job, at, to)
    return to


def imported(importer, place, names=None, step=None):
    """Import into a new tier; return it and what was found."""
    tier = MemoryTier()
    with importer(place, names or {}) as cargo:
        done = bring_in(cargo, tier, "job", cargo.step or 0 if step is None else step)
    assert not catalog.verify(tier, "job", done.id)
    return tier, cargo, done.id


def restored(tier, at, state, rank=0, world_size=1, rng=False):
    """Fill live objects from a checkpoint of a tier; return what is bound then."""
    binding = TorchFramework().bind(state, rng=rng, membership=Membership(rank, world_size))
    offered = _Offered(tier, at)
    try:
        binding.restore(offered)
    finally:
        binding.close()
        offered.close()
    return binding.state


def save_dcp(state, folder):
    """Write a DCP folder as anybody would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other ranks
        dcp.save(state, checkpoint_id=folder)


class _Offered:
    """A checkpoint of a tier as an `OfferedCheckpoint`."""

    in_memory = False

    def __init__(self, tier, at):
        self._tier, self._descriptors = tier, []
        self.document = json.loads(tier.get(keys.manifest_key("job", at)))

    def open(self, files):
        found = {file: self._tier.open(f"job/{file}") for file in files}
        self._descriptors += found.values()
        return found

    def close(self):
        for descriptor in self._descriptors:
            os.close(descriptor)

"""Checkpoints offered to a restore without an agent: images become files or slots, and a manifest lists them."""

import json
import os

from ckptd.storage.digest import tensor_digest
from ckptd.storage.image import parse
from ckptd.storage.keys import folder, shard_file
from ckptd.storage.manifest import ShardContent, build, encode
from ckptd.types import CheckpointId
from ckptd_integrations.torch.framework import TorchFramework

ID = CheckpointId(1, 7)


class Offered:
    """An `OfferedCheckpoint` of images, one per rank: in memory, or in files below `place`.

    Use it as a context, so that no descriptor stays behind. `opened` tells which files were asked for.
    """

    def __init__(self, images, place=None, digested=True):
        self.in_memory = place is None
        self.opened = []
        self._paths, self._descriptors = {}, {}
        contents = []
        for rank, image in enumerate(images):
            file = folder(ID) + shard_file(rank)
            if place is None:
                descriptor = self._descriptors[file] = os.memfd_create("ckptd-test")
                os.write(descriptor, image)
            else:
                path = self._paths[file] = place / file.replace("/", "_")
                path.write_bytes(image)
            contents.append(content(rank, image, digested))
        self.document = json.loads(encode(build("job", ID, None, contents, created_at=0.0, values={})))

    def open(self, files):
        self.opened += files
        for file in files:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._paths[file], os.O_RDONLY)
        return {file: self._descriptors[file] for file in files}

    def flip(self, rank, at):
        """Damage one byte of a rank's image after its digests were taken."""
        file = folder(ID) + shard_file(rank)
        descriptor = os.open(self._paths[file], os.O_RDWR) if file in self._paths else self._descriptors[file]
        (byte,) = os.pread(descriptor, 1, at)
        os.pwrite(descriptor, bytes([byte ^ 4]), at)
        if file in self._paths:
            os.close(descriptor)

    def cut(self, rank, size):
        """Let a rank's file end early."""
        file = folder(ID) + shard_file(rank)
        os.truncate(self._paths.get(file) or self._descriptors[file], size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def content(rank, image, digested=True):
    """Return what a manifest has to know of an image."""
    layout = parse(image)
    digests = {span.name: tensor_digest(image[span.begin : span.end]) for span in layout.spans} if digested else {}
    return ShardContent(rank, layout, len(image), None, digests)


def capture(state, membership):
    """Capture into a slot that held other bytes before."""
    binding = TorchFramework().bind(state, rng=False, membership=membership)
    try:
        prepared = binding.prepare(7)
        slot = memoryview(bytearray(b"\xa5" * prepared.image_bytes))
        prepared.write(slot)
        return slot
    finally:
        binding.close()

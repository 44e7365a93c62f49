"""Digests made in several threads are those of each tensor by itself."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from ckptd.daemon.digesting import Digesting
from ckptd.storage import image
from ckptd.storage.digest import LEAF_BYTES, tensor_digest
from ckptd.storage.image import TensorSpec
from ckptd.storage.reuse import Entry
from ckptd.storage.shards import Shards

_SIZES = [5, LEAF_BYTES, 0, 3 * LEAF_BYTES + 7, *range(2500), LEAF_BYTES + 1, 2 * LEAF_BYTES, 0]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_entry_has_its_digest(threads: int) -> None:
    """Many small tensors, empty ones and some of several leaves: each has its digest, whichever half it is done in."""
    specs = [TensorSpec(f"t{at:05d}", "U8", (size,)) for at, size in enumerate(_SIZES)]
    shards = Shards({rank: image.plan(specs, 10, {}) for rank in range(2)})
    images = {
        rank: memoryview(random.Random(rank).randbytes(layout.image_bytes)) for rank, layout in shards.layouts.items()
    }
    chosen = {entry for at, entry in enumerate(shards.spans) if at % 3 == 0}
    with ThreadPoolExecutor(threads) as pool:
        both = [Digesting(images, leaves, pool, threads) for leaves in shards.split_leaves(chosen)]
        wait([item for digesting in both for item in digesting.futures])
        first, others = (digesting.found() for digesting in both)
    assert first.values.keys() == chosen
    found = first | others
    wanted = {entry: tensor_digest(images[entry.rank][span.begin : span.end]) for entry, span in shards.spans.items()}
    assert found.values == {entry: digest.value for entry, digest in wanted.items()}
    assert {entry: tuple(leaves) for entry, leaves in found.leaves.items()} == {
        entry: digest.leaves for entry, digest in wanted.items() if digest.leaves
    }
    assert Entry(0, "t00003") in found.leaves

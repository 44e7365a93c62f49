"""Sharded state of real ranks: each captures its part, and all parts together are every element once."""

import json

import pytest
import torch

from ckptd_integrations.torch.local_boxes import boxes_at
from tests.integrations.torch import rank_scripts

pytestmark = pytest.mark.xdist_group("dtensor_capture")  # or each worker runs all the ranks
OUTCOMES = {
    2: [
        "fsdp is plain", "fsdp", "overlapped", "tensor parallel", "odd", "tied", "partial", "witness", "ddp",
        "ddp buffers", "ddp balance",
    ],
    4: ["fsdp of four", "hybrid", "fsdp and tensor parallel", "a mesh of some ranks"],
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What ranks of jobs of two and of four have found: nothing wrong, or what, by name and rank."""
    place = tmp_path_factory.mktemp("ranks")
    rank_scripts.run("capture_ranks", place)
    return {
        ranks: [json.loads((place / f"outcomes-{ranks}.{rank}").read_text()) for rank in range(ranks)]
        for ranks in (2, 4)
    }


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, names in OUTCOMES.items() for name in names])
def test_sharded_state(outcomes, ranks, name):
    """FSDP2, tensor parallel, both, hybrid and DDP: every rank finds that all images together are the whole state."""
    assert [of_rank[name] for of_rank in outcomes[ranks]] == [""] * ranks


def test_nothing_is_left_out(outcomes):
    """Everything that the ranks look at is looked at here."""
    assert {ranks: sorted(found[0]) for ranks, found in outcomes.items()} == {
        ranks: sorted(names) for ranks, names in OUTCOMES.items()
    }


@pytest.mark.parametrize("size", [0, 1, 5, 16, 23])
def test_boxes_are_where_torch_says(size):
    """For even, uneven and strided shards the boxes begin and are as large as torch computes it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard

    placings = [
        (Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Replicate()),
        (_StridedShard(0, split_factor=3), Shard(0)), (Replicate(), Replicate()), (Shard(1), Shard(1)),
    ]  # fmt: skip
    shape, mesh = (size, 7), (2, 3)
    for placements in placings:
        held = torch.zeros(shape, dtype=torch.int64)
        for first in range(2):
            for last in range(3):
                boxes = boxes_at(shape, mesh, (first, last), placements)
                local, offset = _compute_local_shape_and_global_offset(shape, mesh, [first, last], placements)
                assert sum(torch.Size(box.shape).numel() for box in boxes) == torch.Size(local).numel()
                if boxes:
                    assert boxes[0].global_offset == tuple(offset)
                for box in boxes:
                    held[
                        tuple(slice(at, at + size) for at, size in zip(box.global_offset, box.shape, strict=True))
                    ] += 1
        copies = 1
        for ranks, placement in zip(mesh, placements, strict=True):
            copies *= ranks if placement.is_replicate() else 1
        assert bool((held == copies).all())

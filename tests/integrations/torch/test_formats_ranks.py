"""Exports of sharded state hold whole tensors, which the library shares out anew among any number of ranks."""

import json

import pytest

from tests.integrations.torch import rank_scripts

pytestmark = pytest.mark.xdist_group("formats_ranks")  # or each worker runs all the ranks
OUTCOMES = [
    "dcp", "dcp goes on", "torch", "restored from torch", "restored from torch goes on", "restored from dcp",
    "restored from dcp goes on",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank found, by world size: nothing, or the names of the tensors that differ."""
    place = tmp_path_factory.mktemp("formats")
    rank_scripts.run("format_ranks", place)
    return {
        world_size: [json.loads((place / f"outcomes-{world_size}.{rank}").read_text()) for rank in range(world_size)]
        for world_size in (1, 2)
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", OUTCOMES)
def test_sharded_state(outcomes, world_size, name):
    """Parameters and AdamW's state of an FSDP2 run arrive bit for bit, and the next step is the same."""
    assert [found[name] for found in outcomes[world_size]] == [""] * world_size

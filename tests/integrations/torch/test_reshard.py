"""Another world size or mesh than the captured run's: every rank gets its part of the state, element by element."""

import json

import pytest

from tests.integrations.torch import rank_scripts
from tests.integrations.torch.reshard_ranks import SOURCES, TARGETS

pytestmark = pytest.mark.xdist_group("reshard")  # or each worker runs all the ranks
PAIRS = [(source, target) for source in SOURCES for target in TARGETS if source[0] == target[0]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank found after each restore: nothing, or the names of the tensors that differ."""
    place = tmp_path_factory.mktemp("reshard")
    rank_scripts.run("reshard_ranks", place)
    found = {}
    for line in (line for file in place.glob("outcomes.*") for line in file.read_text().splitlines()):
        size, layout, ranks, *target, rank, result = json.loads(line)
        found.setdefault(((size, layout, ranks), (size, *target)), {})[rank] = result
    return found


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda value: "-".join(map(str, value)))
def test_reshard(outcomes, source, target):
    """Parameters and Adam's state are bit for bit what was captured, and can be stepped on."""
    assert outcomes[source, target] == dict.fromkeys(range(target[2]), "")

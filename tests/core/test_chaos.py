"""Which fault comes when: the same for a seed, exponential in time, and correlated where that is asked for."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.chaos import FOLLOW_S, IN_RANKS, KINDS, OF_RANKS, Campaign, Draws, Fault, plan
from ckptd.errors import ConfigError, ProtocolError

_CAMPAIGNS = st.builds(
    Campaign,
    world_size=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    mtbf_s=st.floats(0.01, 1e4),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    signals=st.lists(st.sampled_from([6, 9, 11, 15]), min_size=1),
    correlated=st.floats(0, 1),
    count=st.integers(0, 60),
    duration_s=st.floats(0, 1e5),
)


@given(_CAMPAIGNS)
def test_a_seed_decides_everything(campaign: Campaign) -> None:
    """The same settings give the same faults; these keep within ranks, kinds, count, duration and the order of time."""
    planned = list(plan(campaign))
    assert planned == list(plan(campaign))
    assert len(planned) <= campaign.count
    assert [item.at_s for item in planned] == sorted(item.at_s for item in planned)
    for item in planned:
        fault = item.fault
        assert item.at_s < campaign.duration_s
        assert fault.kind in campaign.kinds
        assert bool(fault.ranks) == (fault.kind in OF_RANKS)
        assert len(set(fault.ranks)) == len(fault.ranks)
        assert all(0 <= rank < campaign.world_size for rank in fault.ranks)
        assert Fault.from_json(fault.to_json()) == fault
        assert not item.follows or fault.kind not in IN_RANKS or set(campaign.kinds) <= set(IN_RANKS)


def test_times_are_exponential_and_not_periodic() -> None:
    """Of many gaps the mean is the one asked for, a share of 1/e is longer than that, and no two are alike."""
    planned = list(plan(Campaign(2, seed=7, mtbf_s=30.0, count=4000)))
    gaps = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(planned)]
    assert sum(gaps) / len(gaps) == pytest.approx(30.0, rel=0.06)
    assert sum(gap > 30.0 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.03)
    assert len(set(gaps)) == len(gaps)


def test_correlated_faults() -> None:
    """Half of the correlated ones hit several ranks at once, the others are followed by one within the restart."""
    planned = list(plan(Campaign(4, seed=3, mtbf_s=10.0, correlated=1.0, count=3000)))
    several = [item for item in planned if len(item.fault.ranks) > 1]
    follows = [pair for pair in itertools.pairwise(planned) if pair[1].follows]
    assert len(several) == pytest.approx(len(follows), rel=0.15)
    assert {len(item.fault.ranks) for item in several} == {2, 3, 4}
    assert all(0 <= later.at_s - earlier.at_s <= FOLLOW_S for earlier, later in follows)
    alone = list(plan(Campaign(4, seed=3, mtbf_s=10.0, count=1000)))
    assert all(len(item.fault.ranks) == 1 and not item.follows for item in alone)


def test_draws_are_the_same_everywhere() -> None:
    """The generator is splitmix64 as published: its first output for the seed 0 is known."""
    assert Draws(0).uniform() == (0xE220A8397B1DCDAF >> 11) / 2**53


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinds": ("flood",)}, "there is no fault 'flood'"),
        ({"kinds": ()}, "no fault is named"),
        ({"mtbf_s": 0.0}, "the mean time between faults is 0 s"),
        ({"correlated": 1.5}, "a share of 1.5 can't be correlated"),
        ({"rank": 2}, "there is no rank 2"),
    ],
)
def test_what_is_refused(settings: dict[str, object], said: str) -> None:
    """A campaign that can't be planned is refused in words."""
    with pytest.raises(ConfigError, match=said):
        Campaign(**{"world_size": 2, "seed": 1, "mtbf_s": 1.0, **settings})


def test_a_fault_is_checked_where_it_arrives() -> None:
    """What crosses the socket is no fault unless every field is there, fits and makes sense together."""
    with pytest.raises(ProtocolError):
        Fault.from_json({"kind": "kill"})
    with pytest.raises(ProtocolError):
        Fault.from_json({**Fault("kill", (0,)).to_json(), "ranks": ["x"]})
    with pytest.raises(ConfigError):
        Fault("kill")
    with pytest.raises(ConfigError):
        Fault("full-disk", (0,))

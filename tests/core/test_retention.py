"""What is kept and what is pruned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.retention import RetentionPolicy, judge
from ckptd.types import CheckpointId
from tests.core.script import cid

checkpoints = st.lists(st.builds(CheckpointId, st.integers(1, 5), st.integers(0, 20)), max_size=12)
policies = st.builds(RetentionPolicy, st.integers(0, 5))


def words(verdicts):
    """Return verdicts as lines."""
    return [f"{'keep' if item.keep else 'prune'} {item.id}: {item.reason}" for item in verdicts]


def test_the_newest_ones_stay_with_their_reasons():
    """Proves the verdicts and reasons on literals, newest first whatever the order of the list."""
    given_ids = [cid("g1/s10"), cid("g2/s5"), cid("g1/s20"), cid("g1/s30")]
    assert words(judge(given_ids, RetentionPolicy(2), in_use=[cid("g1/s10")])) == [
        "keep g2/s5: the newest",
        "keep g1/s30: one of the last 2",
        "prune g1/s20: not one of the last 2",
        "keep g1/s10: a restore uses it",
    ]


def test_nothing_is_judged_of_nothing():
    """Proves that an empty tier has no verdicts."""
    assert judge([], RetentionPolicy(1), in_use=[]) == []


@given(checkpoints, policies, checkpoints)
def test_the_newest_stays_whatever_the_policy_says(ids, policy, in_use):
    """Proves that the last commit is never pruned, that each checkpoint is judged once, and that each has a reason."""
    verdicts = judge(ids, policy, in_use)
    assert [item.id for item in verdicts] == sorted(set(ids), reverse=True)
    assert all(item.reason for item in verdicts)
    if ids:
        assert verdicts[0].keep
        assert verdicts[0].id == max(ids)


@given(checkpoints, policies, checkpoints)
def test_keeps_as_many_as_it_says_and_what_is_in_use(ids, policy, in_use):
    """Proves that exactly the newest ones and those in use stay."""
    kept = {item.id for item in judge(ids, policy, in_use) if item.keep}
    newest = set(sorted(set(ids), reverse=True)[: max(1, policy.keep_last)])
    assert kept == newest | (set(ids) & set(in_use))


@given(checkpoints, policies)
def test_judging_again_prunes_nothing_more(ids, policy):
    """Proves that what was kept once is kept again, so that pruning never runs away."""
    kept = [item.id for item in judge(ids, policy, in_use=()) if item.keep]
    assert all(item.keep for item in judge(kept, policy, in_use=()))

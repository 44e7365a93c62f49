"""What a new generation begins with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.restore import MEMORY, Offers, Source, plan_restore
from ckptd.core.snapshots import Snapshot, SnapshotState
from ckptd.errors import DamagedError
from ckptd.types import CheckpointId
from tests.core.script import TIER, cid

ids = st.builds(CheckpointId, st.integers(1, 4), st.integers(1, 20))


def sealed(text: str, state: SnapshotState = SnapshotState.SEALED, **fields: object) -> Snapshot:
    """Return a snapshot in memory."""
    return Snapshot(cid(text), 0.0, state, **fields)


def stored(*texts: str, tier: str = TIER) -> list[Source]:
    """Return sources on a tier."""
    return [Source(cid(text), tier) for text in texts]


def order(plan) -> list[str]:
    """Return what a plan tries, in order."""
    return [f"{source.id} {source.tier}" for source in plan.sources]


def test_nothing_anywhere_is_a_fresh_start():
    """Proves that only emptiness means a fresh start, with its reason."""
    plan = plan_restore(None, [], refused=())
    assert plan.fresh
    assert plan.reasons == ("there is no checkpoint of this job",)


def test_memory_comes_before_the_disk():
    """Proves that the newest is tried first, and of two copies of one checkpoint the one in memory."""
    plan = plan_restore(sealed("g1/s20"), stored("g1/s20", "g1/s10"), refused=())
    assert order(plan) == ["g1/s20 memory", "g1/s20 local", "g1/s10 local"]
    assert plan.reasons[-1] == "g1/s20 in memory is the newest complete one"


def test_the_newest_wins_wherever_it_is():
    """Proves that an older snapshot in memory does not hide a newer checkpoint on the disk."""
    plan = plan_restore(sealed("g1/s10"), stored("g2/s5"), refused=())
    assert order(plan) == ["g2/s5 local", "g1/s10 memory"]


def test_tiers_keep_the_order_of_their_cost():
    """Proves that copies of one checkpoint are tried in the order in which the tiers were given."""
    plan = plan_restore(None, [*stored("g1/s10", tier="nvme"), *stored("g1/s10", tier="s3")], refused=())
    assert order(plan) == ["g1/s10 nvme", "g1/s10 s3"]


@pytest.mark.parametrize("state", [SnapshotState.ANNOUNCED, SnapshotState.VOID, SnapshotState.SUPERSEDED])
def test_what_is_not_complete_is_not_offered(state):
    """Proves that a snapshot which some rank has not sealed, or which is gone, is never tried."""
    assert plan_restore(sealed("g1/s20", state), [], refused=()).fresh


def test_what_was_refused_is_named_and_left_out():
    """Proves that a copy which failed to restore is left out, that the plan says so, and that other copies stay."""
    memory, disk = Source(cid("g1/s20"), MEMORY), Source(cid("g1/s20"), TIER)
    plan = plan_restore(sealed("g1/s20"), stored("g1/s20", "g1/s10"), refused={memory})
    assert order(plan) == ["g1/s20 local", "g1/s10 local"]
    assert plan.reasons[0] == "g1/s20 in memory failed to restore before"
    plan = plan_restore(sealed("g1/s20"), stored("g1/s20", "g1/s10"), refused={disk})
    assert order(plan) == ["g1/s20 memory", "g1/s10 local"]
    assert plan.reasons[0] == "g1/s20 on local failed to restore before"
    assert order(plan_restore(sealed("g1/s20"), stored("g1/s20", "g1/s10"), refused={memory, disk})) == ["g1/s10 local"]


def test_an_older_step_on_purpose():
    """Proves that what is newer than the step asked for is left out, with the reason."""
    plan = plan_restore(sealed("g1/s30"), stored("g1/s20", "g1/s10"), refused=(), at_most_step=15)
    assert order(plan) == ["g1/s10 local"]
    assert "g1/s30 in memory is newer than the step asked for, 15" in plan.reasons
    assert "g1/s20 on local is newer than the step asked for, 15" in plan.reasons


copies = st.builds(Source, ids, st.sampled_from([MEMORY, TIER]))


@given(st.none() | ids, st.lists(ids, max_size=8, unique=True), st.sets(copies), st.none() | st.integers(0, 20))
def test_a_plan_offers_everything_allowed_once_newest_first(newest, on_disk, refused, at_most):
    """Proves that a plan is complete, sorted and free of what is excluded, for any facts."""
    snapshot = None if newest is None else Snapshot(newest, 0.0, SnapshotState.COMMITTED)
    plan = plan_restore(snapshot, [Source(item, TIER) for item in on_disk], refused, at_most)
    offered = [source.id for source in plan.sources]
    assert offered == sorted(offered, reverse=True)
    there = {Source(item, TIER) for item in on_disk} | ({Source(newest, MEMORY)} if newest else set())
    allowed = {source for source in there - refused if at_most is None or source.id.step <= at_most}
    assert set(plan.sources) == allowed
    assert len(plan.sources) == len(allowed)
    assert plan.reasons
    assert plan.fresh == (not offered)
    if newest and Source(newest, MEMORY) in allowed:
        assert plan.sources[offered.index(newest)].tier == MEMORY


# --- offers over a job's life -----------------------------------------------------------------------------------------


def offers(*texts: str) -> Offers:
    """Return offers of what a disk holds."""
    made = Offers()
    made.stored = stored(*texts)
    return made


def test_sources_are_tried_one_by_one():
    """Proves that a plan is walked through in order, and then ends."""
    made = offers("g1/s20", "g1/s10")
    made.plan(None)
    assert [made.next(), made.next(), made.next()] == [*stored("g1/s20", "g1/s10"), None]


def test_a_store_whose_every_checkpoint_is_unusable_is_an_error():
    """Proves that there is no silent fresh start once anything was refused or can't be used."""
    made = offers("g1/s20")
    made.refused.add(Source(cid("g1/s20"), TIER))
    with pytest.raises(DamagedError, match="none can be restored") as caught:
        made.plan(None)
    assert "verify" in str(caught.value.hint)
    made.stored = []
    with pytest.raises(DamagedError):
        made.plan(None)


def test_a_dropped_copy_leaves_the_others():
    """Proves that one damaged copy does not condemn the same checkpoint on another tier."""
    made = Offers()
    made.stored = [*stored("g1/s10", tier="nvme"), *stored("g1/s10", tier="s3")]
    made.drop(Source(cid("g1/s10"), "nvme"))
    assert made.stored == stored("g1/s10", tier="s3")


def test_beginning_with_an_older_one_drops_the_newer():
    """Proves that the lineage is cut where a generation begins, and that a step back holds for one restart only."""
    made = offers("g1/s30", "g1/s20", "g1/s10")
    made.at_most_step = 20
    made.began_with(Source(cid("g1/s20"), TIER))
    assert made.stored == stored("g1/s20", "g1/s10")
    assert made.at_most_step is None


def test_a_commit_is_offered_first_and_the_pruned_are_forgotten():
    """Proves that offers follow commits and prunes."""
    made = offers("g1/s20", "g1/s10")
    made.add(Source(cid("g1/s30"), TIER))
    made.keep({TIER: [cid("g1/s30"), cid("g1/s20")]})
    assert made.stored == stored("g1/s30", "g1/s20")


def test_a_copy_on_a_further_tier_comes_behind_the_nearer_one():
    """Proves that an upload which is told late neither hides the newer checkpoint nor the cheaper copy."""
    made = Offers(["nvme", "s3"])
    for checkpoint, tier in [("g1/s10", "nvme"), ("g1/s20", "nvme"), ("g1/s20", "s3"), ("g1/s10", "s3")]:
        made.add(Source(cid(checkpoint), tier))
    assert [str(source) for source in made.stored] == [
        "g1/s20 on nvme", "g1/s20 on s3", "g1/s10 on nvme", "g1/s10 on s3",
    ]  # fmt: skip


def test_a_tier_that_can_not_be_read_keeps_what_was_known_of_it():
    """Proves that a second look which finds a tier dead does not forget its copies."""
    made = Offers([TIER, "s3"])
    made.read([*stored("g1/s20"), *stored("g1/s10", tier="s3")])
    made.read(stored("g1/s30"), unread=["s3"])
    assert [str(source) for source in made.stored] == ["g1/s30 on local", "g1/s10 on s3"]


def test_a_fetched_copy_mends_the_first_tier_and_is_refused_with_it():
    """Proves that a repaired copy may be offered again, and that a second damage refuses both: no endless repair."""
    made = Offers([TIER, "s3"])
    local, far = Source(cid("g1/s10"), TIER), Source(cid("g1/s10"), "s3")
    made.read([local, far])
    made.refuse(local)
    assert made.newest_on(TIER) is None
    made.fetched(far, TIER)
    assert made.newest_on(TIER) == cid("g1/s10")
    made.refuse(far)
    assert made.refused == {local, far}


@pytest.mark.parametrize(("at_most", "newest"), [(None, "g1/s20"), (20, "g1/s20"), (19, "g1/s10"), (9, None)])
def test_the_newest_that_a_restart_could_begin_with(at_most, newest):
    """Proves that a step back which is under way, and a damaged copy, are taken into account on each tier."""
    made = offers("g1/s30", "g1/s20", "g1/s10")
    made.add(Source(cid("g1/s30"), "s3"))
    made.refuse(Source(cid("g1/s30"), TIER))
    made.at_most_step = at_most
    assert made.newest_on(TIER) == (None if newest is None else cid(newest))


@pytest.mark.parametrize(
    ("step", "newest"), [(9, None), (10, "g1/s10"), (20, "g1/s20"), (25, "g1/s20"), (30, "g1/s30")]
)
def test_what_a_step_back_can_reach(step, newest):
    """Proves that a step back needs a stored checkpoint, or one complete in memory, that is old enough."""
    made = offers("g1/s20", "g1/s10")
    made.refused.add(Source(cid("g1/s5"), MEMORY))
    complete = [sealed("g1/s30"), sealed("g1/s5")]
    wanted = None if newest is None else cid(newest)
    assert made.newest_until(step, complete) == wanted
    assert made.newest_before(CheckpointId(3, step + 1), complete) == wanted

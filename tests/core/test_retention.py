"""What is kept and what is pruned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.retention import Best, RetentionPolicy, judge, make_room
from ckptd.types import CheckpointId, Held
from tests.core.script import cid

ids = st.builds(CheckpointId, st.integers(1, 5), st.integers(0, 20))
losses = st.sampled_from([0.0, 0.5, 1.0, 2.0, float("nan"), float("inf")])
facts = st.builds(
    Held,
    ids,
    st.floats(0, 100),
    st.integers(0, 50),
    st.dictionaries(st.just("loss"), losses, max_size=1),
    st.lists(st.sampled_from(["good", "paper"]), max_size=1).map(tuple),
)
tiers = st.lists(facts, max_size=12, unique_by=lambda item: item.id)
policies = st.builds(
    RetentionPolicy,
    keep_last=st.integers(0, 5),
    keep_every_s=st.sampled_from([0.0, 10.0, 33.3]),
    keep_every_steps=st.sampled_from([0, 1, 7]),
    keep_best=st.none() | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(0, 3)),
    keep_tagged=st.booleans(),
    max_bytes=st.sampled_from([0, 0, 1, 60, 200]),
)
uses = st.dictionaries(ids, st.just("a restore reads it"), max_size=3)


def held(*texts: str, size_bytes: int = 10, **more: object) -> list[Held]:
    """Return checkpoints committed at a second a step."""
    return [Held(cid(text), float(cid(text).step), size_bytes, **more) for text in texts]


def words(verdicts):
    """Return verdicts as lines."""
    return [f"{'keep' if item.keep else 'prune'} {item.id}: {'; '.join(item.reasons)}" for item in verdicts]


def kept(verdicts) -> set[CheckpointId]:
    """Return what stays."""
    return {item.id for item in verdicts if item.keep}


def test_the_newest_ones_stay_with_their_reasons():
    """Proves the verdicts and reasons on literals, newest first whatever the order of the list."""
    items = held("g1/s10", "g2/s5", "g1/s20", "g1/s30")
    assert words(judge(items, RetentionPolicy(2), {cid("g1/s10"): "a restore reads it"})) == [
        "keep g2/s5: the newest",
        "keep g1/s30: one of the last 2",
        "prune g1/s20: no rule keeps it",
        "keep g1/s10: a restore reads it",
    ]


def test_the_first_of_every_stretch_stays():
    """Proves that of each stretch of time or steps the first stays, and that reasons of several rules are all named."""
    items = held("g1/s3", "g1/s9", "g1/s10", "g1/s11", "g1/s19", "g1/s25")
    assert words(judge(items, RetentionPolicy(1, keep_every_s=10), {})) == [
        "keep g1/s25: the newest; the first of its 10 s",
        "prune g1/s19: no rule keeps it",
        "prune g1/s11: no rule keeps it",
        "keep g1/s10: the first of its 10 s",
        "prune g1/s9: no rule keeps it",
        "keep g1/s3: the first of its 10 s",
    ]
    assert kept(judge(items, RetentionPolicy(1, keep_every_steps=8), {})) == {
        cid("g1/s3"), cid("g1/s9"), cid("g1/s19"), cid("g1/s25"),
    }  # fmt: skip


def test_the_best_stay_and_what_was_not_measured_is_not_among_them():
    """Proves both directions of a metric, that of equals the newer is better, and that NaN is no value."""
    values = {"g1/s1": 0.5, "g1/s2": 2.0, "g1/s3": 0.5, "g1/s4": float("nan"), "g1/s5": 1.0}
    items = [Held(cid(text), values={"loss": value}) for text, value in values.items()] + held("g1/s6")
    assert kept(judge(items, RetentionPolicy(1, keep_best=Best("loss", "min", 1)), {})) == {cid("g1/s3"), cid("g1/s6")}
    assert kept(judge(items, RetentionPolicy(1, keep_best=Best("loss", "max", 2)), {})) == {
        cid("g1/s2"), cid("g1/s5"), cid("g1/s6"),
    }  # fmt: skip


def test_a_tag_keeps_unless_it_is_told_not_to():
    """Proves that a name is a reason to stay, which the verdict tells."""
    items = [*held("g1/s1", tags=("paper",)), *held("g1/s2")]
    assert words(judge(items, RetentionPolicy(1), {}))[1] == "keep g1/s1: tagged paper"
    assert words(judge(items, RetentionPolicy(1, keep_tagged=False), {}))[1] == "prune g1/s1: no rule keeps it"


def test_a_bound_on_bytes_takes_the_oldest_first():
    """Proves that the bound wins over rules, oldest first, but not over a tag, a use, or the newest."""
    items = [*held("g1/s1", tags=("paper",)), *held("g1/s2", "g1/s3", "g1/s4", "g1/s5")]
    policy = RetentionPolicy(5, max_bytes=30)
    assert words(judge(items, policy, {cid("g1/s2"): "a restore reads it"})) == [
        "keep g1/s5: the newest",
        "prune g1/s4: 40 bytes are kept where 30 are allowed",
        "prune g1/s3: 50 bytes are kept where 30 are allowed",
        "keep g1/s2: one of the last 5; a restore reads it",
        "keep g1/s1: one of the last 5; tagged paper",
    ]
    assert kept(judge(held("g1/s1", "g1/s2"), RetentionPolicy(5, max_bytes=1), {})) == {cid("g1/s2")}


def test_room_is_made_of_what_only_its_turn_keeps():
    """Proves that the oldest go first, no more than it takes, and none that anything but keep_last keeps."""
    items = [*held("g1/s1", tags=("paper",)), *held("g1/s2", "g1/s3", "g1/s4", "g1/s5", "g1/s6")]
    policy, in_use = RetentionPolicy(9, keep_every_steps=4), {cid("g1/s5"): "a restore reads it"}
    assert words(make_room(items, policy, in_use, 11)) == [
        "prune g1/s2: the tier is full, and nothing but keep_last keeps it",
        "prune g1/s3: the tier is full, and nothing but keep_last keeps it",
    ]
    assert [item.id for item in make_room(items, policy, in_use, 1)] == [cid("g1/s2")]
    assert make_room(items, policy, in_use, 0) == []
    assert make_room(held("g1/s1"), RetentionPolicy(1), {}, 99) == []


def test_nothing_is_judged_of_nothing():
    """Proves that an empty tier has no verdicts."""
    assert judge([], RetentionPolicy(1), {}) == []


@given(tiers, policies, uses)
def test_the_newest_stays_whatever_the_policy_says(items, policy, in_use):
    """Proves that the last commit is never pruned, that each checkpoint is judged once, and that each has a reason."""
    verdicts = judge(items, policy, in_use)
    assert [item.id for item in verdicts] == sorted((item.id for item in items), reverse=True)
    assert all(item.reasons and all(item.reasons) for item in verdicts)
    if items:
        assert verdicts[0].keep


@given(tiers, policies, uses)
def test_what_is_in_use_or_tagged_stays(items, policy, in_use):
    """Proves that no rule and no bound takes what a restore reads, or what has a name where names count."""
    stays = kept(judge(items, policy, in_use))
    assert {item.id for item in items if item.id in in_use} <= stays
    if policy.keep_tagged:
        assert {item.id for item in items if item.tags} <= stays


@given(tiers, policies, uses)
def test_rules_only_add(items, policy, in_use):
    """Proves that without a bound on bytes every rule alone keeps no more than all of them together."""
    policy = RetentionPolicy(
        policy.keep_last, policy.keep_every_s, policy.keep_every_steps, policy.keep_best, policy.keep_tagged
    )
    everything = kept(judge(items, policy, in_use))
    newest = sorted((item.id for item in items), reverse=True)[: policy.keep_last]
    assert set(newest) <= everything
    alone = [
        RetentionPolicy(0, keep_every_s=policy.keep_every_s),
        RetentionPolicy(0, keep_every_steps=policy.keep_every_steps),
        RetentionPolicy(0, keep_best=policy.keep_best, keep_tagged=policy.keep_tagged),
    ]
    for rule in alone if policy.keep_tagged else ():
        assert kept(judge(items, rule, {})) <= everything


@given(tiers, policies, uses)
def test_a_bound_on_bytes_holds_where_it_can(items, policy, in_use):
    """Proves that what stays is within the bound, or nothing is left that may go; and that it never adds anything."""
    unbound = RetentionPolicy(
        policy.keep_last, policy.keep_every_s, policy.keep_every_steps, policy.keep_best, policy.keep_tagged
    )
    stays = kept(judge(items, policy, in_use))
    assert stays <= kept(judge(items, unbound, in_use))
    may_go = [
        item
        for item in sorted(items, key=lambda item: item.id)[:-1]
        if item.id in stays and item.id not in in_use and not (policy.keep_tagged and item.tags)
    ]
    total_bytes = sum(item.size_bytes for item in items if item.id in stays)
    assert not policy.max_bytes or total_bytes <= policy.max_bytes or not may_go


@given(tiers, policies, uses)
def test_judging_again_prunes_nothing_more(items, policy, in_use):
    """Proves that what was kept once is kept again, so that pruning never runs away."""
    stays = kept(judge(items, policy, in_use))
    again = judge([item for item in items if item.id in stays], policy, in_use)
    assert kept(again) == stays


@given(tiers, policies)
def test_a_newer_one_takes_nothing_that_rules_over_all_have_named(items, policy):
    """Proves that the first of a stretch of steps stays as newer checkpoints come, while there is room."""
    policy = RetentionPolicy(1, keep_every_steps=policy.keep_every_steps)
    stays: set[CheckpointId] = set()
    known: list[Held] = []
    for item in sorted(items, key=lambda item: item.id):
        known = [other for other in known if other.id in stays] + [item]
        verdicts = judge(known, policy, {})
        firsts = {verdict.id for verdict in verdicts if any("first" in reason for reason in verdict.reasons)}
        stays = kept(verdicts)
        assert firsts <= stays
        if policy.keep_every_steps:
            assert {other.id.step // policy.keep_every_steps for other in known} == {
                verdict.step // policy.keep_every_steps for verdict in firsts
            }


@given(tiers, policies, uses, st.integers(0, 300))
def test_room_is_never_made_of_what_somebody_wanted_to_keep(items, policy, in_use, needed_bytes):
    """Proves that the newest, tags, uses and every rule but keep_last stay, and that what goes is enough or all."""
    going = {verdict.id for verdict in make_room(items, policy, in_use, needed_bytes)}
    unbound = RetentionPolicy(1, policy.keep_every_s, policy.keep_every_steps, policy.keep_best, policy.keep_tagged)
    wanted = kept(judge(items, unbound, in_use))
    assert not going & wanted
    freed_bytes = sum(item.size_bytes for item in items if item.id in going)
    assert freed_bytes >= needed_bytes or going == {item.id for item in items} - wanted
    if going:
        assert going == {item.id for item in items if item.id not in wanted and item.id <= max(going)}

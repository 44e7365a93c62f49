"""What is garbage, what waits for its grace to end, and which generation records are still of use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.garbage import (
    SKEW_S,
    Caution,
    Uses,
    judge_files,
    judge_markers,
    judge_records,
)
from ckptd.types import CheckpointId, Marker, StoredFile
from tests.core.script import cid

DAY_S = 86400.0
NOW = 1e9
ALONE = Caution(exclusive=True, now=NOW, after_s=DAY_S)
SHARED = Caution(exclusive=False, now=NOW, after_s=DAY_S)
OLD, YOUNG = NOW - DAY_S - SKEW_S, NOW - DAY_S

ids = st.builds(CheckpointId, st.integers(1, 4), st.integers(0, 4))
files = st.builds(
    lambda checkpoint, rank, at: StoredFile(f"{checkpoint}/{rank}", checkpoint, 10, at),
    ids,
    st.integers(0, 2),
    st.sampled_from([0.0, OLD, OLD + 1, YOUNG, NOW, NOW + DAY_S]),
)
names = st.builds("{}/{}".format, ids, st.integers(0, 2))
uses = st.builds(Uses, st.frozensets(names), st.frozensets(ids), st.frozensets(ids), st.frozensets(ids))
cautions = st.builds(Caution, st.booleans(), st.just(NOW), st.sampled_from([0.0, DAY_S]))
markers = st.lists(st.builds(Marker, ids, st.integers(0, 10**4).map(lambda age: NOW - age), st.just(9)), max_size=6)


def file(checkpoint: str, name: str, modified_at: float = OLD) -> StoredFile:
    """Return a file in the folder of a checkpoint."""
    return StoredFile(name, cid(checkpoint), 10, modified_at)


@pytest.mark.parametrize(
    ("item", "alone", "shared"),
    [
        (file("g1/s1", "referred"), "keep: a checkpoint needs it", None),
        (file("g1/s2", "a"), "remove: its checkpoint was removed", None),
        (file("g1/s3", "a"), "keep: it lies with a checkpoint that stays", None),
        (file("g1/s4", "a"), "keep: its checkpoint is on its way", None),
        (file("g1/s5", "released", NOW), "remove: the last checkpoint that needed it was removed", None),
        (
            file("g1/s6", "a", YOUNG),
            "remove: its checkpoint was never committed",
            "keep: somebody may be about to commit its checkpoint",
        ),
        (
            file("g1/s6", "a", OLD),
            "remove: its checkpoint was never committed",
            "remove: its checkpoint was not committed within 86400 s",
        ),
    ],
)  # fmt: skip
def test_files(item: StoredFile, alone: str, shared: str | None) -> None:
    """Proves each verdict and its reason, with a job held alone and with one that is not."""
    facts = Uses(
        needed={"referred"}, staying={cid("g1/s3")}, ours={cid("g1/s4")}, gone={cid("g1/s2")}, released={"released"}
    )
    for caution, wanted in ((ALONE, alone), (SHARED, shared or alone)):
        (verdict,) = judge_files([item], facts, caution)
        assert f"{'remove' if verdict.remove else 'keep'}: {verdict.reason}" == wanted


@given(st.lists(files, max_size=8), uses, cautions)
def test_what_anybody_needs_is_no_garbage(found, facts, caution):
    """Proves that no file goes that is needed, stays with its checkpoint or is on its way, and that all are judged."""
    verdicts = judge_files(found, facts, caution)
    assert [verdict.file for verdict in verdicts] == found
    for verdict in verdicts:
        if verdict.remove:
            assert verdict.file.name not in facts.needed
            assert verdict.file.checkpoint not in facts.ours
            assert verdict.file.checkpoint not in facts.staying or verdict.file.checkpoint in facts.gone


@given(st.lists(files, max_size=8), uses, cautions)
def test_where_others_may_write_less_goes_and_only_later(found, facts, caution):
    """Proves that sharing a place and a clock that is behind each take away from what goes, and never add to it."""

    def goes(caution: Caution) -> set[str]:
        return {verdict.file.name for verdict in judge_files(found, facts, caution) if verdict.remove}

    alone = goes(Caution(exclusive=True, now=caution.now, after_s=caution.after_s))
    earlier = Caution(caution.exclusive, caution.now - 3600, caution.after_s)
    assert goes(earlier) <= goes(caution) <= alone


@given(st.lists(files, max_size=8), uses)
def test_a_clock_that_is_ahead_removes_nothing_that_is_written_now(found, facts):
    """Proves that what was written just now is no garbage on a shared place, though our clock is 15 minutes ahead."""
    caution = Caution(exclusive=False, now=NOW + SKEW_S, after_s=1.0)
    facts = Uses(facts.needed, facts.staying, facts.ours, frozenset())
    assert not [v for v in judge_files(found, facts, caution) if v.remove and v.file.modified_at >= NOW]


def test_markers() -> None:
    """Proves when a removal becomes final, and when a marker means nothing."""
    found = [Marker(cid(f"g1/s{at}"), NOW - age, 9) for at, age in ((1, 10), (2, 100), (3, 10), (3, 100), (4, 100))]
    verdicts = judge_markers(found, {cid("g1/s4")}, 50.0, ALONE)
    assert [(item.ends, item.final) for item in verdicts] == [
        (False, False), (True, True), (False, False), (False, False), (True, False),
    ]  # fmt: skip
    assert verdicts[0].reason == "its removal can be undone for another 40 s"
    young, old = (Marker(cid("g1/s4"), NOW - age, 9) for age in (100, DAY_S + SKEW_S))
    assert [item.ends for item in judge_markers([young], {cid("g1/s4")}, 50.0, SHARED)] == [False]
    assert [item.ends for item in judge_markers([old], {cid("g1/s4")}, 50.0, SHARED)] == [True]


@given(markers, st.frozensets(ids), st.sampled_from([0.0, 50.0, 5000.0]), cautions)
def test_no_removal_is_final_before_its_time(found, committed, grace_s, caution):
    """Proves that nothing committed goes because of a marker, and nothing else before its newest marker is old."""
    for verdict in judge_markers(found, committed, grace_s, caution):
        newest = max(item.deleted_at for item in found if item.checkpoint == verdict.marker.checkpoint)
        over = NOW - newest >= grace_s
        assert verdict.final == (over and verdict.marker.checkpoint not in committed)
        assert verdict.reason
        assert verdict.ends or not verdict.final


@given(st.frozensets(st.integers(1, 9)), st.frozensets(ids), st.none() | st.integers(1, 9))
def test_records_stay_as_long_as_a_lineage_may_go_through_them(generations, remaining, needed_from):
    """Proves that the newest record stays, and every one from that of the oldest checkpoint on."""
    gone = judge_records(generations, remaining, needed_from)
    assert set(gone) <= generations
    assert not generations or max(generations) not in gone
    for generation in gone:
        assert needed_from is not None
        assert generation < needed_from
        assert all(generation < item.generation for item in remaining)


def test_records() -> None:
    """Proves on literals what goes."""
    assert judge_records({1, 2, 3, 5}, [cid("g3/s1")], 3) == (1, 2)
    assert judge_records({1, 2, 3, 5}, [cid("g3/s1")], 2) == (1,)
    assert judge_records({1, 2, 3, 5}, [], 9) == (1, 2, 3)
    assert judge_records({1, 2, 3, 5}, [cid("g3/s1")], None) == ()
    assert judge_records((), [], 4) == ()

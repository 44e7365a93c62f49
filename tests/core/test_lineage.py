"""Which committed checkpoints a new generation may begin with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.lineage import candidates, latest_generation
from ckptd.types import CheckpointId
from tests.core.script import cid


def line(parents: dict[int, str | None], *committed: str) -> list[str]:
    """Return the candidates as they are printed."""
    known = {number: None if parent is None else cid(parent) for number, parent in parents.items()}
    return [str(item) for item in candidates(known, map(cid, committed))]


def test_an_empty_store_has_no_lineage():
    """Proves that nothing leads to nothing."""
    assert line({}) == []
    assert latest_generation({}, []) == 0


def test_the_newest_step_comes_first():
    """Proves the order within one generation, whatever the order of the listing."""
    assert line({1: None}, "g1/s10", "g1/s30", "g1/s20") == ["g1/s30", "g1/s20", "g1/s10"]


def test_a_generation_without_commits_leads_to_its_parent():
    """Proves that an agent which died right after the claim leaves the line intact."""
    assert line({1: None, 2: "g1/s20", 3: "g1/s20"}, "g1/s10", "g1/s20") == ["g1/s20", "g1/s10"]


def test_a_parent_that_never_was_committed_still_marks_the_place():
    """Proves that a restart from memory, whose snapshot was lost with the agent, leads to what came before it."""
    assert line({1: None, 2: "g1/s25"}, "g1/s10", "g1/s20", "g1/s30") == ["g1/s20", "g1/s10"]


def test_a_step_back_leaves_newer_ones_out():
    """Proves that what lies beyond the parent is no ancestor, however high its step number."""
    assert line({1: None, 2: "g1/s10"}, "g1/s10", "g1/s90", "g2/s15") == ["g2/s15", "g1/s10"]


def test_a_line_goes_back_over_several_generations():
    """Proves that each generation counts up to the step that the next one began with."""
    assert line(
        {1: None, 2: "g1/s20", 3: "g2/s30", 4: "g2/s30"},
        "g1/s10", "g1/s20", "g1/s25", "g2/s30", "g2/s40", "g3/s35", "g4/s50",
    ) == ["g4/s50", "g2/s30", "g1/s20", "g1/s10"]  # fmt: skip


def test_a_step_back_whose_target_has_not_arrived_yet_leads_to_what_is_there():
    """Proves that a bucket which has the claim of a generation, but nothing of its lineage yet, is still good for one.

    That is so between a step back and the first upload after it: what it left behind beats a fresh start.
    """
    assert line({1: None, 2: "g1/s39"}, "g1/s40", "g1/s42") == ["g1/s42", "g1/s40"]
    assert line({1: None, 2: "g1/s39"}, "g1/s40", "g1/s42", "g2/s41") == ["g2/s41"]


def test_a_fresh_start_has_no_ancestors():
    """Proves that a generation that began from nothing hides what was there before it."""
    assert line({1: None, 2: None}, "g1/s10", "g2/s5") == ["g2/s5"]


def test_a_record_that_points_forward_ends_the_line():
    """Proves that a damaged generation record can't send the search round in circles."""
    assert line({1: "g2/s10", 2: "g1/s10"}, "g1/s10", "g2/s20") == ["g2/s20", "g1/s10"]
    assert line({2: "g2/s10"}, "g2/s20") == ["g2/s20"]


def test_a_lost_generation_record_is_survived():
    """Proves that commits whose generation has no record are still offered."""
    assert line({}, "g3/s30", "g3/s20") == ["g3/s30", "g3/s20"]


@st.composite
def histories(draw):
    """Draw a job's true history: each generation begins with something that existed, and commits some of its steps."""
    parents: dict[int, CheckpointId | None] = {}
    committed: list[CheckpointId] = []
    ancestry: list[CheckpointId] = []
    for number in sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=6))):
        parent = draw(st.sampled_from([None, *ancestry]))
        parents[number] = parent
        ancestry = [] if parent is None else ancestry[: ancestry.index(parent) + 1]
        first = 0 if parent is None else parent.step
        steps = draw(st.lists(st.integers(1, 5), max_size=4))
        for gap in steps:
            first += gap
            snapshot = CheckpointId(number, first)
            ancestry.append(snapshot)
            if draw(st.booleans()):
                committed.append(snapshot)
    return parents, committed, [item for item in ancestry if item in committed]


@given(histories(), st.randoms())
def test_the_line_is_what_really_happened(history, rng):
    """Proves that the candidates are exactly the committed ancestors, newest first, whatever order a tier lists."""
    parents, committed, ancestors = history
    rng.shuffle(committed)
    if ancestors:
        assert candidates(parents, committed) == ancestors[::-1]


@given(histories())
def test_a_line_of_which_nothing_is_left_gives_way_to_the_one_before(history):
    """Proves that a fresh start is made only where nothing at all is committed, and that older lines come in turn."""
    parents, committed, ancestors = history
    assert bool(candidates(parents, committed)) == bool(committed)
    if not ancestors:
        older = {number: parent for number, parent in parents.items() if number != max(parents)}
        assert candidates(parents, committed) == candidates(older, committed)


@given(histories())
def test_the_next_generation_is_above_every_number_in_use(history):
    """Proves that a claim can't meet a number that a record or a commit has used."""
    parents, committed, _ = history
    latest = latest_generation(parents, committed)
    assert latest == max([*parents, *(item.generation for item in committed)])

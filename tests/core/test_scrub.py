"""Which copy is read again: the table of the policy, and what holds for all facts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.scrub import Copy, decide
from ckptd.core.restore import Source
from tests.core.script import BUCKET, TIER, cid

OLD, NEW, FAR = Source(cid("g1/s10"), TIER), Source(cid("g1/s20"), TIER), Source(cid("g1/s10"), BUCKET)
NEVER = -float("inf")


@pytest.mark.parametrize(
    ("copies", "busy", "chosen", "reason"),
    [
        ([], {}, None, "no copy is due"),
        ([Copy(OLD, 0.0, 101.0)], {}, None, "no copy is due"),
        ([Copy(OLD, 0.0, 100.0)], {}, OLD, "nobody has read it for 100 s"),
        ([Copy(NEW, 0.0, 50.0), Copy(FAR, 0.0, 20.0)], {}, FAR, "nobody has read it for 100 s"),
        ([Copy(OLD, 90.0, 20.0), Copy(NEW, NEVER, 20.0)], {}, NEW, "it was found damaged"),
        ([Copy(OLD, 10.0, 20.0), Copy(NEW, 10.0, 20.0)], {}, NEW, "nobody has read it for 90 s"),
        ([Copy(OLD, 0.0, 20.0), Copy(NEW, 10.0, 20.0)], {OLD: "it is read"}, NEW, "nobody has read it for 90 s"),
        ([Copy(OLD, 0.0, 20.0)], {OLD: "its upload reads it"}, None, "g1/s10 on local is due, but its upload reads it"),
    ],
)
def test_what_is_read_next(copies: list[Copy], busy: dict[Source, str], chosen: Source | None, reason: str) -> None:
    """The copy that has waited longest for its turn, none that is busy, and the reason in words."""
    decision = decide(copies, busy, 100.0)
    assert (decision.source, decision.reason) == (chosen, reason)


_COPIES = st.lists(
    st.builds(
        Copy,
        st.builds(
            Source, st.builds(lambda step: cid(f"g1/s{step}"), st.integers(1, 9)), st.sampled_from([TIER, BUCKET])
        ),
        st.floats(-1000, 1000),
        st.floats(0.001, 1000),
    ),
    unique_by=lambda copy: copy.source,
)


@given(_COPIES, st.sets(st.integers(0, 8)), st.floats(0, 1000))
def test_nothing_is_read_too_early_and_nothing_starves(copies: list[Copy], places: set[int], now_s: float) -> None:
    """Whatever the facts: what is read is due and free, and nothing else that is due and free was due before it."""
    busy = {copy.source: "of its upload" for place, copy in enumerate(copies) if place in places}
    found = decide(copies, busy, now_s).source
    free = [copy for copy in copies if copy.due_s <= now_s and copy.source not in busy]
    assert (found is None) == (not free)
    if found is not None:
        assert min(copy.due_s for copy in free) == next(copy.due_s for copy in free if copy.source == found)

"""Reported numbers on the control page: a ring that one side writes and the other reads."""

from __future__ import annotations

import math
import os

from hypothesis import given
from hypothesis import strategies as st

from ckptd.protocol.page import PAGE_BYTES, RING_ENTRIES, ControlPage, Word


def new_page() -> ControlPage:
    """Return a page of one's own."""
    descriptor = os.memfd_create("test-page", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, PAGE_BYTES)
    try:
        return ControlPage(descriptor)
    finally:
        os.close(descriptor)


@given(st.lists(st.integers(0, 2 * RING_ENTRIES), max_size=8))
def test_nothing_is_read_twice_and_what_is_lost_is_counted(batches: list[int]) -> None:
    """However many are written between two looks, each is read once, in order, or counted as lost."""
    page, since, said = new_page(), 0, 0
    for size in batches:
        begin = said
        for _ in range(size):
            said += 1
            page.report(said, said / 2)
        since, found, missed = page.reports(since)
        expected = list(range(begin + 1, said + 1))
        kept = expected[missed:]
        assert [step for step, _ in found] == kept
        assert [value for _, value in found] == [step / 2 for step in kept]
        assert missed == max(0, size - (RING_ENTRIES - 1) if said >= RING_ENTRIES else 0)
    page.close()


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_survives(value: float) -> None:
    """A value is read as the very float that was reported."""
    page = new_page()
    page.report(7, value)
    _, ((step, read),), _ = page.reports(0)
    assert step == 7
    assert read == value or (math.isnan(read) and math.isnan(value))
    page.close()


def test_who_takes_over_reads_what_is_left() -> None:
    """An agent that finds a ring in use reads all that it holds, and misses nothing by that."""
    page = new_page()
    for step in range(1, 201):
        page.report(step, 1.0)
    count, found, missed = page.reports(None)
    assert (count, missed) == (200, 0)
    assert [step for step, _ in found] == list(range(202 - RING_ENTRIES, 201))
    page.close()


def test_a_report_that_may_be_half_written_is_not_read() -> None:
    """When the ring is full the oldest lies where the next is being written, so that one is lost."""
    page = new_page()
    for step in range(RING_ENTRIES):
        page.report(step, 1.0)
    assert page.words[Word.REPORTS] == RING_ENTRIES
    _, found, missed = page.reports(0)
    assert (found[0][0], missed) == (1, 1)
    page.close()

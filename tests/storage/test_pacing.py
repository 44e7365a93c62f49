"""Bounded bandwidth, as arithmetic and beside real threads; niceness as the kernel reports it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import InvariantError
from ckptd.storage.pacing import NICENESS, Bucket, Pacer, be_nice

RATE = 1000.0
BURST = RATE * 0.1
requests = st.lists(st.tuples(st.floats(0, 2), st.integers(0, 1000)), min_size=1, max_size=30)
"""How long after the last one each comes, and its bytes."""


@given(requests)
def test_no_stretch_of_time_sees_more_than_the_rate(asked: list[tuple[float, int]]) -> None:
    """Between any two moments at most rate x time, one burst and the request that overdrew it pass."""
    bucket, now_s = Bucket(RATE, 0.0), 0.0
    passed: list[tuple[float, int]] = []
    for pause_s, size in asked:
        now_s += pause_s
        passed.append((now_s + bucket.take(size, now_s), size))
    for (before_s, _), (at_s, _) in pairwise(passed):
        assert at_s >= before_s - 1e-9, "one overtook another"  # times are sums of floats
    largest = max(size for _, size in passed)
    for first, (begin_s, _) in enumerate(passed):
        total = 0
        for end_s, size in passed[first:]:
            total += size
            assert total <= RATE * (end_s - begin_s) + BURST + largest + 1e-6


@given(requests)
def test_nobody_waits_longer_than_the_rate_demands(asked: list[tuple[float, int]]) -> None:
    """Each is let through when all before it are paid for: a bound slows down, it does not stop."""
    bucket, now_s, before = Bucket(RATE, 0.0), 0.0, 0
    for pause_s, size in asked:
        now_s += pause_s
        assert 0 <= bucket.take(size, now_s) <= before / RATE + 1e-9
        before += size


def test_a_flow_settles_at_the_rate() -> None:
    """Requests that always come at once are let through at exactly the rate, after the first burst."""
    bucket, now_s = Bucket(RATE, 5.0), 5.0
    for _ in range(101):
        now_s += bucket.take(50, now_s)
    assert now_s - 5.0 == pytest.approx((100 * 50 - BURST) / RATE)


def test_a_clock_that_stands_still_is_no_gain() -> None:
    """The same or an earlier moment gives no new tokens."""
    bucket = Bucket(RATE, 10.0)
    assert bucket.take(1000, 10.0) == 0
    waits = [bucket.take(0, at_s) for at_s in (10.0, 9.0, 10.0)]
    assert waits == [pytest.approx(0.9)] * 3


def test_threads_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What several threads move together keeps to the bound: the waits add up to what all their bytes take."""
    slept: list[float] = []
    monkeypatch.setattr("ckptd.storage.pacing.time.monotonic", lambda: 100.0)
    monkeypatch.setattr("ckptd.storage.pacing.time.sleep", slept.append)
    pace = Pacer(RATE)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pace, [100] * 20))
    assert sorted(slept) == [pytest.approx(0.1 * number) for number in range(1, 19)]


def test_a_bound_of_nothing_is_a_bug() -> None:
    """No bound is said by having no pacer."""
    with pytest.raises(InvariantError):
        Pacer(0)


def test_nice_threads_and_what_they_start() -> None:
    """A pool's threads step back, with the threads that they start in turn; this thread keeps its priority."""
    inner: list[int] = []

    def look() -> int:
        thread = threading.Thread(target=lambda: inner.append(_niceness()))
        thread.start()
        thread.join()
        return _niceness()

    before = _niceness()
    with ThreadPoolExecutor(1, initializer=be_nice) as pool:
        assert pool.submit(look).result() == max(before, NICENESS)
    assert inner == [max(before, NICENESS)]
    assert _niceness() == before


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

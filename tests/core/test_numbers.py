"""What a reported number says of training."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.numbers import LEAST, NumbersPolicy, judge

finite = st.floats(-1e6, 1e6)
windows = st.lists(finite, max_size=60)
POLICY = NumbersPolicy()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_at_once(value):
    """Proves that NaN and infinities need no window, and are named with their metric."""
    found = judge([], value, NumbersPolicy(metric="nll"))
    assert found is not None
    assert (found.kind, found.summary) == ("nan", f"nll {value:g}")


def test_a_spike_is_named_with_its_measure():
    """Proves the finding on literals: the median is 2, the MAD 0.1, so 5 is 3 / 0.14826 deviations above it."""
    window = [1.9, 2.0, 2.1] * 6
    found = judge(window, 5.0, POLICY)
    assert found is not None
    assert found.kind == "spike"
    assert found.summary == "loss 5, 20.2 deviations above the median 2 of the last 18"
    assert judge(window, 3.4, POLICY) is None


@given(finite.filter(lambda value: abs(value) > 1e-6), st.floats(0, 0.0999))
def test_a_flat_loss_does_not_alarm(level, change):
    """Proves that without any spread in the window a value must be 10 times 1 % above it to be a spike."""
    window = [level] * 128
    assert judge(window, level + abs(level) * change, POLICY) is None
    assert judge(window, level + abs(level) * 0.2, POLICY) is not None


def test_where_all_is_nought_nothing_can_be_told():
    """Proves that a window without any scale calls nothing a spike."""
    assert judge([0.0] * 128, 1.0, POLICY) is None


@given(windows, finite)
def test_what_was_seen_before_is_no_spike(window, value):
    """Proves that only a value above all in a window that is long enough can be one, and that more of it stays one."""
    found = judge(window, value, POLICY)
    if found is not None:
        assert len(window) >= LEAST
        assert value > max(window)
        assert judge(window, value + abs(value) + 1, POLICY) is not None


@given(st.lists(st.floats(1.0, 2.0), min_size=32, max_size=60), st.lists(st.floats(1e3, 1e6), max_size=10))
def test_a_few_odd_values_hide_no_spike(window, odd):
    """Proves that a quarter of odd values in the window does not make one twice as high look normal."""
    assert judge([*window, *odd], 2e6, POLICY) is not None


@given(windows, finite)
def test_zero_switches_spikes_off(window, value):
    """Proves that zscore = 0 calls no finite value a spike."""
    assert judge(window, value, NumbersPolicy(zscore=0.0)) is None


def test_a_short_window_is_enough_when_it_is_asked_for():
    """Proves that a window of fewer values than the usual least is used as soon as it is full."""
    policy = NumbersPolicy(window=4)
    assert judge([1.0] * 3, 9.0, policy) is None
    assert judge([1.0] * 4, 9.0, policy) is not None

"""The setting `numbers`, as it is written on the command line, in TOML and in options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ckptd.config import JobConfig
from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.errors import ConfigError
from ckptd.numbers_config import read_numbers
from ckptd.store_config import StoreConfig


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("warn", NumbersPolicy()),
        ("off", NumbersPolicy("off")),
        ("step_back, healthy=5, zscore=6.5", NumbersPolicy("step_back", healthy=5, zscore=6.5)),
        ("metric=nll,window=64", NumbersPolicy(metric="nll", window=64)),
        ({"policy": "step_back", "zscore": 0}, NumbersPolicy("step_back", zscore=0.0)),
        ({}, NumbersPolicy()),
    ],
)
def test_what_can_be_said(said: object, means: NumbersPolicy) -> None:
    """Proves that text and tables mean the same settings, and that what is left out has its default."""
    assert read_numbers(said) == means


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("stepback", "the policy of numbers is 'stepback'"),
        ("warn,off", "numbers 'warn,off' is not understood"),
        ("warn,window=many", "numbers.window is 'many'"),
        ("warn,healthy=2.5", "numbers.healthy is '2.5'"),
        ("warn,healthy=0", "numbers.healthy is 0"),
        ("warn,window=1", "the window of numbers is 1"),
        ("warn,zscore=-1", "the zscore of numbers is -1"),
        ("warn,zscore=nan", "the zscore of numbers is nan"),
        ("warn,metric=", "the metric of numbers has no name"),
        ({"polcy": "warn"}, "numbers has no setting 'polcy'"),
        ({"window": True}, "numbers.window is True"),
        ({"metric": 3}, "numbers.metric is 3"),
        (3, "numbers is 3"),
    ],
)
def test_what_can_not_be_said(said: object, says: str) -> None:
    """Proves that each mistake is named, with an example of what is right."""
    with pytest.raises(ConfigError) as caught:
        read_numbers(said)
    assert says in caught.value.message
    assert "numbers = {" in caught.value.hint


def test_a_job_keeps_it() -> None:
    """Proves that the setting crosses the socket and the journal unchanged."""
    config = JobConfig("job", ("train.py",), (StoreConfig("/runs"),), numbers=NumbersPolicy("step_back", window=32))
    data: dict[str, Any] = config.to_json()
    assert data["numbers"] == dataclasses.asdict(config.numbers)
    assert JobConfig.from_json(data).numbers == config.numbers

"""Jobs in the states from which the scenarios of this folder go on."""

from __future__ import annotations

import pytest

from tests.core.script import Script


@pytest.fixture
def job() -> Script:
    """A supervised job of two ranks on an empty store, not begun."""
    return Script()


@pytest.fixture
def begun(job: Script) -> Script:
    """The same job with generation 1 claimed, and no rank started."""
    job.begin()
    job.store()
    job.claimed(1)
    return job


@pytest.fixture
def starting(begun: Script) -> Script:
    """The same job with a process of every rank, none of which has joined."""
    begun.spawned()
    return begun


@pytest.fixture
def training(job: Script) -> Script:
    """The same job in generation 1; every rank has finished step 1, and a step takes a second."""
    job.begin_training()
    job.now_s += 1.0
    job.progress(2)
    return job


@pytest.fixture
def captured(training: Script) -> Script:
    """The same job with step 10 committed, held in slot 0."""
    assert training.capture(10, 0) == ["announce None", "flush g1/s10"]
    assert training.committed("g1/s10") == ["log checkpoint committed"]
    return training

"""Campaigns of the simulation in which a batch makes the loss a NaN, and then all weights."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter

import pytest

from ckptd.core.health import Health
from ckptd.core.numbering import Numbering
from tests.simulation.node import SimulationError, run
from tests.simulation.options import Options

SEEDS = int(os.environ.get("CKPTD_SIM_SEEDS", "800")) // 8
FIRST_SEED = int(os.environ.get("CKPTD_SIM_FIRST_SEED", "0"))
KINDS = ("rank", "rank", "ranks", "agent", "agent", "stop", "checkpoint", "restart", "step back")
REACHED = ("NaN heard", "stepped back", "fresh start", "from memory", "from local", "agent", "stop", "numbers suspect")


def options_of(seed: int) -> Options:
    """Draw a run with a NaN somewhere; what disks do to checkpoints is another campaign's matter."""
    drawn = Options.draw(seed)
    return dataclasses.replace(
        drawn, nan_at=random.Random(seed).randint(1, drawn.total_steps), bucket=False, disk_files=0, differ_from=None,
        scrub_s=0.0, write_error_chance=0.0, fault_kinds=KINDS,
    )  # fmt: skip


@pytest.mark.timeout(0 if SEEDS > 250 else 120)
def test_no_job_ends_on_weights_that_came_of_a_nan():
    """Proves that whatever dies beside the NaN, every job steps back to what is healthy, and ends without it."""
    seen: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        seen += run(seed, options_of(seed)).witness.seen
    if SEEDS >= 100:
        assert [what for what in REACHED if not seen[what]] == []


def broken(attempts: int = 60) -> str:
    """Return what the witness says of the first run that it calls wrong."""
    for seed in range(attempts):
        try:
            run(seed, options_of(seed))
        except SimulationError as error:
            return str(error.problem)
    return ""


def test_the_witness_sees_a_job_that_does_not_step_back(monkeypatch):
    """Proves that a machine which is deaf to a NaN is caught by what its ranks end with."""
    monkeypatch.setattr(Numbering, "_reported", lambda *_: [])
    assert "ends with weights that came of a NaN" in broken()


def test_the_witness_sees_a_step_back_to_the_wrong_place(monkeypatch):
    """Proves that to take the newest that is not suspect, though a healthy one is there, is caught."""
    monkeypatch.setattr(
        Health, "best", lambda self, items: max((i for i in items if i not in self.suspect), default=None)
    )
    assert "steps back to" in broken()


def test_the_witness_sees_the_newest_healthy_checkpoint_go(monkeypatch):
    """Proves that retention which knows nothing of health is caught."""
    monkeypatch.setattr(Health, "needed", lambda *_: {})
    assert "the newest healthy" in broken()

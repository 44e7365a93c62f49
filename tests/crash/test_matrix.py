"""A sample of the matrix, one cell for each kind of call; `make crashmatrix` harms every single call."""

from __future__ import annotations

import pytest

from tests.crash.matrix import ERRORS, FIRST_STEPS, KILLS, PHASES, Bench, Case, Verdict, harm, run_case
from tests.crash.world import World

_FRESH = ((9, KILLS[0]), (40, KILLS[1]), (140, KILLS[0]), (45, ERRORS[0]), (60, ERRORS[3]))
_RESUME = ((12, KILLS[0]), (80, KILLS[0]))
_BUCKET = (("upload", 38, KILLS[0]), ("fetch", 25, KILLS[1]))


def _is_as_promised(verdict: Verdict) -> None:
    assert verdict.problems == [], f"{verdict.case}: {verdict.met}"
    assert verdict.garbage == [], f"{verdict.case}: {verdict.met}"
    assert verdict.was_met, f"{verdict.case}: only {verdict.count} calls"


@pytest.mark.parametrize(("at", "what"), _FRESH)
def test_a_fresh_job(bench: Bench, at: int, what: str) -> None:
    """Harmed at that call of its life, a job keeps its newest checkpoint, ends right, and leaves no garbage."""
    _is_as_promised(run_case(bench, Case(PHASES["fresh"], harm(PHASES["fresh"], at, what))))


@pytest.mark.parametrize(("at", "what"), _RESUME)
def test_a_job_that_resumes(bench: Bench, at: int, what: str) -> None:
    """Killed once more while it resumes, the same."""
    _is_as_promised(run_case(bench, Case(PHASES["resume"], harm(PHASES["resume"], at, what))))


@pytest.mark.xdist_group("object store")
@pytest.mark.parametrize(("phase", "at", "what"), _BUCKET)
def test_a_job_with_a_bucket(bucket_bench: Bench, phase: str, at: int, what: str) -> None:
    """Killed at that request to a bucket, or at that call while it fetches from one, the same on both tiers."""
    _is_as_promised(run_case(bucket_bench, Case(PHASES[phase], harm(PHASES[phase], at, what))))


def test_every_kind_of_call_is_there(world: World) -> None:
    """A quiet run makes every kind of call that the storage layer is made of, a write over a spare too."""
    outcome = world.run(4 * FIRST_STEPS)  # a busy machine takes few captures, and the first two make no spare
    assert outcome.code == 0, outcome.output[-4000:]
    made = {line["call"] for line in outcome.calls}
    assert {"open", "pwrite", "fsync", "rename", "link", "unlink", "mkdir", "rmdir", "scandir", "fallocate"} <= made
    kept = [line for line in outcome.calls if line["call"] == "rename" and ".tmp-spares-" in str(line["paths"][0])]
    assert kept, "no spare was written over"

"""Campaigns of the simulation: many seeds, each a run with faults that must end as if there had been none.

`CKPTD_SIM_SEEDS` and `CKPTD_SIM_FIRST_SEED` choose how many seeds and from where; ``python -m tests.simulation`` runs
the same on several cores and replays a single seed.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, deque

import pytest

from ckptd.core import events as e
from ckptd.core.job_states import TERMINAL, JobState
from tests.simulation.node import Node, SimulationError, run
from tests.simulation.options import Options
from tests.simulation.storage import TIER

SEEDS = int(os.environ.get("CKPTD_SIM_SEEDS", "500"))
FIRST_SEED = int(os.environ.get("CKPTD_SIM_FIRST_SEED", "0"))

REACHED = (
    "fresh start", "from memory", "from local", "killed in a capture", "killed during a flush", "launcher",
    "killed before the first step", "agent killed during a flush", "agent between two effects", "FlushFailed",
    "FetchFailed", "RestoreFailed", "CaptureMissed", "step back", "restart", "stop", "halt", "checkpoint skipped",
    "snapshot abandoned", "restart delayed", "damage found in memory", "damage found on the disk", "referred to",
    "replicas differ", "given up", "from bucket", "UploadFailed", "upload skipped", "agent killed during an upload",
    "bucket down", "bucket slow", "disk lost", "tier unreadable", "fetch failed",
    "takeover", "rank returned", "job adopted", "NaN heard", "stepped back",
    "hang found", "room made", "record removed", "damage found by a scrub", "mended by a scrub", "offered again",
)  # fmt: skip
"""What a campaign must have met, or its faults don't reach what they are meant to test."""


@pytest.mark.timeout(0 if SEEDS > 2000 else 120)
def test_every_seed_finishes_within_the_design():
    """Proves that no seed breaks an invariant and every job finishes, and that the faults reach what they should."""
    seen: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        seen += run(seed).witness.seen
    if SEEDS >= 500:
        assert [what for what in REACHED if not seen[what]] == []


@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills_of_ranks_cost_nothing_but_time(seed):
    """Proves that 20 kills in 400 steps, whenever they come, leave the state and the checkpoint of a quiet run."""
    options = Options(total_steps=400, faults=20, fault_chance=0.02, fault_kinds=("rank",), every_s=0.5, step_s=0.05)
    node = run(seed, options)
    assert node.witness.seen["rank"] + node.witness.seen["rank between two effects"] == 20
    assert node.witness.seen["from memory"] + node.witness.seen["fresh start"] == node.witness.started


@pytest.mark.parametrize("seed", range(5))
def test_memory_makes_a_dead_disk_harmless_to_restarts(seed):
    """Proves that restarts go on from memory while every write to the disk fails, and that the end is no success."""
    options = Options(
        total_steps=60, faults=6, fault_chance=0.005, fault_kinds=("rank",), every_s=0.3, write_error_chance=1.0
    )
    node = Node(seed, options)
    while node.clock.now_s < 30 and not node.witness.hopeless():
        node.clock.step(node.fault_point)
        node.witness.after_event()
    assert node.disk.manifests == {}
    assert node.witness.seen["from local"] == 0


def course(seed: int, options: Options) -> list[tuple[float, str]]:
    """Run until training is over; return when what was committed on the disk, and when which generation began."""
    node = Node(seed, options)
    node.trace = deque(maxlen=None)
    while node.agent.machine.state not in (JobState.DRAINING, *TERMINAL):
        node.clock.step(node.fault_point)
        node.witness.after_event()
    said = [(at_s, what) for at_s, kind, what in node.trace if kind == "in" and getattr(what, "tier", TIER) == TIER]
    return [(at_s, str(what)) for at_s, what in said if isinstance(what, (e.Committed, e.Claimed, e.RankStepped))]


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_bucket_delays_nothing(seed):
    """Proves that with a bucket that never answers each commit and each restart comes when it comes without one."""
    options = Options(
        total_steps=200, faults=10, fault_chance=0.01, fault_kinds=("rank",), every_s=0.5, step_s=0.05, keep_last=8
    )
    without = course(seed, options)
    dead = dataclasses.replace(options, bucket=True, bucket_read_s=0.0, bucket_error_chance=1.0)
    assert course(seed, dead) == without
    assert sum("Committed" in what for _, what in without) > 10
    assert sum("Claimed" in what for _, what in without) > 5


@pytest.mark.parametrize("seed", range(5))
def test_a_bucket_that_comes_back_gets_the_newest_checkpoint(seed):
    """Proves that after an outage over most of a training the newest checkpoint arrives, soon and before the end."""
    options = Options(total_steps=400, faults=0, every_s=0.5, step_s=0.05, bucket=True)
    node = Node(seed, options)
    node.bucket.down_until_s = 12.0
    newest = None
    while not node.finished:
        node.clock.step(node.fault_point)
        node.witness.after_event()
        if node.clock.now_s < 12.0:
            newest = max(node.disk.manifests, default=None)
            assert node.bucket.manifests == {}
        elif not node.bucket.manifests:
            assert node.clock.now_s < 12.0 + 60.0
        elif newest is not None:
            assert max(node.bucket.manifests) >= newest
            assert node.witness.started == 1
    assert max(node.bucket.manifests) == max(node.disk.manifests)


def test_a_lost_disk_costs_what_was_not_uploaded():
    """Proves that a node which is lost again and again goes on from the bucket and finishes."""
    options = Options(total_steps=200, fault_chance=0.002, fault_kinds=("disk lost",), every_s=0.5, bucket=True)
    seen: Counter[str] = Counter()
    for seed in range(10):
        seen += run(seed, options).witness.seen
    assert seen["from bucket"] >= 10


def test_who_hangs_is_found_and_nobody_else():
    """Proves that ranks which stand still at any moment are ended, soon in training, and no other is called hung."""
    seen: Counter[str] = Counter()
    for seed in range(100):
        kinds = ("hang", "hang", "hang", "rank", "agent", "stop", "checkpoint")
        seen += run(seed, dataclasses.replace(Options.draw(seed), faults=6, fault_kinds=kinds)).witness.seen
    for what in ("hang found", "hang found soon"):
        assert seen[what], (what, seen)


def test_who_leaves_on_purpose_has_everything_safe_or_says_what_is_not():
    """Proves that a stop with any grace at any moment keeps it, and leaves the newest everywhere or says so."""
    seen: Counter[str] = Counter()
    for seed in range(80):
        drawn = Options.draw(seed)
        kinds = ("stop", "stop", "bucket slow", "bucket down", "rank")
        options = dataclasses.replace(drawn, bucket=True, faults=8, fault_chance=0.01, fault_kinds=kinds)
        seen += run(seed, options).witness.seen
    for what in ("left after a last capture", "left with everything in the bucket", "left behind, and said so"):
        assert seen[what] > 5, (what, seen)


@pytest.mark.timeout(120)
def test_agents_come_and_go_under_ranks_that_train():
    """Proves that agents which die one after the other, launchers and ranks too, cost nothing that is still held."""
    seen: Counter[str] = Counter()
    kinds = ("takeover", "takeover", "takeover", "rank", "launcher")
    for seed in range(80):
        drawn = Options.draw(seed)
        options = dataclasses.replace(drawn, faults=5, fault_chance=0.01, nan_at=0, fault_kinds=kinds)
        seen += run(seed, options).witness.seen
    for what in ("takeover", "takeover between two effects", "rank returned", "job adopted", "memory lost with a rank"):
        assert seen[what] > 5, (what, seen)
    assert seen["launcher lost"] > 10


def test_a_seed_is_a_run():
    """Proves that a seed replays a run event for event, without which a failure could not be looked into."""
    first, second = run(7), run(7)
    assert first.clock.events == second.clock.events
    assert first.lines() == second.lines()


def test_a_failure_says_how_to_replay_it(monkeypatch):
    """Proves that a broken run names its seed and ends with a short trace."""
    monkeypatch.setattr("tests.simulation.witness.Witness.job_finished", lambda witness: witness.require(False, "no"))
    with pytest.raises(SimulationError) as caught:
        run(11, dataclasses.replace(Options.draw(11), faults=0))
    lines = str(caught.value).splitlines()
    assert lines[0] == "ViolationError: no"
    assert lines[1] == "replay: python -m tests.simulation --first 11 --seeds 1 --trace"
    assert 10 < len(lines) < 80

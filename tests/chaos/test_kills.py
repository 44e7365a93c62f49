"""The campaign of part A: twenty kills at random moments over one run, which ends bit-identical to a quiet one.

`make chaos` runs it. `CKPTD_CHAOS_SEED` chooses the moments; a failure prints it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.harness import World, until

STEPS = 600
KILLS = 20
EVERY_S = 0.3
PAUSE = "--pause=0.005"
MOMENTS = ("any", "capture", "flush", "any")
WIDTH = "--width=20000"  # some 10 MiB of state a rank: captures and flushes take long enough to be hit


def lead_and_interval(world: World, job: str) -> int:
    """Return how many steps an interval may hold in this run, from the fastest pace that its commits show."""
    listed = world.json("ls", job)
    newest, older = listed[0], listed[1]
    pace = (newest["step"] - older["step"]) / max(1e-3, newest["committed_at"] - older["committed_at"])
    return int(EVERY_S * pace * 3) + 10


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("overlap", ["auto", "on"])
def test_twenty_kills_at_random_moments(tmp_path: Path, overlap: str) -> None:
    """Twenty SIGKILLs at random moments: the run ends bit-identical, with at most an interval lost for each."""
    seed = int(os.environ.get("CKPTD_CHAOS_SEED", time.time_ns() % 10**6))
    print(f"CKPTD_CHAOS_SEED={seed}")
    random_ = random.Random(seed)
    world = World(tmp_path)
    try:
        options = ("--name", "quiet")
        world.finish(world.run("train.py", STEPS, WIDTH, options=options))
        killed = ("--name", "killed", "--overlap", overlap)
        run = world.run("train.py", STEPS, WIDTH, PAUSE, every=f"{EVERY_S}s", options=killed)
        world.until_training("killed", 1)
        kills, hits = 0, dict.fromkeys(MOMENTS, 0)
        while kills < KILLS:
            moment = MOMENTS[kills % len(MOMENTS)]
            time.sleep(random_.expovariate(1 / 0.4))
            if not _wait_for(moment, world):
                continue
            now = world.status("killed")
            assert run.poll() is None, world.output(run)[-4000:]
            if now is None or now["state"] != "running" or now["step"] > STEPS - 15:
                assert now is None or now["step"] <= STEPS - 15, f"only {kills} kills before the end"
                continue
            world.kill_rank("killed", random_.randrange(2), signal.SIGKILL)
            kills += 1
            hits[moment] += 1
            until(lambda n=kills: len(world.incidents_now("killed")) >= n, "the incident")
        world.finish(run)
        assert world.tensors("killed") == world.tensors("quiet")
        _judge(world)
        print(json.dumps({"moments": hits}))
        world.until_empty(patience_s=20)
    finally:
        world.close()


def _wait_for(moment: str, world: World) -> bool:
    """Wait a little for a capture or a flush to be under way; every rank is hit at any moment otherwise."""
    end_s = time.monotonic() + 2
    while moment != "any" and time.monotonic() < end_s:
        if moment == "flush" and any((world.store / "killed").glob("g*/s*/.tmp-*")):
            return True
        if moment == "capture":
            now = world.status("killed")
            if now is not None and any(rank["state"] == "capturing" for rank in now["ranks"]):
                return True
    return moment == "any"


def _judge(world: World) -> None:
    incidents = world.incidents("killed")
    assert len(incidents) == KILLS
    assert all(item["intact"] for item in world.json("verify", "killed", "--all"))
    bound = lead_and_interval(world, "killed")
    for item in incidents:
        assert item["signal"] == signal.SIGKILL
        assert item["lost_steps"] is not None
        assert item["lost_steps"] <= max(bound, item["failed_step"] if item["restored"] is None else 0), item
    lost = sorted(item["lost_steps"] for item in incidents)
    totals = sorted(item["seconds"]["total"] for item in incidents if "total" in item["seconds"])
    print(json.dumps({"lost_steps": lost, "total_s": {"median": totals[len(totals) // 2], "max": totals[-1]}}))

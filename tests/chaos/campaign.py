"""The campaign: random faults against a real job of two torch ranks, and what must hold after each of them.

    python -m tests.chaos.campaign [--faults N] [--seed N] [--kind KIND]... [--overlap WAY] [--keep FOLDER]

The job runs under the daemon, which this starts again when it was killed, as systemd would. After each fault: the job
trains; nothing that was committed is lost; the generation has only grown; it went on from a checkpoint at most an
interval old, or the snapshot in memory; no process, no segment in /dev/shm and no descriptor of the agent is left over.
At the end all checkpoints are intact, and the weights are bit-identical to those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ckptd.config import OVERLAPS
from ckptd.core.policy.chaos import KINDS, Campaign, Planned, plan
from tests.chaos.checks import Checks
from tests.end_to_end.harness import World
from tests.faults.job import NAME, VICTIM, Job
from tests.waiting import PATIENCE_S

FAULTS = 25
MTBF_S = 0.7
CORRELATED = 0.15
SIGNALS = (9, 9, 11, 6)
WEIGHTS = {"kill": 8, "exception": 3, "launcher": 1, "agent": 2, "stop": 1, "nan": 1, "slow": 1, "full-disk": 2}
"""How often each kind is drawn, in shares; hangs take seconds to be found by design."""
FOR_S, PAUSE_S = 1.0, 0.2
SETTINGS = {"hang": {"floor": "2s", "first": "60s", "ceiling": "60s"}, "numbers": {"policy": "step_back"}}
WIDTH = 20_000
"""Of a layer: some 10 MiB of state a rank, so that captures and flushes take long enough to be hit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; return 0 when everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=FAULTS, metavar="N", help=f"how many (default {FAULTS})")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="repeats the choices of an earlier one")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these (default: all)")
    parser.add_argument("--overlap", choices=OVERLAPS, default="auto", help="how state is captured (default auto)")
    parser.add_argument("--keep", metavar="FOLDER", help="where to work; it stays")
    options = parser.parse_args(arguments)
    seed = time.time_ns() % 10**6 if options.seed is None else options.seed
    print(f"{options.faults} faults, seed {seed}", flush=True)
    folder = Path(options.keep or tempfile.mkdtemp(prefix="ckptd-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    try:
        run(world, options.faults, seed, options.kind or list(WEIGHTS), options.overlap)
    finally:
        world.close()
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def run(world: World, faults: int, seed: int, kinds: Sequence[str], overlap: str) -> None:
    """Run the campaign against a job of its own."""
    job = Job(world, settings={**SETTINGS, "overlap": overlap}, pause_s=0.01, width=WIDTH)
    job.start()
    checks = Checks(job)
    campaign = Campaign(
        world_size=2,
        seed=seed,
        mtbf_s=MTBF_S,
        kinds=[kind for kind in kinds for _ in range(WEIGHTS[kind])],
        signals=SIGNALS,
        correlated=CORRELATED,
        count=faults,
        for_s=FOR_S,
        pause_s=PAUSE_S,
    )
    began_s, done, before_s = time.monotonic(), Counter[str](), 0.0
    planned = list(plan(campaign))
    for number, item in enumerate(planned):
        time.sleep(item.at_s - before_s)
        before_s = item.at_s
        if not item.follows:
            checks.before()
        what = checks.inflict(item)
        done[item.fault.kind] += 1
        print(f"{number + 1:4} {time.monotonic() - began_s:6.1f} s  {_named(item)}: {what}", flush=True)
        if number + 1 == len(planned) or not planned[number + 1].follows:
            checks.after()
    _end(world, job)
    _report(job, done, time.monotonic() - began_s)
    job.close()
    world.until_empty(patience_s=30)
    checks.nothing_left()


def _named(item: Planned) -> str:
    return ("then " if item.follows else "") + item.fault.kind


def _end(world: World, job: Job) -> None:
    """Let the job end, and hold its checkpoints against an undisturbed run to the same step."""
    last = job.finish()
    damaged = [item for item in world.json("verify", NAME, "--all") if not item["intact"]]
    assert not damaged, damaged
    disturbed = _tensors(world, NAME)
    assert disturbed[0] == last
    quiet = world.run(str(VICTIM), 0, WIDTH, every="60s", options=("--name", "quiet"))
    quiet.wait(PATIENCE_S + last)  # a second a step: on a busy machine this takes long
    world.finish(quiet)
    assert _tensors(world, "quiet") == disturbed, "the weights differ from those of an undisturbed run"


def _tensors(world: World, job: str) -> tuple[int, set[tuple[str, str]]]:
    """Return step, names and digests of a job's newest checkpoint.

    Which rank has stored what they hold alike is left out: that changes once NaN in one of them has made them differ.
    """
    step, found = world.tensors(job)
    return step, {(name.partition("/")[2], digest) for name, digest in found.items()}


def _report(job: Job, done: Counter[str], took_s: float) -> None:
    incidents = job.incidents()
    print(f"\n{sum(done.values())} faults in {took_s:.0f} s, {len(incidents)} incidents, nothing lost")
    print(json.dumps({"faults": dict(done)}))
    for kind in sorted({item["kind"] for item in incidents}):
        of_kind = [item for item in incidents if item["kind"] == kind]
        figures = {"kind": kind, "incidents": len(of_kind)}
        for name in ("detect", "total"):
            figures |= _spread(f"{name}_s", [item["seconds"][name] for item in of_kind if name in item["seconds"]])
        figures |= _spread("lost_steps", [item["lost_steps"] for item in of_kind if item["lost_steps"] is not None])
        print(json.dumps(figures))


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile and maximum."""
    if not values:
        return {}
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    middle = statistics.median(ordered)
    return {f"{name} median": round(middle, 4), f"{name} p95": round(high, 4), f"{name} max": round(ordered[-1], 4)}


if __name__ == "__main__":
    sys.exit(main())

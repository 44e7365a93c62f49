"""`ckptctl verify`: read checkpoints completely and compare every digest."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ckptd.cli.common import checkpoints, find_job, pick, step_number
from ckptd.cli.render import show_json
from ckptd.errors import ConfigError, DamagedError
from ckptd.storage.catalog import verify
from ckptd.types import CheckpointId


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("verify", help="check that checkpoints are intact, to the last bit")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--all", action="store_true", help="check every checkpoint of the job")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--tier", metavar="NAME", help="verify on this tier only")
    parser.add_argument("--json", action="store_true", help="a list of {generation, step, tier, intact, problems}")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Verify; exit code 5 when anything is damaged."""
    if options.all and options.step is not None:
        raise ConfigError("STEP and --all exclude each other")
    places = find_job(options.job, options.store, options.tier)
    chosen = checkpoints(places) if options.all else pick(places, step_number(options.step))
    results: list[tuple[str, CheckpointId, list[str]]] = []
    for number, (place, checkpoint) in enumerate(chosen, 1):
        if sys.stderr.isatty():
            print(
                f"\rverifying {number} of {len(chosen)}: step {checkpoint.step} ", end="", file=sys.stderr, flush=True
            )
        results.append((place.name, checkpoint, verify(place.tier, place.job, checkpoint)))
    _progress("\r\x1b[K")
    if options.json:
        show_json(
            [
                {
                    "generation": checkpoint.generation,
                    "step": checkpoint.step,
                    "tier": tier,
                    "intact": not problems,
                    "problems": problems,
                }
                for tier, checkpoint, problems in results
            ]
        )
    else:
        for tier, checkpoint, problems in results:
            state = "DAMAGED" if problems else "intact"
            print(f"step {checkpoint.step} of generation {checkpoint.generation} on {tier}: {state}")
            for problem in problems:
                print(f"  {problem}")
    return DamagedError.exit_code if any(problems for *_, problems in results) else 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)

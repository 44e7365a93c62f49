"""`ckptctl ls`: the committed checkpoints of a job."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ckptd.cli.common import checkpoints, find_job, when
from ckptd.cli.render import show_json, show_table
from ckptd.errors import DamagedError, NotFoundError
from ckptd.storage.catalog import load_manifest
from ckptd.units import show_size


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("ls", help="list a job's checkpoints")
    parser.add_argument("job", metavar="JOB", help="its name, or where it is, like s3://bucket/runs/gpt")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--tier", metavar="NAME", help="look on this tier only")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a list of {generation, step, tier, committed_at, size_bytes, shards, world_size}; size_bytes is what was "
        "written for a checkpoint, without the unchanged tensors that it refers to",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """List the checkpoints, newest first; exit code 5 when a manifest can't be read."""
    places = find_job(options.job, options.store, options.tier)
    records, damaged = [], []
    for place, checkpoint in checkpoints(places):
        try:
            records.append(load_manifest(place.tier, place.job, checkpoint).record(place.name))
        except DamagedError as error:
            damaged.append(error)
        except NotFoundError:
            continue  # pruned while we looked
    if options.json:
        show_json([record.to_json() for record in records])
    else:
        columns = "STEP> GENERATION> TIER COMMITTED SIZE> SHARDS>"
        rows = [
            (
                item.id.step,
                item.id.generation,
                item.tier,
                when(item.committed_at),
                show_size(item.size_bytes),
                item.shards,
            )
            for item in records
        ]
        show_table(columns, rows, f"job {places[0].job} has no checkpoint that can be read")
    for problem in damaged:
        print(f"ckptctl: damaged: {problem.message}", file=sys.stderr)
    return DamagedError.exit_code if damaged else 0

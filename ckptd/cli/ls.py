"""`ckptctl ls`: the committed checkpoints of a job."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from ckptd.cli.common import Copy, JobPlace, checkpoints, find_job, tell_unread, when
from ckptd.cli.health import health_of, word
from ckptd.cli.render import show_json, show_table
from ckptd.errors import CkptdError, DamagedError, NotFoundError
from ckptd.storage.catalog import in_parallel, listing, load_manifest
from ckptd.types import CheckpointRecord
from ckptd.units import show_size


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("ls", help="list a job's checkpoints")
    parser.add_argument("job", metavar="JOB", help="its name, or where it is: s3://bucket/runs/gpt, ./runs/gpt")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--tier", metavar="NAME", help="look on this tier only")
    parser.add_argument("--deleted", action="store_true", help="list what `ckptctl prune --undo` can bring back")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a list of {generation, step, tier, committed_at, size_bytes, shards, world_size, health}; size_bytes is "
        "what was written for a checkpoint, without the unchanged tensors that it refers to; health is healthy, "
        "suspect (a bad number was reported after it) or null",
    )
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """List the checkpoints, newest first; exit code 5 when a manifest can't be read, 4 when a whole place can't."""
    places = find_job(options.job, options.store, options.tier)
    if options.deleted:
        _show_deleted(places, json=options.json)
        return 0
    unread: list[CkptdError] = []
    copies = checkpoints(places, unread)
    found = in_parallel(_look, copies)
    health = health_of(places, {checkpoint: place for place, checkpoint in reversed(copies)})
    records = [
        dataclasses.replace(item, health=word(health, item.id)) for item in found if isinstance(item, CheckpointRecord)
    ]
    damaged = [item for item in found if isinstance(item, DamagedError)]
    if options.json:
        show_json([record.to_json() for record in records])
    else:
        columns = "STEP> GENERATION> TIER COMMITTED SIZE> SHARDS> HEALTH"
        rows = [
            (
                item.id.step,
                item.id.generation,
                item.tier,
                when(item.committed_at),
                show_size(item.size_bytes),
                item.shards,
                item.health or "-",
            )
            for item in records
        ]
        show_table(columns, rows, f"job {places[0].job} has no checkpoint that can be read")
    for problem in damaged:
        print(f"ckptctl: damaged: {problem.message}", file=sys.stderr)
    return tell_unread(unread) or (DamagedError.exit_code if damaged else 0)


def _show_deleted(places: Sequence[JobPlace], *, json: bool) -> None:
    """List the removals that can be undone, the newest checkpoint first."""
    found: list[dict[str, Any]] = []
    for place in places:
        listed = listing(place.tier, place.job)
        markers = sorted(listed.markers, key=lambda item: item.deleted_at)
        newest = {item.checkpoint: item.deleted_at for item in markers if item.checkpoint not in listed.committed}
        found += [{**item._asdict(), "tier": place.name, "deleted_at": at} for item, at in newest.items()]
    found.sort(key=lambda item: (item["generation"], item["step"]), reverse=True)
    if not found:
        checkpoints(places)  # or there is no such job
    if json:
        show_json(found)
        return
    rows = [(item["step"], item["generation"], item["tier"], when(item["deleted_at"])) for item in found]
    show_table(
        "STEP> GENERATION> TIER DELETED", rows, f"nothing that was removed from job {places[0].job} can be undone"
    )


def _look(copy: Copy) -> CheckpointRecord | DamagedError | None:
    place, checkpoint = copy
    try:
        return load_manifest(place.tier, place.job, checkpoint).record(place.name)
    except DamagedError as error:
        return error
    except NotFoundError:
        return None  # pruned while we looked

"""`ckptctl tag`: names for checkpoints, which keep them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ckptd.cli.common import JobPlace, checkpoints, find_job, pick, step_number, when
from ckptd.cli.render import show_json, show_table
from ckptd.errors import ConfigError, NotFoundError
from ckptd.storage import catalog


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "tag",
        help="give a checkpoint a name, which keeps it",
        description="Give the checkpoint of a step a name on every tier that has it. What has a name is not pruned, "
        "unless the store's keep_tagged is false. Without NAME, list the names that there are.",
    )
    parser.add_argument("job", metavar="JOB", help="its name, or where it is, like s3://bucket/runs/gpt")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--remove", action="store_true", help="take the name away")
    parser.add_argument("--move", action="store_true", help="take the name from another checkpoint that has it")
    parser.add_argument("--store", metavar="PLACE", help="look here instead of where the job ran")
    parser.add_argument("--json", action="store_true", help="a list of {tag, generation, step, tier, created_at}")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Name a checkpoint, take a name away, or list the names."""
    if options.name is None and (options.remove or options.move):
        raise ConfigError("no tag is named", hint=f"`ckptctl tag {options.job}` lists them")
    if options.step is not None and options.remove:
        raise ConfigError("a tag is removed from whatever step it names", hint="leave out STEP")
    places = find_job(options.job, options.store)
    if options.name is None:
        _show(places, json=options.json)
    elif options.remove:
        _remove(places, options.name)
    else:
        now = time.time()
        for place, checkpoint in pick(places, step_number(options.step)):
            catalog.put_tag(place.tier, place.job, options.name, checkpoint, now, move=options.move)
            print(f"step {checkpoint.step} of generation {checkpoint.generation} on {place.name}: {options.name}")
    return 0


def _remove(places: list[JobPlace], name: str) -> None:
    removed = []
    for place in places:
        try:
            catalog.remove_tag(place.tier, place.job, name)
        except NotFoundError:
            continue
        removed.append(place.name)
    if not removed:
        raise NotFoundError(f"job {places[0].job} has no tag {name}", hint=f"`ckptctl tag {places[0].job}` lists them")
    print(f"{name} is gone from {', '.join(removed)}")


def _show(places: list[JobPlace], *, json: bool) -> None:
    found = [
        {"tag": name, **tag.id._asdict(), "tier": place.name, "created_at": tag.created_at}
        for place in places
        for name, tag in sorted(catalog.tags(place.tier, place.job).items())
    ]
    if not found:
        checkpoints(places)  # or there is no such job
    if json:
        show_json(found)
        return
    rows = [(item["tag"], item["step"], item["generation"], item["tier"], when(item["created_at"])) for item in found]
    show_table("TAG STEP> GENERATION> TIER SINCE", rows, f"job {places[0].job} has no tags")

"""`ckptctl show`: what is in one checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from ckptd.cli.common import find_job, pick, step_number, when
from ckptd.cli.render import show_fields, show_json, show_table
from ckptd.storage.catalog import load_manifest
from ckptd.storage.image import VALUES_NAME
from ckptd.storage.keys import checkpoint_prefix
from ckptd.units import show_size


def register(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser("show", help="show what is in a checkpoint")
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("step", nargs="?", metavar="STEP", help="the newest one without it")
    parser.add_argument("--store", metavar="PATH", help="look here instead of where the job ran")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="the manifest, format version 1")
    parser.set_defaults(verb=run)


def run(options: argparse.Namespace) -> int:
    """Show one checkpoint."""
    place = find_job(options.job, options.store)
    chosen = pick(place, step_number(options.step))
    loaded = load_manifest(place.tier, place.job, chosen)
    if options.json:
        show_json(loaded.document)
        return 0
    tensors = {name: item for name, item in loaded.document["tensors"].items() if name != VALUES_NAME}
    parent = loaded.parent
    began = "afresh" if parent is None else f"with step {parent.step} of generation {parent.generation}"
    show_fields(
        [
            ("checkpoint", f"step {loaded.id.step} of job {place.job}"),
            ("generation", f"{loaded.id.generation}, which began {began}"),
            ("committed", when(loaded.created_at)),
            ("place", f"{place.tier.url}/{checkpoint_prefix(place.job, chosen)}"),
            ("size", f"{show_size(loaded.size_bytes)} in {len(loaded.shards)} shards"),
            ("tensors", len(tensors)),
            ("values", ", ".join(f"{name} {value:g}" for name, value in loaded.values.items()) or "none reported"),
            ("written by", f"ckptd {loaded.document['producer']['ckptd']}"),
        ]
    )
    if options.tensors:
        print()
        rows = [
            (name, item["dtype"] or "differs", _shape(item["shape"]), len(item["chunks"]))
            for name, item in tensors.items()
        ]
        show_table("TENSOR DTYPE SHAPE CHUNKS>", rows, "no tensor")
    return 0


def _shape(shape: list[int] | None) -> str:
    return "differs" if shape is None else f"[{', '.join(map(str, shape))}]"
